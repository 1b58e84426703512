"""What can be read of the images in a folder: the factors of Trifeature, or else the class."""

import json
from pathlib import Path

from moco import trifeature
from moco.errors import UserError

AS_FOLDERS = "class"  # the readout of a data set that is no Trifeature


def factors_of(folder):
    """The names of what the images in `folder` tell, without a factor that is hidden in them. UserError."""
    path = Path(folder) / trifeature.SETTINGS
    if not path.is_file():
        return [AS_FOLDERS]
    try:
        hidden = dict(json.loads(path.read_text())).get("hide")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); draw the set again") from error
    return [factor for factor in trifeature.FACTORS if factor != hidden]
