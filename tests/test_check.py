"""`python -m moco.check`: every bad file is found and named, and a good data set is called good."""

import json
import os
import re
import signal
import sys
import time

import numpy as np
import pytest
from command_lines import program
from conftest import make_folders
from forked_program import Program
from PIL import Image
from test_bad_images import damage
from test_decoders import DAMAGED, ODD, encoded

from moco import check, check_files
from moco.data import image_folder

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


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
    assert "bad" not in output and "odd" not in output and "only in" not in output
    assert re.fullmatch(rf"{folders}: 33/33 images in \d s\n", errors)
    assert sorted(folders.rglob("*")) == before


@pytest.mark.parametrize("workers", ["0", "3"])
def test_every_kind_of_bad_file_is_named_with_its_reason(tmp_path, cli, workers):
    make_folders(tmp_path, train=20)
    bad = damage(tmp_path, list(DAMAGED))
    late = tmp_path / "val" / "cat" / "zzz.jpg"  # the last one of all
    late.write_bytes(b"x")
    code, output, _ = cli(check.main, tmp_path, "-j", workers)
    assert code == 1
    found = reported(output)
    assert sorted(found) == sorted([*bad, str(late)])
    for name, reason in (
        ("truncated.jpg", "image file is truncated"),
        ("text.jpg", "no image that Pillow knows"),
        ("empty.jpg", "no image that Pillow knows"),
        ("bomb.png", "Image size (400000000 pixels) exceeds limit"),
        ("link.jpg", "No such file or directory"),
    ):
        assert found[str(tmp_path / "train" / "bee" / name)].startswith(reason)
    assert f"{len(bad) + 1} of {60 + 9 + len(bad) + 1} images cannot be read" in output
    assert all(len(line) < 80 or str(tmp_path) in line for line in output.splitlines())

    for path in (*bad, late):
        os.remove(path)
    assert cli(check.main, tmp_path)[0] == 0


def test_a_file_that_is_not_for_the_reader(folders, tmp_path, monkeypatch, cli):
    """As a file of another user or a disk's error is: the system's words."""
    make_folders(tmp_path)
    path = tmp_path / "val" / "bee" / "1.jpg"
    path.unlink()
    path.mkdir()  # a folder is no image: ImageFolder passes it over, and so does the check
    assert cli(check.main, tmp_path)[0] == 0
    real = check_files.read_bytes
    shut = str(tmp_path / "train" / "ant" / "3.jpg")

    def refused(name):
        return real("/proc/self/mem" if name == shut else name)  # it opens, and reading fails

    monkeypatch.setattr(check_files, "read_bytes", refused)
    code, output, _ = cli(check.main, tmp_path, "-j", "0")
    assert code == 1 and reported(output) == {shut: "Input/output error"}


def test_odd_images_are_counted_and_good(tmp_path, cli):
    folder = tmp_path / "one class"
    folder.mkdir()
    for name, make in ODD.items():
        (folder / f"{name.replace(':', '')}.jpg").write_bytes(make())
    ramp = Image.fromarray(np.arange(6000, dtype=np.uint16).reshape(60, 100))
    (folder / "deep.png").write_bytes(encoded(ramp, "PNG"))
    code, output, _ = cli(check.main, tmp_path, "--json", "--decoder", "pillow")
    report = json.loads(output)
    assert code == 0 and report["bad"] == [] and report["images"] == len(ODD) + 1
    assert report["odd"] == {"orientation": 1, "CMYK": 2, "16 bits": 1, "alpha": 3}
    assert report["splits"][""]["width"] == [1, 90, 100] and report["splits"][""]["height"] == [1, 61, 61]
    _, output, _ = cli(check.main, tmp_path)
    assert (
        "odd, but read:\n  1 with an orientation in EXIF, which training ignores: pixels as stored" in output
    )
    assert "\n  2 in CMYK" in output and "\n  3 with transparency" in output


def test_sixteen_bits_in_colour_and_huge_images(tmp_path, monkeypatch):
    """A PNG of 2 x 1 pixels, 48 bits each, which Pillow cannot write."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" + struct.pack(">6H", 0, 1, 0x8000, 0xFFFF, 0x1234, 0))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    path = tmp_path / "deep.png"
    path.write_bytes(data)
    decode = check_files.decoder("pillow")[0]
    assert check_files.examine(path, decode) == (None, (2, 1), ["16 bits"])
    assert decode(data).tolist() == [[[0, 0, 0x80], [0xFF, 0x12, 0]]]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with pytest.warns(Image.DecompressionBombWarning):
        assert check_files.examine(path, decode) == (None, (2, 1), ["16 bits", "huge"])


def test_classes_files_and_layouts(tmp_path, cli):
    make_folders(tmp_path, classes=("ant", "bee"))
    for name in ("cat", "dog"):
        make_folders(tmp_path / "more", classes=(name,))
    (tmp_path / "more" / "train" / "cat").rename(tmp_path / "train" / "cat")
    (tmp_path / "more" / "val" / "dog").rename(tmp_path / "val" / "dog")
    (tmp_path / "train" / "ant" / "list.txt").write_text("0.jpg")
    (tmp_path / "train" / "stray.jpg").write_bytes(encoded(Image.new("RGB", (9, 9))))
    (tmp_path / "train" / "ant" / "deeper").mkdir()
    (tmp_path / "train" / "ant" / "0.jpg").rename(tmp_path / "train" / "ant" / "deeper" / "0.JPEG")
    (tmp_path / "train" / "bee" / "linked").symlink_to(tmp_path / "more" / "val" / "cat")
    code, output, _ = cli(check.main, tmp_path)
    assert code == 0, "training can start: main_lincls.py says what it needs"
    flat = " ".join(output.split())
    assert "only in train/: 1 class (cat); linear evaluation needs the same classes in both" in flat
    assert "only in val/: 1 class (dog)" in flat
    assert "2 files that training does not use" in flat
    assert check_files.found_in(tmp_path / "train").paths == [
        path for path, _ in image_folder(tmp_path, "train").samples
    ]

    (tmp_path / "val" / "empty").mkdir()
    code, output, _ = cli(check.main, tmp_path)
    assert code == 1 and f"no image in the class folder {tmp_path}/val/empty" in output
    code, output, _ = cli(check.main, tmp_path / "train" / "bee")  # a folder of images alone
    assert code == 0 and output.startswith(f"{tmp_path}/train/bee: 11 images in 1 class\n")


def test_wrong_use_is_a_sentence(tmp_path, cli):
    for words, message in (
        ([], "the following arguments are required: DIR"),
        ([tmp_path / "none"], "there is no folder"),
        ([tmp_path], "holds no image"),
        ([tmp_path, "-j", "-1"], "--workers must be 0"),
        ([tmp_path, "--decoder", "other"], "invalid choice: 'other'"),
    ):
        code, output, errors = cli(check.main, *words)
        assert code == 2 and message in errors and output == "" and "Traceback" not in errors


def test_help_is_fast_and_narrow():
    code = (
        "import sys; sys.argv = ['check', '--help']\nfrom moco import check\n"
        "try: check.main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    )
    run = program(sys.executable, "-c", code, COLUMNS="80")
    assert run.returncode == 0, run.stderr
    assert "Exit code 0: every image can be read" in run.stdout
    assert max(map(len, run.stdout.splitlines())) < 80


def slow(report):
    """A check of sys.argv's folder whose workers say that they have begun, and never end."""
    check_files.examine = lambda path, decode: print("begun", file=report, flush=True) or time.sleep(60)
    sys.argv = ["check", FOLDER[0], "-j", "2"]
    check.main()


FOLDER = []


@pytest.mark.parametrize("to_all", [True, False], ids=["terminal", "parent"])
def test_ctrl_c_leaves_nothing(tmp_path, to_all):
    make_folders(tmp_path, train=20)
    FOLDER[:] = [str(tmp_path)]
    before = sorted(tmp_path.rglob("*"))
    running = Program(slow)
    assert len(running.workers) == 2
    (os.killpg if to_all else os.kill)(running.pid, signal.SIGINT)
    code, said = running.end()
    assert code == 130 and "\ninterrupted\n" in said and "Traceback" not in said
    running.clear()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_worker_that_is_killed_is_a_sentence(tmp_path):
    make_folders(tmp_path, train=20)
    FOLDER[:] = [str(tmp_path)]
    running = Program(slow)
    os.kill(running.workers[0], signal.SIGKILL)
    code, said = running.end()
    assert code == 2 and "data worker" in said and "Traceback" not in said
    running.clear()
