"""A miniature with ImageNet's structure, in its two layouts."""

import zlib
from pathlib import Path

from moco.imagenet100 import make

CLASSES = ["n01440764", "n02123045", "n13040303"]
OTHERS = ["n01443537", "n04589890"]
TRAIN = {"n01440764": 3, "n02123045": 4, "n13040303": 2, "n01443537": 2, "n04589890": 1}
EXPECTED = {"train": 9, "val": 6}
VAL_ORDER = [*CLASSES, *OTHERS, *reversed(OTHERS), *reversed(CLASSES)]  # two images of each class


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
    """root/train and root/val with a folder per class, or all images directly in root/val."""
    for split, classes in originals().items():
        for wnid, files in classes.items():
            folder = root / split / ("" if flat_val and split == "val" else wnid)
            folder.mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                (folder / name).write_bytes(data)
    return root


def write_kaggle(root):
    """Kaggle's layout: images below ILSVRC/Data/CLS-LOC, and a table of their classes in another order."""
    write_folders(root / "ILSVRC" / "Data" / "CLS-LOC", flat_val=True)
    rows = [
        f"{val_name(number)[:-5]},{wnid} 85 1 499 272 {wnid} 3 4 5 6 "
        for number, wnid in enumerate(VAL_ORDER, 1)
    ]
    lines = ["ImageId,PredictionString", *rows[::-1]]
    (root / "LOC_val_solution.csv").write_text("".join(line + "\n" for line in lines))
    return root


def build(imagenet, out, **options):
    return make(imagenet, out, classes=CLASSES, expected=EXPECTED, **options)
