"""Base encoders: which architectures are taken, which image sizes, and further input channels."""

import re
import sys

import pytest
import torch

from moco.encoders import base_encoder, check_image_size, last_linear, on_meta_device
from moco.errors import UserError


@pytest.mark.parametrize("arch", ["resnet18", "regnet_y_400mf", "shufflenet_v2_x0_5", "googlenet"])
def test_an_encoder_gives_one_tensor_of_num_classes(arch):
    assert base_encoder(arch)(num_classes=7)(torch.randn(2, 3, 96, 96)).shape == (2, 7)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet5", "no classification model 'resnet5'; did you mean resnet50?"),
        ("get_model", "no classification model 'get_model'"),
        ("squeezenet1_1", "has its one Linear classifier, and SqueezeNet has none"),
    ],
)
def test_other_architectures_are_refused(arch, message):
    with pytest.raises(UserError, match=re.escape(message)):
        last_linear(base_encoder(arch))


def test_without_timm_the_pip_line_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        UserError, match="-a timm:resnet18 needs a package that is not installed: pip install timm"
    ):
        base_encoder("timm:resnet18")


def test_a_small_stem_keeps_the_size_and_the_other_weights():
    torch.manual_seed(0)
    plain = base_encoder("resnet18")(num_classes=4)
    torch.manual_seed(0)
    small = base_encoder("resnet18", stem="small")(num_classes=4)
    assert small.conv1(torch.zeros(1, 3, 9, 9)).shape == (1, 64, 9, 9)
    assert small.maxpool(small.conv1.weight) is small.conv1.weight
    assert small.conv1.weight.std().item() == pytest.approx(
        (2 / (64 * 9)) ** 0.5, rel=0.1
    )  # He 2015, fan out
    differ = [n for n, x in plain.state_dict().items() if not torch.equal(x, small.state_dict()[n])]
    assert differ == ["conv1.weight"]


def test_conv3_is_as_described():
    network = base_encoder("conv3", image_size=30)(num_classes=5)
    shapes = [tuple(x.shape) for x in network.parameters() if x.dim() > 1]
    assert shapes == [(32, 3, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3), (128, 64 * 4 * 4), (5, 128)]
    assert network.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    with pytest.raises(RuntimeError):  # negative control
        network(torch.randn(2, 3, 33, 33))


@pytest.mark.parametrize(("arch", "size"), [("inception_v3", 64), ("googlenet", 8)])
def test_too_small_images_are_refused(arch, size):
    with pytest.raises(UserError, match=f"{arch} cannot take --image-size {size} "):
        check_image_size(arch, size)
    check_image_size(arch, 96)


def test_checks_take_neither_memory_nor_random_numbers():
    before = torch.get_rng_state()
    check_image_size("regnet_x_400mf", 64)
    network = on_meta_device(lambda: base_encoder("resnet50")(num_classes=1))
    assert all(parameter.is_meta for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("arch", ["resnet18", "googlenet"])
def test_further_channels_keep_the_weights_of_the_image(arch):
    torch.manual_seed(0)
    plain = base_encoder(arch)(num_classes=4)
    torch.manual_seed(0)
    wide = base_encoder(arch, extra_channels=2)(num_classes=4)
    widened = {}
    for name, tensor in plain.state_dict().items():
        other = wide.state_dict()[name]
        if other.shape == tensor.shape:
            assert torch.equal(other, tensor), name
        else:
            widened[name] = other
            assert torch.equal(other[:, :3], tensor)
            assert other[:, 3:].std() == pytest.approx(tensor.std().item(), rel=0.1)
    assert len(widened) == 1
    assert next(iter(widened.values())).shape[1] == 5
