"""The encoder of the golden files, and what tests share to build a small MoCo."""

import torch
from torch import nn
from torchvision.models._api import register_model


class TinyEncoder(nn.Module):
    """conv3x3(3 -> 8, stride 2), BatchNorm, ReLU, global average pool, Linear `fc`."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv(x))).mean(dim=(2, 3)))


def tiny(weights=None, **settings):
    return TinyEncoder(**settings)


tiny.__module__ = "torchvision.models.tiny"  # where the programs look for networks: here they know `-a tiny`
register_model()(tiny)
