"""Processes of a run that are told to stop or die: spawned, and under torchrun."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from command_lines import ROOT
from test_resume import WORDS, content, pretrained

TWO_RANKS = """
import sys, torch
torch.cuda.device_count = lambda: 2  # in the parent alone: the processes find none, and use the CPU
import main_moco
from moco.errors import run_program
sys.argv[0] = "main_moco.py"
run_program(main_moco.main)
"""
SPAWN = ["-c", TWO_RANKS, "--multiprocessing-distributed", "--world-size", "1", "--rank", "0"]
LONG = ["--epochs", "100000", "--keep", "2", "-j", "0"]


class Program:
    """A program in a process group of its own, of which nothing is left after the block."""

    def __init__(self, *words):
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=ROOT, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.pid, self.output = self.process.pid, ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in [self.pid, *self.below()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.stdout.close()
        self.process.wait()

    def wait_for(self, text):
        while text not in self.output:
            line = self.process.stdout.readline()
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


def test_a_spawned_run_saves_when_its_parent_is_told_to_stop(folders, tmp_path):
    with Program(*SPAWN, *WORDS, *LONG, folders, "--output-dir", tmp_path) as run:
        run.wait_for("Epoch: [0][2/3]")
        ranks = run.ranks()
        assert len(ranks) == 2
        os.kill(run.pid, signal.SIGTERM)
        assert run.end(60) == 75, run.output
        assert re.search(r"as SIGTERM said\n\S+ has it all; --resume auto goes on\n", run.output)
        assert all_end(ranks, 5)
    assert os.listdir(tmp_path)


@pytest.mark.parametrize("whom", ["a rank", "the parent"])
def test_kill_9_of_one_ends_all(folders, tmp_path, whom):
    with Program(*SPAWN, *WORDS, *LONG, folders, "--output-dir", tmp_path) as run:
        run.wait_for("Epoch: [0][2/3]")
        everyone = [run.pid, *run.below()]
        os.kill(run.ranks()[1] if whom == "a rank" else run.pid, signal.SIGKILL)
        began = time.monotonic()
        if whom == "a rank":
            assert run.end(60) == 2, run.output
            assert run.output.count("main_moco.py: error: ") == 1 and "Traceback" not in run.output
            assert re.search(r"error: (process 1 died|another process of the run ended)", run.output)
        assert all_end(everyone, 60) and time.monotonic() - began < 60


def torchrun(port, *words, restarts=0):
    return [
        "-m", "torch.distributed.run", "--nnodes=1", "--nproc_per_node=2",
        f"--max-restarts={restarts}", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}",
        "--monitor-interval=0.1",
        "main_moco.py", *WORDS, "-j", "0", *words,
    ]  # fmt: skip


def test_torchrun_is_told_to_stop_and_goes_on_and_a_killed_rank_is_started_again(
    folders, tmp_path, free_port, run_ranks
):
    words = [folders, "--output-dir", tmp_path / "run", "--resume", "auto", "--epochs"]
    with Program(*torchrun(free_port, *words, "100000")) as run:
        run.wait_for("Epoch: [0][0/3]")
        os.kill(run.pid, signal.SIGTERM)
        assert run.end(60) != 0
        assert re.search(r"stopped in epoch 0 after \d of 3 steps, as SIGTERM said", run.output), run.output
    with Program(*torchrun(free_port, *words, "9", restarts=1)) as run:
        run.wait_for("Epoch: [3][2/3]")
        os.kill(run.ranks()[1], signal.SIGKILL)
        assert run.end(120) == 0, run.output
        assert run.output.count("--resume auto: ") == 2
    expected = [*WORDS, "-j", "0", "--epochs", "9", "--output-dir", tmp_path / "whole"]
    (tmp_path / "whole").mkdir()
    assert run_ranks(2, pretrained, expected, folders) == [0, 0]
    for name in ("checkpoint_0007.pth.tar", "checkpoint_0008.pth.tar"):
        assert (content(tmp_path / "run", name)) == content(tmp_path / "whole", name)
    assert content(tmp_path / "run", "checkpoint_0007.pth.tar") != content(
        tmp_path / "run", "checkpoint_0008.pth.tar"
    )
