"""Pixels of odd and damaged image files, with and without simplejpeg."""

import io

import numpy as np
import pytest
from odd_images import DAMAGED, ODD, encoded, photograph
from PIL import Image

from moco.data import decode
from moco.data.decode import decoder_name, image_size, read_pixels
from moco.errors import UserError, printable


@pytest.fixture(params=["pillow", "simplejpeg"])
def decoder(request, monkeypatch):
    """Tests run with each decoder."""
    if request.param == "pillow":
        monkeypatch.setattr(decode, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")
    assert decoder_name() == request.param


def as_published(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("name", ODD)
def test_odd_images_are_what_imagefolder_gives(tmp_path, name, decoder):
    path = tmp_path / "image"  # what is in a file counts, not its name
    path.write_bytes(ODD[name]())
    pixels = read_pixels(path)
    assert pixels.shape == ((1, 1, 3) if name == "1 x 1" else (61, 90, 3))
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, as_published(path.read_bytes()))
    assert image_size(path) == pixels.shape[1::-1]


def test_simplejpeg_is_used_for_jpeg_files_in_color(monkeypatch):
    simplejpeg = pytest.importorskip("simplejpeg")
    used = []
    real = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda data: used.append(data) or real(data))
    for name in ("RGB", "progressive", "CMYK", "gray JPEG", "gray PNG"):
        decode.decode(ODD[name]())
    assert used == [ODD["RGB"](), ODD["progressive"]()]


def test_sixteen_bits_keep_the_high_byte(decoder):
    """A ramp over all 65536 values stays a ramp; PIL's own conversion makes it white."""
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    gray = np.repeat((ramp // 256).astype(np.uint8)[:, :, None], 3, axis=2)
    big_endian = Image.frombytes("I;16B", (256, 256), ramp.astype(">u2").tobytes())
    for image, kind in ((Image.fromarray(ramp), "PNG"), (Image.fromarray(ramp), "PPM"), (big_endian, "TIFF")):
        data = encoded(image, kind)
        assert np.array_equal(decode.decode(data), gray)
        assert as_published(data).mean() > 250


@pytest.mark.parametrize("name", [*DAMAGED, "missing.jpg"])
def test_files_that_cannot_be_read_are_named_in_one_line(tmp_path, name, decoder):
    path = tmp_path / name
    if name in DAMAGED:
        path.write_bytes(DAMAGED[name]())
    else:
        with pytest.raises(UserError, match=r"missing\.jpg cannot be read"):
            image_size(path)
    with pytest.raises(UserError) as caught:
        read_pixels(path)
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be read as an image (") and "\n" not in message
    assert " at 0x" not in message, "the same on every run"


def test_names_of_any_bytes(tmp_path):
    name = b"caf\xe9\n.jpg"
    path = bytes(tmp_path) + b"/" + name
    with open(path, "wb") as file:
        file.write(encoded(photograph()))
    text = str(next(tmp_path.iterdir()))  # as a listing of the folder gives it
    assert read_pixels(text).shape == (61, 90, 3)
    with open(path, "wb") as file:
        file.write(b"no image")
    with pytest.raises(UserError) as caught:
        read_pixels(text)
    assert str(caught.value).startswith(rf"{tmp_path}/caf\udce9\n.jpg cannot be read as an image")
    str(caught.value).encode("utf-8")  # under a strict locale
    assert printable("übung 3.jpg") == "übung 3.jpg"
