"""BatchNorm over groups: which modules are split, special settings, and the form that is compiled."""

import pytest
import torch
from torch import nn

from moco.batchnorm import SplitBatchNorm2d, deinterleave, interleave, split_batchnorm
from moco.encoders import base_encoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_formula_gives_the_same_as_the_kernels(dtype, layout):
    torch.manual_seed(0)
    layers = [SplitBatchNorm2d(5, splits=3) for _ in range(2)]
    layers[0].weight.data.uniform_(), layers[0].bias.data.normal_()
    layers[1].load_state_dict(layers[0].state_dict())
    x, results = torch.randn(12, 5, 4, 3).to(dtype=dtype, memory_format=layout), []
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for layer, run in zip(layers, (layers[0], layers[1]._by_formula), strict=True):
        layer.to(wide)
        inputs = x.clone().requires_grad_()
        for _ in range(2):
            y = run(inputs)
        (y.to(wide) ** 3).sum().backward()
        results.append(
            [y, inputs.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]
        )
        assert layer.num_batches_tracked == 2
    close = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 3e-2}[dtype]
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close)
    assert (layers[0](x[[0, 4, 8] * 4]) - layers[1]._by_formula(x)).abs().max() > 0.1  # negative control


@pytest.mark.parametrize("arch", ["resnet18", "googlenet"])
def test_every_batchnorm_is_split_and_no_name_changes(arch):
    plain, split = base_encoder(arch)(num_classes=4), base_encoder(arch)(num_classes=4)
    changed = split_batchnorm(split, 2)
    assert changed == sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules()) > 0
    assert changed == sum(isinstance(m, SplitBatchNorm2d) for m in split.modules())
    assert list(plain.state_dict()) == list(split.state_dict())


def test_batch_that_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="cannot be split into 3"):
        SplitBatchNorm2d(2, splits=3)(torch.randn(8, 2, 4, 4))


def test_split_batchnorm_without_statistics_or_momentum():
    """The two special settings of BatchNorm2d: a cumulative average, and no running statistics."""
    x = torch.randn(8, 2, 4, 4)
    own, plain = SplitBatchNorm2d(2, momentum=None, splits=2), nn.BatchNorm2d(2, momentum=None)
    for _ in range(3):
        own(x)
        plain(x[::2])
    torch.testing.assert_close(own.running_var, plain.running_var)
    bare = SplitBatchNorm2d(2, track_running_stats=False, splits=2)
    torch.testing.assert_close(bare(x)[1::2], nn.BatchNorm2d(2)(x[1::2]))


def test_interleaving_mixes_groups_and_is_undone():
    x = torch.arange(6)
    assert interleave(x, 2).tolist() == [0, 3, 1, 4, 2, 5]
    assert torch.equal(deinterleave(interleave(x, 2), 2), x)
