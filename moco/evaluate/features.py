"""The backbone of a checkpoint, its features of a data set, and how features lie in space."""

import contextlib
import itertools
from functools import partial

import torch
from torch import nn

from moco import zoo
from moco.data.decode import pixels_of
from moco.data.device import normalize
from moco.data.loader import ValidationLoader
from moco.data.pil import center_resize
from moco.encoders import base_encoder, last_linear, on_meta_device
from moco.errors import UserError
from moco.progress import Progress
from moco.run.backbone import arch_of, loaded_backbone
from moco.run.checkpoint import check_arch, read

GROUP = 16  # batches after which the features of a GPU are moved to the CPU, for which it waits


def load_backbone(name_or_path, arch=None):
    """(network, transform) of a released model's name or a checkpoint file, of this or another program.

    network: in eval mode on the CPU, from normalized images (N, 3, H, W), float32, to features (N, d): the
    input of the classifier, as linear evaluation sees it. transform: a PIL image to such an image (3, S, S),
    the central view of validation. The architecture is read from the file (arch: for files that do not name
    it), S and --gray-range from the run's settings (else 224 and none). Raises UserError.
    """
    network, checkpoint = backbone_of(name_or_path, arch)
    size, resize = checkpoint["image_size"], checkpoint["resize"]
    gray_range = checkpoint["gray_range"]
    return network, partial(_central_view, size=size, resize=resize, gray_range=gray_range)


def _central_view(image, size, resize, gray_range):
    return normalize(center_resize(pixels_of(image, gray_range), size, resize))


def backbone_of(path_or_name, arch=None, image_size=None):
    """(network, checkpoint) of a checkpoint file or the name of a released model.

    The network is that of `load_backbone`. arch: its name as of moco.encoders (default: the checkpoint's
    entry `arch`, else resnet50). image_size: of the images that it is to take (default: that of the run).
    checkpoint: the dict that moco.run.checkpoint.read gives, with "arch", "image_size", "resize",
    "gray_range", and "taken": where in the file the backbone was, in words. Raises UserError.
    """
    path = zoo.resolve(path_or_name)
    checkpoint = read(path)
    arch = arch_of(checkpoint, path, arch) or "resnet50"
    check_arch(checkpoint, arch, path)
    network, image_size, taken = loaded_backbone(checkpoint, path, arch, image_size)
    trained = own if isinstance(own := checkpoint.get("settings"), dict) else {}  # others may have any
    resize = "torch" if trained.get("resize") == "torch" else "pil"
    found = {"arch": arch, "image_size": image_size, "resize": resize, "taken": taken}
    found["gray_range"] = trained.get("gray_range")
    return network, checkpoint | found


def with_head(network, checkpoint, path):
    """The network of `backbone_of` and behind it the query encoder's head: to N x C, not yet of length 1.

    checkpoint: the dict beside the network; path: its file, named in messages. Raises UserError when the file
    has no head of MoCo.
    """
    name = last_linear(base_encoder(checkpoint["arch"], image_size=checkpoint["image_size"]))
    start = f"encoder_q.{name}."
    tensors = checkpoint["state_dict"].items()
    state = {key.removeprefix(start): tensor.float() for key, tensor in tensors if key.startswith(start)}

    def linear(place=""):
        out, width = state[f"{place}weight"].shape
        return nn.Linear(width, out, bias=f"{place}bias" in state)

    if "weight" in state:
        head = on_meta_device(linear)
    elif {"0.weight", "2.weight"} <= state.keys():  # MoCo v2
        head = on_meta_device(lambda: nn.Sequential(linear("0."), nn.ReLU(), linear("2.")))
    else:
        raise UserError(f"{path} has no head of MoCo (no encoder_q.{name}); take its backbone's features")
    head.load_state_dict(state, assign=True)
    return nn.Sequential(network, head.requires_grad_(False)).eval()


def embed(network, images, device="cpu", **settings):
    """(features N x d float32, targets N int64) of an ImageFolder's N images, in its order, on the CPU.

    network: in eval mode on `device`; settings: of ValidationLoader. It shows its progress on standard error.
    """
    loader = ValidationLoader(images, device=device, **settings)
    features, targets, end = None, torch.empty(len(images), dtype=torch.int64), 0
    with Progress("features", len(images), "images") as progress, contextlib.closing(loader):

        def counted():
            for batch in loader:
                yield batch
                progress.update(len(batch.targets))

        batches = counted()
        for _ in range(0, len(loader), GROUP):
            part, part_targets = features_of(network, itertools.islice(batches, GROUP), device)
            if features is None:  # filled in place: with a list of parts there would be two copies in the end
                features = torch.empty(len(images), part.shape[1])
            start, end = end, end + len(part)
            features[start:end], targets[start:end] = part, part_targets
        next(batches, None)  # which counts the last
    return features, targets


@torch.no_grad()
def features_of(network, loader, device, autocast=contextlib.nullcontext):
    """(features N x d float32, targets N int64) of a ValidationLoader's images, in its order, on `device`.

    network: in eval mode on the loader's device; autocast: makes the context of a forward pass.
    """
    features, targets = [], []
    for batch in loader:
        with autocast():
            features.append(network(normalize(batch.pixels[0])).float().to(device))
        targets.append(batch.targets.to(device))
    return torch.cat(features), torch.cat(targets)


def gram(features):
    """The products of the columns of features, N x d: float64 d x d."""
    rows = features.split(4096)
    return sum((part.double().T @ part.double() for part in rows[1:]), rows[0].double().T @ rows[0].double())


def rankme(gram):
    """RankMe, the effective rank of features Z (N x d) by their gram(Z): a number from 1 to d, nan where one
    is not finite.

    The exponential of the entropy of Z's singular values, as shares of their sum (Garrido et al. 2023,
    without the 1e-7 that they add for logarithms of 0). Features in r dimensions have at most r.
    """
    if not gram.isfinite().all():
        return float("nan")
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()  # singular values, squared in gram
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum().exp().item()


def similarities(q, k, mean_key):
    """The four numbers below and the length of mean_key by name. q, k: positive pairs, N x C; mean_key: the
    mean of the queue, (C,).

    All of these functions take unit rows (float32 or float64, without gradient) and return a 0-dim. tensor on
    their device, without waiting for it and without an N x K product.
    """
    return {
        "pos_similarity": pos_similarity(q, k),
        "neg_similarity": neg_similarity(q, mean_key),
        "alignment": alignment(q, k),
        "uniformity": uniformity(q),
        "queue_mean": mean_key.norm(),
    }


def pos_similarity(q, k):
    """Mean cosine of the rows of q and k, N x C each."""
    return (q * k).sum(dim=1).mean()


def neg_similarity(q, mean_key):
    """Mean cosine of the N rows of q and the queue's keys, from the mean of the keys: cosines are linear."""
    return q.mean(dim=0) @ mean_key


def alignment(q, k):
    """Mean squared distance of positive pairs, the rows of q and k (Wang & Isola 2020, with alpha 2)."""
    return (q - k).square().sum(dim=1).mean()


def uniformity(q):
    """log of the mean of exp(-2 |q_i - q_j|^2) over pairs i < j (Wang & Isola 2020, t 2); nan for one row."""
    return torch.pdist(q).square().mul(-2).exp().mean().log()
