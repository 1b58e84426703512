"""From an image file to its pixels in RGB.

Pillow reads every format. JPEG files in color, most of a data set, are decoded by simplejpeg where it is
installed (`pip install simplejpeg`), in two thirds of Pillow's time and to the same pixels: both call
libjpeg-turbo with its accurate transform and smooth chroma. Other JPEG files (four channels, gray, damaged)
go to Pillow, so that pixels and errors are Pillow's.

The pixels are those of torchvision's ImageFolder, except for 16 and more bits: README.md, "Odd images".
gray_range is --gray-range: (low, high), or None for the full range of the type (moco.data.gray).
"""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from moco.data.gray import FormError, gray_of
from moco.errors import UserError

TIFF = {  # how such files begin: byte order, and where it says at which byte the directory is
    b"II*\0": ("little", slice(4, 8)),
    b"MM\0*": ("big", slice(4, 8)),
    b"II+\0": ("little", slice(8, 16)),
    b"MM\0+": ("big", slice(8, 16)),
}

try:
    import simplejpeg
except ImportError:
    simplejpeg = None


def decoder_name():
    """What decodes JPEG files here: "simplejpeg" or "pillow"."""
    return "simplejpeg" if simplejpeg else "pillow"


def read_pixels(path, gray_range=None):
    """An image file to its pixels: uint8 (H, W, 3), maybe read-only. Raises UserError that names the file."""
    try:
        with open(path, "rb", buffering=0) as file:
            return decode(file.readall(), gray_range)
    except Exception as error:  # damaged files make Pillow raise nearly everything
        raise _unreadable(path, error) from error


def image_size(path):
    """An image file to (width, height), by its header alone. Raises UserError that names the file."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:
        raise _unreadable(path, error) from error


def decode(data, gray_range=None):
    """The bytes of an image file to uint8 (H, W, 3). Raises many kinds of exceptions."""
    if simplejpeg and data[:2] == b"\xff\xd8":
        try:
            height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
            # A larger one may be a decompression bomb, about which Pillow warns or raises.
            small = Image.MAX_IMAGE_PIXELS is None or height * width <= Image.MAX_IMAGE_PIXELS
            if colors in ("YCbCr", "RGB") and small:
                return simplejpeg.decode_jpeg(data)  # strict: it raises where libjpeg only warns
        except ValueError:
            pass  # Pillow knows whether the file can be decoded nevertheless
    return decode_by_pillow(data, gray_range)


def decode_by_pillow(data, gray_range=None):
    """As `decode`, without simplejpeg."""
    try:
        opened = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        if data[:4] in TIFF:
            order, place = TIFF[data[:4]]
            if int.from_bytes(data[place], order) >= len(data):
                raise ValueError("a TIFF whose end is missing") from error
            raise FormError("a TIFF whose channels, bits or kind of numbers Pillow does not know") from error
        raise
    with opened as image:
        return pixels_of(image, gray_range)


def pixels_of(image, gray_range=None):
    """A PIL image to uint8 (H, W, 3). Raises many kinds of exceptions."""
    gray = gray_of(image)  # convert("RGB") would clip it to white
    if gray:
        return np.repeat(gray.pixels(gray_range)[:, :, None], 3, axis=2)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def reason(error):
    """The message of an exception from reading or decoding an image, in one line without the image's path."""
    if isinstance(error, UnidentifiedImageError):
        return "no image that Pillow knows"
    said = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return said.rstrip(".")


def _unreadable(path, error):
    advice = getattr(error, "advice", "repair or remove {it}").format(it="it")
    return UserError(f"{path} cannot be read as an image ({reason(error)}); {advice}")
