"""Image files that are unusual (ODD) or cannot be read (DAMAGED): functions that make their bytes."""

import io

import numpy as np
from PIL import Image


def photograph(width=90, height=61):
    coarse = np.random.default_rng(1).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def palette():
    image = photograph().quantize(16)
    image.info["transparency"] = 3
    return image


def alpha(mode):
    image = photograph().convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def oriented():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    return exif


ODD = {
    "RGB": lambda: encoded(photograph()),
    "4:4:4": lambda: encoded(photograph(), subsampling=0, quality=95),
    "4:2:2": lambda: encoded(photograph(), subsampling=1),
    "progressive": lambda: encoded(photograph(), progressive=True),
    "RGB without YCbCr": lambda: encoded(photograph(), keep_rgb=True),
    "CMYK": lambda: encoded(photograph().convert("CMYK")),
    "gray JPEG": lambda: encoded(photograph().convert("L")),
    "EXIF orientation": lambda: encoded(photograph(), exif=oriented()),
    "1 x 1": lambda: encoded(photograph(1, 1)),
    "data after the end": lambda: encoded(photograph()) + b"more",
    "gray PNG": lambda: encoded(photograph().convert("L"), "PNG"),
    "gray with alpha": lambda: encoded(alpha("L"), "PNG"),
    "RGBA": lambda: encoded(alpha("RGB"), "PNG"),
    "palette with transparency": lambda: encoded(palette(), "PNG"),
    "1 bit": lambda: encoded(photograph().convert("1"), "PNG"),
    "GIF": lambda: encoded(photograph(), "GIF"),
    "CMYK TIFF": lambda: encoded(photograph().convert("CMYK"), "TIFF"),
}


def sized(jpeg, width, height):
    """A JPEG file whose frame header says another size."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + jpeg[at + 4 :]


DAMAGED = {
    "truncated.jpg": lambda: encoded(photograph(), quality=95)[:1500],
    "truncated.png": lambda: encoded(photograph(), "PNG")[:3000],
    "without-end-marker.jpg": lambda: encoded(photograph())[:-2],
    "header-only.jpg": lambda: encoded(photograph())[:300],
    "text.jpg": lambda: b"<html>not found</html>",
    "empty.jpg": lambda: b"",
    "bomb.png": lambda: encoded(Image.new("1", (20000, 20000)), "PNG"),  # 50 KB, 400 million pixels
    "bomb.jpg": lambda: sized(encoded(photograph()), 60000, 60000),
}
