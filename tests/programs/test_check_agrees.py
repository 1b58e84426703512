"""moco.check says that training will start only with folders with which both programs start."""

import shutil

import linear_runs
import pytest
from command_lines import TINY
from odd_images import encoded, photograph
from started_runs import run

from moco import check


def images_beside_no_class(root):
    for image in (root / "train" / "ant").iterdir():
        image.rename(root / "train" / image.name)
    for name in ("ant", "bee", "cat"):
        shutil.rmtree(root / "train" / name)


def an_empty_class(root):
    (root / "train" / "dog").mkdir()


def a_class_of_hidden_files(root):
    (root / "train" / "dog").mkdir()
    (root / "train" / "dog" / "._0.jpg").write_bytes(encoded(photograph()))


def an_empty_class_in_val(root):
    for image in (root / "val" / "bee").iterdir():
        image.unlink()


def a_class_that_train_lacks(root):
    (root / "val" / "bee").rename(root / "val" / "bug")


def no_val(root):
    shutil.rmtree(root / "val")


def a_class_that_val_lacks(root):
    shutil.rmtree(root / "val" / "bee")


def hidden_folders(root):
    for folder in (root / "train", root / "train" / "ant", root / "val"):
        (folder / ".ipynb_checkpoints").mkdir()
        (folder / ".ipynb_checkpoints" / "0-checkpoint.jpg").write_bytes(b"no image")


def a_link_that_leads_back(root):
    (root / "train" / "loop").symlink_to(".")
    (root / "val" / "ant" / "loop").symlink_to("..")


def nothing(root):
    pass


STARTS = {  # whether pre-training and linear evaluation start
    images_beside_no_class: (False, False),
    an_empty_class: (False, False),
    a_class_of_hidden_files: (False, False),
    an_empty_class_in_val: (True, False),
    a_class_that_train_lacks: (True, False),
    no_val: (True, False),
    a_class_that_val_lacks: (True, True),
    hidden_folders: (True, True),
    a_link_that_leads_back: (True, True),
    nothing: (True, True),
}


@pytest.mark.parametrize("change", STARTS)
def test_check_says_what_the_programs_do(folders, tmp_path, cli, run_ranks, change):
    root = shutil.copytree(folders, tmp_path / "images")
    change(root)
    starts = STARTS[change]
    said = run(*TINY, "--epochs", "1", "--output-dir", tmp_path / "out", root, code=0 if starts[0] else 2)
    assert ("Epoch: [0]" in said) == starts[0]
    words = ["--epochs", "1", "--schedule", "1"]
    [code], linear = linear_runs.run(run_ranks, 1, root, tmp_path / "linear", *words)
    assert (code == 0) == ("best Acc@1" in linear) == starts[1]

    code, output, _ = cli(check.main, root, "-j", "0")
    assert ("pre-training will start" in output) == (starts[0] and code == 0)
    assert ("linear evaluation will start" in output) == starts[1]
    assert code == (0 if all(starts) or change is no_val else 1 if starts[0] else 2)
    if starts[0]:  # the same images, and the same words on what is left out
        assert "train: images 24, classes 3" in output and f"24 images of {root}" in said.splitlines()
        left_out = [line.strip() for line in output.splitlines() if "left out in " in line]
        assert [line for line in said.splitlines() if line.startswith("left out in ")] == left_out[:1]
        assert not starts[1] or all(line in linear.splitlines() for line in left_out)
        assert bool(left_out) == (change in (hidden_folders, a_link_that_leads_back))
