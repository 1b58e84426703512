"""Gray images of more than 8 bits: values of every kind of file, mapped by a range, in all readers."""

import io

import numpy as np
import pytest
import torch
from odd_images import CT, alpha, ct, encoded, photograph, png16, tiff
from PIL import Image

from moco.data.augment import moco_v2
from moco.data.cache import decoded_cache
from moco.data.decode import decode, read_pixels
from moco.data.folders import ImageFolder
from moco.data.gray import LOOK, range_warnings, use_of, uses_of_some
from moco.data.loader import TrainLoader, ValidationLoader
from moco.errors import UserError

TYPES = ("uint16", "int16", "uint32", "int32", "float32")


def numbers(dtype):
    """Numbers over all of a type, its ends among them."""
    rng, limits = np.random.default_rng(0), np.iinfo("int16" if dtype == "float32" else dtype)
    values = rng.integers(limits.min, limits.max, (9, 8), np.int64)
    values[0, :2] = limits.min, limits.max
    return values.astype(dtype)


def mapped(values, low, high):
    """The definition, number by number: low is 0, high is 255, what is beyond is clipped."""
    levels = [round(255 * (float(value) - low) / (high - low)) for value in values.ravel()]
    return np.array([min(255, max(0, level)) for level in levels], np.uint8).reshape(values.shape)


def gray_of(data, gray_range=None):
    pixels = decode(data, gray_range)
    assert pixels.shape[2] == 3 and (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0]


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("endian", "<>")
@pytest.mark.parametrize("dtype", TYPES)
def test_a_range_is_mapped_of_every_kind_of_tiff(dtype, endian, deflated):
    if (dtype, endian) == ("uint32", ">"):
        pytest.skip("Pillow does not know it")
    values = numbers(dtype)
    data = tiff(values, endian=endian, deflated=deflated)
    for share in (1, 2, 10):
        low, high = (float(end) / share for end in (values.min(), values.max()))
        assert np.array_equal(gray_of(data, (low, high)), mapped(values, low, high))
    assert not np.array_equal(gray_of(data, (low, high)), gray_of(data, (low, 2 * high)))  # negative control


@pytest.mark.parametrize("maxval", [4095, 40000, 65535])
def test_a_range_is_mapped_of_png_and_of_pgm_in_the_units_of_the_file(maxval):
    values = np.random.default_rng(0).integers(0, maxval, (9, 8), np.uint16, endpoint=True)
    head = f"P5 8 9 {maxval}\n".encode()
    for data in (encoded(Image.fromarray(values), "PNG"), head + values.astype(">u2").tobytes()):
        assert np.array_equal(gray_of(data, (100, maxval)), mapped(values, 100, maxval))
    pillow = np.asarray(Image.open(io.BytesIO(data)))  # of PGM over 65535, whatever the file's maximum
    assert np.array_equal(gray_of(data), pillow >> 8)


def test_without_a_range_the_full_range_of_the_type_is_mapped():
    ramp = np.arange(65536).reshape(256, 256)
    high_byte = ramp // 256
    assert np.array_equal(gray_of(encoded(Image.fromarray(ramp.astype(np.uint16)), "PNG")), high_byte)
    assert np.array_equal(gray_of(tiff(ramp.astype(np.uint16), endian=">")), high_byte)
    assert np.array_equal(gray_of(tiff((ramp - 32768).astype(np.int16))), high_byte)
    twelve = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    assert np.array_equal(gray_of(tiff(twelve, bits=12)), twelve // 16)
    assert gray_of(encoded(Image.fromarray(twelve), "PNG")).max() == 15  # the reason for --gray-range
    for values in (ramp.astype(np.uint32), ramp.astype(np.int32), (ramp / 65535).astype(np.float32)):
        with pytest.raises(ValueError, match="do not say what is black"):
            decode(tiff(values))


def test_what_no_range_can_mend_is_refused_in_words_that_fit(tmp_path):
    for name, data, gray_range, words in (
        ("a.tif", tiff(ct("float")), None, r"\(its float values do not .*\); say it with --gray-range LOW H"),
        ("b.tif", tiff(numbers("int32")), None, r"\(its 32-bit values do not .*\); say it with --gray-range"),
        (
            "c.tif",
            tiff(numbers("float32").astype(float)),
            (0, 1),
            r"\(a TIFF whose .* know\); save it as .* 32-bit f",
        ),
        (
            "d.tif",
            tiff(np.zeros((9, 8, 5), np.uint16)),
            (0, 1),
            r"\(a TIFF whose channels, bits .*save it as",
        ),
        ("e.tif", tiff(numbers("uint16"))[:100], None, r"\(a TIFF whose end is missing\); repair or"),
        ("f.png", png16(ct("12-bit"), "RGB"), (0, 4095), r"\(--gray-range needs .*\); save it as gray of"),
        ("g.png", png16(ct("12-bit"), "LA"), (0, 4095), r"\(--gray-range needs .*\); save it as gray of"),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"{name} cannot be read as an image {words}"):
            read_pixels(path, gray_range)


def test_values_that_are_not_finite_are_black_or_clipped():
    values = np.array([[np.nan, -np.inf, np.inf, 0.5]], np.float32)
    assert gray_of(tiff(values), (0, 1)).tolist() == [[0, 0, 255, 128]]


def test_a_range_leaves_images_of_8_bits_as_they_are():
    for image, kind in ((photograph(), "JPEG"), (photograph().convert("L"), "PNG"), (alpha("L"), "PNG")):
        data = encoded(image, kind)
        assert np.array_equal(decode(data, (0, 10)), decode(data))


# The readers.


@pytest.fixture
def images(tmp_path):
    """Two of each kind of CT, as an ImageFolder has them."""
    paths = []
    for seed in range(2):
        for name, (make, _) in CT.items():
            paths.append(tmp_path / f"{seed} {name}")
            paths[-1].write_bytes(make(seed))
    return ImageFolder("CT", ["ct"], [(str(path), 0) for path in paths])


def test_all_readers_map_the_same_range(images):
    paths, gray_range = [path for path, _ in images.samples], (-500, 1500)

    def views(make, **settings):
        loader = make(images, size=32, batch_size=8, gray_range=gray_range, **settings)
        batches = list(loader.epoch(0) if make is TrainLoader else loader)
        loader.close()
        return torch.cat([batch.pixels.clone() for batch in batches], dim=1)

    cache = decoded_cache(paths, show_progress=False, gray_range=gray_range)
    for index, path in enumerate(paths):
        assert np.array_equal(cache.read(index), read_pixels(path, gray_range))
    for make, more in ((TrainLoader, {"recipe": moco_v2(), "seed": 1}), (ValidationLoader, {})):
        read = views(make, **more)
        assert torch.equal(read, views(make, cache=cache, **more))
        assert torch.equal(read, views(make, workers=2, **more))
        gray_range = (0, 4095)
        assert not torch.equal(read, views(make, **more))  # negative control
        gray_range = (-500, 1500)


def test_signed_bytes_are_read_as_such():
    values = np.arange(-128, 128, dtype=np.int8).reshape(16, 16)
    assert np.array_equal(gray_of(tiff(values)), np.arange(256).reshape(16, 16))
    assert np.array_equal(gray_of(tiff(values), (-128, 127)), np.arange(256).reshape(16, 16))
    assert np.array_equal(gray_of(tiff(values), (0, 51)), mapped(values, 0, 51))
    assert np.array_equal(gray_of(tiff(values.view(np.uint8)), (0, 51)), values.view(np.uint8))  # control


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "LA"])
def test_gray_of_16_bits_in_colors_or_with_alpha_is_warned_of_and_refused_with_a_range(tmp_path, kind):
    path = tmp_path / "12-bit.png"
    path.write_bytes(png16(ct("12-bit"), kind))
    assert np.array_equal(gray_of(path.read_bytes()), ct("12-bit") >> 8)
    [line] = range_warnings(uses_of_some([path]))
    assert "use 0 to 4095 of 0 to 65535: they come out in 16 of 256 gray levels; saved as gray alone " in line
    [line] = range_warnings(uses_of_some([path], (0, 4095)), (0, 4095))
    assert "cannot be read with --gray-range; save them as gray" in line
    path.write_bytes(png16(16 * ct("12-bit"), kind))  # negative controls: all bits are used, or colors
    assert range_warnings(uses_of_some([path])) == []
    if kind != "LA":
        path.write_bytes(png16(ct("12-bit"), kind, red=ct("12-bit", seed=1)))
        assert uses_of_some([path]) == [] and (decode(path.read_bytes(), (0, 4095)) < 16).all()


def test_a_ppm_of_more_than_8_bits_is_told_by_its_maximum(tmp_path):
    path, values = tmp_path / "a.ppm", np.repeat(ct("12-bit").astype(">u2")[:, :, None], 3, axis=2)
    for maxval, warnings in ((4095, 0), (65535, 1)):
        path.write_bytes(f"P6 64 48 {maxval}\n".encode() + values.tobytes())
        assert len(range_warnings(uses_of_some([path]))) == warnings


@pytest.mark.parametrize("name", CT)
def test_the_range_that_a_warning_names_shows_the_image(tmp_path, name):
    make, (low, high) = CT[name]
    path = tmp_path / name
    path.write_bytes(make())
    [line] = range_warnings([use_of(path)])
    assert line.endswith(f"--gray-range {low} {high}" + " spreads them over all" * ("float" not in name))
    assert len(np.unique(read_pixels(path, (low, high)))) > 40
    if "float" not in name:
        assert len(np.unique(read_pixels(path))) <= 17
    assert range_warnings([use_of(path)], (low, high)) == []


# The warnings.


def uses(tmp_path, *ranges):
    for number, (least, greatest) in enumerate(ranges):
        values = np.linspace(least, greatest, 12).astype(np.uint16).reshape(3, 4)
        (tmp_path / f"{number:03d}.png").write_bytes(encoded(Image.fromarray(values), "PNG"))
    return uses_of_some(sorted(tmp_path.iterdir()))


@pytest.mark.parametrize(
    ("ranges", "warning"),
    [
        (
            [(0, 4095)],
            "use 0 to 4095 of 0 to 65535: they come out in 16 of 256 gray levels; --gray-range 0 4095",
        ),
        ([(60000, 65535)], "use 60000 to 65535 of 0 to 65535: they come out in 22 of 256 gray"),
        ([(0, 4095), (9000, 9100)], "use 0 to 9100 of"),
        ([(7, 7)], "use 7 to 7 of 0 to 65535: they come out in 1 of 256 gray levels; --gray-range 7 8 "),
        ([(0, 16383)], "use 0 to 16383"),
        ([(0, 16384)], None),
        ([(0, 4095), (0, 65535)], None),  # one of them is dark, not all
    ],
)
def test_a_warning_comes_below_a_quarter_of_the_range_of_all_images_together(tmp_path, ranges, warning):
    lines = range_warnings(uses(tmp_path, *ranges))
    assert len(lines) == bool(warning)
    assert all(line.startswith(f"warning: 16-bit gray images {warning}") for line in lines)


def test_single_pixels_do_not_hide_that_images_are_dark(tmp_path):
    values = ct("12-bit")
    values[20, 20] = 65535  # one pixel of 3072
    path = tmp_path / "hot.png"
    path.write_bytes(encoded(Image.fromarray(values), "PNG"))
    assert "use 0 to 4095 of 0 to 65535: they come out in 16" in range_warnings(uses_of_some([path]))[0]
    values[20:22] = 65535
    path.write_bytes(encoded(Image.fromarray(values), "PNG"))
    assert range_warnings(uses_of_some([path])) == []  # negative control


@pytest.mark.parametrize(
    ("gray_range", "warning"),
    [
        ((10000, 20000), " of 10000 to 20000: they come out in 1 of 256 gray levels; --gray-range 0 4094"),
        ((-9, 0), " of -9 to 0: they come out in 1 of"),
        ((4000, 60000), " of 4000 to 60000: they come out in 1 of"),
        ((0, 1), ", of which 0 to 1 makes 100% of the pixels black or white; --gray-range 0 4094"),
        ((4000, 4200), ", of which 4000 to 4200 makes 96% of the pixels black or white; --gray-range 0 4094"),
        ((3000, 3600), None),
        ((0, 8000), None),
        ((-100000, 4094), " of -100000 to 4094: they come out in 11 of"),
        (None, " of 0 to 65535: they come out in 16 of"),
    ],
)
def test_a_range_that_shows_little_of_the_values_is_warned_of(tmp_path, gray_range, warning):
    values = np.linspace(0, 4094, 3000).astype(np.uint16).reshape(50, 60)
    values[:, 0], values[:, 1] = 0, 4094  # more than outliers
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(values), "PNG"))
    lines = range_warnings(uses_of_some([tmp_path / "a.png"], gray_range), gray_range)
    assert len(lines) == bool(warning), lines
    assert all(line.startswith(f"warning: 16-bit gray images use 0 to 4094{warning}") for line in lines)


def test_each_kind_has_its_own_warning_and_others_have_none(images, tmp_path):
    (tmp_path / "photograph.jpg").write_bytes(encoded(photograph()))
    (tmp_path / "no image.png").write_text("none")
    paths = [path for path, _ in images.samples]
    lines = range_warnings(uses_of_some([*paths, tmp_path / "photograph.jpg", tmp_path / "no image.png"]))
    assert [line.split(" gray images")[0] for line in lines] == [
        "warning: 16-bit",
        "warning: signed 16-bit",
        "warning: float",
    ]
    assert uses_of_some([tmp_path / "photograph.jpg"]) == []


def test_images_are_looked_at_over_the_whole_data_set(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr("moco.data.gray.use_of", lambda path, _: looked.append(path))
    uses_of_some(list(range(100 * LOOK)))
    assert looked == [100 * number for number in range(LOOK)]
    del looked[:]
    uses_of_some([5, 6, 7])
    assert looked == [5, 6, 7]
