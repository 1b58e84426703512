"""BatchNorm over groups: which modules are split, special settings, and the form that is compiled."""

import pytest
import torch
from torch import nn

from moco.batchnorm import SplitBatchNorm2d, deinterleave, interleave, split_batchnorm
from moco.encoders import base_encoder


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


def results(run, layer, x):
    """What a layer, called as `run`, gives in two steps: output, gradients, running statistics."""
    inputs = x.clone().requires_grad_()
    for _ in range(2):
        y = run(inputs)
    (y.to(layer.running_mean.dtype) ** 3).sum().backward()
    gradients = [inputs.grad, *(p.grad for p in layer.parameters())]
    return [y.detach(), *gradients, layer.running_mean, layer.running_var]


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [True, False])
def test_what_is_compiled_gives_the_same_as_the_kernels(dtype, close, layout, affine):
    """Values, the gradients of its own backward pass against autograd's, and running statistics."""
    torch.manual_seed(0)
    layers = [
        SplitBatchNorm2d(5, affine=affine, splits=3).to(torch.promote_types(dtype, torch.float32))
        for _ in range(3)
    ]
    for parameter in layers[0].parameters():
        parameter.data.normal_()
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    x = torch.randn(12, 5, 4, 3).to(dtype=dtype, memory_format=layout)
    compiled = torch.compile(layers[1], backend="aot_eager", fullgraph=True)
    eager, ours = results(layers[0], layers[0], x), results(compiled, layers[1], x)
    assert layers[1].num_batches_tracked == 2
    for theirs, own in zip(eager, ours, strict=True):
        assert own.dtype == theirs.dtype
        scale = theirs.abs().max()  # the gradient of y ** 3 is of any size
        torch.testing.assert_close(own / scale, theirs / scale, rtol=0, atol=close)
    mixed = x[[0, 4, 8] * 4]  # negative control: other groups
    assert (compiled(mixed) - ours[0]).abs().max() > 0.1


def test_the_compiled_gradient_needs_the_terms_of_the_statistics():
    """The control of the test above: without them the gradient differs, and it sums to something."""
    layer = SplitBatchNorm2d(3, splits=2).double()
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    (compiled(x) ** 3).sum().backward()
    # a shift of a whole group changes nothing
    assert x.grad.unflatten(0, (-1, 2)).sum((0, 3, 4)).abs().max() < 1e-10
    frozen = (x.detach() * layer.running_var.rsqrt()[:, None, None]).requires_grad_()
    (frozen**3).sum().backward()
    assert frozen.grad.unflatten(0, (-1, 2)).sum((0, 3, 4)).abs().max() > 0.1


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
