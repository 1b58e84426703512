"""ImageNet-100 out of a miniature with ImageNet's structure, in each form in which people have ImageNet."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from miniature import (
    CLASSES,
    OTHERS,
    SYNSETS,
    TRAIN,
    VAL_ORDER,
    build,
    contents,
    originals,
    pixels,
    val_name,
    wanted,
    write_folders,
    write_tars,
)

from moco.errors import UserError
from moco.imagenet100 import CLASS_LIST, read_classes
from moco.imagenet_source import read_val_labels


def test_the_list_is_the_published_one(tmp_path):
    classes = read_classes()
    assert len(set(classes)) == 100 and classes == sorted(classes)
    changed = tmp_path / "imagenet100.txt"
    changed.write_text(CLASS_LIST.read_text().replace("n02869837", "n01440764"))
    with pytest.raises(UserError, match="not the published list"):
        read_classes(changed)


@pytest.mark.parametrize("form", ["folders", "flat val", "tars", "tars by name"])
@pytest.mark.parametrize("copy", [False, True])
def test_every_form_gives_the_same_images(tmp_path, form, copy):
    source = tmp_path / "imagenet"
    write_tars(source) if "tars" in form else write_folders(source, flat_val=form == "flat val")
    before = contents(source) if form == "folders" else None
    places = sorted(source.glob("*.tar")) if form == "tars by name" else [source]
    out = tmp_path / "new" / "imagenet100"
    assert build(places, out, copy=copy) == {"train": 9, "val": 6}
    assert contents(out) == wanted() != originals()
    links = [path for path in out.rglob("*") if path.is_symlink()]
    in_class_folders = {"folders": 6, "flat val": 3 + 6}.get(form, 0)
    assert len(links) == (0 if copy else in_class_folders)
    assert os.listdir(out.parent) == ["imagenet100"]
    assert before is None or contents(source) == before


def test_imagefolder_reads_through_the_links(tmp_path):
    from torchvision.datasets import ImageFolder

    build(write_folders(tmp_path / "imagenet"), tmp_path / "out")
    folder = ImageFolder(tmp_path / "out" / "train", loader=lambda path: Path(path).read_bytes())
    assert folder.classes == CLASSES and len(folder) == 9
    assert folder[0] == (pixels("n01440764_0"), 0)


def write_labels(folder, form):
    names = [val_name(number)[:-5] for number in range(1, 11)]
    if form == "synsets":
        path, text = folder / "labels.txt", "\n".join(VAL_ORDER)
    elif form == "kaggle":  # in no order, a class and boxes
        rows = [
            f"{name},{wnid} 85 1 499 272 {wnid} 3 4 5 6" for name, wnid in zip(names, VAL_ORDER, strict=True)
        ]
        path, text = folder / "LOC_val_solution.csv", "\n".join(["ImageId,PredictionString", *rows[::-1]])
    elif form == "valprep":
        moves = [f"mv {name}.JPEG {wnid}/" for name, wnid in zip(names, VAL_ORDER, strict=True)]
        path, text = folder / "valprep.sh", "\n".join([f"mkdir -p {wnid}" for wnid in TRAIN] + moves)
    else:
        import numpy
        import scipy.io

        fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
        ids = {wnid: number for number, wnid in enumerate(reversed(TRAIN), 1)}  # not the order of the wnids
        synsets = numpy.array([(number, wnid, "a, b", 0) for wnid, number in ids.items()], dtype=fields)
        scipy.io.savemat(folder / "meta.mat", {"synsets": synsets.reshape(-1, 1)}, do_compression=True)
        path = folder / "ILSVRC2012_validation_ground_truth.txt"
        text = "".join(f"{ids[wnid]}\n" for wnid in VAL_ORDER)
    path.write_text(text)
    if form == "devkit archive":
        archive = folder / "ILSVRC2012_devkit_t12.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            for part in (path, folder / "meta.mat"):
                tar.add(part, f"ILSVRC2012_devkit_t12/data/{part.name}")
        return archive
    return path


@pytest.mark.parametrize("form", ["synsets", "kaggle", "valprep", "devkit", "devkit archive"])
def test_every_form_of_validation_labels(tmp_path, form):
    expected = {val_name(number)[:-5]: wnid for number, wnid in enumerate(VAL_ORDER, 1)}
    path = write_labels(tmp_path, form)
    assert read_val_labels(path) == expected
    if form.startswith("devkit"):
        return
    path.write_text(path.read_text().replace(f"{OTHERS[0]}", f"{CLASSES[0]}"))
    assert read_val_labels(path) != expected


def test_label_files_that_do_not_serve(tmp_path, monkeypatch):
    source = write_tars(tmp_path / "imagenet")
    cases = {
        "1 of 10 validation images have no label, such as ILSVRC2012_val_00000010": "\n".join(VAL_ORDER[1:]),
        "n01440764 has 3 instead of 2": "\n".join([CLASSES[0], CLASSES[0], *VAL_ORDER[2:]]),
        "names no classes such as n01440764": "\n".join(map(str, range(10))),
    }
    for sentence, text in cases.items():
        (tmp_path / "labels").write_text(text)
        with pytest.raises(UserError, match=sentence):
            build(source, tmp_path / "out", val_labels=tmp_path / "labels")
    (source / SYNSETS).unlink()
    with pytest.raises(UserError, match="name a file with --val-labels"):
        build(source, tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        build(source, tmp_path / "out", val_labels=tmp_path / "nowhere")
    archive = write_labels(tmp_path, "devkit archive")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="pip install scipy"):
        patch.setitem(sys.modules, "scipy.io", None)
        read_val_labels(archive)
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(UserError, match="damaged or cut off"):
        read_val_labels(archive)
    (tmp_path / "meta.mat").write_bytes(b"no MATLAB file")
    with pytest.raises(UserError, match="not the development kit's"):
        read_val_labels(tmp_path / "ILSVRC2012_validation_ground_truth.txt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("copy", [False, True])
def test_a_run_of_the_other_kind_is_continued_without_touching_imagenet(tmp_path, copy):
    source = write_folders(tmp_path / "imagenet")
    part = tmp_path / "out.part" / "train"
    part.mkdir(parents=True)
    if copy:  # what a run without --copy leaves
        (part / "n01440764").symlink_to(source / "train" / "n01440764")
    else:
        shutil.copytree(source / "train" / "n01440764", part / "n01440764")
    (source / "train" / "n01440764" / "n01440764_1.JPEG").touch()
    build(source, tmp_path / "out", copy=copy)
    assert contents(source) == originals()
    assert contents(tmp_path / "out") == wanted()
    assert (tmp_path / "out" / "train" / "n01440764").is_symlink() != copy


@pytest.mark.slow
def test_the_program_on_the_real_number_of_classes_and_images(tmp_path):
    for count in (1266, 1267, 50):  # many classes may link to one folder of images
        (tmp_path / str(count)).mkdir()
        for number in range(count):
            (tmp_path / str(count) / f"{number}.JPEG").write_bytes(b"x")
    for i, wnid in enumerate(read_classes()):
        for split, count in (("train", 1267 if i < 89 else 1266), ("val", 50)):  # 126,689 and 5,000 together
            folder = tmp_path / "imagenet" / split
            folder.mkdir(parents=True, exist_ok=True)
            (folder / wnid).symlink_to(tmp_path / str(count))

    def program(*arguments):
        command = [sys.executable, "-m", "moco.imagenet100", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    done = program(tmp_path / "imagenet", tmp_path / "imagenet100")
    assert done.returncode == 0 and "126,689 training and 5,000 validation images" in done.stdout, done.stderr
    assert f"--dataset_root {tmp_path} --dataset imagenet100" in done.stdout
    again = program(tmp_path / "imagenet", tmp_path / "imagenet100")
    assert again.returncode == 2 and "exists already" in again.stderr and "Traceback" not in again.stderr
    (tmp_path / "1266" / "0.JPEG").unlink()
    fewer = program(tmp_path / "imagenet", tmp_path / "new")
    assert fewer.returncode == 2 and "has 126,678 of the 126,689 train images" in fewer.stderr
