"""Crops on the device against the workers' crops: both round twice, so they can differ by 2 levels."""

import numpy as np
import torch

from moco.draws import VIEW, draw, moco_v2
from moco.resident import ResidentLoader, crop_resize_batch
from moco.views import crop_resize


def photographs(count, height, width):
    """Smooth colours and noise, uint8 (count, height, width, 3)."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, 3, 5, 5)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").numpy()
    noisy = smooth + rng.normal(0, 10, smooth.shape)
    return noisy.clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def test_crops_are_within_two_levels_of_the_workers():
    images = photographs(24, 90, 120)
    for size in (16, 64, 160):  # smaller and larger than the boxes
        records = np.concatenate([draw(moco_v2(), 120, 90, 0, 0, i, views=1) for i in range(24)])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        batch = crop_resize_batch(pixels, records, size)
        single = torch.stack([crop_resize(i, r, size, "torch") for i, r in zip(images, records, strict=True)])
        difference = (batch.int() - single.int()).abs()
        assert difference.max() <= 2
        assert (difference > 1).float().mean() < 1e-4
        assert (difference > 0).float().mean() < 0.05
        moved = records.copy()
        moved["left"] = np.maximum(moved["left"] - 1, 0)
        assert (crop_resize_batch(pixels, moved, size).int() - single.int()).abs().max() > 2


def test_batches_have_the_draws_and_targets_of_their_keys():
    images, targets = photographs(6, 40, 40), np.arange(6) % 3
    keys = [[(2, 5), (2, 0)], [(2, 3), (2, 4)]]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    batches = list(ResidentLoader(pixels, targets, moco_v2(), 16, 9, keys))
    assert [batch.targets.tolist() for batch in batches] == [[2, 0], [0, 1]]
    for batch, of_batch in zip(batches, keys, strict=True):
        assert batch.pixels.shape == (2, 2, 3, 16, 16)
        assert batch.records.dtype == VIEW
        for position, (epoch, index) in enumerate(of_batch):
            expected = draw(moco_v2(), 40, 40, 9, epoch, index)
            assert np.array_equal(batch.records[:, position], expected)
