"""Every bad file is named with its reason, odd images are counted, what training refuses is a fault."""

import os
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from forked_program import Program
from odd_images import CT, DAMAGED, ct, encoded, oriented, photograph, png16, tiff

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
        f"{folders}/train: 24 images in 3 folders",
        "  classes 3, images of each (smallest / median / largest): 8 / 8 / 8",
        "  pixels: width 40 / 40 / 40, height 30 / 30 / 30",
        f"{folders}/val: 9 images in 3 folders",
    ]
    assert output.splitlines()[-2].startswith("all 33 images can be read, by ")
    start = "pre-training will start, with -b 24 or less; linear evaluation will start"
    assert output.splitlines()[-1] == start


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
    color = np.zeros((6, 10, 5), np.uint8)
    color[0, 0, 0] = 255
    pages = [photograph().convert(mode) for mode in ("RGB", "L")]
    odd = {
        "plain.jpg": encoded(photograph()),
        "gray.jpg": encoded(photograph().convert("L")),
        "one pixel.png": encoded(photograph(1, 1), "PNG"),
        "cmyk.jpg": encoded(photograph().convert("CMYK")),
        "turned.jpg": encoded(photograph(), exif=oriented()),
        "rgba.png": encoded(photograph().convert("RGBA"), "PNG"),
        "la.png": encoded(photograph().convert("LA"), "PNG"),
        "transparent.png": encoded(photograph().convert("P"), "PNG", transparency=0),
        "color16.tif": tiff(256 * color[:, :, :3].astype(np.uint16), photometric=2),
        "inverted.tif": tiff(np.full((6, 10), 60000, np.uint16), photometric=0),
        "channels.tif": tiff(color, photometric=2, extra=(0, 0)),
        "pages.tif": encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]),
        "frames.webp": encoded(pages[0], "WEBP", save_all=True, append_images=pages[1:]),
        "preview.jpg": encoded(pages[0], "MPO", save_all=True, append_images=pages[1:]),
        "one page.tif": encoded(photograph(), "TIFF"),
    }
    folder = tmp_path / "train" / "one class"
    folder.mkdir(parents=True)
    for name, data in odd.items():
        (folder / name).write_bytes(data)
    code, output, _ = cli(check.main, tmp_path)
    lines = output.splitlines()
    assert code == 0 and "  pixels: width 1 / 90 / 90, height 1 / 61 / 61" in lines
    odd = [line.strip() for line in lines if line.startswith("  ")][2:]
    assert sorted(line.split(":")[0] for line in odd) == [
        "1 gray of more than 8 bits with white stored as 0",
        "1 gray with 16-bit values",
        "1 in CMYK",
        "1 with 16 bits a color",
        "1 with 5 channels, of which 3 are read",
        "1 with an orientation in EXIF",
        "2 with several pages or frames",
        "3 with transparency",
    ]


@pytest.mark.parametrize("name", CT)
def test_a_range_that_fits_the_gray_images_is_named_and_can_be_given(tmp_path, cli, name):
    make, (low, high) = CT[name]
    for split in ("train", "val"):
        (tmp_path / split / "ct").mkdir(parents=True)
        for seed in range(2):
            (tmp_path / split / "ct" / f"{seed}.{name}").write_bytes(make(seed))
    code, output, _ = cli(check.main, tmp_path, "-j", "0")
    [warning] = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert f" use {low} to {high}" in warning and f"--gray-range {low} {high}" in warning
    assert ("4 of 4 images cannot be read: 4 need the --gray-range named above" in output) == (
        name == "float.tif"
    )
    assert code == (1 if name == "float.tif" else 0)
    code, output, _ = cli(check.main, tmp_path, "-j", "2", "--gray-range", low, high)
    assert code == 0 and "warning" not in output
    assert output.count(f"values: {low} to {high}, {low} to {high} become 0 to 255") == 2
    output = cli(check.main, tmp_path, "-j", "2", "--gray-range", -90000, 90000)[1]
    assert f"use {low} to {high} of -90000 to 90000" in output


def test_what_needs_a_range_is_told_from_what_is_damaged(tmp_path, cli):
    (tmp_path / "train" / "ct").mkdir(parents=True)
    (tmp_path / "train" / "ct" / "0.tif").write_bytes(CT["float.tif"][0]())
    (tmp_path / "train" / "ct" / "1.tif").write_bytes(CT["float.tif"][0]()[:300])
    code, output, _ = cli(check.main, tmp_path)
    assert code == 1 and "1 need the --gray-range named above" in output
    assert "; of the other 1: repair or remove them" in output
    (tmp_path / "train" / "ct" / "2.png").write_bytes(png16(ct("12-bit"), "LA"))
    code, output, _ = cli(check.main, tmp_path, "--gray-range", "0", "1")
    assert code == 1 and "2 of 3 images cannot be read: save 1 of them as gray of 8 or 16 bits" in output
    assert output.endswith("; of the other 1: repair or remove them\n")  # to skip most would fail
    (tmp_path / "train" / "ct" / "2.png").unlink()
    (tmp_path / "train" / "ct" / "0.tif").write_bytes(encoded(photograph(), "TIFF"))
    code, output, _ = cli(check.main, tmp_path)
    assert code == 1 and "gray-range" not in output
    assert output.endswith("cannot be read: repair or remove them, or train with --on-bad-image skip\n")


def test_what_is_left_out_is_said(images, cli):
    assert "left out" not in cli(check.main, images)[1]
    (images / "train" / "bee" / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/0-checkpoint.jpg", "._0.jpg"):
        (images / "train" / "bee" / name).write_bytes(b"no image")
    (images / "val" / "cat" / "loop").symlink_to("..")
    code, output, _ = cli(check.main, images)
    assert code == 0 and "all 33 images can be read" in output
    assert "1 hidden file and 1 hidden folder left out\n" in output
    assert "1 link to a folder above it left out\n" in output


def test_a_val_that_cannot_be_used_is_a_fault_of_linear_evaluation(images, cli):
    (images / "val" / "empty").mkdir()
    code, output, _ = cli(check.main, images)
    assert code == 1 and "all 24 images can be read" in output and "will start" not in output
    assert "fault: " in output.splitlines()[-1] and "such as empty/" in output.splitlines()[-1]
    shutil.rmtree(images / "val")
    output = cli(check.main, images)[1]
    assert output.endswith("-b 24 or less; linear evaluation needs val/, which is missing\n")
    (images / "val").touch()
    assert cli(check.main, images)[0] == 1


def test_one_image_is_too_few(tmp_path, cli):
    (tmp_path / "train" / "one").mkdir(parents=True)
    (tmp_path / "train" / "one" / "0.jpg").write_bytes(encoded(photograph()))
    code, output, _ = cli(check.main, tmp_path)
    assert code == 1 and "/train has 1 image, and a batch needs 2" in output and "will start" not in output


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
    for words, message in (
        ([], "give the folder DIR or a list of --images, one of them"),
        ([images / "none"], "there is no folder"),
        ([images / "train" / "empty"], "there is no image in "),
        ([images, "--images", "list.txt"], "give the folder DIR or a list of --images, one of them"),
        (["--images", images], "takes a text file of paths"),
        ([images, "--gray-range", "1", "0"], "--gray-range: 1 must be below 0"),
        ([images, "-j", "-1"], "--workers must be 0"),
    ):
        code, output, errors = cli(check.main, *words)
        assert code == 2 and message in errors and output == "" and "Traceback" not in errors


@pytest.mark.parametrize("fault", ["a worker is killed", "Ctrl-C in a terminal", "SIGINT to the parent"])
def test_a_check_that_is_ended_leaves_no_process(folders, monkeypatch, fault):
    def main(report):  # its workers say that they have begun, and never end
        monkeypatch.setattr(
            check, "read_pixels", lambda *_: print("begun", file=report, flush=True) or time.sleep(60)
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
