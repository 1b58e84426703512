"""ImageNet-100 out of a miniature with ImageNet's structure, in each form in which people have ImageNet."""

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import pytest

from moco.errors import UserError
from moco.imagenet100 import CLASS_LIST, make, read_classes
from moco.imagenet_source import read_val_labels

CLASSES = ["n01440764", "n02123045", "n13040303"]
OTHERS = ["n01443537", "n04589890"]
TRAIN = {"n01440764": 3, "n02123045": 4, "n13040303": 2, "n01443537": 2, "n04589890": 1}
EXPECTED = {"train": (9, (2, 4)), "val": (6, (2, 2))}
VAL_ORDER = [*CLASSES, *OTHERS, *reversed(OTHERS), *reversed(CLASSES)]  # two images of each class
SYNSETS = "imagenet_2012_validation_synset_labels.txt"


def pixels(name):
    return name.encode() * (1 + zlib.crc32(name.encode()) % 100)  # images differ in size too


def val_name(number):
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def originals():
    """{split: {wnid: {name: bytes}}} of the miniature, all five classes."""
    train = {wnid: {f"{wnid}_{i}.JPEG": pixels(f"{wnid}_{i}") for i in range(n)} for wnid, n in TRAIN.items()}
    val = {wnid: {} for wnid in TRAIN}
    for number, wnid in enumerate(VAL_ORDER, 1):
        val[wnid][val_name(number)] = pixels(val_name(number))
    return {"train": train, "val": val}


def contents(root):
    return {
        split.name: {
            wnid.name: {file.name: file.read_bytes() for file in wnid.iterdir()} for wnid in split.iterdir()
        }
        for split in Path(root).iterdir()
    }


def wanted():
    return {split: {wnid: files[wnid] for wnid in CLASSES} for split, files in originals().items()}


def write_folders(root, flat_val=False):
    for split, classes in originals().items():
        for wnid, files in classes.items():
            folder = root / split / ("" if flat_val and split == "val" else wnid)
            folder.mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                (folder / name).write_bytes(data)
    if flat_val:
        (root / SYNSETS).write_text("".join(wnid + "\n" for wnid in VAL_ORDER))
    return root


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def write_tars(root):
    root.mkdir()
    miniature = originals()
    inner = {f"{wnid}.tar": tar_of(files) for wnid, files in miniature["train"].items()}
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    flat = {name: data for files in miniature["val"].values() for name, data in files.items()}
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of(dict(sorted(flat.items()))))
    (root / SYNSETS).write_text("".join(wnid + "\n" for wnid in VAL_ORDER))
    return root


def build(places, out, **options):
    places = [places] if isinstance(places, Path) else places
    return make(places, out, classes=CLASSES, expected=EXPECTED, **options)


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


def test_ctrl_c_leaves_nothing_under_the_name_and_the_next_run_continues(tmp_path):
    source = write_folders(tmp_path / "imagenet")
    blocked = source / "train" / "n02123045" / "n02123045_2.JPEG"
    data = blocked.read_bytes()
    blocked.unlink()
    os.mkfifo(blocked)  # the copy waits here for a writer who never comes
    out, part = tmp_path / "out", tmp_path / "out.part"
    call = f"make([{str(source)!r}], {str(out)!r}, copy=True, classes={CLASSES}, expected={EXPECTED})"
    program = (
        f"from moco.errors import run_program; from moco.imagenet100 import make; run_program(lambda: {call})"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    before = part / "train" / "n02123045" / "n02123045_1.JPEG"
    limit = time.monotonic() + 20
    while not before.exists() and time.monotonic() < limit:
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1].endswith("\ninterrupted\n") and process.returncode == 130
    assert before.exists() and not out.exists()

    blocked.unlink()
    blocked.write_bytes(data)
    half = part / "train" / "n01440764" / "n01440764_0.JPEG"
    half.write_bytes(half.read_bytes()[:-1])
    (part / "val" / "n01440764" / "stranger.JPEG").write_bytes(b"from another source")
    kept = {path: path.stat().st_mtime_ns for path in part.rglob("*.JPEG") if path.name != "stranger.JPEG"}
    build(source, out, copy=True)
    assert contents(out) == wanted() and not part.exists()
    made_again = [
        path.name for path, when in kept.items() if (out / path.relative_to(part)).stat().st_mtime_ns != when
    ]
    assert made_again == ["n01440764_0.JPEG"] and len(kept) > 8


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


def break_folders(source, fault):
    if fault == "class":
        shutil.rmtree(source / "train" / "n02123045")
    elif fault == "all classes":
        shutil.rmtree(source / "train")
        (source / "train").mkdir()
    elif fault == "val image":
        (source / "val" / "n02123045" / val_name(2)).unlink()
    elif fault == "train image":
        (source / "train" / "n02123045" / "n02123045_0.JPEG").unlink()
    elif fault == "no val":
        shutil.rmtree(source / "val")
    elif fault == "all":
        shutil.rmtree(source)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("class", r"train has 5 of the 9 train images .* 1 of 3 classes are missing: n02123045$"),
        ("all classes", "3 of 3 classes are missing: n01440764, n02123045, n13040303"),
        ("val image", "val has 5 of the 6 val images .* n02123045 has 1 instead of 2$"),
        ("train image", "train has 8 of the 9 .* below 4 are n01440764 3, n02123045 3, n13040303 2$"),
        ("no val", "no val images in .*ILSVRC2012_img_val.tar"),
        ("all", "imagenet does not exist"),
    ],
)
def test_what_a_folder_lacks_is_said_before_anything_is_made(tmp_path, fault, sentence):
    break_folders(write_folders(tmp_path / "imagenet"), fault)
    with pytest.raises(UserError, match=sentence):
        build(tmp_path / "imagenet", tmp_path / "out", copy=True)
    assert set(os.listdir(tmp_path)) <= {"imagenet"}


@pytest.mark.parametrize("fault", ["cut off", "class missing", "image missing", "not a tar"])
def test_what_a_tar_file_lacks_is_said(tmp_path, fault):
    source = write_tars(tmp_path / "imagenet")
    path = source / "ILSVRC2012_img_train.tar"
    train = originals()["train"]
    if fault == "cut off":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif fault == "not a tar":
        path.write_text("<html>")
    else:
        if fault == "class missing":
            del train["n13040303"]
        else:
            del train["n13040303"]["n13040303_1.JPEG"]
        path.write_bytes(tar_of({f"{wnid}.tar": tar_of(files) for wnid, files in train.items()}))
    sentence = {
        "class missing": "lacks 1 of 3 classes: n13040303",
        "image missing": "has 8 of the 9 train images .* n13040303 has 1 instead of 2 to 4",
    }.get(fault, "damaged or cut off .* MD5 of the published file is 1d675b47")
    with pytest.raises(UserError, match=sentence):
        build(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(source)
    build(write_tars(tmp_path / "imagenet"), tmp_path / "out")
    assert contents(tmp_path / "out") == wanted() and not (tmp_path / "out.part").exists()


def test_an_output_that_exists(tmp_path):
    source, out = write_folders(tmp_path / "imagenet"), tmp_path / "out"
    out.mkdir()
    build(source, out)  # an empty folder is no loss
    inode = out.stat().st_ino
    with pytest.raises(UserError, match="exists already.*--force"):
        build(source, out)
    assert out.stat().st_ino == inode
    build(source, out, copy=True, force=True)
    assert contents(out) == wanted() and out.stat().st_ino != inode
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds more than"):
        build(source, out, force=True)
    for target in (source, tmp_path, source / "train" / "new"):
        with pytest.raises(UserError, match="lie in each other"):
            build(source, target, force=True)
    other = tmp_path / "other.part"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(UserError, match="other.part is in the way"):
        build(source, tmp_path / "other")
    assert (
        contents(source) == originals() and (out / "notes.txt").exists() and (other / "thesis.tex").exists()
    )


def test_a_disk_that_cannot_be_written_to_is_a_sentence(tmp_path):
    source = write_folders(tmp_path / "imagenet")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Not a directory.*continues"):
        build(source, tmp_path / "file" / "out")


def test_the_program_on_the_real_number_of_classes_and_images(tmp_path):
    for count in (1266, 1267, 50):  # many classes may link to one folder of images
        (tmp_path / str(count)).mkdir()
        for number in range(count):
            (tmp_path / str(count) / f"{number}.JPEG").touch()
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
