"""Order and randomness of samples, image folders, and batches from files."""

import numpy as np
import pytest
import torch
from conftest import make_folders
from PIL import Image

from moco import loader as published
from moco.cores import available_cores
from moco.data import EpochBatches, Loading, image_folder, labelled_folders
from moco.distributed import Process
from moco.draws import moco_v1, moco_v2
from moco.errors import UserError
from moco.finish import finisher


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


def batches_of(
    folders, workers, seed, epoch=1, size=8, device_aug="off", resize="pil", recipe=None, cache=None,
    image_size=16, **rank,
):  # fmt: skip
    """The finished batches (q, k, target) of an epoch."""
    recipe = recipe or moco_v2()
    loader = Loading(image_size, resize, size, workers, cache=cache).training(
        image_folder(folders, "train"), recipe, process(**rank), seed, photometric=device_aug == "off"
    )
    loader.batch_sampler.epoch = epoch
    finish, _ = finisher(device_aug, recipe, torch.device("cpu"))
    return [(*finish(batch), batch.targets) for batch in loader]


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


@pytest.mark.parametrize("recipe", [moco_v1(), moco_v2()])
def test_pixels_are_the_same_wherever_colours_are_done(folders, recipe):
    by_workers = batches_of(folders, 1, seed=3, recipe=recipe)
    assert equal(by_workers, batches_of(folders, 1, seed=3, recipe=recipe, device_aug="exact"))
    fast = batches_of(folders, 1, seed=3, recipe=recipe, device_aug="float")
    assert not equal(by_workers, fast)
    for ours, theirs in zip(by_workers, fast, strict=True):
        assert (ours[0] - theirs[0]).abs().mean() < 0.03  # 1.7 grey levels
    assert not equal(by_workers, batches_of(folders, 1, seed=3, recipe=recipe, resize="torch"))


def test_caches_change_no_sample(folders):
    plain = batches_of(folders, 1, seed=3, device_aug="exact", resize="torch")
    for kind in ("decoded", "files"):
        assert equal(plain, batches_of(folders, 1, seed=3, device_aug="exact", resize="torch", cache=kind))
    resident = batches_of(folders, 1, seed=3, device_aug="exact", cache="device")
    for ours, theirs in zip(plain, resident, strict=True):
        assert torch.equal(ours[2], theirs[2])
        assert (ours[0] - theirs[0]).abs().mean() < 0.01  # less than a grey level
    with pytest.raises(UserError, match="add --device-aug"):
        batches_of(folders, 1, seed=3, cache="device")


def test_samples_do_not_depend_on_the_batch_size(folders):
    def samples(size):
        batches = batches_of(folders, 0, seed=3, size=size)
        return sorted(view.numpy().tobytes() for q, _, _ in batches for view in q)

    assert samples(4) == samples(12)


def test_loading_leaves_the_callers_generator_alone(folders):
    torch.manual_seed(1)
    batches_of(folders, 1, seed=0)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_counts_every_image_once(folders, world_size):
    images = image_folder(folders, "val")  # 9 images: no multiple of 2 or 4
    seen = []
    for rank in range(world_size):
        loader = Loading(16, "pil", 4 * world_size, 0).validation(images, process(rank, world_size))
        seen += [image.numpy().tobytes() for batch in loader for image in batch.pixels[0]]
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


def test_names_that_other_code_imports():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    q, k = published.TwoCropsTransform(published.GaussianBlur([0.1, 2.0]))(image)
    assert q.size == k.size == image.size
    assert np.any(np.asarray(q) != np.asarray(k))


def test_cores_respect_the_control_groups(tmp_path):
    everything = available_cores(tmp_path, "0::/\n")
    job = tmp_path / "job"
    (job / "step").mkdir(parents=True)
    (job / "cpu.max").write_text("150000 100000\n")
    (job / "step" / "cpu.max").write_text("max 100000\n")
    assert available_cores(tmp_path, "0::/job/step\n") == 1  # the group's, or that of one around it
    assert available_cores(tmp_path, "0::/other\n") == everything >= 1
    (tmp_path / "cpu" / "job").mkdir(parents=True)  # version 1
    for name, value in (("quota", 100000), ("period", 100000)):
        (tmp_path / "cpu" / "job" / f"cpu.cfs_{name}_us").write_text(str(value))
    assert available_cores(tmp_path, "1:cpu,cpuacct:/job\n4:memory:/\n") == 1
    (tmp_path / "cpu" / "job" / "cpu.cfs_quota_us").write_text("-1\n")
    assert available_cores(tmp_path, "1:cpu,cpuacct:/job\n") == everything
