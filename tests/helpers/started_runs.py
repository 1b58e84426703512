"""Runs of pre-training in processes of their own, for tests to tell, to stop and to kill: started anew, or
forked, as torch is imported here already.
"""

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
LONG = ["--epochs", "100000", "--keep", "2"]


class Program:
    """A program in a process group of its own, of which nothing is left after the block."""

    def __init__(self, *words):
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            start_new_session=True,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
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
        """The processes of the run, without the workers of their loaders and other helpers, by rank."""
        found = {}
        for pid in self.below():
            with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
                parent = int(file.read().rsplit(")", 1)[1].split()[1])
                if parent not in found and "resource_tracker" not in command(pid):
                    found[pid] = parent
        return [pid for pid in found if "main_moco" in command(pid) or found[pid] == self.pid]

    def end(self, seconds=60):
        """The exit code, when all that could write have ended."""
        output, _ = self.process.communicate(timeout=seconds)
        self.output += output
        return self.process.returncode


class Forked(Program):
    """The pre-training program with a command line, after prepare() in the forked process."""

    def __init__(self, *words, prepare=lambda: None, main=main_moco.main):
        def with_words():
            sys.argv = ["main_moco.py", *map(str, words)]
            prepare()
            main()

        self.pid, self.stdout = forked(with_words, (1, 2))
        self.output = ""

    def reap(self):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def end(self, seconds=60):
        watch = threading.Timer(seconds, os.killpg, (self.pid, signal.SIGKILL))
        watch.start()
        self.output += self.stdout.read()
        watch.cancel()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class TwoRanks(Forked):
    """A run of two ranks that are processes of a forked parent, which believes in two GPUs; they find none.

    start: "fork", where the ranks are what `prepare` has made of the parent, or "spawn", as for users.
    """

    def __init__(self, *words, prepare=lambda: None, start="fork"):
        def two():
            torch.cuda.device_count = lambda: 2
            if start == "fork":
                torch.multiprocessing.spawn = partial(
                    torch.multiprocessing.start_processes, start_method="fork"
                )
            prepare()

        super().__init__(*SPAWN, *words, prepare=two)


def run(*words, world=1, prepare=lambda: None, code=0, seconds=60):
    """What a run of one or two processes printed, which must end with the exit code `code`."""
    with (Forked, TwoRanks)[world - 1](*words, prepare=prepare) as program:
        ended = program.end(seconds)
        assert ended == code, f"exit code {ended}:\n{program.output}"
    return program.output


def at_step(number, act, rank=None):
    """Have act() called within step `number`, from 1, of a run to come, in each rank or only in one."""
    real, steps = main_moco.rank_accuracy, [0]

    def counted(ranks):
        steps[0] += 1
        if steps[0] == number and rank in (None, int(os.environ.get("RANK", 0))):
            act()
        return real(ranks)

    main_moco.rank_accuracy = counted


def send(number, to=os.getpid):
    """A function that sends the process to() a signal, and waits until it has been passed on."""

    def act():
        os.kill(to(), number)
        time.sleep(0.3 if to is os.getppid else 0)

    return act


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
