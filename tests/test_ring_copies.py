"""The ring and a device that copies out of it later: a slot is free when its copy has ended."""

import pytest
import torch
from test_ring import RECORD, SAMPLE, Numbers, fill, is_batch

from moco.ring import RingLoader
from moco.slots import Layout

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class LateCopies:
    """Stands in for a GPU: copies out of the ring happen when somebody waits for the event behind them."""

    def __init__(self, monkeypatch, patient=True):
        self.waiting, self.waits, self.patient, self.pinned = [], 0, patient, []
        monkeypatch.setattr(torch.cuda, "Event", lambda: self.Event(self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(RingLoader, "_moved", lambda loader, array: self.copy(array))

    def cudaHostRegister(self, address, size, flags):
        self.pinned.append((address, size))
        return 0

    def cudaHostUnregister(self, address):
        self.pinned = [entry for entry in self.pinned if entry[0] != address]

    def copy(self, array):
        target = torch.zeros(array.shape, dtype=torch.from_numpy(array[:0]).dtype)
        self.waiting.append((target, array))
        return target

    class Event:
        def __init__(self, copies):
            self.copies = copies

        def record(self, stream):
            self.mine, self.copies.waiting = self.copies.waiting, []

        def query(self):
            return not self.mine or not self.copies.patient

        def synchronize(self):
            self.copies.waits += 1
            for target, array in self.mine:
                target.copy_(torch.from_numpy(array))
            self.mine = []


@pytest.mark.parametrize("patient", [True, False])
def test_a_slot_is_free_when_its_copy_to_the_device_has_ended(monkeypatch, patient):
    copies = LateCopies(monkeypatch, patient)
    batches = Numbers(240, 20)
    loader = RingLoader(fill, batches, Layout(2, 20, SAMPLE, RECORD), 2, torch.device("cuda"))
    taken, events = [], []
    for batch in loader:
        taken.append(batch)
        events.append(loader._slots.read[-1][2])
    assert copies.pinned == [(loader._memory.array.ctypes.data, loader.memory_bytes)]
    for wait in events:
        wait()
    right = [is_batch(*pair) for pair in zip(taken, batches, strict=True)]
    # Negative control: an event that says "done" at once hands out slots that are still to be copied.
    assert all(right) == patient
    assert copies.waits > len(events) or not patient
    loader.close()
    assert copies.pinned == []
