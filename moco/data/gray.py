"""Gray images of more than 8 bits: the values in their files, and how they become 0 to 255.

CT, X-ray and microscope images are of this kind: 12 bits in a file of 16, Hounsfield units in a signed one,
floats. Without a range of values (--gray-range) the full range of the file's type is mapped, which makes
12-bit values nearly black.
"""

import contextlib
import math
import sys
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image

LOOK = 32  # images that are looked at before a run
BITS, FORMAT = 258, 339  # TIFF's tags BitsPerSample and SampleFormat
UNSIGNED, SIGNED = 1, 2  # values of FORMAT

# Of compressed big-endian TIFFs of these kinds Pillow swaps the bytes that libtiff has swapped already.
SWAPPED_TWICE = {"I;16BS": np.int16, "I;32BS": np.int32, "F;32BF": np.float32}


class RangeError(ValueError):
    """An image's values cannot be mapped to 0..255 without a range."""


class Gray(NamedTuple):
    """A gray image: the type of its values in words, the values (H, W), the least and greatest of the type.

    The limits are None where the type does not say what is black and white: 32-bit integers and floats.
    """

    kind: str
    values: np.ndarray
    limits: tuple | None

    def pixels(self, gray_range=None):
        """Bytes (H, W): the values `gray_range` (low, high) become 0 and 255, those between linearly, those
        beyond are clipped; NaN is 0. Without a range, the high byte of the type. Raises RangeError.
        """
        if gray_range:
            low, high = gray_range
            with np.errstate(all="ignore"):  # of values that are not finite
                levels = (self.values.astype(np.float64) - low) * (255 / (high - low))
            return np.rint(np.nan_to_num(levels)).clip(0, 255).astype(np.uint8)
        if self.limits is None:
            raise RangeError(f"its {self.kind} values do not say what is black and what is white")
        low, high = self.limits
        values = self.values - low
        if high - low != 65535:
            values = np.rint(values / (high - low) * 65535).astype(np.uint16)
        return (values >> 8).astype(np.uint8)


def gray_of(image):
    """The Gray of an image that Pillow has opened, or None when it has colors or at most 8 bits."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return None
    decoder, *_, stored = image.tile[0] if image.tile else (None, None)  # before the pixels are read
    values = np.asarray(image)
    if decoder == "libtiff" and stored[0] in SWAPPED_TWICE and sys.byteorder == "little":
        values = values.astype(SWAPPED_TWICE[stored[0]]).byteswap()
    tags = getattr(image, "tag_v2", {})
    bits, form = (tags.get(tag, (default,))[0] for tag, default in ((BITS, 32), (FORMAT, SIGNED)))
    if image.format == "PPM" and image.mode == "I":
        most = stored[1] if isinstance(stored, tuple) else 65535  # Pillow scales it to 65535
        return Gray("16-bit", np.rint(values / 65535 * most).astype(np.int32), (0, most))
    if image.mode == "F":
        return Gray("float", values, None)
    if image.mode.startswith("I;16") or image.format == "PNG":
        return Gray("12-bit", values, (0, 4095)) if bits == 12 else Gray("16-bit", values, (0, 65535))
    if bits == 16:  # Pillow's mode of 32 bits holds it
        return Gray("signed 16-bit", values, (-32768, 32767))
    return Gray("32-bit", values.view(np.uint32) if form == UNSIGNED else values, None)


# What the values are that images use.


class Use(NamedTuple):
    """The kind and limits of a Gray, and the least and greatest finite value that it uses."""

    kind: str
    limits: tuple | None
    least: float
    greatest: float


def use_of(path):
    """The Use of an image file, or None when it is not Gray. Raises many kinds of exceptions."""
    with Image.open(path) as image:
        gray = gray_of(image)
    finite = None if gray is None else gray.values[np.isfinite(gray.values)]
    if finite is None or not len(finite):
        return None
    return Use(gray.kind, gray.limits, finite.min().item(), finite.max().item())


def uses_of_some(paths):
    """The Uses of LOOK images that are spread over the image files `paths`; other images are passed over."""
    uses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's name no file
        for number in range(min(LOOK, len(paths))):
            with contextlib.suppress(Exception):  # a damaged image is reported where it is needed
                uses.append(use_of(paths[number * len(paths) // min(LOOK, len(paths))]))
    return list(filter(None, uses))


def overall(uses):
    """[(number, Use)]: of each kind, how many of the Uses are of it, and the Use of all of them together."""
    kinds = {}
    for use in uses:
        kinds.setdefault((use.kind, use.limits), []).append(use)
    return [
        (len(same), Use(*kind, min(use.least for use in same), max(use.greatest for use in same)))
        for kind, same in kinds.items()
    ]


def range_warnings(uses, gray_range=None):
    """A line for each kind whose Uses need a --gray-range, or take less than a quarter of what is mapped."""
    lines = []
    for _, use in overall(uses):
        mapped = gray_range or use.limits
        high = use.greatest if use.greatest > use.least else use.least + 1
        fit = f"--gray-range {in_words(use.least)} {in_words(high)}"
        if mapped is None:
            lines.append(f"warning: {use.kind} gray images use {span(use)} and cannot be read without {fit}")
        elif use.greatest - use.least < (mapped[1] - mapped[0]) / 4:
            levels = (use.greatest - use.least) / (mapped[1] - mapped[0]) * 255
            lines.append(
                f"warning: {use.kind} gray images use {span(use)} of {span(mapped)}: they come out in "
                f"{math.floor(levels) + 1} of 256 gray levels; {fit} spreads them over all"
            )
    return lines


def span(values):
    """The last two of `values`, of a Use or of a range, in words."""
    return f"{in_words(values[-2])} to {in_words(values[-1])}"


def in_words(value):
    """A number without digits that say nothing: 4095, 0.25, 1e+20."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:.6g}"
