"""`python -m moco.check`: every bad file is named, what training refuses is a fault, good data are good."""

import io
import json
import os
import re
import runpy
import shutil
import signal
import struct
import sys
import time
import zlib

import numpy as np
import pytest
from forked_program import Program
from PIL import Image

from moco import check, trifeature

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photograph(width=90, height=61):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


BAD = {  # a file of that name in train/bee: how the reason begins
    "truncated.jpg": (encoded(photograph())[:1500], "image file is truncated"),
    "text.jpg": (b"<html>not found</html>", "no image that Pillow knows"),
    "empty.jpg": (b"", "no image that Pillow knows"),
    "bomb.png": (encoded(Image.new("1", (20000, 20000)), "PNG"), "Image size (400000000 pixels) exceeds"),
}


def damage(root):
    """Put damaged files into root/train/bee, and a link to nowhere. Returns {path: how the reason begins}."""
    folder = root / "train" / "bee"
    for name, (data, _) in BAD.items():
        (folder / name).write_bytes(data)
    (folder / "link.jpg").symlink_to("nowhere")
    reasons = {str(folder / name): reason for name, (_, reason) in BAD.items()}
    return reasons | {str(folder / "link.jpg"): "No such file or directory"}


@pytest.fixture
def images(folders, tmp_path):
    """A copy of `folders` to change: 24 + 9 images of ant, bee and cat."""
    return shutil.copytree(folders, tmp_path / "images")


def reported(output):
    """{path: reason} of the bad files in a text."""
    lines = output.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("bad: ")]
    return {lines[at][5:]: lines[at + 1].strip() for at in starts}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_good_data_set_is_good(folders, cli, workers):
    before = sorted(folders.rglob("*"))
    code, output, errors = cli(check.main, folders, "-j", workers)
    assert code == 0
    assert output.splitlines()[:3] == [
        f"{folders}/train: 24 images in 3 classes",
        "  pixels (smallest, median, largest): width 40 / 40 / 40, height 30 / 30 / 30",
        "  images of a class (smallest, median, largest): 8 / 8 / 8",
    ]
    assert f"{folders}/val: 9 images in 3 classes" in output
    assert output.splitlines()[-1].startswith("all 33 images can be read, by ")
    assert "bad" not in output and "odd" not in output and "fault" not in output
    assert re.fullmatch(rf"{folders}: 33/33 images in \d s\n", errors)
    assert sorted(folders.rglob("*")) == before


@pytest.mark.parametrize("workers", ["0", "3"])
def test_every_kind_of_bad_file_is_named_with_its_reason(images, cli, workers):
    reasons = damage(images)
    late = images / "val" / "cat" / "zzz.jpg"  # the last one of all
    late.write_bytes(b"x")
    reasons[str(late)] = "no image that Pillow knows"
    code, output, _ = cli(check.main, images, "-j", workers)
    found = reported(output)
    assert code == 1 and list(found) == sorted(reasons)
    assert all(found[path].startswith(reason) for path, reason in reasons.items())
    assert f"6 of {24 + 9 + 6} images cannot be read" in output
    for path in reasons:
        os.remove(path)
    assert cli(check.main, images)[0] == 0


def test_names_of_any_bytes_are_printed_escaped(images, cli):
    folder = os.fsencode(images / "train" / "ant")
    for name in (b"caf\xe9.jpg", b"two\nlines.jpg"):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(b"no image")
    with pytest.raises(UnicodeEncodeError):  # here too, standard output is strict
        print(os.fsdecode(b"caf\xe9"))
    code, output, _ = cli(check.main, images, "-j", "0")
    assert code == 1
    assert f"bad: {images}/train/ant/caf\\udce9.jpg\n" in output
    assert f"bad: {images}/train/ant/two\\nlines.jpg\n" in output


def test_odd_images_are_counted_and_good(tmp_path, cli, monkeypatch):
    exif = Image.Exif()
    exif[check.ORIENTATION] = 6
    palette = photograph().convert("P")
    gray16 = Image.fromarray(np.arange(6000, dtype=np.uint16).reshape(60, 100))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rgb16 = (  # 2 x 1 pixels of 48 bits each, which Pillow cannot write
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(">6H", 0, 1, 0x8000, 0xFFFF, 0x1234, 0)))
        + chunk(b"IEND", b"")
    )
    odd = {
        "plain.jpg": encoded(photograph()),
        "gray.jpg": encoded(photograph().convert("L")),
        "one pixel.png": encoded(photograph(1, 1), "PNG"),
        "cmyk.jpg": encoded(photograph().convert("CMYK")),
        "turned.jpg": encoded(photograph(), exif=exif),
        "rgba.png": encoded(photograph().convert("RGBA"), "PNG"),
        "la.png": encoded(photograph().convert("LA"), "PNG"),
        "transparent.png": encoded(palette, "PNG", transparency=0),
        "gray16.png": encoded(gray16, "PNG"),
        "rgb16.png": rgb16,
    }
    folder = tmp_path / "train" / "one class"
    folder.mkdir(parents=True)
    for name, data in odd.items():
        (folder / name).write_bytes(data)
    code, output, _ = cli(check.main, tmp_path, "--json")
    report = json.loads(output)
    assert code == 0 and report["bad"] == report["faults"] == [] and report["images"] == len(odd)
    assert report["odd"] == {"orientation": 1, "CMYK": 1, "16 bits": 2, "alpha": 3}
    assert report["splits"]["train"]["width"] == [1, 90, 100]
    assert report["splits"]["train"]["height"] == [1, 61, 61]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # twice that is refused
    _, output, _ = cli(check.main, tmp_path, "-j", "0")
    assert "odd, but read:\n  1 with an orientation in EXIF, which training ignores: pixels" in output
    assert "\n  1 in CMYK" in output and "\n  3 with transparency" in output and " so large that" in output


def test_classes_and_files_that_training_does_not_use(images, cli):
    train = images / "train"
    (train / "ant" / "list.txt").write_text("0.jpg")
    (train / "stray.jpg").write_bytes(encoded(photograph()))
    (train / "ant" / "deeper").mkdir()
    (train / "ant" / "0.jpg").rename(train / "ant" / "deeper" / "0.JPEG")
    (train / "ant" / "folder.jpg").mkdir()
    (train / "bee" / "linked").symlink_to(images / "val" / "bee")
    code, output, _ = cli(check.main, images)
    assert code == 0 and f"{train}: 27 images in 3 classes" in output
    assert "2 files that training does not use, such as " in output

    (images / "val" / "cat").rename(images / "val" / "cow")
    code, output, _ = cli(check.main, images)
    assert code == 1 and "fault: class cow is in " in output and "can be read" in output
    cat = (images / "val" / "cow").rename(images / "cat")
    code, output, _ = cli(check.main, images)
    assert code == 0 and "all 33 images can be read" in output  # val/ may lack a class

    (images / "val" / "cat").mkdir()  # an empty class; those of the others are still read
    code, output, _ = cli(check.main, images)
    assert code == 1 and "/val is not complete (Found no valid file for the classes cat. Supported" in output
    assert "all 33 images" in output

    shutil.rmtree(images / "val")  # pre-training needs none
    assert cli(check.main, images)[0] == 0 and cat.exists()


def test_images_without_class_folders_are_a_fault_as_in_training(images, cli):
    (images / "train" / "ant").rename(images / "flat")
    shutil.rmtree(images / "train")
    (images / "flat").rename(images / "train")
    code, output, _ = cli(check.main, images)
    assert code == 1 and "train is not complete (Couldn't find any class folder" in output


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn") / "trifeature"
    trifeature.generate(root, size=16, renders=1)
    return root


def test_trifeatures_held_out_combinations_are_by_design(drawn, cli):
    code, output, _ = cli(check.main, drawn, "-j", "0")
    assert code == 0 and "fault" not in output
    assert "a Trifeature set: by design, val/ holds the combinations that train/ does not have\n" in output
    settings = drawn / trifeature.SETTINGS
    text = settings.read_text()
    settings.unlink()  # negative control
    code, output, _ = cli(check.main, drawn, "-j", "0")
    settings.write_text(text)
    assert code == 1 and "fault: class " in output


def test_wrong_use_is_a_sentence(tmp_path, cli, monkeypatch, capsys):
    for words, message in (
        ([], "the following arguments are required: DIR"),
        ([tmp_path / "none"], "there is no folder"),
        ([tmp_path], "has no folder train/"),
        ([tmp_path, "-j", "-1"], "--workers must be 0"),
    ):
        code, output, errors = cli(check.main, *words)
        assert code == 2 and message in errors and output == "" and "Traceback" not in errors
    monkeypatch.setattr(sys, "argv", ["check.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        runpy.run_path(check.__file__, run_name="__main__")
    assert capsys.readouterr().err.startswith("python -m moco.check: error: ")


def test_a_worker_that_is_killed_is_a_sentence(folders, monkeypatch):
    def slow(report):  # a check whose workers say that they have begun, and never end
        monkeypatch.setattr(
            check, "read_pixels", lambda path: print("begun", file=report, flush=True) or time.sleep(60)
        )
        sys.argv = ["check", str(folders), "-j", "2"]
        check.main()

    running = Program(slow)
    os.kill(running.workers[0], signal.SIGKILL)
    code, said = running.end()
    assert code == 2 and "data worker" in said and "Traceback" not in said
    running.clear()
