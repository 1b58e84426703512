"""Every way to start a run, and the command lines that users of the published programs know."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_lines import MOCO, ROOT, losses_of, program

import main_lincls
import main_moco
from moco.distributed import sum_over_processes
from moco.errors import UserError
from moco.launch import launch


def two_nodes(port, folders, outs, *more):
    """A node, of two in all on this machine, for every folder of `outs`; `more` words for each."""
    more = more or [[]] * len(outs)
    return [
        subprocess.Popen(
            [
                sys.executable,
                "main_moco.py",
                *MOCO,
                "--epochs",
                "1",
                str(folders),
                "--output-dir",
                str(out),
                *more[rank],
                "-b",
                "4",
                "--multiprocessing-distributed",
                "--world-size",
                "2",
                "--rank",
                str(rank),
                "--dist-url",
                f"tcp://127.0.0.1:{port}",
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        for rank, out in enumerate(outs)
    ]


def test_torchrun_and_two_nodes_give_the_same_bits(folders, tmp_path, free_port):
    torchrun = program(
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master-port={free_port}",
        "main_moco.py", *MOCO, "--epochs", "1", str(folders), "--output-dir", str(tmp_path / "torchrun"),
    )  # fmt: skip
    assert torchrun.returncode == 0, torchrun.stderr
    nodes = two_nodes(free_port, folders, [tmp_path / "first", tmp_path / "second"])
    (output, errors), _ = (node.communicate(timeout=120) for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert losses_of(output) == losses_of(torchrun.stdout)
    assert len(losses_of(output)) == 3
    one, other = (
        torch.load(tmp_path / name / "checkpoint_0000.pth.tar", weights_only=True)["state_dict"]
        for name in ("torchrun", "first")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not os.listdir(tmp_path / "second")  # only the first process writes


def test_nodes_with_other_flags_are_refused(folders, tmp_path, free_port):
    nodes = two_nodes(free_port, folders, [tmp_path, tmp_path], ["--moco-k", "20"], ["--moco-k", "24"])
    for node in nodes:
        _, errors = node.communicate(timeout=120)
        assert node.returncode == 2
        assert "moco_k is 20 on rank 0 and 24 on rank 1" in errors
    assert not os.listdir(tmp_path)


def spawned(process, folder, failing):
    """A worker of launch that leaves its rank in `folder`; the rank `failing` raises instead."""
    if process.rank == failing:
        raise UserError(f"rank {failing} cannot go on")
    total = sum_over_processes(torch.tensor(process.rank + 1.0))
    (folder / str(process.rank)).write_text(f"{process.world_size} {total.item()}")


def test_spawn_starts_a_process_for_each_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # here alone: the processes find none
    launch(spawned, (tmp_path, None), spawn=True, nodes=1, node_rank=0)
    assert [(tmp_path / name).read_text() for name in "01"] == ["2 3.0", "2 3.0"]
    with pytest.raises(UserError, match=r"^(rank 1 cannot go on|another process of the run ended.*)$"):
        launch(spawned, (tmp_path, 1), spawn=True, nodes=1, node_rank=0)


def test_a_bad_image_ends_a_run_with_workers(folders, tmp_path):
    shutil.copytree(folders, tmp_path / "data")
    (tmp_path / "data" / "train" / "bee" / "1.jpg").write_text("no image")
    words = [*MOCO, "--workers", "2", str(tmp_path / "data"), "--output-dir", str(tmp_path)]
    run = program("main_moco.py", *words)
    assert run.returncode == 2
    assert "bee/1.jpg cannot be read as an image" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


def test_help_needs_nothing():
    for name in ("main_moco.py", "main_lincls.py"):
        run = program(name, "--help", COLUMNS="80")
        assert run.returncode == 0
        assert max(map(len, run.stdout.splitlines())) <= 80
        assert "--dataset-root ROOT, --dataset_root ROOT" in run.stdout


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


def test_a_port_in_use_is_said(folders, tmp_path, free_port, cli):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port))
        taken.listen()
        node = two_nodes(free_port, folders, [tmp_path])[0]
        _, errors = node.communicate(timeout=60)
    assert node.returncode == 2
    assert f"the port of tcp://127.0.0.1:{free_port} is in use" in errors
    assert "Traceback" not in errors


def test_ctrl_c_saves_and_ends(folders, tmp_path):
    words = [*MOCO, "--workers", "1", "--epochs", "1000", str(folders), "--output-dir", str(tmp_path)]
    run = subprocess.Popen(
        [sys.executable, "main_moco.py", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not run.stdout.readline().startswith("epoch 0"):
        assert run.poll() is None
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the program and its loader workers
    output, errors = run.communicate(timeout=30)
    assert run.returncode == 75 and errors == ""
    saved = re.search(r"stopped in epoch .* as SIGINT said\n(\S+) has it all; --resume auto goes on", output)[
        1
    ]
    assert torch.load(saved, weights_only=True)["epoch"] >= 1
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_a_killed_data_worker_ends_the_run_with_a_sentence(folders, tmp_path):
    words = [*MOCO, "--workers", "1", "--epochs", "1000", str(folders), "--output-dir", str(tmp_path)]
    run = subprocess.Popen(
        [sys.executable, "main_moco.py", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not run.stdout.readline().startswith("epoch 0"):
        assert run.poll() is None
    [worker] = (Path("/proc") / str(run.pid) / "task" / str(run.pid) / "children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2
    assert f"data worker {worker} is killed by signal" in errors
    assert "Traceback" not in errors
