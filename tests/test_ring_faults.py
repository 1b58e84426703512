"""What becomes of the ring and its workers when processes die, signals come and memory is short."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from forked_program import Program, abandoned, gone_within, lives
from test_ring import CPU, RECORD, SAMPLE, Numbers, fill

from moco.errors import UserError
from moco.memory import free_memory
from moco.ring import RingLoader
from moco.slots import Layout
from moco.workers import Crew


def fill_for_ever(batch, position, key):
    time.sleep(0.01)
    fill(batch, position, key)


def fill_but_one(batch, position, key):
    if key[1] == 33:
        raise UserError("photo 33.jpg cannot be read as an image; mend or remove it")
    fill(batch, position, key)


@pytest.fixture
def start():
    """start(fill): a Program that loads for ever; at the end no worker lives and /dev/shm is as before."""
    before, started = set(os.listdir("/dev/shm")), []

    def run(function):
        def load(report):
            loader = RingLoader(function, Numbers(10**6, 20), Layout(2, 20, SAMPLE, RECORD), 2, CPU)
            batches = iter(loader)
            print("started", file=report, flush=True)
            for _ in batches:
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
    program = start(fill_for_ever)
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


def test_what_a_worker_raises_is_the_message(start):
    said = "photo 33.jpg cannot be read as an image; mend or remove it"
    assert start(fill_but_one).end() == (2, f"program: error: {said}\n")
    loader = RingLoader(fill_but_one, Numbers(200, 20), Layout(2, 20, SAMPLE, RECORD), 2, CPU)
    with pytest.raises(UserError) as caught:
        list(loader)
    assert str(caught.value) == said


def test_ctrl_c_ends_the_workers(start):
    program = start(fill_for_ever)
    time.sleep(0.3)
    os.killpg(program.pid, signal.SIGINT)
    assert program.end() == (130, "\ninterrupted\n")


@pytest.mark.parametrize("late", [0, 0.5])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_leave_when_the_program_is_killed(start, number, late, monkeypatch):
    real = Crew.start

    def start_late(crew, worker):  # the parent is gone before the worker looks at it
        time.sleep(late)
        real(crew, worker)

    monkeypatch.setattr(Crew, "start", start_late)
    program = start(fill_for_ever)
    assert all(map(lives, program.workers))
    os.kill(program.pid, number)
    begin = time.monotonic()
    assert program.end() == (-number, "")
    assert time.monotonic() - begin < 5


@pytest.fixture
def loading():
    """A loader of ten batches, its iterator after the first, and the process numbers of its two workers."""
    loader = RingLoader(fill, Numbers(200, 20), Layout(2, 20, SAMPLE, RECORD), 2, CPU)
    batches = iter(loader)
    next(batches)
    workers = [worker.pid for worker in loader._loader._iterator._workers]
    yield loader, batches, workers
    loader._crew.end()
    assert gone_within(5, lambda: not any(map(lives, workers)))


def test_workers_leave_signals_to_the_program(loading):
    _, batches, workers = loading
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker, number)
    time.sleep(0.3)
    assert len([batch.targets for batch in batches]) == 9
    assert all(map(lives, workers))


def test_a_forked_copy_of_a_loader_leaves_its_workers_alone(loading):
    loader, batches, workers = loading
    copy = os.fork()
    if copy == 0:
        loader._crew.end()
        os._exit(0)
    assert os.waitpid(copy, 0)[1] == 0
    time.sleep(0.5)
    assert len([batch.targets for batch in batches]) == 9
    assert all(map(lives, workers))


@pytest.mark.parametrize("name", ["moco-test-{}", "torch_{}_123_0", "sem.loky-{}-abc"])
def test_what_is_left_in_shared_memory_is_seen(name):
    before, name = set(os.listdir("/dev/shm")), name.format(os.getpid())
    with open(f"/dev/shm/{name}", "wb") as file:
        file.write(b"left")
    try:
        assert name in abandoned(before, {os.getpid()})
        assert (name in abandoned(before, {1})) == name.startswith("moco")
    finally:
        os.unlink(file.name)


PROGRAM = """
import torch, test_ring
if test_ring.os.environ["SMALL"]:
    try:
        torch.ones(4_000_000).share_memory_()
    except RuntimeError as error:
        print(error)
layout = test_ring.Layout(2, 20, (3, 200, 200), test_ring.RECORD)
loader = test_ring.RingLoader(test_ring.write_ones, test_ring.Numbers(80, 20), layout, 2, test_ring.CPU)
batches = iter(loader)
print(sum(int(batch.pixels.sum()) for batch in batches), loader.transport)
"""


def test_dev_shm_may_be_as_small_as_in_containers():
    """1 MB of /dev/shm: torch's own shared memory fails there, so the limit is real. And a program whose
    loader lives until Python ends does end, though its workers ignore signals."""
    private = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    private += ['mount -t tmpfs -o size=1m none /dev/shm && exec "$@"', "sh"]
    small = subprocess.run([*private, "true"], capture_output=True).returncode == 0
    result = subprocess.run(
        [*(private if small else []), sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "SMALL": "1" if small else ""},
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert f"{80 * 2 * 3 * 200 * 200} batches travel through 24" in result.stdout
    assert not small or "unable to allocate shared memory" in result.stdout


def test_free_memory_is_what_the_control_groups_leave(tmp_path):
    machine = free_memory(tmp_path, "0::/\n")
    assert 2**20 < machine < 2**50
    outer = tmp_path / "job"
    inner = outer / "step"
    inner.mkdir(parents=True)
    for folder, limit in ((outer, "3000000"), (inner, "max")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text("1000000\n")
        (folder / "memory.stat").write_text("anon 5\ninactive_file 200000\n")
    assert free_memory(tmp_path, "0::/job/step\n") == 2200000
    assert abs(free_memory(tmp_path, "0::/other\n") - machine) < 2**30
    first = tmp_path / "memory" / "job"
    first.mkdir(parents=True)
    (first / "memory.limit_in_bytes").write_text("500\n")
    (first / "memory.usage_in_bytes").write_text("800\n")
    (first / "memory.stat").write_text("total_inactive_file 100\n")
    assert free_memory(tmp_path, "4:cpu,memory:/job\n0::/\n") == 0
