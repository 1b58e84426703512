"""The JPEG files that measurements make."""

import os
from pathlib import Path

import pytest
from PIL import Image

from moco import photographs


def test_made_images_are_jpeg_files_of_the_intended_size(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    paths = photographs.make_photographs(first, 2)
    again = photographs.make_photographs(second, 2)
    for path, same, size in zip(paths, again, photographs.SIZES, strict=False):
        assert Path(path).read_bytes() == Path(same).read_bytes()
        with Image.open(path) as image:
            assert (image.format, image.size) == ("JPEG", size)
        assert os.path.getsize(path) / (size[0] * size[1]) == pytest.approx(0.42, rel=0.15)
    assert photographs.make_photographs(second, 1, seed=1) == again[:1]
    assert Path(paths[0]).read_bytes() != Path(again[0]).read_bytes()
