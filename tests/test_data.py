"""Order and randomness of samples, image folders, and the published recipes."""

import numpy as np
import pytest
import torch
from conftest import make_folders
from PIL import Image
from torchvision import transforms

from moco import loader as recipes
from moco.cores import available_cores
from moco.data import EpochBatches, image_folder, labelled_folders, training_loader, validation_loader
from moco.distributed import Process
from moco.errors import UserError


def process(rank=0, world_size=1):
    return Process(rank, world_size, rank, world_size, world_size, torch.device("cpu"))


def epoch_of(batches, epoch):
    batches.epoch = epoch
    return [[index for _, index in batch] for batch in batches]


def test_processes_share_the_same_global_batches():
    alone = epoch_of(EpochBatches(103, 12, seed=5), 2)
    shared = [epoch_of(EpochBatches(103, 12, 5, rank, 3), 2) for rank in range(3)]
    assert [sum(parts, []) for parts in zip(*shared, strict=True)] == alone
    assert len(alone) == 8
    assert len({index for batch in alone for index in batch}) == 96
    assert epoch_of(EpochBatches(103, 12, seed=5), 3) != alone
    assert epoch_of(EpochBatches(103, 12, seed=6), 2) != alone


def batches_of(folders, workers, seed, epoch=1, **options):
    images = image_folder(folders, "train")
    transform = recipes.TwoCropsTransform(recipes.moco_v2(16))
    loader = training_loader(images, transform, process(**options), 8, workers, seed)
    loader.batch_sampler.epoch = epoch
    return [(q, k, target) for (q, k), target in loader]


def equal(ours, theirs):
    return all(
        torch.equal(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_samples_do_not_depend_on_workers(folders):
    without, two = batches_of(folders, 0, seed=3), batches_of(folders, 2, seed=3)
    assert equal(without, two)
    assert not equal(without, batches_of(folders, 0, seed=4))
    assert not equal(without, batches_of(folders, 0, seed=3, epoch=2))


def test_no_two_samples_draw_the_same_numbers(tmp_path):
    """One image under many names: every view that any worker or rank makes of it differs from the others."""
    make_folders(tmp_path, classes=("ant",), train=1)
    image = tmp_path / "train" / "ant" / "0.jpg"
    for i in range(1, 32):
        (image.parent / f"{i}.jpg").write_bytes(image.read_bytes())
    views = [
        view
        for rank in range(2)
        for q, k, _ in batches_of(tmp_path, 2, seed=0, rank=rank, world_size=2)
        for view in (*q, *k)
    ]
    assert len(views) == 2 * 32
    assert len({view.numpy().tobytes() for view in views}) == len(views)


def test_loading_leaves_the_callers_generator_alone(folders):
    images = recipes.TwoCropsTransform(recipes.moco_v1(16))
    loader = training_loader(image_folder(folders, "train"), images, process(), 8, 0, seed=0)
    torch.manual_seed(1)
    loader.dataset[(0, 0)]
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_counts_every_image_once(folders, world_size):
    images = image_folder(folders, "val")  # 9 images: no multiple of 2 or 4
    seen = []
    for rank in range(world_size):
        loader = validation_loader(images, recipes.linear_val(16), process(rank, world_size), 4, 0)
        seen += [image.numpy().tobytes() for batch, _ in loader for image in batch]
    assert len(seen) == len(set(seen)) == 9


def test_classes_of_train_and_val_must_agree(tmp_path):
    make_folders(tmp_path)
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "bug")
    with pytest.raises(UserError, match="class bee stands in .*train"):
        labelled_folders(tmp_path)


def test_bad_image_is_named(tmp_path):
    make_folders(tmp_path, classes=("ant",))
    path = tmp_path / "train" / "ant" / "3.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"ant/3\.jpg"):
        batches_of(tmp_path, 0, seed=0)
    with pytest.raises(UserError, match=r"ant/3\.jpg"):
        batches_of(tmp_path, 2, seed=0)


def test_recipes_hold_the_published_numbers():
    v1, v2 = recipes.moco_v1(224).transforms, recipes.moco_v2(224).transforms
    names = [" ".join(type(t).__name__ for t in recipe) for recipe in (v1, v2)]
    crop, end = "RandomResizedCrop", "RandomHorizontalFlip ToTensor Normalize"
    assert names == [
        f"{crop} RandomGrayscale ColorJitter {end}",
        f"{crop} RandomApply RandomGrayscale RandomApply {end}",
    ]
    assert v1[0].scale == v2[0].scale == (0.2, 1.0)
    assert v1[1].p == v2[2].p == 0.2
    assert v1[2].hue == (-0.4, 0.4)
    jitter = v2[1].transforms[0]
    assert (jitter.brightness, jitter.hue, v2[1].p, v2[3].p) == ((0.6, 1.4), (-0.1, 0.1), 0.8, 0.5)
    assert v2[3].transforms[0].sigma == (0.1, 2.0)
    assert isinstance(recipes.linear_val(224).transforms[0], transforms.Resize)
    assert [recipes.linear_val(size).transforms[0].size for size in (224, 64)] == [256, 73]


def test_views_are_drawn_independently():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    q, k = recipes.TwoCropsTransform(recipes.moco_v2(32))(image)
    assert q.shape == k.shape == (3, 32, 32)
    assert q.dtype == torch.float32
    assert not torch.equal(q, k)
    assert recipes.GaussianBlur([0.1, 2.0])(image).size == image.size


def test_cores_respect_the_control_group(tmp_path):
    everything = available_cores(tmp_path / "none")
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert available_cores(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert available_cores(tmp_path) == everything >= 1
