"""Which training images are nearest to validation images in a backbone's features, and a sheet of them."""

import copy
import math
import os
from dataclasses import dataclass

import numpy as np
import torch

from moco import zoo
from moco.checkpoint import check_arch, encoder_state, load_strictly
from moco.checkpoint_reader import read_checkpoint
from moco.data import paths_of
from moco.decoders import decoder, read_pixels
from moco.encoders import base_encoder
from moco.errors import UserError
from moco.factors import COMBINATIONS, FACTORS
from moco.knn import unit_rows
from moco.pictures import BLUE, RED, WIDTH, literal, own_style, shortened
from moco.progress import Progress
from moco.seeds import seeded
from moco.views import center_resize, normalise

UNTRAINED = "untrained"
IN_LINE = 5  # neighbours beside each other
LETTERS = 10  # beside a picture


@dataclass
class Shown:
    """An image as the encoder is shown it, uint8 (3, S, S), the name of its class, its number in its folder,
    and its cosine with the one that was looked for (1 for that one itself).
    """

    index: int
    name: str
    view: np.ndarray
    cosine: float = 1.0


def backbone_of(checkpoint, arch=None, seed=0):
    """(network, its torchvision name, image size or None, what it is in words) of what main_lincls.py takes.

    checkpoint: a path, a released model's name, or "untrained" for weights drawn from `seed`. arch: None for
    what the checkpoint says, else resnet50. The network ends before `fc` and is in eval mode on the CPU. The
    image size is that of the checkpoint's training, where it is recorded. Raises UserError.
    """
    untrained = checkpoint == UNTRAINED and not os.path.isfile(checkpoint)
    path = None if untrained else zoo.resolve(checkpoint)
    content = {} if untrained else read_checkpoint(path)
    arch = arch or content.get("arch") or "resnet50"
    check_arch(content, arch, path)
    with seeded(seed):
        model = base_encoder(arch)(num_classes=1)
    model.fc = torch.nn.Identity()
    if untrained:
        return model.eval(), arch, None, f"an untrained {arch} (seed {seed})"
    load_strictly(model, encoder_state(content, path), path)
    epoch = content.get("epoch")
    about = f"{checkpoint} ({arch}{f' after {epoch} epochs' if epoch else ''})"
    return model.eval(), arch, content.get("settings", {}).get("image_size"), about


def neighbours_of(process, model, train, val, loading, seed, count, neighbours, among=None):
    """A list of (Shown of a validation image, list of the Shown of its nearest training images).

    train, val: ImageFolders; loading: a moco.data.Loading; the `count` validation images are drawn from
    `seed` alone, so they are the same for every model. among: how many training images are searched, drawn
    from `seed` too (None: all). Raises UserError.
    """
    for flag, wanted, images in (("--count", count, val), ("--neighbours", neighbours, train)):
        if wanted > len(images):
            raise UserError(f"{flag} {wanted} is more than the {len(images)} images of {images.root}")
    if among is not None and not neighbours <= among <= len(train):
        raise UserError(f"--among must be from --neighbours {neighbours} to {len(train)}, not {among}")
    asked = np.random.default_rng(seed).permutation(len(val))[:count]
    searched = np.sort(np.random.default_rng(seed).permutation(len(train))[:among])
    model = model.to(process.device)
    queries = torch.cat(list(features(model, loading.validation(_only(val, asked), process))))
    loader = loading.validation(_only(train, searched), process)
    with Progress("features", len(searched), "images") as bar:
        cosines, numbers = nearest(queries, features(model, loader, bar), neighbours)
    return [
        (
            _shown(val, int(index), loading),
            [_shown(train, int(searched[n]), loading, c) for n, c in zip(near, cosine, strict=True)],
        )
        for index, near, cosine in zip(asked, numbers.tolist(), cosines.tolist(), strict=True)
    ]


@torch.inference_mode()
def features(model, loader, progress=None):
    """Give for each batch of central views the features (N, D), float32, of length 1."""
    for batch in loader:
        yield unit_rows(model(normalise(batch.pixels[0])))
        if progress:
            progress.update(len(batch.targets))


@torch.inference_mode()
def nearest(queries, batches, count):
    """Cosines (Q, count) and numbers (Q, count), int64, of the features in `batches` nearest to the `queries`
    (Q, D), most similar first, of equal ones the first. All have length 1.

    batches: an iterable of (N, D); only the nearest so far are kept, so that any number of them fits.
    """
    best, first = queries.new_empty(len(queries), 0), 0
    numbers = torch.empty_like(best, dtype=torch.int64)
    for found in batches:
        here = torch.arange(first, first + len(found), device=queries.device).expand(len(queries), -1)
        best, numbers = torch.cat([best, queries @ found.T], 1), torch.cat([numbers, here], 1)
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, numbers, first = best[:, :count], numbers.gather(1, order)[:, :count], first + len(found)
    return best, numbers


def values_of(name):
    """(shape, texture, color) of the name of a Trifeature class, or None of another name."""
    values = tuple(name.split("_"))
    return values if values in COMBINATIONS else None


def agreement(found):
    """What the neighbours have in common with their images, in words: the class, or factors of Trifeature."""
    pairs = [(one.name, near.name) for one, others in found for near in others]
    if not all(map(values_of, {name for pair in pairs for name in pair})):
        return f"{sum(a == b for a, b in pairs)} of {len(pairs)} neighbours have the image's class"
    factors = zip(
        *[[a == b for a, b in zip(*map(values_of, pair), strict=True)] for pair in pairs], strict=True
    )
    agree = [f"{name} {sum(same)}" for name, same in zip(FACTORS, factors, strict=True)]
    return f"of {len(pairs)} neighbours agree in {', '.join(agree)}"


def neighbours_sheet(found, title):
    """A matplotlib Figure with a row for each validation image: itself, then its neighbours, nearest first.

    found: of neighbours_of. Beside each neighbour stands its class, or its values of Trifeature's factors,
    with a mark whether they are the image's. More than IN_LINE neighbours go on below.
    """
    lines = math.ceil(len(found[0][1]) / IN_LINE)
    cell, apart, side, line = 1.6, 0.12, 0.78, 0.15  # inches: of a picture with its words; a line of text
    height, between, head = side + 1.7 * line, 0.06, 1.15
    total = head - 1.2 * line + len(found) * (lines * height + between)
    with own_style() as matplotlib:
        figure = matplotlib.figure.Figure((WIDTH, total))
        figure.text(0.1 / WIDTH, 1 - 0.08 / total, literal(title), va="top", fontsize=10, linespacing=1.4)
        for left, text, colour in ((0.1, "✓ as in the image at the left", BLUE), (2.3, "✗ another", RED)):
            figure.text(left / WIDTH, 1 - 0.74 / total, text, va="top", fontsize=9, color=colour)
        for row, (one, others) in enumerate(found):
            top = total - head - row * (lines * height + between)
            for number, shown in enumerate([one, *others]):
                down, column = divmod(number - 1, IN_LINE) if number else (0, -1)
                x = 0.1 + (column + 1) * cell + apart * (number > 0)
                place = (x / WIDTH, (top - down * height - side) / total, side / WIDTH, side / total)
                _draw(figure.add_axes(place), shown, one if number else None)
    return figure


def _draw(axis, shown, one):
    """A picture with its words; one: the Shown that it is a neighbour of, None for that one itself."""
    axis.imshow(np.moveaxis(shown.view, 0, -1), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)
    head = f"cosine {shown.cosine:.3f}" if one else f"val {shown.index}"
    axis.set_title(head, fontsize=8, pad=3, fontweight=None if one else "bold")
    own, its = values_of(shown.name), values_of(one.name) if one else None
    lines = own or (shown.name,)
    same = [None] * len(lines) if one is None else [shown.name == one.name]
    if own and its:
        same = [a == b for a, b in zip(own, its, strict=True)]
    for number, (text, right) in enumerate(zip(lines, same, strict=False)):
        mark, colour = {None: ("", "black"), True: ("✓ ", BLUE), False: ("✗ ", RED)}[right]
        place = {"xy": (1, 1), "xytext": (4, -10.8 * number)}
        axis.annotate(
            literal(mark + shortened(text, LETTERS)), **place, xycoords="axes fraction",
            textcoords="offset points", va="top", fontsize=8, color=colour,
        )  # fmt: skip
    if one and not own:
        axis.spines[:].set(visible=True, color=BLUE if same[0] else RED, linewidth=2)


def _only(images, numbers):
    """The ImageFolder with these of its images alone, in this order."""
    chosen = copy.copy(images)
    chosen.samples = [images.samples[number] for number in numbers]
    chosen.targets = [images.targets[number] for number in numbers]
    chosen.imgs = chosen.samples
    return chosen


def _shown(images, index, loading, cosine=1.0):
    image = read_pixels(paths_of(images)[index], decoder(loading.decode)[0])
    view = center_resize(image, loading.size, loading.resize).numpy()
    return Shown(index, images.classes[images.targets[index]], view, cosine)
