"""ImageNet-100 out of a miniature with ImageNet's structure, and what is said when something is wrong."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from forked_program import forked
from miniature import CLASSES, contents, originals, val_name, wanted, write_folders, write_kaggle
from torchvision.datasets import ImageFolder

from moco import imagenet100
from moco.errors import UserError
from moco.imagenet100 import make


def test_the_list_is_the_published_one():
    classes = imagenet100.read_classes()
    assert len(set(classes)) == 100 and classes == sorted(classes)
    digest = hashlib.sha256(Path(imagenet100.__file__).with_name("imagenet100.txt").read_bytes()).hexdigest()
    assert digest == "79f3f1552ccc478ce24bd934b4573625db584ddc1f4643ae23c994a94cb11397"


@pytest.mark.parametrize("write", [write_folders, write_kaggle])
@pytest.mark.parametrize("copy", [False, True])
def test_both_layouts_give_the_same_images(tmp_path, miniature, write, copy):
    source, out = write(tmp_path / "imagenet"), tmp_path / "new" / "imagenet100"
    before = sorted((path, path.stat().st_mtime_ns) for path in source.rglob("*"))
    make(source, out, copy)
    assert contents(out) == wanted() != originals()
    assert sum(path.is_symlink() for path in out.rglob("*")) == (0 if copy else 9 + 6)
    assert os.listdir(out.parent) == ["imagenet100"]
    assert sorted((path, path.stat().st_mtime_ns) for path in source.rglob("*")) == before
    folder = ImageFolder(out / "train", loader=lambda path: path)
    assert folder.classes == CLASSES and len(folder) == 9


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("no label", "val_00000001.JPEG has no class in LOC_val_solution.csv: download"),
        ("wrong label", "val has 5 of the 6 images"),
        ("no labels", "there is no .*imagenet/LOC_val_solution.csv: put it there"),
    ],
)
def test_labels_that_do_not_serve(tmp_path, miniature, fault, sentence):
    source = write_kaggle(tmp_path / "imagenet")
    labels = source / "LOC_val_solution.csv"
    lines = labels.read_text().splitlines()
    if fault == "no label":
        labels.write_text("\n".join(lines[:-1]))
    elif fault == "wrong label":
        first = "ILSVRC2012_val_00000001,"
        labels.write_text("\n".join(lines).replace(f"{first}n01440764", f"{first}n01443537"))
    else:
        labels.unlink()
    with pytest.raises(UserError, match=sentence):
        make(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["imagenet"]


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("class", r"train has 5 of the 9 images .* none of 1 classes such as n02123045: unpack"),
        ("val image", "val has 5 of the 6 images that are needed: unpack"),
        ("link to nothing", "train has 8 of the 9 images"),
        ("no val", "has no folders train/ and val/: name the folder of ImageNet"),
        ("tar files", r'unpack them with torchvision.datasets.ImageNet\(ROOT, split="train"\)'),
    ],
)
def test_what_imagenet_lacks_is_said_before_anything_is_made(tmp_path, miniature, fault, sentence):
    source = write_folders(tmp_path / "imagenet")
    image = source / "train" / "n02123045" / "n02123045_0.JPEG"
    if fault == "class":
        shutil.rmtree(image.parent)
    elif fault == "val image":
        (source / "val" / "n02123045" / val_name(2)).unlink()
    elif fault == "link to nothing":
        image.unlink()
        image.symlink_to("nowhere")
    else:
        shutil.rmtree(source / "val")
        if fault == "tar files":
            (source / "ILSVRC2012_img_train.tar").touch()
    with pytest.raises(UserError, match=sentence):
        make(source, tmp_path / "out", copy=True)
    assert os.listdir(tmp_path) == ["imagenet"]


def test_an_output_that_exists_stays_as_it_is(tmp_path, miniature):
    source, out = write_folders(tmp_path / "imagenet"), tmp_path / "out"
    out.mkdir()
    make(source, out)  # an empty folder may be replaced
    before = out.stat().st_ino
    with pytest.raises(UserError, match="out exists already: name another folder, or remove it"):
        make(source, out, copy=True)
    assert out.stat().st_ino == before and contents(out) == wanted()


def test_a_second_that_makes_the_same_folder_is_refused(tmp_path, miniature, monkeypatch):
    source, out, fill, said = write_folders(tmp_path / "imagenet"), tmp_path / "out", imagenet100._fill, []

    def fill_beside(*words):  # while the first is at work
        if not said:
            pid, output = forked(lambda: make(source, out), (1, 2))
            said.append(output.read())
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
        fill(*words)

    monkeypatch.setattr(imagenet100, "_fill", fill_beside)
    make(source, out, copy=True)
    assert f"error: process {os.getpid()} is making {out} (" in said[0]
    assert contents(out) == wanted() and sorted(os.listdir(tmp_path)) == ["imagenet", "out"]


def test_the_command_line(tmp_path, miniature, cli):
    words = [write_kaggle(tmp_path / "imagenet"), tmp_path / "imagenet100"]
    code, output, errors = cli(imagenet100.main, *words)
    assert code == 0 and "9 training and 6 validation images" in output, errors
    assert f"--dataset_root {tmp_path} --dataset imagenet100" in output
    (tmp_path / "file").touch()
    assert cli(imagenet100.main, words[0], tmp_path / "file")[0] == 2
