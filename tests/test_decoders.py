"""Pixels of odd and damaged image files, and that both decoders give the same."""

import io
import sys
import types

import numpy as np
import pytest
from PIL import Image

from moco import decoders
from moco.decoders import decode_pillow, decode_simplejpeg, decoder, image_size, read_pixels
from moco.errors import UserError


def photograph(width=90, height=61):
    coarse = np.random.default_rng(1).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoders_here():
    """Every decoder that this machine has, by its function."""
    try:
        return [decode_pillow, decoder("simplejpeg")[0]]
    except UserError:
        return [decode_pillow]


def as_published(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


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


@pytest.mark.parametrize("name", ODD)
def test_odd_images_are_what_imagefolder_gives(name):
    data = ODD[name]()
    for decode in decoders_here():
        pixels = decode(data)
        assert pixels.shape == ((1, 1, 3) if name == "1 x 1" else (61, 90, 3))
        assert pixels.dtype == np.uint8
        assert np.array_equal(pixels, as_published(data))


def test_simplejpeg_is_used_and_gives_pillows_pixels(monkeypatch):
    simplejpeg = pytest.importorskip("simplejpeg")
    decode, name = decoder()
    assert decode is decode_simplejpeg
    assert name == f"simplejpeg {simplejpeg.__version__}"
    data = encoded(photograph(), quality=85)
    assert np.array_equal(decode(data), decode_pillow(data))
    used = []
    real = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda data: used.append(len(data)) or real(data))
    decode(data)
    assert used == [len(data)]
    for other in ("CMYK", "gray JPEG", "gray PNG"):
        decode(ODD[other]())
    assert len(used) == 1


def test_sixteen_bits_keep_the_high_byte(tmp_path):
    """A ramp over all 65536 values stays a ramp; PIL's own conversion makes it white."""
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    gray = np.repeat((ramp // 256).astype(np.uint8)[:, :, None], 3, axis=2)
    for kind in ("PNG", "PPM", "TIFF"):
        data = encoded(Image.fromarray(ramp), kind)
        assert np.array_equal(decode_simplejpeg(data), gray)
        assert as_published(data).mean() > 250
    big_endian = Image.frombytes("I;16B", (256, 256), ramp.astype(">u2").tobytes())
    assert np.array_equal(decode_pillow(encoded(big_endian, "TIFF")), gray)
    for pixels in (ramp.astype(np.float32) / 65536, ramp.astype(np.int32)):
        path = tmp_path / "deep.tiff"
        path.write_bytes(encoded(Image.fromarray(pixels), "TIFF"))
        with pytest.raises(UserError, match=r"deep\.tiff cannot be read as an image .*32 bits a pixel"):
            read_pixels(path, decode_pillow)


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


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(DAMAGED[name]())
    said = set()
    for decode in decoders_here():
        with pytest.raises(UserError, match=r"cannot be read as an image") as caught:
            read_pixels(path, decode)
        assert str(path) in caught.value.sentence
        said.add(caught.value.sentence)
        assert str(caught.value) == caught.value.sentence, "one line"
    assert len(said) == 1, "the same words whichever decoder, and so on every run"
    assert " at 0x" not in said.pop()


def test_missing_files_are_named(tmp_path):
    for call in (lambda path: read_pixels(path, decode_pillow), image_size):
        with pytest.raises(UserError, match=r"gone\.jpg cannot be read"):
            call(tmp_path / "gone.jpg")
    path = tmp_path / "here.jpg"
    path.write_bytes(encoded(photograph()))
    assert image_size(path) == (90, 61)
    assert read_pixels(path, decode_pillow).shape == (61, 90, 3)


def other_pixels(data):
    pixels = decode_pillow(data).copy()
    pixels[0, 0, 0] ^= 1
    return pixels


@pytest.mark.parametrize(
    ("module", "fault"),
    [
        (None, "ModuleNotFoundError|ImportError"),
        (types.SimpleNamespace(), "AttributeError"),
        (types.SimpleNamespace(decode_jpeg=other_pixels), "its pixels are not Pillow's"),
    ],
)
def test_a_broken_simplejpeg_is_told_and_not_used(monkeypatch, module, fault):
    monkeypatch.setattr(decoders.importlib.metadata, "version", lambda name: "9.9")
    monkeypatch.setitem(sys.modules, "simplejpeg", module)
    decode, name = decoder()
    assert decode is decode_pillow
    assert name.startswith("Pillow ")
    assert "simplejpeg 9.9 is installed but does not work" in name
    with pytest.raises(UserError, match=fault):
        decoder("simplejpeg")


def test_without_simplejpeg(monkeypatch):
    def missing(name):
        raise decoders.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(decoders.importlib.metadata, "version", missing)
    assert decoder() == decoder("pillow") == (decode_pillow, f"Pillow {decoders.PIL.__version__}")
    with pytest.raises(UserError, match="pip install simplejpeg"):
        decoder("simplejpeg")
    with pytest.raises(UserError, match="there is no decoder turbo"):
        decoder("turbo")
