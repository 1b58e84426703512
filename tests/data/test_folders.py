"""Image folders and the order of an epoch."""

import os
import socket

import numpy as np
import pytest
import torchvision
from made_folders import make_folders
from PIL import Image

from moco import loader as published
from moco import trifeature
from moco.data.folders import (
    EpochBatches,
    ImageFolder,
    data_folder,
    image_folder,
    labeled_folders,
    paths_of,
    pretraining_images,
    targets_of,
)
from moco.errors import UserError


def test_where_the_data_are(tmp_path, monkeypatch):
    assert data_folder(str(tmp_path), None, "ImageNet-100") == tmp_path
    assert data_folder(None, str(tmp_path), "ImageNet-100") == tmp_path / "ImageNet-100"
    with pytest.raises(UserError, match="either DIR"):
        data_folder("a", "b", "ImageNet-100")
    with pytest.raises(UserError, match="where are the images"):
        data_folder(None, None, "ImageNet-100")
    drawn = []
    monkeypatch.setattr(trifeature, "ensure", lambda *words, **settings: drawn.append((words, settings)))
    assert data_folder(None, None, "trifeature").as_posix() == "data/trifeature"
    assert data_folder(None, tmp_path, "trifeature") == tmp_path / "trifeature"
    assert drawn[1] == ((tmp_path / "trifeature",), {"size": 64, "renders": 4})


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*gone"):
        image_folder(tmp_path / "gone", "train")
    with pytest.raises(UserError, match=r"has no folder train/"):
        image_folder(tmp_path, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"train is not complete \(no folder in it\)"):
        image_folder(tmp_path, "train")
    (tmp_path / "train" / "a.png").touch()
    with pytest.raises(
        UserError, match=r"\(no folder in it; images outside of class folders: 1\): .* train/all/"
    ):
        image_folder(tmp_path, "train")
    for name in ("ant", "bee"):
        (tmp_path / "train" / name).mkdir()
    (tmp_path / "train" / "bee" / "0.PNG").touch()
    (tmp_path / "train" / "ant" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"\(no image in 1 of its 2 class folders, such as ant/; images"):
        image_folder(tmp_path, "train")


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def as_torchvision(path):
    published = torchvision.datasets.ImageFolder(str(path))
    return published.samples, published.targets, published.classes, published.class_to_idx


def listed(folder):
    images = image_folder(folder, "train")
    return images.samples, images.targets, images.classes, images.class_to_idx


def test_images_classes_and_numbers_are_torchvisions(tmp_path):
    train, pool = tmp_path / "train", tmp_path / "pool"
    names = ("b/2.jpg", "b/10.JPEG", "b/sub/x.png", "b/sub-2/x.png", "b/sub/z/x.tiff", "b/notes.txt")
    touch(*(train / name for name in (*names, "B/a.webp", "10/a.bmp", "2/a.pgm", "\u00e9/a.ppm")))
    touch(pool / "one.jpg", pool / "deep" / "two.jpg", tmp_path / "alone.png")
    with open(os.fsencode(train) + b"/b/caf\xe9.jpg", "wb"):
        pass
    (train / "pooled").symlink_to(pool)  # a class that is a link
    (train / "b" / "again").symlink_to(pool)  # the same images under another name
    (train / "b" / "link.png").symlink_to(tmp_path / "alone.png")
    (train / "b" / "nowhere.png").symlink_to("gone")
    (train / "b" / "itself.png").symlink_to("itself.png")
    assert listed(tmp_path) == as_torchvision(train)
    assert len(image_folder(tmp_path, "train")) == 17
    assert image_folder(tmp_path, "train").remark == "1 other file left out"  # notes.txt


def test_hidden_files_and_folders_are_left_out_and_counted(tmp_path):
    train = tmp_path / "train"
    touch(train / "ant" / "0.jpg", train / "bee" / "0.jpg", train / "bee" / "sub" / "1.jpg")
    before = listed(tmp_path)
    hidden = ("ant/._0.jpg", "bee/sub/.1.jpg", ".2.jpg")
    folders = ("ant/.ipynb_checkpoints", ".ipynb_checkpoints", "__MACOSX", "bee/@eaDir", "lost+found")
    touch(*(train / name for name in (*hidden, "ant/.DS_Store", *(f"{name}/0.jpg" for name in folders))))
    assert listed(tmp_path) == before != as_torchvision(train)
    remark = image_folder(tmp_path, "train").remark
    assert remark == "3 hidden files and 5 hidden folders left out"
    touch(train / "3.jpg", train / "4.jpg")
    assert listed(tmp_path) == before
    remark = image_folder(tmp_path, "train").remark
    assert remark.endswith(", 5 hidden folders and 2 images outside of class folders left out")
    assert pretraining_images(tmp_path) == image_folder(tmp_path, "train")


def test_what_could_be_waited_for_without_an_end_is_left_out_and_counted(tmp_path, monkeypatch):
    train = tmp_path / "train"
    touch(train / "ant" / "0.jpg", train / "bee" / "0.jpg", tmp_path / "elsewhere.jpg")
    (train / "ant" / "linked.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    (train / "ant" / "nowhere.jpg").symlink_to("gone")  # said where it is read
    before = image_folder(tmp_path, "train")
    assert len(before) == 4 and before.remark == ""
    os.mkfifo(train / "ant" / "zz.jpg")
    (train / "bee" / "1.jpg").symlink_to("/dev/zero")
    monkeypatch.chdir(train / "bee")  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("2.jpg")
    for images in (image_folder(tmp_path, "train"), pretraining_images(tmp_path)):
        assert images.samples == before.samples
        assert images.remark == "3 pipes, sockets or devices left out"
    os.mkfifo(tmp_path / "0.jpg")  # beside train/, where only pre-training without it looks
    (train / "ant" / "0.jpg").unlink()
    train.rename(tmp_path / "photos")
    assert pretraining_images(tmp_path).remark == "4 pipes, sockets or devices left out"
    (tmp_path / "val" / "ant").mkdir(parents=True)
    os.mkfifo(tmp_path / "val" / "ant" / "0.jpg")
    with pytest.raises(UserError, match="val is not complete .no image in 1 of its 1 class folders"):
        image_folder(tmp_path, "val")


def test_a_data_set_in_a_hidden_folder_is_listed(tmp_path):
    touch(tmp_path / ".cache" / "train" / ".." / "train" / "ant" / "0.jpg")
    assert len(image_folder(tmp_path / ".cache", "train")) == 1


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("ant/loop", "."),
        ("ant/sub/loop", ".."),
        ("ant/sub/loop", "../../../.."),
        ("ant/up", ".."),
        ("again", "."),
        ("again", ".."),
    ],
)
def test_a_link_to_a_folder_above_it_adds_no_image(tmp_path, link, target, monkeypatch):
    train = tmp_path / "data" / "train"
    touch(train / "ant" / "0.jpg", train / "ant" / "sub" / "1.jpg", train / "bee" / "2.jpg")
    before = listed(train.parent)
    (train / link).symlink_to(target)
    for folder in (train.parent, train.parent.relative_to(tmp_path)):  # also by a relative path
        monkeypatch.chdir(tmp_path)
        images = image_folder(folder, "train")
        assert [os.path.abspath(path) for path, _ in images.samples] == [path for path, _ in before[0]]
        assert images.remark == "1 link to a folder above it left out"
    if link.startswith("ant") and target in (".", ".."):  # negative control
        assert len(as_torchvision(train)[0]) > 40
    (tmp_path / "other").symlink_to(train.parent)
    assert len(image_folder(tmp_path / "other", "train")) == 3  # by another name of the data set


def test_links_that_lead_to_each_other_end(tmp_path):
    train = tmp_path / "train"
    touch(train / "ant" / "one" / "0.jpg", train / "ant" / "two" / "1.jpg")
    (train / "ant" / "one" / "there").symlink_to("../two")
    (train / "ant" / "two" / "back").symlink_to("../one")
    names = [os.path.relpath(path, train / "ant") for path, _ in image_folder(tmp_path, "train").samples]
    assert names == ["one/0.jpg", "one/there/1.jpg", "two/1.jpg", "two/back/0.jpg"]


def test_the_only_class_may_be_a_link_to_the_images_beside_it(tmp_path):
    touch(tmp_path / "train" / "0.jpg", tmp_path / "train" / "1.jpg")
    (tmp_path / "train" / "all").symlink_to(".")
    images = image_folder(tmp_path, "train")
    assert images.classes == ["all"] and [path[-5:] for path, _ in images.samples] == ["0.jpg", "1.jpg"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    touch(tmp_path / "train" / "ant" / "0.jpg", tmp_path / "train" / "ant" / "sub" / "1.jpg")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # root may list everything
    with pytest.raises(UserError, match=r"train/ant/sub cannot be listed \(Permission denied\); allow"):
        image_folder(tmp_path, "train")


def below(folder, images):
    return [os.path.relpath(path, folder) for path in paths_of(images)]


def test_of_class_folders_pretraining_takes_the_same_with_train_or_without(tmp_path):
    names = ("b/2.jpg", "b/10.jpg", "b/sub/x.png", "b/sub-2/x.png", "b-c/x.png", "B/a.webp")
    touch(*(tmp_path / "train" / name for name in names))
    labeled = pretraining_images(tmp_path)
    assert labeled == image_folder(tmp_path, "train") and labeled.classes == ["B", "b", "b-c"]
    without = pretraining_images(tmp_path / "train")
    assert paths_of(without) == paths_of(labeled) and (without.classes, set(without.targets)) == ([], {0})
    assert without.summary() == [f"{tmp_path}/train: 6 images in 5 folders"]
    (tmp_path / "train" / "empty").mkdir()  # needs no image, unlike a class
    assert paths_of(pretraining_images(tmp_path)) == paths_of(labeled)
    assert pretraining_images(tmp_path).remark == "1 folder without images left out"


def test_without_class_folders_pretraining_takes_all_images_below(tmp_path):
    names = ["2.png", "a.jpg", "B/x.jpg", "b/a.jpg", "b/c/a.jpg", "b-c/a.jpg"]
    for root in (tmp_path / "there", tmp_path / "here" / "again"):
        touch(*(root / name for name in reversed(names)), root / ".b" / "a.jpg", root / "b" / "a.csv")
        (root / "b" / "loop").symlink_to("..")
        assert below(root, pretraining_images(root)) == names
    left_out = "1 hidden folder, 1 link to a folder above it and 1 other file left out"
    assert pretraining_images(root).summary() == [f"{root}: 6 images in 5 folders", f"  {left_out}"]

    (root / "train").mkdir()
    with pytest.raises(
        UserError, match=r"there is no image in .*/train or .*; names of images end in \.jpg "
    ):
        pretraining_images(root)
    touch(root / "train" / "x.jpg", root / "train" / "y.jpg")
    assert below(root, pretraining_images(root)) == ["train/x.jpg", "train/y.jpg"]
    with pytest.raises(UserError, match="is a file; give a folder"):
        pretraining_images(root / "a.jpg")


def test_thousands_have_commas_in_the_summary():
    samples = [(f"DIR/{number % 3}/{number}.jpg", 0) for number in range(12_345)]
    images = ImageFolder("DIR", [], samples, "2 hidden folders left out")
    assert images.summary() == ["DIR: 12,345 images in 3 folders, 2 hidden folders left out"]


def write_list(path, *lines):
    path.write_bytes(b"".join(map(os.fsencode, lines)))
    return str(path)


def test_a_list_names_images_in_its_own_order(tmp_path, monkeypatch):
    caf = os.fsdecode(b"caf\xe9.jpg")  # no UTF-8
    touch(*(tmp_path / "images" / name for name in ("a.jpg", "b/b b.dat", caf, "c.jpg")))
    lines = ("\ufeffc.jpg\r\n", "\r\n", "b/b b.dat\n", "  \n", f"{tmp_path}/images/a.jpg\n", f"{caf}")
    path = write_list(tmp_path / "images" / "list.txt", *lines)
    images = pretraining_images(None, path)
    assert below(tmp_path / "images", images) == ["c.jpg", "b/b b.dat", "a.jpg", caf]
    assert images.summary() == [f"{path}: 4 images in 2 folders"] and images.classes == []
    monkeypatch.chdir(tmp_path / "images")
    assert below(".", pretraining_images(None, "list.txt")) == ["c.jpg", "b/b b.dat", "a.jpg", caf]
    write_list(tmp_path / "images" / "list.txt", "a.jpg\n", "c.jpg\n", "./a.jpg\n")
    twice = pretraining_images(None, "list.txt")
    assert len(twice) == 3 and twice.remark == "1 of them named before in the list"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "names no image; it needs a path in each line"),
        (["\n \n"], "names no image; it needs a path in each line"),
        (
            ["a.jpg\n", "\n", "x.jpg\n", "y.jpg"],
            r"line 3 of .* names no file: .*/x.jpg \(2 such lines of 3\)",
        ),
        (["a.jpg 0\n"], r"line 1 of .* names no file: .*/a.jpg 0 \(1 such line of 1\)"),
        (["a.jpg\n", "sub\n"], "line 2 of .* names a folder: .*/sub "),
        (["a.jpg\n", "pipe\n"], "line 2 of .* names a pipe, socket or device: .*/pipe "),
        (["a\0.jpg\n"], r"names no file: .*/a\\x00.jpg "),
        ("sub", "takes a text file of paths; .*sub is a folder: give it as DIR"),
        ("gone", r"gone cannot be read \(No such file"),
        ("pipe", "pipe is a pipe, but it is read more than once; save it in a file"),
    ],
)
def test_a_list_that_does_not_name_images_is_refused(tmp_path, lines, message):
    touch(tmp_path / "a.jpg", tmp_path / "sub" / "b.jpg")
    os.mkfifo(tmp_path / "pipe")
    name = lines if isinstance(lines, str) else write_list(tmp_path / "list.txt", *lines)
    with pytest.raises(UserError, match=message):
        pretraining_images(None, str(tmp_path / name))


def test_class_numbers_are_those_of_train(tmp_path):
    make_folders(tmp_path)
    (tmp_path / "val" / "bee").rename(tmp_path / "bee")  # by itself val/ would number cat 1
    train, val, names = labeled_folders(tmp_path)
    assert names == ["ant", "bee", "cat"] == val.classes
    assert set(targets_of(val)) == {0, 2}
    assert all(number == train.class_to_idx[path.split("/")[-2]] for path, number in val.samples)
    (tmp_path / "bee").rename(tmp_path / "val" / "bug")
    with pytest.raises(UserError, match=r"class bug is in .*/val but not in train/ \(1 such\); remove it"):
        labeled_folders(tmp_path)


def test_classes_may_be_a_factor_of_trifeature(tmp_path):
    make_folders(tmp_path, classes=["triangle_solid_red", "square_solid_blue"], train=2, val=1)
    train, val, names = labeled_folders(tmp_path, "shape")
    assert names == list(trifeature.FACTORS["shape"])
    shapes = [names.index("square"), names.index("triangle")]
    assert targets_of(val).tolist() == shapes and targets_of(val).dtype == np.int64
    assert targets_of(train).tolist() == [shapes[0]] * 2 + [shapes[1]] * 2
    assert [path.split("/")[-2] for path in paths_of(val)] == ["square_solid_blue", "triangle_solid_red"]


def test_processes_share_the_same_global_batches():
    alone = EpochBatches(103, 12, seed=5)
    shared = [EpochBatches(103, 12, 5, rank, 3).indices(2) for rank in range(3)]
    assert np.array_equal(np.concatenate(shared, axis=1), alone.indices(2))
    assert np.shape(alone.indices(2)) == (len(alone), 12) == (8, 12)
    assert len(set(np.concatenate(alone.indices(2)))) == 96
    assert not np.array_equal(alone.indices(3), alone.indices(2))
    assert not np.array_equal(EpochBatches(103, 12, seed=6).indices(2), alone.indices(2))


def test_recorded_order():
    """A run that continues under another version must go on with the same order."""
    recorded = [[0, 8, 1, 12], [19, 18, 11, 16]]
    assert np.array_equal(EpochBatches(20, 8, seed=5, rank=1, world_size=2).indices(1), recorded)


def test_names_that_other_code_imports():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    q, k = published.TwoCropsTransform(published.GaussianBlur([0.1, 2.0]))(image)
    assert q.size == k.size == image.size
    assert np.any(np.asarray(q) != np.asarray(k))
