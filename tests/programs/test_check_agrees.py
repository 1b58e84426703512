"""moco.check says that training will start only with folders with which both programs start."""

import shutil

import linear_runs
import pytest
from command_lines import TINY
from odd_images import encoded, photograph
from started_runs import run

from moco import check
from moco.data.folders import image_folder, pretraining_images


def images_beside_no_class(root):
    for image in (root / "train" / "ant").iterdir():
        image.rename(root / "train" / image.name)
    for name in ("ant", "bee", "cat"):
        shutil.rmtree(root / "train" / name)


def no_class_folders(root):
    (root / "train").rename(root / "photos")
    (root / "photos" / "ant" / ".thumbnails").mkdir()
    shutil.copy(root / "val" / "ant" / "0.jpg", root)


def no_image(root):
    shutil.rmtree(root / "train")
    (root / "train" / "ant").mkdir(parents=True)


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
    no_image: (False, False),
    images_beside_no_class: (True, False),
    no_class_folders: (True, False),
    an_empty_class: (True, False),
    a_class_of_hidden_files: (True, False),
    an_empty_class_in_val: (True, False),
    a_class_that_train_lacks: (True, False),
    no_val: (True, False),
    a_class_that_val_lacks: (True, True),
    hidden_folders: (True, True),
    a_link_that_leads_back: (True, True),
    nothing: (True, True),
}
LEAVE_OUT = (
    *(no_class_folders, an_empty_class, a_class_of_hidden_files),
    *(hidden_folders, a_link_that_leads_back),
)


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
    without_labels = change in (no_val, images_beside_no_class, no_class_folders)
    assert code == (0 if all(starts) or without_labels else 1 if starts[0] else 2)
    assert ("linear evaluation needs " in output) == without_labels
    if starts[0]:  # the same images, and the same words on what is left out
        summary = pretraining_images(root).summary()
        assert output.splitlines()[: len(summary)] == summary
        assert all(line in said.splitlines() for line in summary)
        assert ("left out" in summary[-1]) == (change in LEAVE_OUT)
        for split in ("train", "val") * starts[1]:
            lines = image_folder(root, split).summary()
            assert all(line in text.splitlines() for line in lines for text in (linear, output))
