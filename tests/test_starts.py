"""Every way to start a run, and the command lines that users of the published programs know."""

import os
import re
import signal
import socket
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from command_lines import MOCO, losses_of, program
from spawned_ranks import leave_sum
from started_runs import LONG, Forked
from test_resume import FRESH

import main_lincls
import main_moco
from moco.errors import UserError
from moco.launch import launch


def nodes(port, folders, outs, *more):
    """Nodes of two on this machine, of one process each: one for each folder of `outs`; `more` words each."""
    words = [*MOCO, *FRESH, "--epochs", "1", folders, "-b", "4", "--multiprocessing-distributed"]
    words += ["--world-size", "2", "--dist-url", f"tcp://127.0.0.1:{port}"]
    more = more or [[]] * len(outs)
    return [Forked(*words, "--rank", rank, "--output-dir", out, *more[rank]) for rank, out in enumerate(outs)]


def test_torchrun_and_two_nodes_give_the_same_bits(folders, tmp_path, free_port):
    """torchrun starts its processes anew, as users do."""
    torchrun = program(
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master-port={free_port}",
        "main_moco.py", *MOCO, *FRESH, "-j", "2", "--epochs", "1", str(folders),
        "--output-dir", str(tmp_path / "torchrun"),
    )  # fmt: skip
    assert torchrun.returncode == 0, torchrun.stderr
    first, second = nodes(free_port, folders, [tmp_path / "first", tmp_path / "second"])
    with first, second:
        assert [first.end(120), second.end(120)] == [0, 0], first.output + second.output
    assert losses_of(first.output) == losses_of(torchrun.stdout)
    assert len(losses_of(first.output)) == 3
    one, other = (
        torch.load(tmp_path / name / "checkpoint_0000.pth.tar", weights_only=True)["state_dict"]
        for name in ("torchrun", "first")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not os.listdir(tmp_path / "second")  # only the first process writes


def test_nodes_with_other_flags_are_refused(folders, tmp_path, free_port):
    one, other = nodes(free_port, folders, [tmp_path, tmp_path], ["--moco-k", "20"], ["--moco-k", "24"])
    with one, other:
        for node in (one, other):
            assert node.end(120) == 2
            assert "moco_k is 20 on rank 0 and 24 on rank 1" in node.output
    assert not os.listdir(tmp_path)


def test_spawn_starts_a_process_for_each_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # here alone: the processes find none
    for failing in (1, None):
        (folder := tmp_path / str(failing)).mkdir()
        ends = (
            pytest.raises(UserError, match="^(rank 1 cannot go on|another process of the run ended.*)$")
            if failing
            else nullcontext()
        )
        with ends:
            launch(leave_sum, (folder, failing), spawn=True, nodes=1, node_rank=0)
        assert [(folder / name).read_text() for name in "01"] == ["2 3.0", "2 3.0"]
        start = partial(torch.multiprocessing.start_processes, start_method="fork")
        monkeypatch.setattr(torch.multiprocessing, "spawn", start)  # which takes seconds, the second time


def test_help_needs_nothing(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    started = program("main_lincls.py", "--help")
    for code, output in (cli(main_moco.main, "--help")[:2], (started.returncode, started.stdout)):
        assert code == 0
        assert max(map(len, output.splitlines())) <= 80
        assert "--dataset-root ROOT, --dataset_root ROOT" in output


def test_published_command_lines_are_understood(monkeypatch):
    lines = (
        "-a resnet50 --lr 0.8 --batch-size 512 --moco-m 0.99 --mlp --moco-t 0.2 --aug-plus --cos "
        "--dist-url tcp://localhost:10001 --multiprocessing-distributed --world-size 1 --rank 0 "
        "--method ifm --epsilon 0.1 --dataset_root DATA",
        "-a resnet50 --lr 0.03 --batch-size 256 --dist-url tcp://localhost:10001 "
        "--multiprocessing-distributed --world-size 1 --rank 0 IMAGENET",
    )
    for line in lines:
        monkeypatch.setattr(sys, "argv", ["main_moco.py", *line.split()])
        args = main_moco.parse_args()
        main_moco.check(args)
    assert (args.folder, args.method, args.epsilon, args.alpha) == ("IMAGENET", None, None, None)
    line = (
        "--pretrained=model_best.pth.tar --lr 10.0 -b=128 --schedule 30 40 50 --epochs 60 "
        "--dist-url=tcp://localhost:10001 --dataset_root=DATA"
    )
    monkeypatch.setattr(sys, "argv", ["main_lincls.py", *line.split()])
    args = main_lincls.parse_args()
    assert (args.batch_size, args.schedule, args.lr, args.pretrained) == (
        128,
        [30, 40, 50],
        [10.0],
        "model_best.pth.tar",
    )


def test_defaults_are_upstreams(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main_moco.py"])
    moco = vars(main_moco.parse_args())
    monkeypatch.setattr(sys, "argv", ["main_lincls.py"])
    linear = vars(main_lincls.parse_args())
    shared = {"dataset": "imagenet100", "dataset_root": None, "arch": "resnet50", "start_epoch": 0}
    shared |= {"batch_size": 256, "momentum": 0.9, "print_freq": 10, "resume": "", "seed": None, "gpu": None}
    shared |= {"world_size": -1, "rank": -1, "multiprocessing_distributed": False}
    of_moco = {"epochs": 200, "lr": 0.03, "schedule": [120, 160], "weight_decay": 1e-4, "bn_splits": 1}
    of_moco |= {"moco_dim": 128, "moco_k": 65536, "moco_m": 0.999, "moco_t": 0.07, "method": None}
    of_moco |= {"mlp": False, "aug_plus": False, "cos": False}
    of_linear = {"epochs": 100, "lr": [30.0], "schedule": [60, 80], "weight_decay": 0.0}
    of_linear |= {"evaluate": False, "pretrained": ""}
    for parsed, expected in ((moco, {**shared, **of_moco}), (linear, {**shared, **of_linear})):
        assert {name: parsed[name] for name in expected} == expected


def test_a_port_in_use_is_said(folders, tmp_path, free_port):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port))
        taken.listen()
        with nodes(free_port, folders, [tmp_path])[0] as node:
            assert node.end(60) == 2
    assert f"the port of tcp://127.0.0.1:{free_port} is in use" in node.output
    assert "Traceback" not in node.output


@pytest.fixture
def long_run(folders, tmp_path):
    """A run that has finished an epoch, with one data worker."""
    with Forked(*MOCO, "-a", "tiny", *LONG, "-j", "1", folders, "--output-dir", tmp_path) as run:
        run.wait_for("epoch 0")
        yield run


def test_ctrl_c_saves_and_ends(long_run, tmp_path):
    os.killpg(long_run.pid, signal.SIGINT)  # as a terminal does: to the program and its loader workers
    assert long_run.end(30) == 75
    said = r"\nstopped in epoch .* as SIGINT said\n(\S+) has it all; --resume auto goes on\n$"
    saved = re.search(said, long_run.output)[1]
    assert "Traceback" not in long_run.output
    assert torch.load(saved, weights_only=True)["epoch"] >= 1
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_a_killed_data_worker_ends_the_run_with_a_sentence(long_run):
    [worker] = long_run.below()
    os.kill(worker, signal.SIGKILL)
    assert long_run.end(60) == 2
    assert re.search(rf"data worker {worker} (is killed by signal|exited unexpectedly)", long_run.output)
    assert "Traceback" not in long_run.output
