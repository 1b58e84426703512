"""ImageNet-100 when something is wrong: interruptions, missing and broken images, outputs that exist."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from miniature import (
    CLASSES,
    EXPECTED,
    build,
    contents,
    originals,
    tar_of,
    val_name,
    wanted,
    write_folders,
    write_tars,
)

from moco.errors import UserError

SLOW = """
import shutil, sys, time
from moco.errors import run_program
from moco.imagenet100 import make

def slow(source, *rest):
    return time.sleep(60) if source.name.endswith("n02123045_2.JPEG") else copy(source, *rest)

copy, shutil.copyfileobj = shutil.copyfileobj, slow
"""


def slow_process(source, out):
    """A process that copies into `out` and stays at the third image of the second class."""
    call = f"make([{str(source)!r}], {str(out)!r}, copy=True, classes={CLASSES}, expected={EXPECTED})"
    command = [sys.executable, "-c", SLOW + f"run_program(lambda: {call})"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_leaves_nothing_under_the_name_and_the_next_run_continues(tmp_path):
    source = write_folders(tmp_path / "imagenet")
    out, part = tmp_path / "out", tmp_path / "out.part"
    process = slow_process(source, out)
    before = part / "train" / "n02123045" / "n02123045_1.JPEG"
    limit = time.monotonic() + 20
    while not before.exists() and time.monotonic() < limit:
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1].endswith("\ninterrupted\n") and process.returncode == 130
    assert before.exists() and not out.exists() and sorted(os.listdir(tmp_path)) == ["imagenet", "out.part"]

    half = part / "train" / "n01440764" / "n01440764_0.JPEG"
    half.write_bytes(half.read_bytes()[:-1])
    (part / "val" / "n01440764" / "stranger.JPEG").write_bytes(b"from another source")
    kept = {path: path.stat().st_mtime_ns for path in part.rglob("*.JPEG") if path.name != "stranger.JPEG"}
    build(source, out, copy=True)
    assert contents(out) == wanted() and not part.exists()
    made_again = [
        path.name for path, when in kept.items() if (out / path.relative_to(part)).stat().st_mtime_ns != when
    ]
    assert sorted(made_again) == ["n01440764_0.JPEG", "n02123045_2.JPEG"] and len(kept) > 8


def test_a_second_process_is_refused_while_the_first_works(tmp_path):
    source, out = write_folders(tmp_path / "imagenet"), tmp_path / "out"
    first = slow_process(source, out)
    try:
        half = tmp_path / "out.part" / "train" / "n02123045" / "n02123045_2.JPEG"
        limit = time.monotonic() + 20
        while not half.exists() and time.monotonic() < limit:
            time.sleep(0.02)
        before = contents(tmp_path / "out.part")
        second = slow_process(source, out)
        _, errors = second.communicate(timeout=20)
        assert second.returncode == 2 and errors.count("\n") == 1
        assert f"another process is making out in {tmp_path} at this moment" in errors
        assert contents(tmp_path / "out.part") == before and first.poll() is None
    finally:
        first.kill()  # its lock ends with it
        first.communicate()
    build(source, out, copy=True)
    assert contents(out) == wanted() and sorted(os.listdir(tmp_path)) == ["imagenet", "out"]


@pytest.mark.parametrize("split", ["train", "val", "flat val"])
@pytest.mark.parametrize("fault", ["empty", "folder", "link to nothing"])
def test_a_name_alone_is_no_image(tmp_path, split, fault):
    source = write_folders(tmp_path / "imagenet", flat_val=split == "flat val")
    path = {
        "train": source / "train" / "n01440764" / "n01440764_1.JPEG",
        "val": source / "val" / "n01440764" / val_name(1),
        "flat val": source / "val" / val_name(1),
    }[split]
    data = path.read_bytes()
    path.unlink()
    if fault == "empty":
        path.touch()
    elif fault == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nothing")
    for copy in (False, True):
        with pytest.raises(UserError, match=f"1 of .* images in .*, such as {path.name}: restore"):
            build(source, tmp_path / "out", copy=copy)
        assert not (tmp_path / "out").exists()
    path.rmdir() if fault == "folder" else path.unlink()
    (tmp_path / "elsewhere").write_bytes(data)
    path.symlink_to(tmp_path / "elsewhere")  # a link to an image is one
    build(source, tmp_path / "out")
    assert contents(tmp_path / "out") == wanted()


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
