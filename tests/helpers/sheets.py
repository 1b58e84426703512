"""For the tests of pictures: a sheet as a Figure, its pictures and texts, and refusals of a program."""

import re

import numpy as np


def draw_sheet(cli, monkeypatch, *words):
    """The Figure that moco.show draws for a command line; nothing is written."""
    from moco import show  # which imports all that the sheets need

    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(show, "save_picture", lambda figure, out: drawn.append(figure))
        code, _, errors = cli(show.main, *words, "-o", "never_written.png")
    assert code == 0, errors
    return drawn[0]


def pictures(figure):
    return [np.asarray(axis.images[0].get_array()) for axis in figure.axes]


def texts(axis):
    """The lines below a picture."""
    return [text.get_text() for text in axis.texts]


def refused(result, words):
    """The (exit code, output, errors) of a program that said one sentence which matches `words`."""
    code, output, errors = result
    assert (code, output) == (2, "")
    assert errors.count("\n") == 1 and errors.startswith("program: error: ")
    assert re.search(words, errors), errors
