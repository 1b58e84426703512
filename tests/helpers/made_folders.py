"""Small data sets of random images."""

import numpy as np
from PIL import Image


def make_folders(root, classes=("ant", "bee", "cat"), train=8, val=3):
    """Write random JPEG files to root/train and root/val."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((40, 30)).save(root / split / name / f"{i}.jpg")
