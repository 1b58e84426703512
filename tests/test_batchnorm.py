"""BatchNorm over groups: its two ways of computing, which depend on layout, agree."""

import pytest
import torch

from moco.batchnorm import SplitBatchNorm2d


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_split_batchnorm_by_formula_is_that_by_kernels(dtype, layout):
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
