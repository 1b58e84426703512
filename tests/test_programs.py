"""The two programs from the command line: whole runs, every way to start, and wrong use."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_folders
from PIL import Image

import main_lincls
import main_moco
from moco import trifeature

ROOT = Path(__file__).parent.parent
SMALL = ["-a", "resnet18", "--image-size", "16", "-b", "8", "--workers", "0", "-p", "1", "--seed", "3"]
MOCO = [*SMALL, "--moco-k", "20", "--moco-dim", "8", "--mlp", "--moco-t", "0.2", "--aug-plus", "--cos"]
STEP = re.compile(
    r"Epoch: \[\d\]\[\d/\d\]\tTime +[\d.]+ \( *[\d.]+\)\tData +[\d.]+ \( *[\d.]+\)\tLoss \d\.\d{4}e[+-]\d\d "
    r"\(\d\.\d{4}e[+-]\d\d\)\tAcc@1 +[\d.]+ \( *[\d.]+\)\tAcc@5 +[\d.]+ \( *[\d.]+\)"
)


def losses_of(output):
    """The loss of every printed step, in the order of printing."""
    return re.findall(r"^Epoch.*?\tLoss (\S+) ", output, re.MULTILINE)


@pytest.fixture(scope="module")
def pretrained(folders, tmp_path_factory):
    """Output and folder of a finished IFM pre-training run of two epochs in one process."""
    out = tmp_path_factory.mktemp("run")
    words = [
        *MOCO,
        "--epochs",
        "2",
        "--method",
        "ifm",
        "--bn-splits",
        "2",
        "--output-dir",
        str(out),
        str(folders),
    ]
    run = program("main_moco.py", *words)
    assert run.returncode == 0, run.stderr
    return run.stdout, out


def program(*words, **variables):
    command = [sys.executable, *words] if words[0].endswith(".py") else list(words)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_pretraining_prints_and_writes_what_upstream_does(pretrained):
    output, out = pretrained
    assert len(STEP.findall(output)) == 2 * 3
    assert "ln(1+K) = 3.0445" in output
    assert "queue 100% full" in output
    assert sorted(os.listdir(out)) == ["checkpoint_0000.pth.tar", "checkpoint_0001.pth.tar"]
    checkpoint = torch.load(out / "checkpoint_0001.pth.tar", weights_only=True)
    assert checkpoint["epoch"] == 2
    assert checkpoint["arch"] == "resnet18"
    names = set(checkpoint["state_dict"])
    assert {
        "module.encoder_q.conv1.weight",
        "module.encoder_k.fc.2.bias",
        "module.queue",
        "module.queue_ptr",
    } <= names
    assert checkpoint["state_dict"]["module.queue_ptr"].tolist() == [48 % 20]
    assert (
        len(checkpoint["optimizer"]["param_groups"][0]["params"]) == 2 * 64
    )  # both encoders', as upstream's


def test_resume_continues_as_if_never_stopped(pretrained, folders, tmp_path, cli):
    _, out = pretrained
    words = [*MOCO, "--epochs", "2", "--method", "ifm", "--bn-splits", "2", folders, "--output-dir", tmp_path]
    code, _, errors = cli(main_moco.main, *words, "--resume", out / "checkpoint_0000.pth.tar")
    assert code == 0, errors
    whole, resumed = (
        torch.load(folder / "checkpoint_0001.pth.tar", weights_only=True)["state_dict"]
        for folder in (out, tmp_path)
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    earlier = torch.load(out / "checkpoint_0000.pth.tar", weights_only=True)["state_dict"]
    assert not all(torch.equal(whole[name], earlier[name]) for name in whole)


def test_linear_evaluation_from_checkpoint_to_accuracy(pretrained, folders, tmp_path, cli):
    path = pretrained[1] / "checkpoint_0001.pth.tar"
    words = [*SMALL, folders, "--output-dir", tmp_path, "--lr", "1"]
    code, output, errors = cli(
        main_lincls.main, *words, "--epochs", "2", f"--pretrained={path}", "--schedule", "1"
    )
    assert code == 0, errors
    reached = re.findall(r"^ \* Acc@1 (\d+\.\d{3}) Acc@5 100\.000$", output, re.MULTILINE)
    assert len(reached) == 2
    best = torch.load(tmp_path / "model_best.pth.tar", weights_only=True)
    newest = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)
    assert newest["best_acc1"] == best["best_acc1"] == pytest.approx(max(map(float, reached)), abs=1e-3)
    assert best["state_dict"]["module.fc.weight"].shape == (3, 512)  # as many classes as there are folders
    source = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(best["state_dict"]["module.conv1.weight"], source["module.encoder_q.conv1.weight"])

    _, output, _ = cli(main_lincls.main, *words, "-e", "--resume", tmp_path / "model_best.pth.tar")
    assert f" * Acc@1 {best['best_acc1']:.3f} " in output
    code, output, _ = cli(
        main_lincls.main, *words, "--epochs", "3", "--resume", tmp_path / "checkpoint.pth.tar"
    )
    assert code == 0
    assert "Epoch: [2]" in output
    assert "Epoch: [1]" not in output


def test_linear_evaluation_finds_frozen_weights_that_moved(folders, tmp_path, cli, monkeypatch):
    real = main_lincls.train_epoch

    def thaw(args, process, loader, model, *rest):
        real(args, process, loader, model, *rest)
        model.module.bn1.running_mean.add_(1)

    monkeypatch.setattr(main_lincls, "train_epoch", thaw)
    with pytest.raises(RuntimeError, match=r"changed frozen tensors: bn1\.running_mean"):
        cli(main_lincls.main, *SMALL, folders, "--epochs", "1", "--lr", "1", "--output-dir", tmp_path)


def test_trifeature_is_drawn_and_its_factors_are_read(tmp_path, cli, monkeypatch):
    monkeypatch.setattr(trifeature.ensure, "__defaults__", (16, 1, 0, False))
    words = [
        *SMALL,
        "--dataset",
        "trifeature",
        "--dataset_root",
        tmp_path,
        "--output-dir",
        tmp_path,
        "--epochs",
        "1",
    ]
    code, output, errors = cli(main_lincls.main, *words, "-b", "400", "--target", "color", "--lr", "1")
    assert code == 0, errors
    assert "800 training and 200 validation images" in output
    assert "10 classes" in output
    code, _, errors = cli(main_lincls.main, *words)
    assert code == 2
    assert "choose a --target" in errors


# Every way to start


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
        10.0,
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
    of_linear = {"epochs": 100, "lr": 30.0, "schedule": [60, 80], "weight_decay": 0.0}
    of_linear |= {"evaluate": False, "pretrained": ""}
    for parsed, expected in ((moco, {**shared, **of_moco}), (linear, {**shared, **of_linear})):
        assert {name: parsed[name] for name in expected} == expected


# Wrong use: a sentence, exit code 2, no traceback


WRONG = [
    ([], "where are the images?"),
    (["missing"], "there is no folder missing"),
    (["DATA", "--dataset_root", "DATA"], "give either DIR or --dataset_root"),
    (["--dataset_root", "DATA"], "there is no folder .*imagenet100"),
    (["DATA", "-a", "resnet5"], "no classification model 'resnet5'; did you mean resnet50?"),
    (["DATA", "-a", "vit_b_16"], "vit_b_16 has no last layer `fc`"),
    (["DATA", "-b", "25"], "has 24 images, fewer than a step's 25"),
    (["DATA", "--epsilon", "0.1"], "add --method ifm"),
    (["DATA", "--alpha", "1"], "add --method ifm"),
    (["DATA", "--method", "ifm", "--epsilon", "-1"], "--epsilon must be 0 or more"),
    (["DATA", "--method", "ifm", "--alpha", "nan"], "--alpha must be 0 or more"),
    (["DATA", "--method", "ifm_only", "--alpha", "1"], "--method ifm_only does not have"),
    (["DATA", "--method", "other"], "invalid choice: 'other'"),
    (["DATA", "--moco-t", "0"], "--moco-t must be above 0"),
    (["DATA", "--moco-m", "1.5"], "--moco-m must be between 0 and 1"),
    (["DATA", "--moco-k", "0"], "--moco-k must be at least 1"),
    (["DATA", "--bn-splits", "3"], "has no --bn-splits 3 equal groups"),
    (["DATA", "--lr", "0"], "--lr must be above 0"),
    (["DATA", "--epochs", "0"], "--epochs must be at least 1"),
    (["DATA", "--start-epoch", "7", "--epochs", "7"], "leaves nothing"),
    (["DATA", "--workers", "-1"], "--workers must be 0"),
    (["DATA", "--seed", "-1"], "--seed must be between"),
    (["DATA", "--resume", "missing.pth.tar"], "there is no file missing.pth.tar"),
    (["DATA", "--resume", "DATA/train/ant/0.jpg"], "not a checkpoint"),
    (["DATA", "--output-dir", "DATA/train/ant/0.jpg"], "cannot write to --output-dir"),
    (["DATA", "--dist-backend", "nccl"], "nccl needs a GPU"),
    (["DATA", "--dist-backend", "tcp"], "--dist-backend tcp is not known"),
    (["DATA", "--gpu", "0"], "this machine has 0 GPUs"),
    (["DATA", "--world-size", "2"], "needs --rank between 0 and 1"),
    (["DATA", "--world-size", "2", "--rank", "0"], "several nodes need --dist-url"),
    (
        ["DATA", "--world-size", "2", "--rank", "2", "--dist-url", "tcp://127.0.0.1:1"],
        "needs --rank between 0 and 1",
    ),
    (["DATA", "--dist-url", "env://"], "needs the variable WORLD_SIZE"),
]


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the expected sentences are those of a machine without a GPU"
)
@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_use_of_pretraining_is_a_sentence(words, message, folders, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("DATA", str(folders)) for word in words]
    code, _, errors = cli(main_moco.main, *MOCO, *words)
    assert code == 2
    assert re.search(message, errors), errors
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1 or "usage" in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "where are the images?"),
        (["DATA", "-e"], "--evaluate needs the classifier"),
        (["DATA", "--pretrained", "missing.pth.tar"], "missing.pth.tar"),
        (["DATA", "--pretrained", "DATA/val/ant/0.jpg"], "not a checkpoint"),
        (["DATA", "--target", "shape"], "is not named shape_texture_color"),
        (["DATA", "--lr", "1e38", "--epochs", "3"], "start again with a lower --lr"),
    ],
)
def test_wrong_use_of_linear_evaluation_is_a_sentence(words, message, folders, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("DATA", str(folders)) for word in words]
    code, _, errors = cli(main_lincls.main, *SMALL, *words)
    assert code == 2
    assert re.search(message, errors), errors
    assert "Traceback" not in errors


def test_a_checkpoint_of_another_model_is_refused(pretrained, folders, tmp_path, cli):
    path = pretrained[1] / "checkpoint_0000.pth.tar"
    words = [*MOCO, folders, "--output-dir", tmp_path, "--resume", path]
    for more, message in (
        (["--moco-k", "24"], "does not fit this model.*queue is"),
        (["--moco-dim", "9"], "does not fit this model"),
        (["-a", "resnet34"], "is of -a resnet18, not of -a resnet34"),
        (["--epochs", "1"], "has finished 1 epochs; raise --epochs"),
    ):
        code, _, errors = cli(main_moco.main, *words, *more)
        assert code == 2
        assert re.search(message, errors), errors
    code, _, errors = cli(main_lincls.main, *SMALL, "-a", "resnet34", folders, "--pretrained", path)
    assert code == 2
    assert "is of -a resnet18" in errors


def test_incomplete_folders_are_said(tmp_path, cli):
    def run():
        code, _, errors = cli(main_moco.main, *MOCO, tmp_path, "--output-dir", tmp_path / "out")
        assert code == 2
        return errors

    assert "has no folder train/" in run()
    (tmp_path / "train").mkdir()
    assert "is not complete" in run()
    make_folders(tmp_path / "good", classes=("ant",))
    (tmp_path / "good" / "train" / "bee").mkdir()
    (tmp_path / "train").rmdir()
    (tmp_path / "good" / "train").rename(tmp_path / "train")
    assert "bee" in run()
    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "bee" / "0.png")
    (tmp_path / "train" / "bee" / "1.jpg").write_text("no image")
    errors = run()
    assert "bee/1.jpg cannot be read as an image" in errors
    assert len(errors.strip().splitlines()) == 1


def test_a_port_in_use_is_said(folders, tmp_path, free_port, cli):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port))
        taken.listen()
        node = two_nodes(free_port, folders, [tmp_path])[0]
        _, errors = node.communicate(timeout=60)
    assert node.returncode == 2
    assert f"the port of tcp://127.0.0.1:{free_port} is in use" in errors
    assert "Traceback" not in errors
