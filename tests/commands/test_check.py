"""Every bad file is named with its reason, odd images are counted, what training refuses is a fault."""

import os
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from forked_program import Program
from odd_images import DAMAGED, encoded, oriented, photograph
from PIL import Image

from moco import check, trifeature


@pytest.fixture
def images(folders, tmp_path):
    """A copy of `folders` to change: 24 + 9 images of ant, bee and cat."""
    return shutil.copytree(folders, tmp_path / "images")


def bad_files(output):
    """{path: reason} of the bad files in a report."""
    return dict(line[5:].split(": ", 1) for line in output.splitlines() if line.startswith("bad: "))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_good_data_set_is_good(folders, cli, workers):
    code, output, _ = cli(check.main, folders, "-j", workers)
    assert code == 0
    assert output.splitlines()[:4] == [
        f"{folders}/train: images 24, classes 3",
        "  images of a class (smallest / median / largest): 8 / 8 / 8",
        "  pixels: width 40 / 40 / 40, height 30 / 30 / 30",
        f"{folders}/val: images 9, classes 3",
    ]
    assert output.splitlines()[-1].startswith("all 33 images can be read, by ")


@pytest.mark.parametrize("workers", ["0", "3"])
def test_every_kind_of_bad_file_is_named_with_its_reason(images, cli, workers):
    bad = {images / "train" / "bee" / name: data() for name, data in DAMAGED.items()}
    bad[images / "val" / "cat" / "zzz.jpg"] = b"the last one of all"
    for path, data in bad.items():
        path.write_bytes(data)
    link = images / "train" / "bee" / "link.jpg"
    link.symlink_to("nowhere")
    code, output, _ = cli(check.main, images, "-j", workers)
    found = bad_files(output)
    assert code == 1 and set(found) == {str(path) for path in (*bad, link)}
    for name, reason in {
        "truncated.jpg": "image file is truncated",
        "text.jpg": "no image that Pillow knows",
        "bomb.png": "Image size (400000000 pixels) exceeds",
        "link.jpg": "No such file or directory",
    }.items():
        assert found[str(link.with_name(name))].startswith(reason)
    assert f"{len(found)} of {24 + 9 + len(found)} images cannot be read" in output
    for path in found:
        os.remove(path)
    assert cli(check.main, images)[0] == 0


def test_names_of_any_bytes_are_printed_escaped(images, cli):
    folder = os.fsencode(images / "train" / "ant")
    for name in (b"caf\xe9.jpg", b"two\nlines.jpg"):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(b"no image")
    with pytest.raises(UnicodeEncodeError):  # negative control: standard output is strict
        print(os.fsdecode(b"caf\xe9"))
    code, output, _ = cli(check.main, images, "-j", "0")
    names = {os.path.basename(path) for path in bad_files(output)}
    assert code == 1 and names == {"caf\\udce9.jpg", "two\\nlines.jpg"}


def test_odd_images_are_counted_and_good(tmp_path, cli):
    odd = {
        "plain.jpg": encoded(photograph()),
        "gray.jpg": encoded(photograph().convert("L")),
        "one pixel.png": encoded(photograph(1, 1), "PNG"),
        "cmyk.jpg": encoded(photograph().convert("CMYK")),
        "turned.jpg": encoded(photograph(), exif=oriented()),
        "rgba.png": encoded(photograph().convert("RGBA"), "PNG"),
        "la.png": encoded(photograph().convert("LA"), "PNG"),
        "transparent.png": encoded(photograph().convert("P"), "PNG", transparency=0),
        "gray16.png": encoded(Image.fromarray(np.arange(6000, dtype=np.uint16).reshape(60, 100)), "PNG"),
    }
    folder = tmp_path / "train" / "one class"
    folder.mkdir(parents=True)
    for name, data in odd.items():
        (folder / name).write_bytes(data)
    code, output, _ = cli(check.main, tmp_path)
    lines = output.splitlines()
    assert code == 0 and "  pixels: width 1 / 90 / 100, height 1 / 61 / 61" in lines
    odd = [line.strip() for line in lines if line.startswith("  ")][2:]
    assert sorted(line.split(":")[0] for line in odd) == [
        "1 in CMYK",
        "1 with 16 bits a color",
        "1 with an orientation in EXIF",
        "3 with transparency",
    ]


def test_a_class_that_train_lacks_is_a_fault(images, cli):
    (images / "val" / "cat").rename(images / "val" / "cow")
    code, output, _ = cli(check.main, images)
    assert code == 1 and "all 33 images can be read" in output and "fault: class cow is in " in output
    shutil.rmtree(images / "val" / "cow")  # val/ may lack a class
    assert cli(check.main, images)[0] == 0
    shutil.rmtree(images / "val")  # pre-training needs none
    assert cli(check.main, images)[0] == 0


def test_trifeatures_held_out_combinations_are_no_fault(tmp_path, cli):
    trifeature.generate(tmp_path / "drawn", size=16, renders=1)
    code, output, _ = cli(check.main, tmp_path / "drawn", "-j", "0")
    assert code == 0 and "fault" not in output
    (tmp_path / "drawn" / trifeature.SETTINGS).unlink()  # negative control
    assert cli(check.main, tmp_path / "drawn", "-j", "0")[0] == 1


def test_wrong_use_is_a_sentence(images, cli):
    (images / "train" / "empty").mkdir()
    (images / "flat" / "train").mkdir(parents=True)
    shutil.copy(images / "val" / "cat" / "0.jpg", images / "flat" / "train")
    for words, message in (
        ([], "the following arguments are required: DIR"),
        ([images / "none"], "there is no folder"),
        ([images / "train"], "has no folder train/"),
        ([images], "train is not complete (Found no valid file for the classes empty"),
        ([images / "flat"], "train is not complete (Couldn't find any class folder"),
        ([images, "-j", "-1"], "--workers must be 0"),
    ):
        code, output, errors = cli(check.main, *words)
        assert code == 2 and message in errors and output == "" and "Traceback" not in errors


@pytest.mark.parametrize("fault", ["a worker is killed", "Ctrl-C in a terminal", "SIGINT to the parent"])
def test_a_check_that_is_ended_leaves_no_process(folders, monkeypatch, fault):
    def main(report):  # its workers say that they have begun, and never end
        monkeypatch.setattr(
            check, "read_pixels", lambda path: print("begun", file=report, flush=True) or time.sleep(60)
        )
        sys.argv = ["check", str(folders), "-j", "2"]
        check.main()

    running = Program(main)
    if fault == "a worker is killed":
        os.kill(running.workers[0], signal.SIGKILL)
    else:
        (os.killpg if "terminal" in fault else os.kill)(running.pid, signal.SIGINT)
    code, said = running.end()
    expected = (2, "data worker") if fault == "a worker is killed" else (130, "\ninterrupted\n")
    assert code == expected[0] and expected[1] in said and "Traceback" not in said
    running.clear()
