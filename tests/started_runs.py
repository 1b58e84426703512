"""Runs in processes of their own, for tests to tell, to stop and to kill: started anew, or forked."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import torch
from command_lines import ROOT
from forked_program import forked

import main_moco

SPAWN = ["--multiprocessing-distributed", "--world-size", "1", "--rank", "0"]
LONG = ["--epochs", "100000", "--keep", "2", "-j", "0"]


class Program:
    """A program in a process group of its own, of which nothing is left after the block."""

    def __init__(self, *words):
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=ROOT, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.pid, self.stdout, self.output = self.process.pid, self.process.stdout, ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in [self.pid, *self.below()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.stdout.close()
        self.reap()

    def reap(self):
        self.process.wait()

    def wait_for(self, text):
        while text not in self.output:
            line = self.stdout.readline()
            assert line, self.output
            self.output += line

    def below(self):
        """The processes that it started, and theirs."""
        found, look = [], [self.pid]
        for pid in look:
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as file:
                look += (children := [int(child) for child in file.read().split()])
                found += children
        return found

    def ranks(self):
        """The processes of the run, which have set their rank."""
        return [
            pid
            for pid in self.below()
            if "multiprocessing.spawn" in command(pid) or "main_moco" in command(pid)
        ]

    def end(self, seconds):
        output, _ = self.process.communicate(timeout=seconds)
        self.output += output
        return self.process.returncode


def command(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline") as file:
        return file.read()
    return ""


def alive(pids):
    """Which of the processes still run: those that nobody waited for do not."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
            found += [pid] * (file.read().rsplit(")", 1)[1].split()[0] not in "ZX")
    return found


def all_end(pids, seconds):
    deadline = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pids)


def spawn():
    """Start two ranks as main_moco.py's parent does."""
    torch.cuda.device_count = lambda: 2  # of this forked parent; there is no GPU, so the ranks use the CPU
    main_moco.main()


def spawn_in_forks():
    """Start two ranks that are forked, as torch is imported here already."""
    torch.multiprocessing.spawn = partial(torch.multiprocessing.start_processes, start_method="fork")
    spawn()


class Forked(Program):
    """The pre-training program with a command line, forked, as torch is imported here already."""

    def __init__(self, *words, main=main_moco.main):
        def with_words():
            sys.argv = ["main_moco.py", *map(str, words)]
            main()

        self.pid, self.stdout = forked(with_words, (1, 2))
        self.output = ""

    def reap(self):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def ranks(self):
        return [pid for pid in self.below() if "resource_tracker" not in command(pid)]

    def end(self, seconds):
        """The exit code, when all that could write have ended."""
        watch = threading.Timer(seconds, os.killpg, (self.pid, signal.SIGKILL))
        watch.start()
        self.output += self.stdout.read()
        watch.cancel()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Spawned(Forked):
    """A run of two ranks whose parent is forked, and they too; prepare() is called in the parent first."""

    def __init__(self, *words, prepare=lambda: None):
        def main():
            prepare()
            spawn_in_forks()

        super().__init__(*SPAWN, *words, main=main)


def at_step(number, act):
    """Have act() called in each rank of a run to come, within its step of that number, from 1."""
    real, steps = main_moco.rank_accuracy, [0]

    def counted(ranks):
        steps[0] += 1
        if steps[0] == number:
            act()
        return real(ranks)

    main_moco.rank_accuracy = counted
