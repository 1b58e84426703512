"""A miniature with ImageNet's structure, in its two layouts."""

import zlib
from pathlib import Path

CLASSES = ["n01440764", "n02123045", "n13040303"]
TRAIN = {"n01440764": 3, "n02123045": 4, "n13040303": 2, "n01443537": 2, "n04589890": 1}
IMAGES = {"train": 9, "val": 6}  # in CLASSES
VAL_ORDER = [*TRAIN, *reversed(TRAIN)]  # two images of each class


def val_name(number):
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def contents(root):
    """{split: {class: {name: bytes}}} of a folder."""
    return {
        split.name: {
            wnid.name: {file.name: file.read_bytes() for file in wnid.iterdir()} for wnid in split.iterdir()
        }
        for split in Path(root).iterdir()
    }


def originals():
    """`contents` of the miniature, all five classes."""

    def file(name):
        return {f"{name}.JPEG": name.encode() * (1 + zlib.crc32(name.encode()) % 100)}

    found = {"train": {wnid: {} for wnid in TRAIN}, "val": {wnid: {} for wnid in TRAIN}}
    for wnid, count in TRAIN.items():
        for number in range(count):
            found["train"][wnid] |= file(f"{wnid}_{number}")
    for number, wnid in enumerate(VAL_ORDER, 1):
        found["val"][wnid] |= file(val_name(number).removesuffix(".JPEG"))
    return found


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
        f"{val_name(number).removesuffix('.JPEG')},{wnid} 85 1 499 272 {wnid} 3 4 5 6 "
        for number, wnid in enumerate(VAL_ORDER, 1)
    ]
    lines = ["ImageId,PredictionString", *rows[::-1]]
    (root / "LOC_val_solution.csv").write_text("".join(line + "\n" for line in lines))
    return root
