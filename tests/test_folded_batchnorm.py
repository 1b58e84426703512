"""A network whose BatchNorm is folded into its convolutions computes what it did."""

import copy

import pytest
import torch
from test_resume import content_hash
from torch import nn

from moco.encoders import base_encoder
from moco.folded_batchnorm import fold_batchnorm


def with_statistics(network, x):
    """The network in evaluation mode, float64, with BatchNorm that has the statistics of `x` and draws."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            for tensor in (module.weight, module.bias):
                tensor.data.add_(0.3 * torch.randn_like(tensor))
    with torch.no_grad():
        network.double().train()(x)
    return network.eval()


@pytest.mark.parametrize("arch", ["resnet18", "shufflenet_v2_x0_5", "regnet_y_400mf", "googlenet"])
def test_folded_networks_compute_the_same(arch):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    network = with_statistics(base_encoder(arch)(num_classes=5), x)
    folded = copy.deepcopy(network)
    fold = fold_batchnorm(folded)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        expected = network(x)
        for changed in (False, True):
            if changed:  # folded anew
                list(network.parameters())[0].add_(0.1)
                assert not torch.allclose(network(x), expected, rtol=1e-6)
                assert not torch.allclose(network(x), folded(x), rtol=1e-6)  # negative control
            before = content_hash(dict(network.state_dict()))
            folded.load_state_dict(fold(network.state_dict()), assign=True)
            torch.testing.assert_close(folded(x), network(x), rtol=1e-9, atol=1e-12)
            assert content_hash(dict(network.state_dict())) == before


class Twice(nn.Module):
    """Another layer reads the first convolution too; the second convolution is called twice."""

    def __init__(self, untraceable):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1, bias=i == 2) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))
        self.untraceable = untraceable

    def forward(self, x):
        if self.untraceable and x.sum() > 1e9:
            return x
        y = self.convs[0](x)
        y = y + self.norms[0](y)
        y = self.convs[1](self.norms[1](self.convs[1](y)))
        return self.norms[2](self.convs[2](y))


@pytest.mark.parametrize("untraceable, left", [(False, 2), (True, 3)])
def test_what_cannot_be_folded_stays(untraceable, left):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    network = with_statistics(Twice(untraceable), x)
    folded = copy.deepcopy(network)
    fold = fold_batchnorm(folded)
    folded.load_state_dict(fold(network.state_dict()))
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == left
    torch.testing.assert_close(folded(x), network(x), rtol=1e-12, atol=1e-12)
