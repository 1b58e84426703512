"""The ring: the same batches however they are made and carried, and what happens when processes die."""

import os
import random
import resource
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch

from moco.errors import UserError
from moco.ring import RingLoader
from moco.slots import Layout, Slots

# More workers than cores are meant here, and torch warns of them.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

CPU = torch.device("cpu")
RECORD = np.dtype([("top", "<i4"), ("flip", "?")])
SAMPLE = (3, 4, 4)


class Numbers:
    """Batches of keys (epoch, index); the last may be short."""

    def __init__(self, samples, size):
        self.samples, self.size, self.epoch = samples, size, 0

    def __len__(self):
        return -(-self.samples // self.size)

    def __iter__(self):
        for first in range(0, self.samples, self.size):
            yield [(self.epoch, index) for index in range(first, min(first + self.size, self.samples))]


def fill(batch, position, key):
    epoch, index = key
    values = np.random.default_rng((epoch, index)).integers(0, 256, (2, *SAMPLE), dtype=np.uint8)
    batch.pixels[:, position] = values
    batch.records["top"][:, position] = index, -index
    batch.records["flip"][:, position] = index % 2 == 0
    batch.targets[position] = 10 * index + epoch


def fill_slowly(batch, position, key):
    """As fill, after a time that differs between samples, in two halves with a pause between them."""
    time.sleep(random.Random(str(key)).random() ** 4 * 0.004)
    fill(batch, position, key)


def expected(keys):
    batch = Layout(2, len(keys), SAMPLE, RECORD).empty(len(keys))
    for position, key in enumerate(keys):
        fill(batch, position, key)
    return batch


def write_ones(batch, position, key):
    batch.pixels[:, position] = 1


def is_batch(batch, keys):
    pixels, records, targets = expected(keys)
    return (
        np.array_equal(batch.pixels.numpy(), pixels)
        and np.array_equal(batch.records, records)
        and np.array_equal(batch.targets.numpy(), targets)
    )


def ring(workers, batches=None, size=20, function=fill, **options):
    batches = batches or Numbers(70, size)
    return RingLoader(function, batches, Layout(2, size, SAMPLE, RECORD), workers, CPU, **options)


def epoch_of(loader, epoch):
    loader.batch_sampler.epoch = epoch
    return [batch._replace(pixels=batch.pixels.clone()) for batch in loader]


def check_two_epochs(loader):
    for epoch in (0, 1):
        batches = epoch_of(loader, epoch)
        assert [len(batch.targets) for batch in batches] == [20, 20, 20, 10]
        assert len(loader) == 4
        assert all(is_batch(*pair) for pair in zip(batches, loader.batch_sampler, strict=True))
    loader.batch_sampler.epoch = 0
    assert not any(is_batch(*pair) for pair in zip(batches, loader.batch_sampler, strict=True))
    loader.close()


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_batches_do_not_depend_on_workers(workers):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    loader = ring(workers)
    check_two_epochs(loader)
    assert torch.equal(torch.get_rng_state(), state)
    slot = loader.layout.slot_bytes
    assert slot == 4096 * (1 + 1 + 1)
    assert loader.memory_bytes == {0: 0, 1: 5 * slot, 2: 5 * slot, 4: 7 * slot}[workers]
    with pytest.raises(RuntimeError, match="closed"):
        iter(loader)


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_batches_do_not_depend_on_how_workers_start(start):
    loader = ring(1, context=start)
    assert "shared memory" in loader.transport
    check_two_epochs(loader)


def test_pipes_carry_batches_where_memory_cannot_be_shared():
    """A limit on the size of files makes the memory file fail for real."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        loader = ring(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "pipes, which is slower" in loader.transport
    assert "File too large" in loader.transport
    assert loader.memory_bytes == 0
    check_two_epochs(loader)


def read_under_stress():
    """Whether every batch kept its pixels while it was held, over epochs that end early at random."""
    loader = ring(3, Numbers(16 * 12, 16), 16, fill_slowly)
    chance, intact, seen = random.Random(0), True, 0
    for epoch in range(12):
        loader.batch_sampler.epoch = epoch
        stop = chance.choice([1, 3, 8, 12])
        held = deque(maxlen=2)
        for number, (batch, keys) in enumerate(zip(loader, loader.batch_sampler, strict=True), 1):
            intact &= all(is_batch(*pair) for pair in held)  # workers had the time of a batch to spoil them
            time.sleep(chance.random() ** 3 * 0.02)
            intact &= is_batch(batch, keys)
            held.append((batch, keys))
            seen += 1
            if number == stop:
                break
    loader.close()
    return intact, seen


def test_a_slot_that_is_read_is_never_written(monkeypatch):
    intact, seen = read_under_stress()
    assert intact
    assert seen > 50
    # Negative control: the same with slots that count as free as soon as the batch is handed over.
    monkeypatch.setattr(
        Slots, "lend_memory", lambda self, number, array: self.lend(number, lambda: True, None)
    )
    assert not read_under_stress()[0]


def test_keeping_old_batches_is_an_error_and_not_a_corruption():
    loader = ring(2, Numbers(400, 20))
    kept = []
    with pytest.raises(RuntimeError, match="clone what you keep"):
        for batch in loader:
            kept.append(batch)
    assert len(kept) >= 2
    assert all(is_batch(*pair) for pair in zip(kept, loader.batch_sampler, strict=False))
    del batch
    first = kept[0].pixels[0, 3]  # a part keeps the whole
    kept.clear()
    seen = 0
    for batch in loader:
        seen += len(batch.targets)
        del batch
    assert seen == 400, "one slot may be kept where each batch is let go at once"
    assert np.array_equal(first.numpy(), expected([(0, 3)]).pixels[0, 0])
    loader.close()


def test_an_epoch_ends_the_one_before_it():
    loader = ring(2)
    old = iter(loader)
    next(old)
    new = iter(loader)
    assert is_batch(next(new), [(0, index) for index in range(20)])
    with pytest.raises(RuntimeError, match="ended by a later one"):
        next(old)
    loader.close()
    with pytest.raises(RuntimeError, match="ended by"):
        next(new)


def test_wrong_batches_and_too_little_memory(monkeypatch):
    class Uneven(Numbers):
        def __iter__(self):
            yield [(0, 0)]
            yield [(0, 1)]

    for batches in (Uneven(2, 20), Numbers(60, 30)):
        loader = ring(2, batches, 20)
        with pytest.raises(ValueError, match="has not 20 samples"):
            list(loader)
        loader.close()
    with pytest.raises(UserError, match=r"batches need [\d.]+ GB and [\d.]+ GB of memory are free; lower"):
        RingLoader(fill, Numbers(1, 1), Layout(2, 10**9, SAMPLE, RECORD), 2, CPU)


def test_later_epochs_start_at_once_and_nothing_grows():
    loader = ring(2, Numbers(100 * 20, 20), function=write_ones)
    starts, sizes = [], []
    for epoch in range(20):
        loader.batch_sampler.epoch = epoch
        begin = time.perf_counter()
        for number, _ in enumerate(loader):
            if number == 0:
                starts.append(time.perf_counter() - begin)
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        sizes.append(
            (len(os.listdir("/proc/self/fd")), threading.active_count(), int(status["VmRSS"].split()[0]))
        )
    loader.close()
    assert sorted(starts[1:])[len(starts) // 2] < 0.2
    (files, threads, memory), (files_last, threads_last, memory_last) = sizes[1], sizes[-1]
    assert (files_last, threads_last) == (files, threads)
    assert memory_last - memory < 4000  # kilobytes, after 1,800 batches
