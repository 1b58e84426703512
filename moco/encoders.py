"""Base encoders: torchvision's classification models, timm's, and a small one for experiments on a CPU.

The last Linear of a network, its classifier, is where MoCo's head goes, and what it gets are the features.
"""

import difflib
import math
import warnings
from functools import partial

import torch
from torch import nn
from torchvision import models

from moco.errors import UserError, first_line

TIMM = "timm:"  # in front of the names of timm's networks
SMALL = "small"  # of --stem
RESNETS = ("resnet", "resnext", "wide_resnet")  # how the names of those that have a --stem start
CLASSES = 997  # of a network to look at: no other layer is of this size
# These two would return a tuple in training, with the output of auxiliary classifiers.
WITH_AUXILIARY_HEADS = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def base_encoder(arch, extra_channels=0, stem=None, image_size=224):
    """A callable `(num_classes) -> network` with random weights for the name `arch`: one of torchvision's
    classification models, one of timm's after "timm:", or conv3 (Conv3).

    extra_channels: input channels after the image's three. The weights for the image are those of the network
    without them; the others are drawn afterwards, normal with the same standard deviation.
    stem: "small" for a ResNet whose first convolution is 3 x 3 with stride 1, and without pooling after it.
    image_size: side of the images, for networks whose shapes depend on it (conv3, vision transformers).
    Raises UserError when there is no such network, or it has no such stem.
    """
    if arch.startswith(TIMM):
        construct = _of_timm(arch, image_size)
    elif arch == "conv3":
        construct = partial(Conv3, image_size=image_size)
    else:
        settings = WITH_AUXILIARY_HEADS.get(arch, {})
        if arch.startswith("vit_"):
            settings = {"image_size": image_size}
        construct = partial(models.get_model, _known(arch), weights=None, **settings)
    if stem == SMALL:
        if not arch.startswith(RESNETS):
            raise UserError(f"--stem small is of torchvision's ResNets, not of {arch}; leave it out")
        construct = partial(_with_small_stem, construct)
    return partial(_widened, construct, extra_channels) if extra_channels else construct


def is_known(arch):
    """Whether base_encoder knows the name: files of other programs name networks of their own."""
    return arch.startswith(TIMM) or arch == "conv3" or arch in models.list_models(module=models)


def last_linear(base_encoder):
    """The dotted name of the layer where MoCo's head goes in the networks that `base_encoder(num_classes)`
    constructs: `fc` where it is a Linear, else the one Linear with `num_classes` outputs.

    Raises UserError when there is none, or more than one. No random number is drawn.
    """
    network = on_meta_device(partial(base_encoder, num_classes=CLASSES))
    if isinstance(getattr(network, "fc", None), nn.Linear):
        return "fc"
    linears = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    found = [name for name, linear in linears.items() if linear.out_features == CLASSES]
    if len(found) != 1:
        has = f"has {len(found)} of them ({', '.join(found)})" if found else "has none"
        raise UserError(
            f"MoCo's head goes where a network has its one Linear classifier, and {type(network).__name__} "
            f"{has}; choose another, such as resnet50, convnext_tiny or vit_b_16"
        )
    return found[0]


def replace_layer(network, name, layer):
    """Put `layer` where `network` has the one of the dotted `name`, which is returned."""
    parent, _, own = name.rpartition(".")
    parent = network.get_submodule(parent)
    before = getattr(parent, own)
    setattr(parent, own, layer)
    return before


def backbone(base_encoder, num_classes=1):
    """A network of `base_encoder` with nn.Identity in its classifier's place: images to features, N x d.

    num_classes: of the classifier that is left out, which draws random weights too; torch's generator is
    afterwards as it was.
    """
    with torch.random.fork_rng(devices=[]):
        network = base_encoder(num_classes=num_classes)
    replace_layer(network, last_linear(base_encoder), nn.Identity())
    return network


def has_batchnorm(network):
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def check_image_size(arch, size, flag="--image-size", stem=None):
    """Raise UserError that names `flag` when the network `arch` cannot take images of `size` x `size`, and
    what base_encoder and last_linear raise.
    """
    try:
        construct = base_encoder(arch, stem=stem, image_size=size)
        last_linear(construct)
        network = on_meta_device(partial(construct, num_classes=CLASSES))
        outputs = _forward(network, size)
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        reason = first_line(error)[:120].rstrip(" .!")
        raise UserError(f"{arch} cannot take {flag} {size} ({reason}); use another, such as 224") from error
    if tuple(getattr(outputs, "shape", ())) != (1, CLASSES):
        raise UserError(
            f"{arch} does not give one row of numbers per image; choose another, such as resnet50"
        )


def _forward(network, size):
    """A forward pass of one image, also of a network on the meta device."""
    with torch.no_grad():
        return network.eval()(torch.empty(1, 3, size, size, device=next(network.parameters()).device))


class Conv3(nn.Module):
    """Three 3 x 3 convolutions of stride 2 with 32, 64 and 64 channels, each with BatchNorm and ReLU, then
    Linear 128, BatchNorm and ReLU: the features, N x 128. `fc` is the classifier.

    It takes images of `image_size`, N x 3 x S x S, and of all sizes with the same ceil(S / 8).
    """

    def __init__(self, num_classes=1000, image_size=224):
        super().__init__()
        layers = []
        for channels, out in ((3, 32), (32, 64), (64, 64)):
            conv = nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        hidden = nn.Linear(64 * math.ceil(image_size / 8) ** 2, 128, bias=False)
        self.hidden = nn.Sequential(hidden, nn.BatchNorm1d(128), nn.ReLU(inplace=True))
        self.fc = nn.Linear(128, num_classes)

    def forward(self, x):
        return self.fc(self.hidden(self.convolutions(x)))


def _known(arch):
    known = models.list_models(module=models)
    if arch not in known:
        near = difflib.get_close_matches(arch, [*known, "conv3"], n=1)
        hint = f"did you mean {near[0]}" if near else "for example resnet18 or resnet50"
        raise UserError(f"torchvision has no classification model {arch!r}; {hint}?")
    return arch


def _of_timm(arch, image_size):
    """The callable of base_encoder for one of timm's names, also with the tag of its weights."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"-a {arch} needs a package that is not installed: pip install timm") from error
    name = arch.removeprefix(TIMM)
    known = timm.list_models() + (timm.list_pretrained() if "." in name else [])
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {TIMM}{near[0]}" if near else "for example timm:resnet18 or timm:convnext_atto"
        raise UserError(f"timm has no network {name!r}; {hint}?")
    return partial(_timm_network, timm.create_model, name, image_size)


def _timm_network(create_model, name, image_size, num_classes, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's, on names and layers
        try:
            return create_model(name, num_classes=num_classes, img_size=image_size, **settings)
        except TypeError:  # a network whose shapes do not depend on it
            return create_model(name, num_classes=num_classes, **settings)


def _with_small_stem(construct, num_classes):
    network = construct(num_classes=num_classes)
    out = network.conv1.out_channels
    network.conv1 = nn.Conv2d(3, out, 3, padding=1, bias=False, device=network.conv1.weight.device)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
    network.maxpool = nn.Identity()
    return network


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
