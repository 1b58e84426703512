"""Image folders and the order of an epoch."""

import numpy as np
import pytest
from made_folders import make_folders
from PIL import Image

from moco import loader as published
from moco import trifeature
from moco.data.folders import (
    EpochBatches,
    data_folder,
    image_folder,
    labeled_folders,
    paths_of,
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
    with pytest.raises(UserError, match=r"train is not complete"):
        image_folder(tmp_path, "train")
    (tmp_path / "train" / "ant").mkdir()
    with pytest.raises(UserError, match=r"train is not complete \(.*ant"):
        image_folder(tmp_path, "train")


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
    assert alone.indices(2).shape == (len(alone), 12) == (8, 12)
    assert len(set(alone.indices(2).ravel())) == 96
    assert not np.array_equal(alone.indices(3), alone.indices(2))
    assert not np.array_equal(EpochBatches(103, 12, seed=6).indices(2), alone.indices(2))


def test_recorded_order():
    """A run that continues under another version must go on with the same order."""
    assert EpochBatches(20, 8, seed=5, rank=1, world_size=2).indices(1).tolist() == [
        [0, 8, 1, 12],
        [19, 18, 11, 16],
    ]


def test_names_that_other_code_imports():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    q, k = published.TwoCropsTransform(published.GaussianBlur([0.1, 2.0]))(image)
    assert q.size == k.size == image.size
    assert np.any(np.asarray(q) != np.asarray(k))
