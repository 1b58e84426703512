"""Runs of two ranks whose parent or launcher is told to stop, or dies; forked, which takes a second each."""

import os
import re
import signal
import socket
import time

import pytest
import started_runs
import test_resume
from forked_program import gone_within
from started_runs import LONG, Forked, Spawned, alive, all_end, at_step
from test_resume import WORDS, checkpoints, content, pretrained

import main_moco
from moco.watch import PREEMPTED, SAME, SIGNALS

unstopped = test_resume.whole  # a fixture


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_to_the_parent_stops_the_ranks_which_go_on_exactly(
    folders,
    tmp_path,
    run_ranks,
    unstopped,
    number,
):
    def tell_the_parent():
        if os.environ["RANK"] == "1":
            os.kill(os.getppid(), number)
        time.sleep(0.3)  # until it is passed on

    words = [*WORDS, "-j", "0", folders, "--output-dir", tmp_path]
    with Spawned(*words, prepare=lambda: at_step(4, tell_the_parent)) as run:
        run.wait_for("Epoch: [0][2/3]")
        ranks = run.ranks()
        assert len(ranks) == 2
        assert run.end(60) == PREEMPTED, run.output
        said = (
            rf"stopped in epoch 1 after (\d) of 3 steps, as {number.name} said\n\S+ has it all; --resume auto"
        )
        steps = int(re.search(said, run.output)[1])
        assert not alive(ranks)
    assert checkpoints(tmp_path) == [
        "checkpoint_0000.pth.tar",
        f"checkpoint_0001_{steps:06d}.pth.tar",
    ]
    words = [*WORDS, "-j", "0", "--output-dir", tmp_path, "--resume", "auto"]
    assert run_ranks(2, pretrained, words, folders) == [0, 0]
    expected = content(unstopped(run_ranks, 2))
    assert content(tmp_path) == expected
    assert content(tmp_path, "checkpoint_0000.pth.tar") != expected  # negative control


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_run_that_has_nothing_to_save_ends_as_one_that_can_go_on(
    cli, folders, tmp_path, monkeypatch, number
):
    def told(*_):
        os.kill(os.getpid(), number)
        time.sleep(10)

    handler = signal.getsignal(number)
    monkeypatch.setattr(main_moco, "start_from", told)
    code, _, errors = cli(main_moco.main, *WORDS, "-j", "0", folders, "--output-dir", tmp_path)
    assert (code, errors) == (PREEMPTED, "") and checkpoints(tmp_path) == []
    assert signal.getsignal(number) is handler


def test_a_run_that_waits_for_other_nodes_ends_at_once(folders, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = probe.getsockname()
    nodes = ["--world-size", "2", "--rank", "0", "--dist-url", f"tcp://127.0.0.1:{place[1]}"]
    with Forked(*WORDS, *nodes, folders, "--output-dir", tmp_path) as run:
        assert gone_within(20, lambda: socket.socket().connect_ex(place) == 0)  # it listens
        time.sleep(0.5)
        os.kill(run.pid, signal.SIGTERM)
        assert run.end(10) == -signal.SIGTERM, run.output


def stand_still():
    print("standing", flush=True)
    time.sleep(60)


def test_a_second_signal_ends_a_run_at_once_in_the_middle_of_a_step(folders, tmp_path):
    words = [*WORDS, "-j", "0", folders, "--output-dir", tmp_path]
    with Spawned(*words, prepare=lambda: at_step(2, stand_still)) as run:
        run.wait_for("standing")
        everyone = [run.pid, *run.below()]
        os.kill(run.pid, signal.SIGINT)
        time.sleep(SAME + 0.1)
        assert len(alive(everyone)) == len(everyone)  # the first one waits for the step
        os.kill(run.pid, signal.SIGTERM)
        assert run.end(10) == 2 and "Traceback" not in run.output
        assert f"exit code {128 + signal.SIGTERM}" in run.output and all_end(everyone, 5)
    assert checkpoints(tmp_path) == []


def as_torchrun_does():
    """Start two ranks with torchrun's variables, and wait for them."""
    ranks = []
    for rank in range(2):
        if not (pid := os.fork()):
            os.environ.update(TORCHELASTIC_RUN_ID="run", RANK=str(rank), LOCAL_RANK=str(rank))
            main_moco.main()
            os._exit(0)
        ranks.append(pid)
    for pid in ranks:
        os.waitpid(pid, 0)


@pytest.mark.parametrize("moment", ["starting", "training"])
@pytest.mark.parametrize("launcher", ["spawn", "torchrun"])
def test_kill_9_of_the_launcher_ends_all_where_sigint_is_ignored(
    folders, tmp_path, free_port, monkeypatch, launcher, moment
):
    """As it is in all that a script starts in the background."""
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", free_port), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")

    def prepare():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if moment == "starting":
            main_moco.start_from = lambda *_: stand_still()

    words = [*WORDS, *LONG, folders, "--output-dir", tmp_path]
    if launcher == "torchrun":
        monkeypatch.setattr(started_runs, "spawn_in_forks", as_torchrun_does)
        monkeypatch.setattr(started_runs, "SPAWN", [])
    with Spawned(*words, prepare=prepare) as run:
        run.wait_for("standing" if moment == "starting" else "Epoch: [0][2/3]")
        ranks = run.ranks()
        assert len(ranks) == 2
        os.kill(run.pid, signal.SIGKILL)
        assert all_end(ranks, 10)
    assert bool(checkpoints(tmp_path)) == (moment == "training")  # it was saved
