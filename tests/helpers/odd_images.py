"""Image files that are unusual (ODD), damaged (DAMAGED) or medical (CT): functions that make their bytes."""

import io
import struct
import zlib

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


def tiff(values, photometric=1, endian="<", deflated=False, bits=None, extra=()):
    """The bytes of a TIFF that holds the array `values` (H, W) or (H, W, channels) in its own type.

    bits: 12 packs two values into three bytes; extra: TIFF's ExtraSamples, for channels after the colors.
    """
    height, width, channels = (*values.shape, 1)[:3]
    data = np.ascontiguousarray(values.astype(values.dtype.newbyteorder(endian))).tobytes()
    if bits == 12:
        first, second = values.reshape(-1, 2).T.astype(np.int32)
        packed = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
        data = np.stack(packed, axis=1).astype(np.uint8).tobytes()
    data = zlib.compress(data) if deflated else data
    sample_format = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = {256: [width], 257: [height], 258: [bits or 8 * values.itemsize] * channels}
    tags |= {259: [8 if deflated else 1], 262: [photometric], 273: [8], 277: [channels], 278: [height]}
    tags |= {279: [len(data)], 338: list(extra), 339: [sample_format] * channels}
    tags = {tag: numbers for tag, numbers in tags.items() if numbers}
    directory = 8 + len(data) + len(data) % 2
    behind = directory + 6 + 12 * len(tags)  # where more numbers go than fit into a tag's 4 bytes
    entries, numbers_behind = struct.pack(endian + "H", len(tags)), b""
    for tag, numbers in tags.items():
        packed = struct.pack(f"{endian}{len(numbers)}I", *numbers)
        entries += struct.pack(endian + "HHI", tag, 4, len(numbers))
        if len(packed) > 4:
            entries += struct.pack(endian + "I", behind + len(numbers_behind))
            numbers_behind += packed
        else:
            entries += packed
    head = {"<": b"II*\0", ">": b"MM\0*"}[endian] + struct.pack(endian + "I", directory)
    return head + data.ljust(directory - 8, b"\0") + entries + bytes(4) + numbers_behind


def png16(gray, kind, red=None):
    """The bytes of a PNG of 16 bits a channel that holds uint16 (H, W) as RGB, RGBA or LA.

    red: another array for that channel.
    """

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    colors = [gray] if kind == "LA" else [gray if red is None else red, gray, gray]
    opaque = [np.full_like(gray, 65535)] * kind.endswith("A")
    rows = np.stack(colors + opaque, axis=2).astype(">u2")
    head = struct.pack(">IIBBBBB", *gray.shape[::-1], 16, {"LA": 4, "RGB": 2, "RGBA": 6}[kind], 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def ct(kind, seed=0):
    """An array (48, 64) like a CT slice: air, a body, bone. kind: "12-bit", "Hounsfield" or "float"."""
    rng = np.random.default_rng(seed)
    hounsfield = rng.normal(-950, 20, (48, 64))
    hounsfield[10:40, 8:56] = rng.normal(40, 25, (30, 48))
    hounsfield[20:26, 28:36] = rng.normal(1200, 150, (6, 8))
    hounsfield[0], hounsfield[1, :8] = -1024, 3071  # outside of what is scanned, and metal
    hounsfield = hounsfield.round().clip(-1024, 3071)
    if kind == "12-bit":
        return (hounsfield + 1024).astype(np.uint16)
    return hounsfield.astype(np.int16) if kind == "Hounsfield" else (hounsfield / 1000).astype(np.float32)


CT = {  # of a file's name: its bytes by seed, and the range that fits
    "12-bit.png": (lambda seed=0: encoded(Image.fromarray(ct("12-bit", seed)), "PNG"), (0, 4095)),
    "12-bit.tif": (lambda seed=0: tiff(ct("12-bit", seed)), (0, 4095)),
    "hounsfield.tif": (lambda seed=0: tiff(ct("Hounsfield", seed)), (-1024, 3071)),
    "float.tif": (lambda seed=0: tiff(ct("float", seed)), (-1.024, 3.071)),
}
