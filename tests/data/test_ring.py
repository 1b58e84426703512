"""The ring: the same batches however they are made and carried, and what happens when processes die."""

import gc
import itertools
import multiprocessing
import os
import random
import re
import resource
import signal
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_cuda import Stream, fake_cuda
from forked_program import Program, abandoned, lives
from spawned_loader import load_and_end

from moco.data import ring as rings
from moco.data.augment import VIEW
from moco.data.ring import Batch, RingLoader
from moco.errors import UserError

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


def batches(samples, size=20, epoch=0):
    """Lists of keys (epoch, index); the last may be short."""
    keys = [(epoch, index) for index in range(samples)]
    return [keys[first : first + size] for first in range(0, samples, size)]


def ring(workers, size=20, function=fill, **options):
    return RingLoader(function, 2, size, SIZE, workers, **options)


def is_batch(batch, keys):
    pixels, records = np.zeros((2, len(keys), 3, SIZE, SIZE), np.uint8), np.zeros((2, len(keys)), VIEW)
    expected = Batch(pixels, np.zeros(len(keys), np.int64), records, np.zeros(len(keys), np.int64))
    for position, key in enumerate(keys):
        fill(expected, position, key)
    return all(np.array_equal(part, other) for part, other in zip(batch, expected, strict=True))


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_batches_do_not_depend_on_workers(workers):
    state, loader = torch.get_rng_state(), ring(workers)
    for epoch in (0, 1):
        keys = batches(70, epoch=epoch)
        made = [batch._replace(pixels=batch.pixels.clone()) for batch in loader.epoch(iter(keys))]
        assert [len(batch.targets) for batch in made] == [20, 20, 20, 10]
        assert all(is_batch(*pair) for pair in zip(made, keys, strict=True))
    assert not any(is_batch(*pair) for pair in zip(made, batches(70), strict=True))
    assert made[0].pixels.dtype == torch.uint8 and made[0].targets.dtype == torch.int64
    assert torch.equal(torch.get_rng_state(), state)
    assert loader.slots == {0: 3, 1: 5, 2: 5, 4: 7}[workers]
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        loader.epoch(batches(70))


def read_under_stress(slots=None):
    """Whether every batch kept its pixels while it was held, over epochs that end early at random."""
    loader = ring(3, 16, fill_slowly)
    loader.slots = slots or loader.slots
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


# On a CUDA device that is none.


@pytest.mark.parametrize("waits", [True, False])
def test_a_slot_is_written_to_again_when_its_copy_to_the_device_has_ended(monkeypatch, waits):
    if not waits:  # negative control
        monkeypatch.setattr(Stream, "synchronize", lambda event: None)
    with fake_cuda() as gpu:
        loader, right = ring(2, device="cuda"), []
        for batch, keys in zip(loader.epoch(batches(240)), batches(240), strict=True):
            assert batch.pixels.is_cuda and batch.targets.is_cuda
            right.append(
                is_batch(batch._replace(pixels=batch.pixels.cpu(), targets=batch.targets.cpu()), keys)
            )
        assert gpu.registered == {loader._memory.ctypes.data: loader._memory.nbytes}
        loader.close()
    assert all(right) and len(right) == 12 and gpu.registered == {}
    assert (gpu.overwritten == []) == waits


def test_memory_that_cannot_be_pinned_is_no_error(capfd):
    with fake_cuda(pin_error=2):
        loader = ring(0, device="cuda")
        for _ in range(2):
            assert len(list(loader.epoch(batches(40)))) == 2
        loader.close()
    said = capfd.readouterr().err
    assert re.fullmatch(r"note: CUDA cannot pin the loader's .* \(error 2\); .*\n", said)


# Processes that die, and signals.


@pytest.fixture
def start():
    """start(): a Program that loads for ever; at the end no worker lives."""
    started = []

    def load(report):
        made = ring(2, function=fill_at_leisure).epoch(itertools.repeat(batches(20)[0]))
        print("started", file=report, flush=True)
        for _ in made:
            pass

    def run():
        started.append(Program(load))
        assert len(started[-1].workers) == 2 and all(map(lives, started[-1].workers))
        return started[-1]

    yield run
    for program in started:
        program.clear()


def test_a_dead_worker_ends_the_run_with_a_message(start):
    program = start()
    os.kill(program.workers[0], signal.SIGKILL)
    assert program.end() == (
        2,
        f"program: error: data worker {program.workers[0]} exited unexpectedly (Killed); if memory ran out, "
        "lower -j or --batch-size\n",
    )


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (UserError("photo 33.jpg cannot be read"), UserError, "^photo 33.jpg cannot be read$"),
        (
            ZeroDivisionError(),
            RuntimeError,
            "in a data worker:\nTraceback(.|\n)*in fail\n(.|\n)*ZeroDivision",
        ),
    ],
)
def test_what_a_worker_raises_is_raised(error, kind, text):
    def fail(slot, position, key):
        if key[1] == 33:
            raise error

    loader = ring(2, function=fail)
    with pytest.raises(kind, match=text):
        list(loader.epoch(batches(200)))
    assert len(list(loader.epoch(batches(20)))) == 1  # the workers are still there
    loader.close()


def test_workers_that_cannot_be_started_are_a_sentence():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before, loader = set(multiprocessing.active_children()), ring(4)
    free = sorted(set(range(1000)) - set(map(int, os.listdir("/proc/self/fd"))))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[10], hard))  # enough for some of the workers
    try:
        with pytest.raises(UserError, match=r"cannot be started \(.*Too many open files\); lower -j"):
            loader.epoch(batches(20))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert set(multiprocessing.active_children()) == before
    assert len(list(loader.epoch(batches(20)))) == 1  # negative control
    loader.close()


def test_ctrl_c_ends_the_workers(start):
    program = start()
    os.killpg(program.pid, signal.SIGINT)
    assert program.end() == (130, "\ninterrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_workers_are_started_leaves_none(number):
    """Signals at moments from before the first worker is forked until all work; nobody prints a traceback."""
    for moment in (0, 0.002, 0.005, 0.01, 0.02, 0.05):

        def load(report):
            loader = ring(6, function=fill_at_leisure)
            print("soon", file=report, flush=True)
            for _ in loader.epoch(itertools.repeat(batches(20)[0])):
                pass

        program = Program(load)
        time.sleep(moment)
        os.killpg(program.pid, number)
        code, said = program.end()  # all have closed its errors
        assert (code, said) == ((130, "\ninterrupted\n") if number == signal.SIGINT else (-number, ""))


@pytest.mark.parametrize("late", [0, 0.5])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_when_the_program_is_killed(start, number, late, monkeypatch):
    real = rings._work

    def work_late(*arguments):  # the parent is gone before the worker looks at it
        time.sleep(late)
        real(*arguments)

    monkeypatch.setattr(rings, "_work", work_late)
    program = start()
    os.kill(program.pid, number)
    begin = time.monotonic()
    assert program.end() == (-number, "")
    assert time.monotonic() - begin < 5


@pytest.fixture
def loading():
    """A loader of ten batches, its iterator after the first, and the process numbers of its two workers."""
    before, loader = set(multiprocessing.active_children()), ring(2)
    made = loader.epoch(batches(200))
    next(made)
    workers = [child.pid for child in set(multiprocessing.active_children()) - before]
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


def test_batches_need_no_room_in_dev_shm(loading):
    def mapped(pid):
        return Path(f"/proc/{pid}/maps").read_text().count("/dev/shm/")

    before = mapped(os.getpid())
    assert {mapped(worker) for worker in loading[2]} == {before}
    tensor = torch.ones(9).share_memory_()  # negative control: torch's own shared memory
    assert mapped(os.getpid()) == before + 1
    del tensor


def test_workers_end_with_the_loader():
    """When the last reference goes, not only when cycles are collected."""
    gc.disable()
    try:
        before, loader = set(multiprocessing.active_children()), ring(2, function=fill_at_leisure)
        next(loader.epoch(batches(200)))
        workers = [child.pid for child in set(multiprocessing.active_children()) - before]
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


@pytest.mark.parametrize("name", ["moco-test-{}", "torch_{}_123_0", "sem.loky-{}-abc"])
def test_what_is_left_in_shared_memory_is_seen(name):
    """The negative control of tests/programs/test_processes.py, where a worker is killed."""
    before, name = set(os.listdir("/dev/shm")), name.format(os.getpid())
    with open(f"/dev/shm/{name}", "wb") as file:
        file.write(b"left")
    try:
        assert name in abandoned(before, {os.getpid()})
        assert (name in abandoned(before, {1})) == name.startswith("moco")
    finally:
        os.unlink(file.name)
