"""The factors of Trifeature's images, and what can be read of a folder's images: these, or else the class.

The names of the values stand in those of the folders: train/triangle_solid_red/0.png.
"""

import itertools
import json
from pathlib import Path

from moco.errors import UserError
from moco.trifeature_draw import COLORS, SHAPES, TEXTURES

FACTORS = {"shape": tuple(SHAPES), "texture": tuple(TEXTURES), "color": tuple(COLORS)}
COMBINATIONS = tuple(itertools.product(*FACTORS.values()))  # 1000 x (shape, texture, color)
SETTINGS = "trifeature.json"  # beside train/ and val/: how the set was drawn
WHITE = "color=white"  # hidden so, color can be given to pictures later: moco.recolor
AS_FOLDERS = "class"  # the readout of a data set that is no Trifeature


def factor_of(folder_name, factor):
    """Class index, 0 to 9, of one factor in the name of a folder, such as "triangle_solid_red".

    `factor` is "shape", "texture" or "color". UserError if either name is none of Trifeature's.
    """
    if factor not in FACTORS:
        raise UserError(f"Trifeature has no factor '{factor}'; choose one of {', '.join(FACTORS)}")
    values = tuple(folder_name.split("_"))
    if len(values) != 3 or any(v not in names for v, names in zip(values, FACTORS.values(), strict=True)):
        raise UserError(
            f"folder '{folder_name}' is not named shape_texture_color, as in triangle_solid_red; "
            f"reading the {factor} needs the data set that python -m moco.trifeature draws"
        )
    return FACTORS[factor].index(values[list(FACTORS).index(factor)])


def is_combination(folder_name):
    """Whether the name of a folder is shape_texture_color."""
    return tuple(folder_name.split("_")) in COMBINATIONS


def hidden(words, flag="hide"):
    """(factor, value) of what a flag names: "color" is its first value, "color=blue" the one named. UserError
    where there is no such factor or value.
    """
    factor, given, value = words.partition("=")
    if factor not in FACTORS:
        raise UserError(f"--{flag} {words}: there is no such factor; choose one of {', '.join(FACTORS)}")
    if given and value not in FACTORS[factor]:
        known = ", ".join(FACTORS[factor])
        raise UserError(f"--{flag} {words}: {factor} has no such value; choose one of {known}")
    return factor, value or FACTORS[factor][0]


def factors_of(folder):
    """The names of what the images in `folder` tell, without a factor that is hidden in them. UserError."""
    path = Path(folder) / SETTINGS
    if not path.is_file():
        return [AS_FOLDERS]
    try:
        told = dict(json.loads(path.read_text())).get("hide")
        unseen = told and hidden(told)[0]
    except (OSError, ValueError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"{path} cannot be read ({error}); draw the set again") from error
    return [factor for factor in FACTORS if factor != unseen]
