"""Checkpoints to export."""

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
