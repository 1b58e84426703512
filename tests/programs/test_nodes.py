"""Runs under torchrun that lose a rank or a node and go on from the last checkpoint."""

import os
import re
import signal
import sys
import time

import pytest
from command_lines import MOCO
from run_files import checkpoints, content
from started_runs import Program, all_end, run

WORDS = [*MOCO, "-a", "shufflenet_v2_x0_5", "--method", "ifm", "--keep", "9", "-j", "2", "--resume", "auto"]
TORCHRUN = ["torch.distributed.run", "--monitor-interval=0.1", "--rdzv-backend=c10d"]
# The loop of moco/run/README.md, with a shorter pause.
LOOP = 'for try in 1 2 3 4 5; do "$@" && exit; echo "try $try ended with $?"; sleep 1; done; exit 1'
SHELL = "import os, sys; os.execvp('bash', ['bash', '-c', *sys.argv[1:]])"


def same_as_undisturbed(folder, folders, whole, epochs, batch_size):
    """Whether the last checkpoint is that of a run of two ranks that nothing happened to."""
    words = [*WORDS[:-2], "-b", batch_size, "--epochs", epochs, "--output-dir", whole, folders]
    run(*words, world=2, seconds=300)
    last, before = (f"checkpoint_{epochs - back:04d}.pth.tar" for back in (1, 2))
    assert content(whole, last) != content(whole, before)  # negative control
    return content(folder, last) == content(whole, last)


@pytest.mark.slow
def test_torchrun_is_stopped_and_continues_and_a_killed_rank_is_started_again(folders, tmp_path, free_port):
    def torchrun(*words, restarts):
        agent = [*TORCHRUN, "--nproc_per_node=2", f"--rdzv-endpoint=127.0.0.1:{free_port}"]
        out = ["--output-dir", tmp_path / "run", folders]
        return Program("-m", *agent, f"--max-restarts={restarts}", "main_moco.py", *WORDS, *words, *out)

    with torchrun("--epochs", "100000", restarts=0) as program:
        program.wait_for("Epoch: [0][0/3]")
        os.kill(program.pid, signal.SIGTERM)
        assert program.end(60) != 0
        assert re.search(r"stopped in epoch 0 after \d of 3 steps \(SIGTERM\);\n   saved ", program.output)
        assert len(checkpoints(tmp_path / "run")) == 1
    with torchrun("--epochs", "9", restarts=1) as program:
        program.wait_for("Epoch: [3][2/3]")
        os.kill(program.ranks()[1], signal.SIGKILL)
        assert program.end(120) == 0, program.output
        assert program.output.count("--resume auto: /") == 2
    assert same_as_undisturbed(tmp_path / "run", folders, tmp_path / "whole", 9, 8)


@pytest.mark.slow
def test_a_node_dies_and_comes_back(folders, tmp_path, free_port, monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    words = ["main_moco.py", *WORDS, "-b", "4", "--epochs", "12", "--output-dir", tmp_path / "run", folders]

    def node(number):
        """One that is started again, whatever ended it. The first holds the store."""
        agent = [*TORCHRUN, "--nproc_per_node=1", "--nnodes=2", f"--rdzv-endpoint=127.0.0.1:{free_port}"]
        agent += ["--rdzv-id=run", f"--rdzv-conf=is_host={int(number == 0)},join_timeout=60"]
        return Program("-c", SHELL, LOOP, "loop", sys.executable, "-m", *agent, *words)

    with node(0) as dying, node(1) as survivor:
        wait_for(tmp_path / "run" / "checkpoint_0002.pth.tar", 120)
        dead = [dying.pid, *dying.below()]
        assert len(dead) >= 3  # the loop, the agent, which holds the store, and its rank
        for pid in dead:
            os.kill(pid, signal.SIGKILL)
        assert all_end(dead, 10)
        assert "checkpoint_0010.pth.tar" not in checkpoints(tmp_path / "run")  # it was in the middle
        with node(0) as again:
            assert survivor.end(240) == 0, survivor.output + again.output
            assert again.end(60) == 0, again.output
        dying.end(10)
    assert re.search("^try 1 ended with 1$", survivor.output, re.MULTILINE), survivor.output
    output = dying.output + survivor.output + again.output
    assert output.count("--resume auto: no checkpoint yet, a new run") == 1
    assert f"--resume auto: {tmp_path}/run/checkpoint_" in output
    assert same_as_undisturbed(tmp_path / "run", folders, tmp_path / "whole", 12, 8)


def wait_for(path, seconds):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)
