"""Random bits belong to images, the same in both views."""

from types import SimpleNamespace

import numpy as np
import torch

from moco.data.experiments import HELD_OUT, TRAIN, RandomBits, bits_of, with_channels


def test_bits_are_a_function_of_seed_part_and_image():
    bits = bits_of(3, TRAIN, range(2000), 20)
    assert bits.shape == (2000, 20) and bits.dtype == torch.float32 and set(bits.unique().tolist()) == {0, 1}
    assert torch.equal(bits_of(3, TRAIN, [7, 1999, 7], 20), bits[[7, 1999, 7]])  # in any batch
    for other in (bits_of(4, TRAIN, range(2000), 20), bits_of(3, HELD_OUT, range(2000), 20)):
        assert abs(float((other == bits).float().mean()) - 0.5) < 0.02  # as two that are independent
    assert float((bits.mean(dim=0) - 0.5).abs().max()) < 0.06  # 5 standard deviations
    assert float((torch.corrcoef(bits.T) - torch.eye(20)).abs().max()) < 0.12
    assert len({tuple(row) for row in bits_of(0, TRAIN, range(500), 63).tolist()}) == 500


def test_recorded_bits():
    """A run that continues under another version must go on with the same bits."""
    assert bits_of(5, TRAIN, [0, 1, 999], 6).int().tolist() == [
        [0, 1, 1, 1, 0, 1],
        [0, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 1, 0],
    ]


def test_bits_are_constant_channels_after_the_image():
    images, values = torch.rand(2, 3, 4, 5), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    both = with_channels(images, values)
    assert both.shape == (2, 5, 4, 5) and torch.equal(both[:, :3], images)
    assert torch.equal(both[:, 3:], values[:, :, None, None].expand(2, 2, 4, 5))


def test_views_of_a_batch_get_the_bits_of_its_images():
    views, batch = [torch.zeros(4, 3, 2, 2), torch.ones(4, 3, 2, 2)], SimpleNamespace(indices=np.arange(4))
    q, k = RandomBits(6, 5, lambda batch: views)(batch)
    assert torch.equal(q, with_channels(views[0], bits_of(5, TRAIN, range(4), 6)))
    assert torch.equal(k[:, 3:], q[:, 3:]) and torch.equal(k[:, :3], views[1])
    batch.indices = batch.indices[::-1]
    assert not torch.equal(RandomBits(6, 5, lambda batch: views)(batch)[0], q)
