"""From the bytes of an image file to its pixels in RGB.

Pillow reads every format. JPEG files, most of a data set, can be decoded by simplejpeg, an optional package
(`pip install simplejpeg`) that takes two thirds of Pillow's time or less and gives the same pixels: both
call libjpeg-turbo with its accurate transform and smooth chroma, which `decoder` checks when the program
starts. Whatever simplejpeg does not decode without any complaint (four colour channels, gray, data after a
cut) goes to Pillow, so that pixels and errors are Pillow's with either.

What the pixels are is what torchvision's ImageFolder gives, with the exception of 16 and more bits:
- alpha and transparency are dropped, CMYK, gray and palettes become RGB, as by PIL's convert("RGB");
- an orientation in EXIF is ignored, as ImageFolder ignores it and so the published programs do;
- 16-bit gray keeps its high byte, which is what Pillow does with 16-bit colours. PIL's convert("RGB") would
  clip it instead: nearly every pixel white;
- more than twice PIL.Image.MAX_IMAGE_PIXELS are refused as a decompression bomb, as by ImageFolder; above
  once Pillow warns;
- 32-bit integers and floats are refused, because the file does not say which values are black and white.
"""

import importlib.metadata
import io

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError

from moco.errors import UserError

NAMES = ("simplejpeg", "pillow")


def decoder(name=None):
    """A decoder, which is a function from the bytes of a file to uint8 (H, W, 3), and a text that names it.

    name: "pillow", "simplejpeg", or None for simplejpeg when it is installed and works, else Pillow; a
    simplejpeg that is installed but does not work is told in the text. Raises UserError when "simplejpeg"
    is asked for and cannot be had. A decoder may return an array that cannot be written to.
    """
    pillow = f"Pillow {PIL.__version__}"
    if name not in (None, *NAMES):
        raise UserError(f"there is no decoder {name}; choose {' or '.join(NAMES)}, or leave it out")
    if name == "pillow":
        return decode_pillow, pillow
    try:
        version = importlib.metadata.version("simplejpeg")
    except importlib.metadata.PackageNotFoundError:
        if name:
            raise UserError(
                "the decoder simplejpeg is not installed: pip install simplejpeg, or use pillow"
            ) from None
        return decode_pillow, pillow
    fault = _fault_of_simplejpeg()
    if fault is None:
        return decode_simplejpeg, f"simplejpeg {version}"
    if name:
        raise UserError(f"simplejpeg {version} does not work here ({fault}); install it anew, or use pillow")
    return decode_pillow, f"{pillow} (simplejpeg {version} is installed but does not work: {fault})"


def read_pixels(path, decode):
    """The pixels of an image file, uint8 (H, W, 3). Raises UserError that names the file."""
    return pixels_of(read_bytes(path), path, decode)


def read_bytes(path):
    """The bytes of a file. Raises UserError that names it."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except OSError as error:
        raise _unreadable(path, error) from error


def pixels_of(data, path, decode):
    """The pixels, uint8 (H, W, 3), of the bytes `data` that were read from `path`. Raises UserError."""
    try:
        return decode(data)
    except Exception as error:  # damaged files make Pillow raise nearly everything
        raise _unreadable(path, error) from error


def image_size(path):
    """(width, height) of an image file, from its header alone. Raises UserError that names the file."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:
        raise _unreadable(path, error) from error


def decode_pillow(data):
    """Bytes of any image file to uint8 (H, W, 3), by Pillow. Raises many kinds of exceptions."""
    with Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            gray = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(gray[:, :, None], 3, axis=2)
        if image.mode in ("I", "F"):
            raise ValueError("it has 32 bits a pixel and does not say what is black and white: use 8 or 16")
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def decode_simplejpeg(data):
    """As decode_pillow, with the same pixels; a JPEG file in colour is decoded by simplejpeg."""
    import simplejpeg

    if data[:2] == b"\xff\xd8":
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            # A larger one may be a decompression bomb, about which Pillow warns or raises.
            small = Image.MAX_IMAGE_PIXELS is None or height * width <= Image.MAX_IMAGE_PIXELS
            if colours in ("YCbCr", "RGB") and small:
                return simplejpeg.decode_jpeg(data)  # strict: it raises where libjpeg only warns
        except ValueError:
            pass  # Pillow knows whether the file can be decoded nevertheless
    return decode_pillow(data)


def _fault_of_simplejpeg():
    """Why simplejpeg cannot stand in for Pillow, or None: it is tried on one image in five kinds of JPEG."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((75, 51), Image.Resampling.BICUBIC)
    try:
        import simplejpeg

        for kind in ({"subsampling": 0}, {"subsampling": 1}, {}, {"progressive": True}, {"quality": 30}):
            file = io.BytesIO()
            image.save(file, "JPEG", **kind)
            if not np.array_equal(simplejpeg.decode_jpeg(file.getvalue()), decode_pillow(file.getvalue())):
                return "its pixels are not Pillow's"
    except Exception as error:
        return f"{type(error).__name__}: {_line(error)}"
    return None


def _unreadable(path, error):
    return UserError(f"{path} cannot be read as an image ({reason(error)}); mend or remove it")


def reason(error):
    """What an exception of reading or decoding an image says, without the image's path, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "no image that Pillow knows"
    return getattr(error, "strerror", None) or _line(error).rstrip(".")


def _line(error):
    return " ".join(str(error).split()) or type(error).__name__
