"""What the pictures share (moco.plot, moco.show): colours and letters, checks before the work, and the file.

matplotlib is an optional package (`pip install matplotlib`). Figures are made without pyplot, so none stays
open and no setting of the caller's is touched.
"""

import contextlib
from pathlib import Path

from moco.errors import UserError
from moco.files import atomic_file, check_free

WIDTH, DPI = 10, 200  # inches; dots per inch: letters of 8 points and more are readable at 1000 pixels

# Okabe & Ito's colours, which people with any kind of colour vision tell apart, without the yellow.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
BLACK, GREY = "#000000", "#444444"
PALETTE = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, BLACK)

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "savefig.dpi": DPI,
}


def check_picture(out, force):
    """Raise UserError unless a picture can be written to `out`: before the work that leads to it."""
    check_free(out, force)
    known = set(_matplotlib().figure.Figure().canvas.get_supported_filetypes()) - {"pgf"}  # LaTeX, no picture
    if _ending(out) not in known:
        raise UserError(
            f"{out} must end in .png or another format that matplotlib writes: {' '.join(sorted(known))}"
        )


@contextlib.contextmanager
def own_style():
    """Within the block matplotlib's settings are these, whatever a matplotlibrc says; figures are made and
    saved in one.
    """
    matplotlib = _matplotlib()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # all but the backend
        matplotlib.rcParams.update(STYLE)
        yield matplotlib


def save_picture(figure, out):
    """Write a Figure to `out` in the format of its ending; `out` shows the whole picture or what it was."""
    try:
        with own_style(), atomic_file(out) as temporary:
            figure.savefig(temporary, format=_ending(out))
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror or error}); choose another place") from error


def literal(text):
    """A text as matplotlib shows it letter by letter: a dollar would begin a formula."""
    return text.replace("$", r"\$")


def shortened(text, most):
    """At most `most` letters of a text: its beginning, its end, and dots between them."""
    if len(text) <= most:
        return text
    end = (most - 1) // 2
    return f"{text[: most - 1 - end]}…{text[len(text) - end :]}"


def _ending(out):
    return Path(out).suffix.removeprefix(".").lower()


def _matplotlib():
    try:
        import matplotlib.figure
    except ImportError as error:
        raise UserError(
            "matplotlib, which draws the picture, is not installed: pip install matplotlib"
        ) from error
    return matplotlib
