"""The Trifeature data set (Hermann & Lampinen 2020, arXiv 2006.12433): a shape with a texture and a color.

800 of the 1000 combinations are drawn in train/, the other 200 in val/, a folder each:
train/triangle_solid_red/0.png. A readout of one factor is tested on combinations that training never showed.
"""

import io
import itertools
import json
from pathlib import Path

import numpy as np
from PIL import Image

from moco.errors import UserError
from moco.files import atomic_folder
from moco.lock import Lock, lock_beside
from moco.progress import Progress
from moco.trifeature.draw import COLORS, SHAPES, TEXTURES, render

FACTORS = {"shape": tuple(SHAPES), "texture": tuple(TEXTURES), "color": tuple(COLORS)}
COMBINATIONS = tuple(itertools.product(*FACTORS.values()))  # 1000 x (shape, texture, color)
SETTINGS = "trifeature.json"  # beside train/ and val/: how the set was drawn
VERSION = 1  # of the drawing: raised when the same settings give other pixels
SIZES = range(16, 1025)  # pixels: a smaller shape is a blot; a larger image takes more than 1 GB to draw


def factor_of(folder_name, factor):
    """Class index, 0 to 9, of one factor in the name of a folder, such as "triangle_solid_red".

    `factor` is "shape", "texture" or "color". UserError if the folder's name is none of Trifeature's.
    """
    if not is_combination(folder_name):
        raise UserError(
            f"folder '{folder_name}' is not named shape_texture_color, as in triangle_solid_red; "
            f"reading the {factor} needs the data set that python -m moco.trifeature draws"
        )
    return FACTORS[factor].index(folder_name.split("_")[list(FACTORS).index(factor)])


def is_combination(folder_name):
    """Whether the name of a folder is shape_texture_color."""
    return tuple(folder_name.split("_")) in COMBINATIONS


def held_out(seed):
    """The 200 combinations for validation, as a set of (shape, texture, color); the seed chooses which.

    The values of each factor are numbered at random, and the combinations whose numbers sum to 0 or 1
    (mod 10) are held out: for any values of two factors these are two values of the third. So every value is
    held out in exactly 20 of its 100 combinations, every pair of values in exactly 2 of its 10.
    """
    rng = _rng(seed)
    numbers = [dict(zip(names, rng.permutation(10).tolist(), strict=True)) for names in FACTORS.values()]
    return {
        combination
        for combination in COMBINATIONS
        if sum(number[value] for number, value in zip(numbers, combination, strict=True)) % 10 < 2
    }


def generate(out, size=128, renders=10, seed=0, force=False):
    """Draw the data set into the folder `out`, which appears when it is complete. True if it was drawn, False
    if `out` holds the set with these settings already.

    Each image (RGB, `size` pixels square) depends on (size, seed, combination, render number) alone. `force`
    draws in any case, and replaces an earlier Trifeature set. UserError for settings out of range, an `out`
    that holds something else, or one that cannot be written.
    """
    settings = {"version": VERSION, "size": size, "renders": renders, "seed": seed}
    if size not in SIZES:
        raise UserError(f"--size must be from {SIZES[0]} to {SIZES[-1]} pixels, not {size}")
    for name, value, least in (("seed", seed, 0), ("renders", renders, 1)):
        if value < least:
            raise UserError(f"--{name} must be at least {least}, not {value}")
    out = Path(out).resolve()
    try:
        if not force and _settings_of(out) == settings:
            return False
        _check_free(out, force)
        with atomic_folder(out, replace=force) as folder:
            _draw(folder, size, renders, seed)
            (folder / SETTINGS).write_text(json.dumps(settings) + "\n")
    except OSError as error:
        raise _unwritable(out, error) from error
    return True


def ensure(out, size=128, renders=10, seed=0):
    """Draw the data set unless `out` holds a train/ already, of whatever settings; True if it was drawn.
    Errors as in `generate`.

    Safe in several processes at once: one draws and the others wait. Where there are no locks each draws in a
    folder of its own, the first to finish gives it the name, and the others find it there.
    """
    out = Path(out).resolve()
    train = out / "train"  # complete if it exists, for a set appears under its name when it is complete
    if train.is_dir():
        return False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with Lock(lock_beside(out)):
            return not train.is_dir() and generate(out, size, renders, seed)
    except OSError as error:
        raise _unwritable(out, error) from error
    except UserError:
        if train.is_dir():
            return False
        raise


def _draw(folder, size, renders, seed):
    validation = held_out(seed)
    with Progress("drawing Trifeature", renders * len(COMBINATIONS), "images") as progress:
        for number, combination in enumerate(COMBINATIONS):
            place = folder / ("val" if combination in validation else "train") / "_".join(combination)
            place.mkdir(parents=True)
            for index in range(renders):
                pixels = render(*combination, size, _rng(seed, number, index))
                png = io.BytesIO()  # Pillow forgets the reason when it fails to write to a file
                Image.fromarray(pixels).save(png, "PNG", compress_level=1)
                (place / f"{index}.png").write_bytes(png.getvalue())
            progress.update(renders)


def _rng(seed, *position):
    # numbers that depend on the seed and the position alone; PCG64 by name, for numpy's default may change
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=position)))


def _unwritable(out, error):
    return UserError(f"cannot write {out}: {error.strerror or error}; make room or choose another place")


def _settings_of(out):
    """How the set in the folder `out` was drawn: a dict, or None where there is none."""
    try:
        return dict(json.loads((out / SETTINGS).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _check_free(out, force):
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / SETTINGS).is_file():
        hint = ": --force does not delete it" if force else ""
        raise UserError(
            f"{out} exists and is no Trifeature set (it has no {SETTINGS}){hint}; choose another folder"
        )
    if not force:
        settings = ", ".join(f"{name} {value}" for name, value in (_settings_of(out) or {}).items())
        raise UserError(
            f"{out} holds a set drawn with {settings or 'unknown settings'}; replace it with --force, or "
            "choose another folder"
        )
