"""Two nodes on this machine, each an agent of torchrun with one rank; one of them dies and comes back."""

import os
import re
import signal
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from started_runs import Program, all_end
from test_resume import FRESH, WORDS, pretrained

from moco import meeting
from moco.errors import UserError
from moco.meeting import agreed_start, code_hash, peer_loss

LONG = ["-j", "0", "--epochs", "12", "--keep", "2", "--resume", "auto"]
LAST, BEFORE = "checkpoint_0011.pth.tar", "checkpoint_0010.pth.tar"
# The loop of the README, with a shorter pause.
LOOP = 'for try in 1 2 3 4 5; do "$@" && exit; echo "try $try ended with $?"; sleep 1; done; exit 1'
SHELL = "import os, sys; os.execvp('bash', ['bash', '-c', *sys.argv[1:]])"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--monitor-interval=0.1"]


def node(rank, port):
    """A node that is started again, whatever ended it."""
    return ["-c", SHELL, LOOP, "loop", *TORCHRUN, "--nnodes=2", f"--node_rank={rank}",
            "--master_addr=127.0.0.1", f"--master_port={port}"]  # fmt: skip


def undisturbed(run_ranks, folders, folder):
    """The last checkpoint of a run of two ranks that nothing happened to."""
    folder.mkdir()
    words = [*WORDS, *FRESH, *LONG, "-b", "16", "--output-dir", folder]  # as -b counts a node's processes
    assert run_ranks(2, pretrained, words, folders) == [0, 0]
    return torch.load(folder / LAST, weights_only=True)


def test_a_node_dies_and_comes_back_and_the_run_ends_as_if_nothing_had_happened(
    folders, tmp_path, free_port, run_ranks
):
    words = ["main_moco.py", *WORDS, *FRESH, *LONG, "--output-dir", tmp_path, folders]
    with Program(*node(0, free_port), *words) as dying, Program(*node(1, free_port), *words) as survivor:
        wait_for_file(tmp_path / "checkpoint_0002.pth.tar", 60)
        dead = [dying.pid, *dying.below()]
        assert len(dead) == 3  # the loop, the agent, which holds the store, and its rank
        for pid in dead:
            os.kill(pid, signal.SIGKILL)
        assert all_end(dead, 10)
        assert not (tmp_path / BEFORE).exists()  # it was in the middle
        with Program(*node(0, free_port), *words) as again:
            assert survivor.end(120) == 0, survivor.output
            assert again.end(60) == 0, again.output
        dying.end(10)
    assert "main_moco.py: error: another process of the run ended" in survivor.output
    assert re.search("try 1 ended with 1$", survivor.output, re.MULTILINE)
    said = dying.output + survivor.output + again.output
    assert said.count("--resume auto: nothing to go on from yet") == 1
    assert f"--resume auto: {tmp_path}/checkpoint_" in said

    one, expected, earlier = (
        dict(tensors(torch.load(tmp_path / LAST, weights_only=True))),
        dict(tensors(undisturbed(run_ranks, folders, tmp_path / "undisturbed"))),
        dict(tensors(torch.load(tmp_path / BEFORE, weights_only=True))),
    )
    assert one.keys() == expected.keys() == earlier.keys() and len(one) > 100
    assert all(torch.equal(one[name], expected[name]) for name in one)
    assert not all(torch.equal(one[name], earlier[name]) for name in one)


def wait_for_file(path, seconds):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


def tensors(value, name=""):
    """(name, tensor) of all tensors in nested dicts and lists."""
    if torch.is_tensor(value):
        yield name, value
    elif isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(inner, f"{name}.{key}")


def meet(store, ranks, world, patience=10.0):
    """What agreed_start gives the `ranks`, each in a thread of its own; of those that failed, the error."""
    answers = {}

    def run(rank):
        try:
            answers[rank] = agreed_start(store, rank, world, patience)
        except RuntimeError as error:
            answers[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
        time.sleep(0.02)  # in this order
    for thread in threads:
        thread.join(20)
    return [answers[rank] for rank in sorted(answers)]


def test_every_start_in_one_store_has_a_name_of_its_own():
    store, names = dist.HashStore(), []
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        found = meet(store, order, 3)
        assert len(found) == 3 and len(set(found)) == 1, found
        names += set(found)
    assert len(set(names)) == 3


def test_a_rank_takes_no_start_of_the_dead_for_its_own():
    store = dist.HashStore()
    (before,) = set(meet(store, [0, 1], 2))
    alone, *_ = meet(store, [1], 2, patience=0.3)
    assert isinstance(alone, RuntimeError) and "not all 2 processes came within 0 s" in str(alone)
    also_alone, *_ = meet(store, [0], 2, patience=0.3)  # rank 1 has only signed the start before
    assert isinstance(also_alone, RuntimeError)
    (after,) = set(meet(store, [1, 0], 2))
    assert after != before
    assert agreed_start(store, 0, 1, 1.0) not in (before, after)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_meets_nobody_says_so_and_gives_up(rank, free_port, monkeypatch, capsys):
    monkeypatch.setattr(meeting, "PATIENCE", 1.0)
    monkeypatch.setattr(meeting, "SILENCE", 0.2)
    url = f"tcp://127.0.0.1:{free_port}"
    with pytest.raises(UserError, match=f"^rank {rank} could not meet the others at {url} .* check address"):
        meeting.enter_group(url, rank, 2, "gloo")
    assert capsys.readouterr().err == f"rank {rank} of 2 is waiting for the others at {url}\n"


def test_what_gloo_says_of_a_peer_that_is_gone_becomes_one_sentence():
    place = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] "
    more = ". This is typically caused by a remote worker hanging or bugs in the application."
    for reason in (
        "Read error [10.77.0.2]:9445: Connection timed out",
        "Read error [::1]:1: No route to host",
    ):
        sentence = peer_loss(RuntimeError(place + reason + more))
        assert sentence.startswith(f"another process of the run does not answer ({reason}); ")
    assert "not answer (Application timeout caused" in peer_loss(
        RuntimeError("Application timeout caused pair closure")
    )
    ended = peer_loss(RuntimeError(place + "Connection closed by peer [127.0.0.1]:42" + more))
    assert ended == "another process of the run ended; its message says why"
    assert peer_loss(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_the_hash_of_the_code_sees_every_module_and_program(tmp_path):
    (tmp_path / "moco").mkdir()
    found = []
    for name in ("moco/a.py", "moco/b.py", "main_x.py", "moco/a.py", "README.md"):
        with open(tmp_path / name, "a") as file:
            file.write("1\n")
        found.append(code_hash(tmp_path / "moco"))
    assert len(set(found)) == 4 and found[-1] == found[-2]
    assert code_hash() == code_hash() != found[0]
