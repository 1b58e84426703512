"""Processes of a run that die or are told to stop, really spawned, and under torchrun."""

import os
import re
import signal
import time

import pytest
from started_runs import LONG, SPAWN, Forked, Program, all_end, spawn
from test_resume import FRESH, WORDS, content, pretrained


def test_kill_9_of_a_rank_ends_all(folders, tmp_path):
    """With processes that are really spawned, by a parent that is forked."""
    with Forked(*SPAWN, *WORDS, *FRESH, *LONG, folders, "--output-dir", tmp_path, main=spawn) as run:
        run.wait_for("Epoch: [0][2/3]")
        everyone = [run.pid, *run.below()]
        os.kill(run.ranks()[1], signal.SIGKILL)
        began = time.monotonic()
        assert run.end(60) == 2, run.output
        assert run.output.count("main_moco.py: error: ") == 1 and "Traceback" not in run.output
        assert re.search(r"error: (process 1 died|another process of the run ended)", run.output)
        assert all_end(everyone, 60) and time.monotonic() - began < 60


def torchrun(port, *words, restarts=0):
    return [
        "-m", "torch.distributed.run", "--nnodes=1", "--nproc_per_node=2",
        f"--max-restarts={restarts}", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}",
        "--monitor-interval=0.1",
        "main_moco.py", *WORDS, *FRESH, "-j", "0", *words,
    ]  # fmt: skip


@pytest.mark.slow
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
    expected = [*WORDS, *FRESH, "-j", "0", "--epochs", "9", "--output-dir", tmp_path / "whole"]
    (tmp_path / "whole").mkdir()
    assert run_ranks(2, pretrained, expected, folders) == [0, 0]
    for name in ("checkpoint_0007.pth.tar", "checkpoint_0008.pth.tar"):
        assert (content(tmp_path / "run", name)) == content(tmp_path / "whole", name)
    assert content(tmp_path / "run", "checkpoint_0007.pth.tar") != content(
        tmp_path / "run", "checkpoint_0008.pth.tar"
    )
