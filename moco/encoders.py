"""The networks that can be encoders: torchvision's classification models that end in a Linear layer `fc`."""

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


def base_encoder(arch):
    """A callable `(num_classes) -> network` with random weights for the torchvision name `arch`.

    Raises UserError when torchvision has no such model or it does not end in a Linear `fc`.
    """
    known = models.list_models(module=models)
    if arch not in known:
        near = difflib.get_close_matches(arch, known, n=1)
        hint = f"did you mean {near[0]}" if near else "for example resnet18 or resnet50"
        raise UserError(f"torchvision has no classification model {arch!r}; {hint}?")
    construct = partial(models.get_model, arch, weights=None, **WITH_AUXILIARY_HEADS.get(arch, {}))
    probe = without_memory(partial(construct, num_classes=1))
    if not isinstance(getattr(probe, "fc", None), nn.Linear):
        raise UserError(
            f"{arch} has no last layer `fc` for the MoCo head to replace; choose a resnet, resnext, "
            "wide_resnet, regnet, shufflenet_v2, googlenet or inception_v3"
        )
    return construct


def check_image_size(arch, size, flag="--image-size"):
    """Raise UserError that names `flag` when the network `arch` cannot take images of `size` x `size`."""
    try:
        _look_at(without_memory(partial(base_encoder(arch), num_classes=1)), size)
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:120].rstrip(" .")
        raise UserError(
            f"{arch} cannot take {flag} {size} ({reason}); use a larger one, such as 224"
        ) from error


def check_bf16_on_cpu(arch, size):
    """Raise UserError when images of `size` x `size` leave a convolution of `arch` less than its stride.

    torch 2.14 takes the gradient of such a kernel in bf16 from memory that nobody wrote.
    """
    network = without_memory(partial(base_encoder(arch), num_classes=1))
    smallest = []

    def note(conv, inputs):
        if max(conv.kernel_size) > 1 and min(inputs[0].shape[2:]) < max(conv.stride):
            smallest.append(tuple(inputs[0].shape[2:]))

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(note)
    _look_at(network, size)
    if smallest:
        height, width = min(smallest)
        raise UserError(
            f"--amp bf16 on a CPU gives wrong gradients where --image-size {size} leaves a strided "
            f"convolution of {arch} a map of {height} x {width}; use a larger size, or leave --amp out"
        )


def _look_at(network, size):
    """Let images pass through a network that may have no memory for its tensors."""
    with torch.no_grad():
        network.eval()(torch.empty(1, 3, size, size, device=next(network.parameters()).device))


def without_memory(construct):
    """What `construct()` makes, without memory for tensors, or with it where that computes (regnet)."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return construct()
        except RuntimeError:  # what is wrong with the network itself is raised once more
            return construct()
