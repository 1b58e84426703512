"""Checkpoints to export, and a network with the names of Detectron2's ResNet to load them."""

from functools import partial

import torch
import torchvision
from torch import nn

from moco.builder import MoCo


def write_checkpoint(path, arch, mlp=True):
    """Write a checkpoint of upstream's layout; its query encoder, in eval mode and with an identity as fc."""
    torch.manual_seed(0)
    model = MoCo(partial(torchvision.models.get_model, arch, weights=None), 16, 32, mlp=mlp)
    for module in model.encoder_q.modules():  # statistics that differ from those of a fresh network
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 200, "arch": arch, "state_dict": state, "optimizer": {"state": {}}}, path)
    model.encoder_q.fc = nn.Identity()
    return model.encoder_q.eval().requires_grad_(False)


class D2Conv(nn.Conv2d):
    """A convolution that owns its norm, as Detectron2's layers.Conv2d."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, bias=False, **options)
        self.norm = nn.BatchNorm2d(sizes[1])

    def forward(self, x):
        return self.norm(super().forward(x))


class D2Block(nn.Module):
    """Detectron2's BasicBlock, or its BottleneckBlock with STRIDE_IN_1X1 off."""

    def __init__(self, fan_in, width, fan_out, stride):
        super().__init__()
        self.shortcut = D2Conv(fan_in, fan_out, 1, stride=stride) if fan_in != fan_out else None
        if width == fan_out:
            self.conv1 = D2Conv(fan_in, width, 3, stride=stride, padding=1)
            self.conv2 = D2Conv(width, width, 3, padding=1)
            self.conv3 = None
        else:
            self.conv1 = D2Conv(fan_in, width, 1)
            self.conv2 = D2Conv(width, width, 3, stride=stride, padding=1)
            self.conv3 = D2Conv(width, fan_out, 1)

    def forward(self, x):
        y = self.conv2(self.conv1(x).relu())
        y = y if self.conv3 is None else self.conv3(y.relu())
        return (y + (x if self.shortcut is None else self.shortcut(x))).relu()


class D2ResNet(nn.Module):
    """The structure and the names of Detectron2's ResNet: stem.conv1, res2 to res5, norms in convolutions."""

    def __init__(self, blocks, expansion):
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = D2Conv(3, 64, 7, stride=2, padding=3)
        fan_in = 64
        for stage, count in enumerate(blocks):
            width = 64 * 2**stage
            sizes = [
                (fan_in if i == 0 else width * expansion, 2 if i == 0 and stage else 1) for i in range(count)
            ]
            stage_blocks = [D2Block(size, width, width * expansion, stride) for size, stride in sizes]
            self.add_module(f"res{stage + 2}", nn.Sequential(*stage_blocks))
            fan_in = width * expansion

    def forward(self, x):
        x = nn.functional.max_pool2d(self.stem.conv1(x).relu(), 3, stride=2, padding=1)
        for name in ("res2", "res3", "res4", "res5"):
            x = getattr(self, name)(x)
        return x.mean(dim=(2, 3))
