"""Gray images of more than 8 bits, or with a sign: the values in their files, and how they become 0 to 255.

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

LOOK = 32  # images of a folder that are looked at before a run
OUTLIERS = 0.0005  # share of an image's pixels that is left out at each end of the values that it uses
FEW = 0.1  # share of the pixels: below it a range that also cuts off most values is hardly meant
BITS, FORMAT = 258, 339  # TIFF's tags BitsPerSample and SampleFormat
UNSIGNED, SIGNED = 1, 2  # values of FORMAT

# Of compressed big-endian TIFFs of these kinds Pillow swaps the bytes that libtiff has swapped already.
SWAPPED_TWICE = {"I;16BS": np.int16, "I;32BS": np.int32, "F;32BF": np.float32}


HIGH_BYTES = "16-bit (in RGB or with alpha)"  # the kind of a Gray of whose values Pillow drops the low byte


class RangeError(ValueError):
    """An image's values cannot be mapped to 0..255 without a range."""

    advice = "say it with --gray-range LOW HIGH (python -m moco.check names the range that is used)"


class FormError(ValueError):
    """An image's values cannot be had from its file. advice: what to do with {it}."""

    advice = "save {it} as gray of 8 or 16 bits or of 32-bit floats, or as RGB of 8"


class Gray(NamedTuple):
    """A gray image: the type of its values in words, the values (H, W), the least and greatest of the type.

    The limits are None where the type does not say what is black and white: 32-bit integers and floats. Of
    the kind HIGH_BYTES the values are uint8, 255 the greatest of the type.
    """

    kind: str
    values: np.ndarray
    limits: tuple | None

    def pixels(self, gray_range=None):
        """Bytes (H, W): the values `gray_range` (low, high) become 0 and 255, those between linearly, those
        beyond are clipped; NaN is 0. Without a range, the high byte of the type. Raises RangeError and
        FormError.
        """
        if self.kind == HIGH_BYTES:
            if gray_range:
                raise FormError("--gray-range needs all 16 bits; in RGB or with alpha Pillow gives 8")
            return self.values
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
    """The Gray of an image that Pillow has opened, or None when it has colors or 8 bits without a sign."""
    decoder, *_, stored = image.tile[0] if image.tile else (None, None)  # before the pixels are read
    if most := most_of_high_bytes(image):
        pixels = np.asarray(image.convert("RGB"))
        return Gray(HIGH_BYTES, pixels[:, :, 0], (0, most)) if (pixels == pixels[:, :, :1]).all() else None
    if image.mode == "L" and getattr(image, "tag_v2", {}).get(FORMAT) == (SIGNED,):
        return Gray("signed 8-bit", np.asarray(image).view(np.int8).astype(np.int16), (-128, 127))
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return None
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


def most_of_high_bytes(image):
    """The greatest value that the file of an opened image may hold, when it has several channels of more than
    8 bits, of which Pillow gives the high byte; else None.
    """
    stored = image.tile[0][-1] if image.tile and len(image.getbands()) > 1 else None
    if image.format == "PPM":
        return stored[1] if isinstance(stored, tuple) and stored[1] > 255 else None
    return 65535 if ";16" in str(stored) else None


# What the values are that images use.


class Use(NamedTuple):
    """The kind and limits of a Gray, and the finite values that it uses, but for OUTLIERS: least, greatest.

    inside: the share of the pixels that a range makes neither black nor white.
    """

    kind: str
    limits: tuple | None
    least: float
    greatest: float
    inside: float = 1.0


def use_of(path, gray_range=None):
    """The Use of an image file, or None when it is not Gray. Raises many kinds of exceptions."""
    with Image.open(path) as image:
        gray = gray_of(image)
    finite = None if gray is None else gray.values[np.isfinite(gray.values)]
    if finite is None or not len(finite):
        return None
    ends = int(OUTLIERS * len(finite)), -1 - int(OUTLIERS * len(finite))
    least, greatest = np.partition(finite, ends)[list(ends)].tolist()
    if gray.kind == HIGH_BYTES:  # of all low bytes
        step = (gray.limits[1] + 1) // 256
        return Use(gray.kind, gray.limits, least * step, greatest * step + step - 1)
    inside = 1.0
    if gray_range:
        inside = np.mean((finite > gray_range[0]) & (finite < gray_range[1])).item()
    return Use(gray.kind, gray.limits, least, greatest, inside)


def uses_of_some(paths, gray_range=None):
    """The Uses of LOOK images that are spread over the image files `paths`; other images are passed over."""
    uses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's name no file
        for number in range(min(LOOK, len(paths))):
            with contextlib.suppress(Exception):  # a damaged image is reported where it is needed
                uses.append(use_of(paths[number * len(paths) // min(LOOK, len(paths))], gray_range))
    return list(filter(None, uses))


def overall(uses):
    """[(number, Use)]: of each kind, how many of the Uses are of it, and the Use of all of them together."""
    kinds = {}
    for use in uses:
        kinds.setdefault((use.kind, use.limits), []).append(use)
    return [
        (
            len(same),
            Use(
                *kind,
                min(use.least for use in same),
                max(use.greatest for use in same),
                sum(use.inside for use in same) / len(same),
            ),
        )
        for kind, same in kinds.items()
    ]


def range_warnings(uses, gray_range=None):
    """A line for each kind whose Uses, looked at with `gray_range`, need another: they cannot be read, or use
    less than a quarter of what is mapped, or it is less than a quarter of them and holds FEW pixels.
    """
    lines = []
    for _, use in overall(uses):
        images, mapped = f"warning: {use.kind} gray images", gray_range or use.limits
        high = use.greatest if use.greatest > use.least else use.least + 1
        fit = f"--gray-range {in_words(use.least)} {in_words(high)}"
        spread = f"{fit} spreads them over all"
        if use.kind == HIGH_BYTES:
            spread = f"saved as gray alone they could be read with {fit}"
            if gray_range:
                lines.append(f"{images} cannot be read with --gray-range; save them as gray without alpha")
                continue
        if mapped is None:
            lines.append(f"{images} use {span(use)} and cannot be read without {fit}")
            continue
        shown = max(0, min(use.greatest, mapped[1]) - max(use.least, mapped[0]))
        if shown < (mapped[1] - mapped[0]) / 4:
            levels = math.floor(shown / (mapped[1] - mapped[0]) * 255) + 1
            lines.append(
                f"{images} use {span(use)} of {span(mapped)}: they come out in {levels} of 256 gray levels; "
                f"{spread}"
            )
        elif shown < (use.greatest - use.least) / 4 and use.inside < FEW:
            lines.append(
                f"{images} use {span(use)}, of which {span(mapped)} makes {1 - use.inside:.0%} of the pixels "
                f"black or white; {spread}"
            )
    return lines


def span(values):
    """The ends of a Use or of a range (low, high) in words."""
    least, greatest = values[2:4] or values
    return f"{in_words(least)} to {in_words(greatest)}"


def in_words(value):
    """A number without digits that say nothing: 4095, 0.25, 1e+20."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:.6g}"
