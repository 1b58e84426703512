"""A miniature with ImageNet's structure, as folders and as tar files."""

import io
import tarfile
import zlib
from pathlib import Path

from moco.imagenet100 import make

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
