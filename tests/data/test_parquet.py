"""Class folders from parquet files in the Hugging Face hub's schema, and what is said of other files."""

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from moco import imagenet100
from moco.data.folders import labeled_folders

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["tench, Tinca tinca", "chain saw, chainsaw", "church, church building"]  # not in their sorted order


def picture(number, kind="JPEG", size=(40, 30)):
    """The bytes of an image file, another one for each number."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def row(number, label, path=None, **options):
    return {"image": {"bytes": picture(number, **options), "path": path}, "label": label}


def write(path, rows, names=NAMES, image="image", **options):
    """Write rows, dicts of an image and labels, as `datasets` does; names: of the label(s), or None."""
    labels = [column for column in rows[0] if column != image]
    if names is not None and not isinstance(names, dict):
        names = {"label": names}
    features = {image: {"_type": "Image"}}
    features |= {label: {"names": of, "_type": "ClassLabel"} for label, of in (names or {}).items()}
    kinds = [pa.string() if isinstance(rows[0][label], str) else pa.int64() for label in labels]
    schema = pa.schema([(image, IMAGE), *zip(labels, kinds, strict=True)])
    if names is not None:
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, **options)
    return path


def files_of(folder):
    """{path below a folder: bytes} of its files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def unpack(cli, tmp_path):
    """`unpack(*words)`: (folder made, exit code, output, errors) of the command, from the files in hub/."""

    def run(*words, out="out"):
        files = sorted((tmp_path / "hub").rglob("*.parquet"))
        return tmp_path / out, *cli(imagenet100.main, "--parquet", *files, tmp_path / out, *words)

    return run


@pytest.fixture
def refused(unpack, tmp_path):
    """`refused(sentence, *words)`: the command ends with it, and nothing is made or left over."""

    def run(sentence, *words):
        before = sorted(os.listdir(tmp_path))
        out, code, output, errors = unpack(*words)
        assert code == 2 and not output and sentence in errors.splitlines()[-1], errors
        assert sorted(os.listdir(tmp_path)) == before and not out.exists()

    return run


def test_several_files_become_class_folders_with_the_same_bytes(tmp_path, unpack):
    hub = tmp_path / "hub"
    first = [row(0, 0, "n01440764_10.JPEG"), row(1, 1, kind="PNG"), row(2, 0, "a.jpg", kind="PNG")]
    write(hub / "train-00000-of-00002.parquet", first, row_group_size=2)
    write(hub / "train-00001-of-00002.parquet", [row(3, 2, "a.jpg"), row(4, 0, "sub/a.png", kind="PNG")])
    write(hub / "validation-00000-of-00001.parquet", [row(5, 2), row(6, 0)])
    out, code, output, errors = unpack()
    assert code == 0 and "5 training and 2 validation images of 3 classes" in output, errors
    assert files_of(out) == {
        "train/tench, Tinca tinca/n01440764_10.jpg": picture(0),
        "train/chain saw, chainsaw/00000001.png": picture(1, "PNG"),
        "train/tench, Tinca tinca/a.png": picture(2, "PNG"),
        "train/church, church building/a.jpg": picture(3),
        "train/tench, Tinca tinca/a-4.png": picture(4, "PNG"),
        "val/church, church building/00000000.jpg": picture(5),
        "val/tench, Tinca tinca/00000001.jpg": picture(6),
        "classes.txt": "".join(f"{name}\n" for name in NAMES).encode(),
    }
    train, val, classes = labeled_folders(out)
    assert (len(train), len(val), classes) == (5, 2, sorted(NAMES))
    assert "images: 7/7" in errors and "note" not in errors
    assert f"--dataset_root {tmp_path} --dataset out --image-size 30 ..." in output
    assert files_of(unpack(out="again")[0]) == files_of(out)


def test_images_of_imagenet_that_were_made_smaller_are_named_so(tmp_path, unpack):
    path = tmp_path / "hub" / "train.parquet"
    smaller, other = "cannot be compared with those from images of full size", "ImageNet-100 has 126,689"
    write(path, [row(0, 0, size=(213, 160)), row(1, 1, size=(160, 200)), row(2, 2, size=(900, 800))])
    output = unpack()[2]
    assert "short side of the images: 160 pixels (median of 3)" in output and smaller in output
    assert other not in output and "--image-size 160" in output
    write(path, [row(0, 0, size=(500, 375))])
    output = unpack(out="full")[2]
    assert "375 pixels" in output and smaller not in output and "--image-size" not in output
    write(path, [row(0, 0, size=(32, 32))], names=["airplane", "automobile"])
    output = unpack(out="cifar")[2]
    assert "32 pixels" in output and smaller not in output
    write(path, [row(0, 99, size=(213, 160))], names=[f"n{number:08d}" for number in range(100)])
    output = unpack(out="ids")[2]
    assert smaller in output and other in output


@pytest.mark.parametrize("folder", ["", "default/train/"])
def test_columns_of_cifar_and_a_test_split(tmp_path, unpack, refused, folder):
    rows = [{"img": row(n, 0)["image"], "fine_label": n % 2, "coarse_label": 0} for n in range(4)]
    names = {"fine_label": ["apple", "bowl"], "coarse_label": ["thing"]}
    name = "0000.parquet" if folder else "train-00000-of-00001.parquet"
    write(tmp_path / "hub" / folder / name, rows, names, image="img")
    write(
        tmp_path / "hub" / folder.replace("train", "test") / name.replace("train", "test"), rows, names, "img"
    )
    refused("labels are in fine_label, coarse_label: name the one with the classes by --label NAME")
    refused("none is --label fine: name one of them", "--label", "fine")
    out, _, output, _ = unpack("--label", "fine_label")
    assert "4 training and 4 validation images of 2 classes" in output
    assert sorted(os.listdir(out / "val")) == ["apple", "bowl"]


@pytest.mark.parametrize(
    ("labels", "folders"), [([10, 2, 10], ["02", "10"]), (["b/c", "a", "B_C"], ["B_C", "a", "b_c_2"])]
)
def test_labels_without_names_in_the_schema(tmp_path, unpack, labels, folders):
    write(tmp_path / "hub" / "train.parquet", [row(n, label) for n, label in enumerate(labels)], names=None)
    out, code, _, errors = unpack()
    assert code == 0, errors
    assert sorted(os.listdir(out / "train")) == folders


def test_names_stay_in_the_folder_and_are_seen(tmp_path, unpack):
    bad = ["../..", "/etc/x", ".hidden", "a\0b\n", "é" * 300, "", "same", "SAME", "same", "con?:*", "\ud800"]
    paths = ["../../x.jpg", "/etc/passwd", "..", ".jpg", "C:\\a\\b.jpg", "y" * 400 + ".jpg", None, "a/", "\n"]
    rows = [row(n, n % len(bad), paths[n % len(paths)]) for n in range(99)]
    write(tmp_path / "hub" / "train.parquet", rows, bad)
    out, code, _, errors = unpack()
    assert code == 0, errors
    assert sorted(os.listdir(tmp_path)) == ["hub", "out"] and len(os.listdir(out)) == 2
    (out / "val").symlink_to("train")
    train, _, classes = labeled_folders(out)
    assert len(train) == 99 and len(classes) == len(bad) and "left out" not in train.summary()
    assert sorted((out / "classes.txt").read_text(encoding="utf-8").splitlines()) == classes
    assert {Path(path).read_bytes() for path, _ in train.samples} == {picture(n) for n in range(99)}


def test_rows_that_cannot_be_taken_are_counted(tmp_path, unpack, refused):
    rows = [row(0, 0), row(1, -1), row(2, None), {"image": None, "label": 1}, row(3, 1, kind="GIF")]
    path = write(tmp_path / "hub" / "train.parquet", rows)
    out, _, output, _ = unpack(out="first")
    assert "1 training and 0 validation images" in output and len(files_of(out)) == 2
    reasons = "without a label 2, rows without the bytes of an image 1, rows in a format that is not read 1"
    assert reasons in output
    write(path, rows[1:3])
    refused("train.parquet has no label in its 2 rows: leave it out")
    write(path, [{"image": {"bytes": None, "path": "a.jpg"}, "label": 0}] * 3)
    refused("has no image that can be read (rows without the bytes of an image 3): choose other files")
    write(path, [row(0, 3)])
    refused("has the label 3, and there are 3 classes, from 0 on: download it again")


def test_files_that_do_not_go_together(tmp_path, refused, unpack):
    hub = tmp_path / "hub"
    write(hub / "train-00000-of-00003.parquet", [row(0, 0)])
    write(hub / "b" / "train-00000-of-00003.parquet", [row(0, 0)])
    refused("are the same part of the data: leave one out")
    write(hub / "b" / "train-00001-of-00003.parquet", [row(0, 0)], NAMES[::-1])
    (hub / "b" / "train-00000-of-00003.parquet").unlink()
    refused("has other columns or class names than")
    write(hub / "b" / "train-00001-of-00003.parquet", [row(0, 0)])
    assert "note: only 2 of the 3 files of train/ are named: not all images" in unpack()[3]
    write(hub / "test.parquet", [row(0, 0)])
    write(hub / "validation.parquet", [row(0, 0)])
    _, code, _, errors = unpack(out="another")
    assert code == 2 and "would both become val/: name only one kind" in errors
    (hub / "test.parquet").rename(hub / "train-test.parquet")
    assert "does not say if it is for training or validation" in unpack(out="another")[3]


def test_the_same_file_twice(tmp_path, cli):
    path = write(tmp_path / "train.parquet", [row(0, 0)])
    code, _, errors = cli(imagenet100.main, "--parquet", path, path, tmp_path / "out")
    assert code == 2 and "are the same part of the data: leave one out" in errors


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("no bytes", "image (struct<path: string>), label (int64), and none has images with their bytes"),
        ("text", "train.parquet is not a parquet file: choose other files"),
        ("empty", "train.parquet is not a parquet file"),
        ("pointer", "what git clone leaves in place of the file: run git lfs pull"),
        ("cut", "train.parquet is not complete: download it again"),
        ("footer", "train.parquet cannot be read ("),
        ("middle", "train.parquet cannot be read ("),
        ("no rows", "the parquet files have no rows"),
        ("floats", "label has no numbers or names: name another --label"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, refused, fault, sentence):
    path = write(tmp_path / "hub" / "train.parquet", [row(n, 0) for n in range(200)], compression="zstd")
    data = path.read_bytes()
    if fault == "no bytes":
        pq.write_table(pa.table({"image": [{"path": "a.jpg"}], "label": [0]}), path)
    elif fault == "floats":
        table = pq.read_table(path)
        pq.write_table(table.set_column(1, "label", pa.array([0.5] * 200)), path)
    elif fault == "no rows":
        pq.write_table(pq.read_table(path).slice(0, 0), path)
    else:
        middle, pointer = len(data) // 2, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        path.write_bytes(
            {
                "text": b"hello",
                "empty": b"",
                "pointer": pointer,
                "cut": data[:middle],
                "footer": data[:-200] + bytes(190) + data[-10:],
                "middle": data[:1000] + bytes(middle) + data[middle + 1000 :],
            }[fault]
        )
    refused(sentence)


def test_wrong_command_lines(tmp_path, cli, monkeypatch):
    path = write(tmp_path / "hub" / "train.parquet", [row(0, 0)])

    def said(*words):
        code, _, errors = cli(imagenet100.main, *words)
        assert code == 2 and sorted(os.listdir(tmp_path)) == ["hub"]
        return errors

    assert "the folder to make comes last" in said("--parquet", path, path)
    assert "leave out --copy" in said("--parquet", "--copy", path, tmp_path / "out")
    assert "several files are for parquet files: give --parquet too" in said(path, path, tmp_path / "out")
    assert "--label is for parquet files" in said(path, tmp_path / "out", "--label", "label")
    assert "name them after --parquet" in said(path.parent, tmp_path / "out")
    assert "is a folder: name the files in it, as in hub/*.parquet" in said(
        "--parquet", path.parent, tmp_path / "out"
    )
    assert "there is no file" in said("--parquet", tmp_path / "none-*.parquet", tmp_path / "out")
    assert "exists already" in said("--parquet", path, tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in said("--parquet", path, tmp_path / "out")
