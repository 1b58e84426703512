"""ImageNet-100 out of a miniature with ImageNet's structure, and what is said when something is wrong."""

import hashlib
import os
import shutil

import pytest
from miniature import (
    CLASSES,
    build,
    contents,
    originals,
    val_name,
    wanted,
    write_folders,
    write_kaggle,
)
from torchvision.datasets import ImageFolder

from moco import imagenet100
from moco.errors import UserError


def test_the_list_is_the_published_one():
    classes = imagenet100.read_classes()
    assert len(set(classes)) == 100 and classes == sorted(classes)
    with open(os.path.join(os.path.dirname(imagenet100.__file__), "imagenet100.txt"), "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    assert digest == "79f3f1552ccc478ce24bd934b4573625db584ddc1f4643ae23c994a94cb11397"


@pytest.mark.parametrize("layout", ["folders", "Kaggle", "inside Kaggle", "labels elsewhere"])
@pytest.mark.parametrize("copy", [False, True])
def test_every_layout_gives_the_same_images(tmp_path, layout, copy):
    source, options = tmp_path / "imagenet", {}
    write_folders(source) if layout == "folders" else write_kaggle(source)
    if layout == "inside Kaggle":
        source = source / "ILSVRC" / "Data" / "CLS-LOC"
    if layout == "labels elsewhere":
        options = {"labels": (source / "LOC_val_solution.csv").rename(tmp_path / "labels")}
    before = sorted((path, path.stat().st_mtime_ns) for path in source.rglob("*"))
    out = tmp_path / "new" / "imagenet100"
    assert build(source, out, copy=copy, **options) == {"train": 9, "val": 6}
    assert contents(out) == wanted() != originals()
    assert sum(path.is_symlink() for path in out.rglob("*")) == (0 if copy else 9 + 6)
    assert os.listdir(out.parent) == ["imagenet100"]
    assert sorted((path, path.stat().st_mtime_ns) for path in source.rglob("*")) == before
    folder = ImageFolder(out / "train", loader=lambda path: path)
    assert folder.classes == CLASSES and len(folder) == 9


def test_labels_that_do_not_serve(tmp_path):
    source = write_kaggle(tmp_path / "imagenet")
    labels = source / "LOC_val_solution.csv"
    lines = labels.read_text().splitlines()
    for sentence, text in {
        "val_00000001.JPEG has no class in LOC_val_solution.csv": "\n".join(lines[:-1]),
        "val has 5 of the 6 .* smallest classes: n01440764 with 1,": "\n".join(lines).replace(
            "ILSVRC2012_val_00000001,n01440764", "ILSVRC2012_val_00000001,n01443537"
        ),
    }.items():
        labels.write_text(text)
        with pytest.raises(UserError, match=sentence):
            build(source, tmp_path / "out")
    labels.unlink()
    with pytest.raises(UserError, match="no LOC_val_solution.csv at .*: name the file with --val-labels"):
        build(source, tmp_path / "out")
    with pytest.raises(UserError, match="no LOC_val_solution.csv at .*nowhere"):
        build(source, tmp_path / "out", labels=tmp_path / "nowhere")
    assert os.listdir(tmp_path) == ["imagenet"]


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("class", r"train has 5 of the 9 images .* 1 of 3 classes are missing: n02123045; the smallest"),
        ("all classes", "3 of 3 classes are missing: n01440764, n02123045, n13040303$"),
        ("val image", "val has 5 of the 6 images .* the smallest classes: n02123045 with 1, "),
        ("train image", "train has 8 of the 9 images .* n13040303 with 2, n01440764 with 3"),
        ("link to nothing", "train has 8 of the 9 images"),
        ("no val", "has no folders train/ and val/: name the folder of ImageNet"),
        ("all", "has no folders train/ and val/"),
        ("tar files", r'unpack them with torchvision.datasets.ImageNet\(ROOT, split="train"\)'),
    ],
)
def test_what_imagenet_lacks_is_said_before_anything_is_made(tmp_path, fault, sentence):
    source = write_folders(tmp_path / "imagenet")
    image = source / "train" / "n02123045" / "n02123045_0.JPEG"
    if fault == "class":
        shutil.rmtree(image.parent)
    elif fault == "all classes":
        shutil.rmtree(source / "train")
        (source / "train").mkdir()
    elif fault == "val image":
        (source / "val" / "n02123045" / val_name(2)).unlink()
    elif fault in ("train image", "link to nothing"):
        image.unlink()
        if fault == "link to nothing":
            image.symlink_to("nowhere")
    elif fault == "no val":
        shutil.rmtree(source / "val")
    else:
        shutil.rmtree(source)
        if fault == "tar files":
            source.mkdir()
            (source / "ILSVRC2012_img_train.tar").touch()
    with pytest.raises(UserError, match=sentence):
        build(source, tmp_path / "out", copy=True)
    assert set(os.listdir(tmp_path)) <= {"imagenet"}


def test_an_output_that_exists_stays_as_it_is(tmp_path):
    source, out = write_folders(tmp_path / "imagenet"), tmp_path / "out"
    out.mkdir()
    build(source, out)  # an empty folder is no loss
    before = out.stat().st_ino
    with pytest.raises(UserError, match="out exists already: name another folder, or remove it"):
        build(source, out, copy=True)
    assert out.stat().st_ino == before and contents(out) == wanted()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file exists already"):
        build(source, tmp_path / "file" / "out")
    with pytest.raises(UserError, match="exists already"):
        build(source, tmp_path / "file")


@pytest.mark.slow
def test_the_program_on_the_real_number_of_classes_and_images(tmp_path, cli):
    for count in (1266, 1267, 50):  # many classes may link to one folder of images
        (tmp_path / str(count)).mkdir()
        for number in range(count):
            (tmp_path / str(count) / f"{number}.JPEG").write_bytes(b"x")
    for i, wnid in enumerate(imagenet100.read_classes()):
        for split, count in (("train", 1267 if i < 89 else 1266), ("val", 50)):  # 126,689 and 5,000 together
            folder = tmp_path / "imagenet" / split
            folder.mkdir(parents=True, exist_ok=True)
            (folder / wnid).symlink_to(tmp_path / str(count))
    words = [tmp_path / "imagenet", tmp_path / "imagenet100"]
    code, output, errors = cli(imagenet100.main, *words)
    assert code == 0 and "126,689 training and 5,000 validation images" in output, errors
    assert f"--dataset_root {tmp_path} --dataset imagenet100" in output
    (tmp_path / "1266" / "0.JPEG").unlink()
    code, _, errors = cli(imagenet100.main, words[0], tmp_path / "new")
    assert code == 2 and "has 126,678 of the 126,689 images" in errors
