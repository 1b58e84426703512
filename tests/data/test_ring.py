"""The ring: the same batches however they are made and carried, and what happens when processes die."""

import gc
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_program import Program, abandoned, gone_within, lives
from spawned_loader import load_and_end

from moco.data import ring as rings
from moco.data.augment import VIEW
from moco.data.ring import Batch, RingLoader
from moco.errors import UserError

# More workers than cores are meant here, and torch warns of them.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SIZE = 4  # pixels of a view's side


def fill(slot, position, key):
    epoch, index = key
    rng = np.random.default_rng((epoch, index))
    slot.pixels[:, position] = rng.integers(0, 256, (len(slot.pixels), 3, SIZE, SIZE), dtype=np.uint8)
    slot.records["top"][:, position], slot.records["flip"][:, position] = (index, -index), index % 2
    slot.targets[position], slot.indices[position] = 10 * index + epoch, index


def fill_slowly(slot, position, key):
    """As fill, after a time that differs between samples."""
    time.sleep(random.Random(str(key)).random() ** 4 * 0.004)
    fill(slot, position, key)


def fill_at_leisure(slot, position, key):
    time.sleep(0.01)
    fill(slot, position, key)


def fill_but_one(slot, position, key):
    if key[1] == 33:
        raise UserError("photo 33.jpg cannot be read as an image; mend or remove it")
    fill(slot, position, key)


def batches(samples, size=20, epoch=0):
    """Lists of keys (epoch, index); the last may be short."""
    keys = [(epoch, index) for index in range(samples)]
    return [keys[first : first + size] for first in range(0, samples, size)]


def ring(workers, size=20, function=fill, **options):
    return RingLoader(function, 2, size, SIZE, workers, **options)


def expected(keys):
    views, n = 2, len(keys)
    pixels, records = np.zeros((views, n, 3, SIZE, SIZE), np.uint8), np.zeros((views, n), VIEW)
    batch = Batch(pixels, np.zeros(n, np.int64), records, np.zeros(n, np.int64))
    for position, key in enumerate(keys):
        fill(batch, position, key)
    return batch


def is_batch(batch, keys):
    return all(np.array_equal(part, other) for part, other in zip(batch, expected(keys), strict=True))


def copied(batch):
    return batch._replace(pixels=batch.pixels.clone())


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_batches_do_not_depend_on_workers(workers):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    loader = ring(workers)
    for epoch in (0, 1):
        keys = batches(70, epoch=epoch)
        made = [copied(batch) for batch in loader.epoch(iter(keys))]
        assert [len(batch.targets) for batch in made] == [20, 20, 20, 10]
        assert all(is_batch(*pair) for pair in zip(made, keys, strict=True))
    assert not any(is_batch(*pair) for pair in zip(made, batches(70), strict=True))
    assert made[0].pixels.dtype == torch.uint8 and made[0].targets.dtype == torch.int64
    assert torch.equal(torch.get_rng_state(), state)
    assert loader.slots == {0: 3, 1: 5, 2: 5, 4: 7}[workers]
    text = rf"{workers} data workers?, batches through .* of shared memory" if workers else "no data workers"
    assert re.fullmatch(text, loader.transport)
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        loader.epoch(batches(70))


def read_under_stress(slots=None):
    """Whether every batch kept its pixels while it was held, over epochs that end early at random."""
    loader = ring(3, 16, fill_slowly)
    loader._tasks.slots = slots or loader.slots
    chance, intact, seen = random.Random(0), True, 0
    for epoch in range(12):
        stop = chance.choice([1, 3, 8, 12])
        held, keys = deque(maxlen=2), batches(16 * 12, 16, epoch)
        for number, pair in enumerate(zip(loader.epoch(keys), keys, strict=True), 1):
            intact &= all(is_batch(*old) for old in held)  # workers had the time of a batch to spoil them
            time.sleep(chance.random() ** 3 * 0.02)
            intact &= is_batch(*pair)
            held.append(pair)
            seen += 1
            if number == stop:
                break
    loader.close()
    return intact, seen


def test_a_batch_is_valid_until_the_third_after_it_is_asked_for():
    intact, seen = read_under_stress()
    assert intact
    assert seen > 50
    assert not read_under_stress(slots=3)[0]  # negative control: fewer slots than are handed out


def test_an_epoch_ends_the_one_before_it():
    loader = ring(2)
    old = loader.epoch(batches(70))
    next(old)
    new = loader.epoch(batches(70))
    assert is_batch(next(new), batches(70)[0])
    with pytest.raises(RuntimeError, match="ended by a later one"):
        next(old)
    loader.close()
    with pytest.raises(RuntimeError, match="ended by"):
        next(new)


def test_wrong_batches_and_too_little_memory():
    for keys in ([[(0, 0)], [(0, 1)]], batches(60, 30)):
        loader = ring(2)
        with pytest.raises(ValueError, match="has not 20 samples"):
            list(loader.epoch(keys))
        loader.close()
    with pytest.raises(UserError, match=r"batches need [\d.]+ GB of memory \(.*\); lower --batch-size"):
        RingLoader(fill, 2, 10**9, 16)


def test_later_epochs_start_at_once_and_nothing_grows():
    loader, starts, sizes = ring(2), [], []
    for epoch in range(20):
        begin = time.perf_counter()
        for number, _ in enumerate(loader.epoch(batches(2000, epoch=epoch))):
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


# A device that copies later than it is asked to.


class LateCopies:
    """Stands in for a GPU: copies out of the ring happen when somebody waits for the event behind them."""

    def __init__(self, monkeypatch, patient=True, code=0):
        self.waits, self.patient, self.code, self.pinned = 0, patient, code, []
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: "stream")
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(rings, "_copies", self.copies)

    def cudaHostRegister(self, address, size, flags):
        self.pinned += [] if self.code else [(address, size)]
        return self.code

    def cudaHostUnregister(self, address):
        self.pinned = [entry for entry in self.pinned if entry[0] != address]

    def copies(self, tensors, stream):
        copies = [torch.zeros_like(tensor) for tensor in tensors]
        return copies, self.Event(self, copies, tensors)

    class Event:
        def __init__(self, late, copies, tensors):
            self.late, self.todo = late, list(zip(copies, tensors, strict=True))

        def synchronize(self):
            self.late.waits += 1
            for copy, tensor in self.todo if self.late.patient else ():
                copy.copy_(tensor)
            self.todo = self.todo if not self.late.patient else []


@pytest.mark.parametrize("patient", [True, False])
def test_a_slot_is_written_to_again_when_its_copy_to_the_device_has_ended(monkeypatch, patient):
    late = LateCopies(monkeypatch, patient)
    loader, taken, events = ring(2, device=torch.device("cuda")), [], []
    for batch in loader.epoch(batches(240)):
        taken.append(batch)
        events.append(
            next(e for e in loader._tasks.copied if e and any(c is batch.targets for c, _ in e.todo))
        )
    assert late.pinned == [(loader._memory.ctypes.data, loader._memory.nbytes)]
    late.patient = True
    for event in events:
        event.synchronize()
    right = [is_batch(*pair) for pair in zip(taken, batches(240), strict=True)]
    # Negative control: waiting for events that say "ended" too early gives slots away that are still copied.
    assert all(right) == patient
    loader.close()
    assert late.pinned == []


def test_memory_that_cannot_be_pinned_is_no_error(monkeypatch, capfd):
    LateCopies(monkeypatch, code=2)
    loader = ring(0, device="cuda")
    assert len(list(loader.epoch(batches(40)))) == 2
    assert len(list(loader.epoch(batches(40)))) == 2
    loader.close()
    said = capfd.readouterr().err
    assert re.fullmatch(r"note: CUDA cannot pin the loader's .* \(error 2\); .*\n", said)


# Processes that die, and signals.


@pytest.fixture
def start():
    """start(fill): a Program that loads for ever; at the end no worker lives and /dev/shm is as before."""
    before, started = set(os.listdir("/dev/shm")), []

    def run(function):
        def load(report):
            made = ring(2, function=function).epoch([(0, index) for index in range(20)] for _ in range(10**6))
            print("started", file=report, flush=True)
            for _ in made:
                pass

        started.append(Program(load))
        assert len(started[-1].workers) == 2
        return started[-1]

    yield run
    for program in started:
        program.clear()
    makers = {pid for program in started for pid in (program.pid, *program.workers)}
    assert gone_within(5, lambda: not abandoned(before, makers)), f"left: {abandoned(before, makers)}"


def test_a_dead_worker_ends_the_run_with_a_message(start):
    program = start(fill_at_leisure)
    time.sleep(0.3)
    assert all(map(lives, program.workers))
    os.kill(program.workers[0], signal.SIGKILL)
    code, said = program.end()
    assert code == 2
    # The first where the signal of its death comes first, the second where a look at the workers does.
    how = "(is killed by signal: Killed|exited unexpectedly)"
    assert re.fullmatch(
        rf"program: error: data worker {program.workers[0]} {how}; "
        "if it was for want of memory, lower -j or --batch-size\n",
        said,
    )


def test_what_a_worker_raises_is_the_message():
    loader = ring(2, function=fill_but_one)
    with pytest.raises(UserError) as caught:
        list(loader.epoch(batches(200)))
    assert str(caught.value) == "photo 33.jpg cannot be read as an image; mend or remove it"
    loader.close()


def test_ctrl_c_ends_the_workers(start):
    program = start(fill_at_leisure)
    time.sleep(0.3)
    os.killpg(program.pid, signal.SIGINT)
    assert program.end() == (130, "\ninterrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_workers_are_started_leaves_none(number):
    """Signals at moments from before the first worker is forked until all work; nobody prints a traceback."""
    for moment in (0, 0.005, 0.01, 0.02, 0.04, 0.1):

        def load(report):
            loader = ring(6, function=fill_at_leisure)
            print("soon", file=report, flush=True)
            for _ in loader.epoch([(0, index) for index in range(20)] for _ in range(10**6)):
                pass

        program = Program(load)
        time.sleep(moment)
        os.killpg(program.pid, number)
        code, said = program.end()  # all have closed its errors
        assert (code, said) == ((130, "\ninterrupted\n") if number == signal.SIGINT else (-number, ""))


@pytest.mark.parametrize("late", [0, 0.5])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_when_the_program_is_killed(start, number, late, monkeypatch):
    real = rings._start_worker

    def start_late(worker):  # the parent is gone before the worker looks at it
        time.sleep(late)
        real(worker)

    monkeypatch.setattr(rings, "_start_worker", start_late)
    program = start(fill_at_leisure)
    assert all(map(lives, program.workers))
    os.kill(program.pid, number)
    begin = time.monotonic()
    assert program.end() == (-number, "")
    assert time.monotonic() - begin < 5


@pytest.fixture
def loading():
    """A loader of ten batches, its iterator after the first, and the process numbers of its two workers."""
    loader = ring(2)
    made = loader.epoch(batches(200))
    next(made)
    workers = [child.pid for child in multiprocessing.active_children()]
    assert len(workers) == 2
    yield loader, made, workers
    loader.close()
    assert not any(map(lives, workers))


def test_workers_leave_signals_to_the_program(loading):
    _, made, workers = loading
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker, number)
    time.sleep(0.3)
    assert len([batch.targets for batch in made]) == 9
    assert all(map(lives, workers))


def test_a_forked_copy_of_a_loader_leaves_its_workers_alone(loading):
    loader, made, workers = loading
    copy = os.fork()
    if copy == 0:
        loader.close()
        os._exit(0)
    assert os.waitpid(copy, 0)[1] == 0
    assert len([batch.targets for batch in made]) == 9
    assert all(map(lives, workers))


def test_workers_end_with_the_loader():
    """When the last reference goes, not only when cycles are collected."""
    gc.disable()
    try:
        loader = ring(2, function=fill_at_leisure)
        next(loader.epoch(batches(200)))
        workers = [child.pid for child in multiprocessing.active_children()]
        assert len(workers) == 2
        del loader
        assert not any(map(lives, workers))
    finally:
        gc.enable()


def test_spawned_processes_with_workers_end():
    """Where the loader lives until the end. Workers do not hear how Python ends them in such a process."""
    endings = ["raise", "exit"]
    children = torch.multiprocessing.start_processes(load_and_end, (endings,), nprocs=2, join=False).processes
    end = time.monotonic() + 60  # of which most are imports of torch
    try:
        for child in children:
            child.join(max(0, end - time.monotonic()))
        assert [child.exitcode for child in children] == [1, 75]
    finally:
        for child in children:
            child.kill()


PROGRAM = """
import torch, test_ring
if test_ring.os.environ["SMALL"]:
    try:
        torch.ones(4_000_000).share_memory_()
    except RuntimeError as error:
        print(error)

def write_ones(slot, position, key):
    slot.pixels[:, position] = 1

loader = test_ring.RingLoader(write_ones, 2, 20, 200, 2)
made = loader.epoch(test_ring.batches(80))
print(sum(int(batch.pixels.sum()) for batch in made), loader.transport)
"""


def test_dev_shm_may_be_as_small_as_in_containers():
    """1 MB of /dev/shm: torch's own shared memory fails there, so the limit is real. And a program whose
    loader lives until Python ends does end, though its workers ignore signals.
    """
    private = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    private += ['mount -t tmpfs -o size=1m none /dev/shm && exec "$@"', "sh"]
    small = subprocess.run([*private, "true"], capture_output=True).returncode == 0
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    result = subprocess.run(
        [*(private if small else []), sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "SMALL": "1" if small else ""},
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert f"{80 * 2 * 3 * 200 * 200} 2 data workers, batches through 24" in result.stdout
    assert not small or "unable to allocate shared memory" in result.stdout


@pytest.mark.parametrize("name", ["moco-test-{}", "torch_{}_123_0", "sem.loky-{}-abc"])
def test_what_is_left_in_shared_memory_is_seen(name):
    """The negative control of the fixture `start`."""
    before, name = set(os.listdir("/dev/shm")), name.format(os.getpid())
    with open(f"/dev/shm/{name}", "wb") as file:
        file.write(b"left")
    try:
        assert name in abandoned(before, {os.getpid()})
        assert (name in abandoned(before, {1})) == name.startswith("moco")
    finally:
        os.unlink(file.name)
