"""From an image file to its pixels in RGB.

Pillow reads every format. JPEG files in color, most of a data set, are decoded by simplejpeg where it is
installed (`pip install simplejpeg`), in two thirds of Pillow's time and to the same pixels: both call
libjpeg-turbo with its accurate transform and smooth chroma. Whatever simplejpeg does not decode without any
complaint (four channels, gray, a file that is cut off) goes to Pillow, so pixels and errors are Pillow's.

The pixels are those of torchvision's ImageFolder, with the exception of 16 and more bits:
- alpha and transparency are dropped, CMYK, gray and palettes become RGB, as by PIL's convert("RGB");
- an orientation in EXIF is ignored, as ImageFolder and so the published programs ignore it;
- 16-bit gray keeps its high byte, which is what Pillow does with 16-bit colors. PIL's convert("RGB") would
  clip it instead: nearly every pixel white;
- more than twice PIL.Image.MAX_IMAGE_PIXELS are refused as a decompression bomb, as by ImageFolder; above
  once Pillow warns;
- 32-bit integers and floats are refused, because the file does not say which values are black and white.
"""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from moco.errors import UserError, printable

try:
    import simplejpeg
except ImportError:
    simplejpeg = None


def decoder_name():
    """What decodes JPEG files here: "simplejpeg" or "pillow"."""
    return "simplejpeg" if simplejpeg else "pillow"


def read_pixels(path):
    """The pixels of an image file: uint8 (H, W, 3), maybe read-only. Raises UserError that names the file."""
    try:
        with open(path, "rb", buffering=0) as file:
            return decode(file.readall())
    except Exception as error:  # damaged files make Pillow raise nearly everything
        raise _unreadable(path, error) from error


def image_size(path):
    """(width, height) of an image file, from its header alone. Raises UserError that names the file."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:
        raise _unreadable(path, error) from error


def decode(data):
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
    return decode_by_pillow(data)


def decode_by_pillow(data):
    """As `decode`, without simplejpeg."""
    with Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            gray = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(gray[:, :, None], 3, axis=2)
        if image.mode in ("I", "F"):
            raise ValueError("it has 32 bits a pixel and does not say what is black and white: use 8 or 16")
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def reason(error):
    """What an exception of reading or decoding an image says, in one line without the image's path."""
    if isinstance(error, UnidentifiedImageError):
        return "no image that Pillow knows"
    said = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return said.rstrip(".")


def _unreadable(path, error):
    return UserError(f"{printable(path)} cannot be read as an image ({reason(error)}); mend or remove it")
