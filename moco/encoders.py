"""Base encoders: torchvision's classification models that end in a Linear layer `fc`."""

import difflib
from functools import partial

import torch
from torch import nn
from torchvision import models

from moco.errors import UserError

# These two would return a tuple in training, with the output of auxiliary classifiers.
WITH_AUXILIARY_HEADS = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def base_encoder(arch, extra_channels=0):
    """A callable `(num_classes) -> network` with random weights for the torchvision name `arch`.

    extra_channels: input channels after the image's three. The weights for the image are those of the network
    without them; the others are drawn afterwards, normal with the same standard deviation.
    Raises UserError when torchvision has no such model or it does not end in a Linear `fc`.
    """
    known = models.list_models(module=models)
    if arch not in known:
        near = difflib.get_close_matches(arch, known, n=1)
        hint = f"did you mean {near[0]}" if near else "for example resnet18 or resnet50"
        raise UserError(f"torchvision has no classification model {arch!r}; {hint}?")
    construct = partial(models.get_model, arch, weights=None, **WITH_AUXILIARY_HEADS.get(arch, {}))
    probe = on_meta_device(partial(construct, num_classes=1))
    if not isinstance(getattr(probe, "fc", None), nn.Linear):
        raise UserError(
            f"{arch} has no last layer `fc` for the MoCo head to replace; choose a resnet, resnext, "
            "wide_resnet, regnet, shufflenet_v2, googlenet or inception_v3"
        )
    return partial(_widened, construct, extra_channels) if extra_channels else construct


def check_image_size(arch, size, flag="--image-size"):
    """Raise UserError that names `flag` when the network `arch` cannot take images of `size` x `size`."""
    try:
        _forward(on_meta_device(partial(base_encoder(arch), num_classes=1)), size)
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:120].rstrip(" .")
        raise UserError(
            f"{arch} cannot take {flag} {size} ({reason}); use a larger one, such as 224"
        ) from error


def _forward(network, size):
    """A forward pass of one image, also of a network on the meta device."""
    with torch.no_grad():
        network.eval()(torch.empty(1, 3, size, size, device=next(network.parameters()).device))


def _widened(construct, extra_channels, num_classes):
    network = construct(num_classes=num_classes)
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    weight = first.weight.detach()
    out, channels, height, width = weight.shape
    extra = torch.empty(out, extra_channels, height, width).normal_(std=weight.std().item())
    first.weight = nn.Parameter(torch.cat([weight, extra], dim=1))
    first.in_channels = channels + extra_channels
    return network


def on_meta_device(construct):
    """The network that `construct()` returns, with tensors on the meta device, which takes no memory.

    On the CPU where construction computes with values (regnet).
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return construct()
        except RuntimeError:  # an error of the network's own is raised again
            return construct()
