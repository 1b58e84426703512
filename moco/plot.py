"""Draws the curves of one or more runs, from the logs in their folders, into one picture.

    python -m moco.plot runs/ifm -o ifm.png
    python -m moco.plot runs/ifm runs/moco -o both.png
    python -m moco.plot runs/linear -o linear.png       (a curve per --lr of a linear evaluation)

It needs matplotlib (`pip install matplotlib`).
"""

import argparse
import contextlib
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from moco.errors import UserError, printable, run_program
from moco.files import atomic_file, check_free

# The style of all pictures of the project.

WIDTH, DPI = 10, 200  # inches; dots per inch: letters of 8 points and more are readable at 1000 pixels

# Okabe & Ito's colors, which people with any kind of color vision tell apart, without the yellow.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
BLACK, GRAY = "#000000", "#444444"
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
    known = sorted(_matplotlib().figure.Figure().canvas.get_supported_filetypes())
    if _ending(out) not in known:
        raise UserError(f"{out} must end in .png or another format that matplotlib writes: {' '.join(known)}")


@contextlib.contextmanager
def own_style():
    """Gives matplotlib, which within the block has these settings whatever a matplotlibrc says; figures are
    made and saved in one.
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


def literal(text, most=120):
    """A text as matplotlib shows it letter by letter, at most so many: a dollar would begin a formula."""
    text = printable(text)
    if len(text) > most:
        end = (most - 1) // 2
        text = f"{text[: most - 1 - end]}…{text[len(text) - end :]}"
    return text.replace("$", r"\$")


def _ending(out):
    return Path(out).suffix.removeprefix(".").lower()


def _matplotlib():
    try:
        import matplotlib.figure  # not pyplot: no figure stays open, no setting of the caller's is touched
    except ImportError as error:
        raise UserError(
            "matplotlib, which draws the picture, is not installed: pip install matplotlib"
        ) from error
    return matplotlib


# Reading the log of a run (moco.run.log): one JSON object a line, of the kinds "start", "step" and "epoch".

LOGS = LOG, LINEAR_LOG = "log.jsonl", "linear.jsonl"


@dataclass
class Run:
    """What a log says. steps: the printed steps, epochs: the finished epochs, in order, each a dict of the
    log's names and values with its place `at` in epochs besides, for an epoch its start. chance: the loss at
    chance, or None. linear: whether it is a linear evaluation.
    """

    name: str
    steps: list
    epochs: list
    chance: float | None
    linear: bool


def read_run(path):
    """The Run of an output folder or of the log in it. Raises UserError when there is none.

    Of a repeated (epoch, step) the last line counts. A start voids the lines from its place on: with epoch 0
    and step 0 the whole earlier run, otherwise what was lost between its checkpoint and its end.
    """
    path = Path(path)
    log = next((path / name for name in LOGS if os.path.isfile(path / name)), path)
    try:
        lines = log.read_bytes().splitlines()
    except OSError as error:
        raise UserError(
            f"there is no log in {path} ({error.strerror}); name a run's --output-dir or the {LOG} in it"
        ) from error
    start, found = {}, {}
    for line in lines:
        try:
            entry = json.loads(line)
            kind, place = entry["kind"], (entry["epoch"], entry.get("step", math.inf))
        except (ValueError, TypeError, LookupError):  # a line that was cut off when the run was killed
            continue
        if kind == "start":
            found, start = {earlier: found[earlier] for earlier in found if earlier < place}, entry
        else:
            at = place[0] + entry.get("step", 0) / start.get("steps", 1)
            found[place] = entry | {"at": at}
    if not found:
        raise UserError(f"{log} holds no step and no epoch yet; look again when the run has printed some")
    entries = [found[place] for place in sorted(found)]
    steps, epochs = ([entry for entry in entries if entry["kind"] == kind] for kind in ("step", "epoch"))
    linear = log.name == LINEAR_LOG or any("val_acc1" in entry for entry in epochs)
    return Run(str(path), steps, epochs, start.get("chance"), linear)


def by_head(run):
    """A Run for each classifier of a linear evaluation with several; of any other, the Run itself.

    They have no steps: those in the log are of one at a time, the best so far.
    """
    heads = {}
    for entry in run.epochs:
        for own in entry.get("heads") or ():
            heads.setdefault(own["head"], []).append(entry | own)
    if len(heads) < 2:
        return [run]
    return [replace(run, name=f"{run.name} --lr {lr:g}", steps=[], epochs=own) for lr, own in heads.items()]


# Drawing the curves.

MARKERS = "os^Dv"  # 35 runs before a pair of color and marker comes again
COLUMNS = 3
LOSS = "Loss (nats)"
LINEAR = {"Training accuracy, top 1 (%)": ["acc1"], "Validation accuracy, top 1 (%)": ["val_acc1"]}
OTHERS = {
    "Cosine: positive (solid), negative (dashed)": ["pos_similarity", "neg_similarity"],
    "Alignment: mean |q − k|² of positives": ["alignment"],
    "Uniformity: log mean exp(−2|q − q′|²)": ["uniformity"],
    "Learning rate": ["lr"],
    "Images per second": ["images_per_s"],
    "Share of the queue filled": ["queue_fill"],
}


def figure_of(runs):
    """A matplotlib Figure with the curves of Runs, all of pre-training or all of linear evaluation.

    A line's gid is "RUN QUANTITY steps" or "RUN QUANTITY epochs", RUN counted from 0; that of a loss at
    chance is "chance". A quantity that no log has gets no panel; a value that is null leaves a gap.
    """
    panels = panels_of(runs)
    columns = max(1, min(COLUMNS, 110 // max(len(run.name) for run in runs)))  # of the legend
    rows, legend_rows = math.ceil(len(panels) / COLUMNS), math.ceil(len(runs) / columns)
    with own_style() as matplotlib:
        size = WIDTH, 0.5 + 2.2 * rows + 0.2 * legend_rows
        figure = matplotlib.figure.Figure(size, layout="constrained")
        axes = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True).ravel()
        for (title, names), axis in zip(panels.items(), axes, strict=False):
            axis.set_title(title)
            axis.tick_params(labelbottom=True, length=0)
            for number, run in enumerate(runs):
                for name, dashes in zip(names, ("-", (0, (4, 2))), strict=False):
                    _draw_run(axis, run, name, number, dashes)
            if title != LOSS:  # 0 is in view
                axis.update_datalim([(0, 0)], updatex=False)
                axis.autoscale_view()
        _draw_chance(axes[0], runs)
        for axis in axes[len(panels) :]:
            axis.remove()
        after = "validation" if runs[0].linear else "kNN"
        caption = (
            f"epochs (plain: single steps; markers: means over an epoch, at its middle; {after}: after it)"
        )
        figure.supxlabel(caption, fontsize=8, color=GRAY)
        handles = [
            matplotlib.lines.Line2D([], [], color=_color(number), marker=_marker(number), markersize=5)
            for number in range(len(runs))
        ]
        names = [literal(run.name) for run in runs]
        figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False)
    return figure


def panels_of(runs):
    """{title: names of the log's quantities, of which a second one is dashed} that there is anything for."""
    knn = dict.fromkeys(label for run in runs for entry in run.epochs for label in entry.get("knn") or ())
    accuracies = {"Contrastive accuracy, top 1 (%)": ["acc1"]}
    accuracies |= {f"kNN accuracy: {literal(label, 25)} (%)": [f"knn/{label}"] for label in knn}
    panels = {LOSS: ["loss"]} | (LINEAR if runs[0].linear else accuracies) | OTHERS
    entries = [entry for run in runs for entry in (*run.steps, *run.epochs)]
    return {title: names for title, names in panels.items() if any(curve(entries, name)[0] for name in names)}


def curve(entries, name):
    """(epochs, values) of a quantity in the lines of a log: two lists, nan where it is null.

    "knn/shape" is the entry shape of the dict knn. Lines that do not have it are left out, and both lists are
    empty where no line has a number.
    """
    outer, _, inner = name.partition("/")
    x, y = [], []
    for entry in entries:
        values = (entry.get(outer) or {}) if inner else entry
        if (key := inner or outer) in values:
            x.append(entry["at"])
            y.append(math.nan if values[key] is None else values[key])
    return (x, y) if any(map(math.isfinite, y)) else ([], [])


def _draw_run(axis, run, name, number, dashes):
    """The steps of a run as a line, and the means of its epochs, beside which it is faint, with markers."""
    steps, epochs = curve(run.steps, name), curve(run.epochs, name)
    look = {"color": _color(number), "linestyle": dashes}
    if steps[0]:
        strength = {"linewidth": 0.7, "alpha": 0.3} if len(epochs[0]) > 1 else {"linewidth": 1.4}
        dot = "." if len(steps[0]) == 1 else None
        axis.plot(*steps, **look, **strength, marker=dot, gid=f"{number} {name} steps")
    if epochs[0]:
        after = 1 if name.startswith(("knn/", "val_")) else 0.5
        apart = 0.025 * number % 0.12, 0.12  # the first marker and the distances, in diagonals of the panel
        marks = {"marker": _marker(number), "markersize": 4.5}
        marks["markevery"] = 1 if len(epochs[0]) < 12 else apart
        x = [at + after for at in epochs[0]]
        axis.plot(x, epochs[1], linewidth=1.4, **look, **marks, gid=f"{number} {name} epochs")


def _draw_chance(axis, runs):
    """The losses at chance as dotted lines, black where all runs have the same."""
    levels = [run.chance for run in runs]
    for number, chance in enumerate(levels):
        if chance is not None:
            color = BLACK if len(set(levels)) == 1 else _color(number)
            axis.axhline(chance, color=color, linestyle=":", gid="chance")
            axis.set_title(f"{LOSS}; dotted: at chance")


def _color(number):
    return PALETTE[number % len(PALETTE)]


def _marker(number):
    return MARKERS[number % len(MARKERS)]


def main():
    parser = argparse.ArgumentParser(
        prog="python -m moco.plot", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    text = f"output folder of a run, or its log: {LOG} of a pre-training, {LINEAR_LOG} of a linear evaluation"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=text)
    text = "picture to write; .pdf and .svg work as well"
    parser.add_argument("-o", "--out", required=True, metavar="OUT.png", help=text)
    parser.add_argument("--force", action="store_true", help="replace OUT.png if it exists")
    args = parser.parse_args()

    runs = [read_run(path) for path in args.runs]
    if len({run.linear for run in runs}) > 1:
        one, other = (next(run.name for run in runs if run.linear == linear) for linear in (False, True))
        raise UserError(f"{one} is a pre-training and {other} a linear evaluation: draw them in two pictures")
    check_picture(args.out, args.force)
    save_picture(figure_of([curves for run in runs for curves in by_head(run)]), args.out)
    print(printable(args.out))


if __name__ == "__main__":
    run_program(main, "python -m moco.plot")
