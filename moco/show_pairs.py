"""The pairs of views that pre-training gets, and the sheet that shows them beside their images."""

import math
from dataclasses import dataclass

import numpy as np

from moco.data import EpochBatches, paths_of
from moco.decoders import decoder
from moco.draws import VIEW
from moco.errors import UserError
from moco.pictures import BLUE, RED, WIDTH, literal, own_style, shortened
from moco.samples import Photographs, TrainingSample
from moco.slots import Layout

BESIDE = 2  # pairs in a row of the sheet
LABELS = ("query", "key")
LOOKS = (  # of the boxes: where their edges lie on each other both are seen
    {"edgecolor": BLUE, "linewidth": 2},
    {"edgecolor": RED, "linewidth": 2, "linestyle": (0, (3, 2))},
)


@dataclass
class Pair:
    """image: uint8 (H, W, 3); views: uint8 (2, 3, S, S), the query's and the key's; records: (2,) of VIEW."""

    index: int
    name: str
    image: np.ndarray
    views: np.ndarray
    records: np.ndarray


def pairs_of(images, recipe, size, resize, seed, epoch, count, decode=None):
    """The first `count` Pairs that a run with `seed` trains on in `epoch`, in its order.

    images: an ImageFolder; recipe: a moco.draws.Recipe; size, resize, decode: as moco.data.Loading's. The
    views are those of --device-aug off and exact, before normalisation. Raises UserError.
    """
    if count > len(images):
        raise UserError(f"--count {count} is more than the {len(images)} images of {images.root}")
    batches = EpochBatches(len(images), count, seed)
    batches.epoch = epoch
    keys = next(iter(batches))
    photographs = Photographs(paths_of(images), np.array(images.targets), decoder(decode)[0])
    write = TrainingSample(photographs, recipe, size, resize, seed, photometric=True)
    batch = Layout(2, count, (3, size, size), VIEW).empty(count)
    for position, key in enumerate(keys):
        write(batch, position, key)
    return [
        Pair(
            index,
            images.classes[images.targets[index]],
            photographs.pixels(index),
            batch.pixels[:, position],
            batch.records[:, position],
        )
        for position, (_, index) in enumerate(keys)
    ]


def pairs_sheet(pairs, title):
    """A matplotlib Figure with a row of three pictures for each Pair: the image, its two views."""
    rows = math.ceil(len(pairs) / BESIDE)
    side, gap, line = 1.46, 0.12, 0.15  # inches: of a picture, beside it, of a line of text
    height, head = side + 3.6 * line, 0.95
    total = head + rows * height
    with own_style() as matplotlib:
        figure = matplotlib.figure.Figure((WIDTH, total))
        figure.text(0.1 / WIDTH, 1 - 0.08 / total, literal(title), va="top", fontsize=10, linespacing=1.4)
        _draw_legend(figure, 0.1 / WIDTH, 1 - 0.52 / total)
        for place, pair in enumerate(pairs):
            left = 0.1 + place % BESIDE * (WIDTH / 2)
            top = total - head - place // BESIDE * height

            def axes(column, left=left, top=top):
                x, y = left + column * (side + gap), top - side - line
                axis = figure.add_axes((x / WIDTH, y / total, side / WIDTH, side / total))
                axis.set_axis_off()
                return axis

            _draw_image(axes(0), pair)
            for view in (0, 1):
                _draw_view(axes(1 + view), pair, view)
    return figure


def _draw_legend(figure, left, top):
    boxes = [_rectangle((0, 0), 1, 1, **look) for look in LOOKS]
    words = [f"the {name} is cut out here" for name in LABELS]
    figure.legend(
        [*boxes, _rectangle((0, 0), 1, 1, alpha=0)],
        [*words, "crop: of the image's area; blur: sigma in pixels"],
        loc="upper left", bbox_to_anchor=(left, top), ncols=3, borderaxespad=0, borderpad=0, frameon=False,
        fontsize=9, handlelength=1.4, handleheight=1,
    )  # fmt: skip


def _draw_image(axis, pair):
    axis.imshow(pair.image)
    axis.set_title(f"image {pair.index}", fontsize=8, pad=3)
    _caption(axis, literal(shortened(pair.name, 23)))
    for record, look in zip(pair.records, LOOKS, strict=True):
        top, left, height, width = record.item()[:4]
        axis.add_patch(_rectangle((left - 0.5, top - 0.5), width, height, **look, clip_on=False))


def _draw_view(axis, pair, view):
    axis.imshow(np.moveaxis(pair.views[view], 0, -1), interpolation="nearest")
    axis.set_title(LABELS[view], fontsize=8, pad=3, color=LOOKS[view]["edgecolor"], fontweight="bold")
    _caption(axis, what_was_done(pair.records[view], pair.image.shape))


def _caption(axis, text):
    axis.text(0, -0.03, text, transform=axis.transAxes, va="top", fontsize=8, linespacing=1.2)


def what_was_done(record, shape):
    """Two short lines on a record of VIEW for an image of `shape` (H, W, ...)."""
    share = int(record["height"]) * int(record["width"]) / (shape[0] * shape[1])
    first = [f"crop {share:.0%}"] + ["flipped"] * bool(record["flip"])
    then = ["jitter"] * bool(record["jitter"]) + ["gray"] * bool(record["gray"])
    then += [f"blur {record['sigma']:.1f}"] if record["sigma"] > 0 else []
    return f"{', '.join(first)}\n{', '.join(then)}"


def _rectangle(*place, **look):
    from matplotlib.patches import Rectangle

    return Rectangle(*place, **look, facecolor="none")
