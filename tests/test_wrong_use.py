"""Wrong use of the two programs: one sentence, exit code 2, no traceback."""

import re

import pytest
import torch
from command_lines import MOCO, SMALL
from conftest import make_folders
from PIL import Image

import main_lincls
import main_moco
from moco.encoders import check_image_size

WRONG = [
    ([], "where are the images?"),
    (["missing"], "there is no folder missing"),
    (["DATA", "--dataset_root", "DATA"], "give either DIR .* or --dataset_root, not both"),
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
    (
        ["DATA", "--multiprocessing-distributed", "--world-size", "1", "--rank", "1"],
        "needs --rank between 0 and 0",
    ),
    (["DATA", "--bn-splits", "8"], "BatchNorm needs at least 2 images"),
    (["DATA", "--lr", "nan"], "--lr must be above 0"),
    (["DATA", "--cache", "device"], "add --device-aug exact or float"),
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
        (["--moco-k", "24"], "is of a run with --moco-k 20, not 24"),
        (["--moco-dim", "9"], "is of a run with --moco-dim 8, not 9"),
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
    def run(*words):
        code, _, errors = cli(main_moco.main, *MOCO, *words, tmp_path, "--output-dir", tmp_path / "out")
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
    for workers in ("0", "2"):
        errors = run("--workers", workers)
        assert "bee/1.jpg cannot be read as an image" in errors
        assert len(errors.strip().splitlines()) == 1


def test_a_number_that_is_none_in_the_environment_is_said(folders, tmp_path, cli, monkeypatch):
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, errors = cli(main_moco.main, *MOCO, folders, "--output-dir", tmp_path, "--dist-url", "env://")
    assert code == 2
    assert "RANK must be a whole number, not 'x'" in errors


@pytest.mark.parametrize(
    "content", [{0: torch.zeros(1)}, {"state_dict": {"x": torch.zeros(1)}, "epoch": "a"}]
)
def test_files_of_something_else_are_refused(content, folders, tmp_path, cli):
    torch.save(content, tmp_path / "file.pth.tar")
    words = [*MOCO, folders, "--output-dir", tmp_path, "--resume", tmp_path / "file.pth.tar"]
    code, _, errors = cli(main_moco.main, *words)
    assert code == 2
    assert re.search("holds no state_dict|has no optimizer state|its entry epoch", errors), errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-a", "inception_v3", "--image-size", "64"], "inception_v3 cannot take --image-size 64 "),
        (["-a", "googlenet", "--image-size", "8"], "googlenet cannot take --image-size 8 "),
        (["--cache", "device", "--device-aug", "exact", "--resize", "pil"], "leave out --resize"),
        (["--cache", "device"], "add --device-aug exact or float"),
        (
            ["--image-size", "100000", "--workers", "0", "-b", "24", "-a", "resnet18"],
            "GB of memory are free; lower",
        ),
    ],
)
def test_what_the_data_path_cannot_serve_is_said(words, message, folders, tmp_path, cli, monkeypatch):
    for program in (main_moco, main_lincls):
        if "100000" in words:  # not even a network without weights can be tried at this size
            monkeypatch.setattr(program, "check_image_size", lambda arch, size: None)
        settings = MOCO if program is main_moco else SMALL
        code, _, errors = cli(program.main, *settings, *words, folders, "--output-dir", tmp_path)
        assert code == 2 and message in errors and errors.count("\n") == 1, errors


def test_every_architecture_is_tried_without_memory():
    for arch in ("resnet18", "regnet_x_400mf", "shufflenet_v2_x0_5", "inception_v3"):
        check_image_size(arch, 96)


def test_resuming_tells_what_was_chosen_too(pretrained, folders, tmp_path, cli):
    words = [*MOCO, "--epochs", "2", "--method", "ifm", "--bn-splits", "2", folders, "--output-dir", tmp_path]
    words += ["--resume", pretrained[1] / "checkpoint_0000.pth.tar"]
    same = cli(main_moco.main, *words, "--device-aug", "off", "--resize", "pil")
    assert same[0] == 0 and "note: " not in same[1].replace("note: with one", "")
    other = cli(main_moco.main, *words, "--device-aug", "exact")
    assert other[0] == 0 and "note: device_aug was off" in other[1] and "note: resize was pil" in other[1]
