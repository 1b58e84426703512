"""2,000 training steps with persistent workers: nothing that a process holds grows."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import TINY
from made_folders import make_folders

import main_moco

EPOCHS, STEPS = 40, 50  # of a run, and of an epoch
WARM_UP = 10  # epochs, of which allocators and caches need some
PAGE = os.sysconf("SC_PAGE_SIZE")


def held(pid):
    """(resident bytes that are its own, open files, threads, children) of a process."""
    proc = Path(f"/proc/{pid}")
    _, resident, shared = map(int, (proc / "statm").read_text().split()[:3])
    threads = os.listdir(proc / "task")
    return (resident - shared) * PAGE, len(os.listdir(proc / "fd")), len(threads), len(children(pid))


def children(pid):
    return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


class Record:
    """What this process and its workers held after each epoch."""

    def __init__(self):
        self.before = children(os.getpid())  # such as a tracker of other tests' memory
        self.own, self.workers, self.shared = [], [], []

    def look(self):
        pid = os.getpid()
        self.own.append(held(pid))
        workers = children(pid) - self.before
        self.workers.append([held(worker) for worker in sorted(workers, key=int)])
        self.shared.append(len(os.listdir("/dev/shm")))

    def grown(self):
        """What is larger in the last quarter than after the warm-up: a set of names."""
        found = set()
        rows = {"own": self.own}
        for number in range(len(self.workers[0])):
            rows[f"worker {number}"] = [workers[number] for workers in self.workers]
        for who, row in rows.items():
            memory, *counts = np.array(row[WARM_UP:]).T
            quarter = len(memory) // 4
            if np.median(memory[-quarter:]) - np.median(memory[:quarter]) > 2_000_000:
                found.add(f"memory of {who}")
            for name, count in zip(("files", "threads", "children"), counts, strict=True):
                if count[-1] > count[0]:
                    found.add(f"{name} of {who}")
        if self.shared[-1] > self.shared[WARM_UP]:
            found.add("names in /dev/shm")
        return found


@pytest.fixture
def long_run(tmp_path, monkeypatch, cli):
    """long_run(steps, leak): a Record of a run of so many steps an epoch; leak(step) is called in each."""

    def run(many, leak=lambda step: None):
        record, steps = Record(), [0]
        make_folders(tmp_path, classes=("ant", "bee"), train=2 * many)

        def look(*arguments, real=main_moco.Checkpoints.save, **entries):
            record.look()
            return real(*arguments, **entries)

        def counted(ranks, real=main_moco.rank_accuracy):
            steps[0] += 1
            leak(steps[0])
            return real(ranks)

        words = [*TINY, "--image-size", "8", "-b", "4", "-j", "2", "--epochs", EPOCHS, "--keep", "1"]
        words += ["-p", "1000", "--output-dir", tmp_path / "out", tmp_path]
        with monkeypatch.context() as patch:
            patch.setattr(main_moco, "rank_accuracy", counted)
            patch.setattr(main_moco.Checkpoints, "save", look)
            code, output, errors = cli(main_moco.main, *words)
        assert (code, errors) == (0, "")
        assert steps[0] == many * EPOCHS and len(record.own) == EPOCHS == output.count("\nepoch ")
        assert {len(workers) for workers in record.workers} == {2}
        return record

    return run


@pytest.mark.slow
def test_two_thousand_steps_leave_nothing(long_run):
    record = long_run(STEPS)
    assert record.grown() == set(), record.own[:: EPOCHS // 8]


@pytest.mark.slow
def test_what_grows_is_noticed(long_run):
    """Negative control: leaks of 20 KB in a step, of a file and a thread in every hundredth."""
    kept = []

    def leak(step):
        kept.append(torch.ones(5000))
        if step % 100 == 0:
            kept.append(open(os.devnull))  # noqa: SIM115
            end = threading.Event()
            thread = threading.Thread(target=end.wait, daemon=True)
            thread.start()
            kept.append(end)

    try:
        assert long_run(STEPS // 5, leak).grown() == {"memory of own", "files of own", "threads of own"}
    finally:
        for thing in kept:
            if isinstance(thing, threading.Event):
                thing.set()
