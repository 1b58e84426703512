"""Random bits belong to images, the same in both views."""

from types import SimpleNamespace

import numpy as np
import torch

from moco.data import experiments
from moco.data.augment import VIEW
from moco.data.experiments import HELD_OUT, TRAIN, RandomBits, bits_of, bits_of_views, with_channels


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


def test_bits_are_sent_without_a_stride_of_0(monkeypatch):
    """Such tensors cannot be pinned for the way to a GPU."""
    sent = []
    monkeypatch.setattr(experiments, "to_device", lambda values, device: sent.append(values) or values)
    batch = SimpleNamespace(indices=np.arange(4), records=np.zeros((2, 4), VIEW))
    for per_view in (False, True):
        RandomBits(6, 5, lambda batch: [torch.zeros(4, 3, 2, 2)] * 2, per_view)(batch)
    assert [0 in values.stride() for values in sent] == [False, False]


def test_bits_per_view_are_functions_of_the_image_and_its_view():
    indices, records = np.arange(500), np.zeros((2, 500), VIEW)
    batch, images = SimpleNamespace(indices=indices, records=records), torch.zeros(500, 3, 1, 1)
    views = RandomBits(20, 5, lambda batch: [images, images], per_view=True)(batch)
    q, k = (view[:, 3:, 0, 0] for view in views)
    assert set(q.unique().tolist()) == {0, 1} and torch.equal(
        torch.stack([q, k]), bits_of_views(5, records, indices, 20)
    )
    assert torch.equal(bits_of_views(5, records[:, 7:9], indices[7:9], 20)[0], q[7:9])  # in any batch
    records = records.copy()
    records["top"][0] = 1  # as in another epoch
    other = bits_of_views(5, records, indices, 20)
    assert torch.equal(other[1], k)
    for bits in (
        k,
        other[0],
        bits_of(5, TRAIN, indices, 20),
        bits_of_views(6, batch.records, indices, 20)[0],
    ):
        assert abs(float((bits == q).float().mean()) - 0.5) < 0.02  # as two that are independent
