"""Draws the curves of one or more runs, from the logs in their folders, into one picture.

    python -m moco.plot runs/ifm -o ifm.png
    python -m moco.plot runs/ifm runs/moco -o both.png
    python -m moco.plot runs/linear -o linear.png       (a curve per --lr of a linear evaluation)

It needs matplotlib (`pip install matplotlib`).
"""

import contextlib
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from moco.errors import Parser, UserError, printable, run_program
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
    """Raise UserError unless a picture can be written to `out`: to be called before the work of drawing."""
    check_free(out, force)
    known = sorted(_matplotlib().figure.Figure().canvas.get_supported_filetypes())
    if _suffix(out) not in known:
        raise UserError(f"{out} must end in .png or another format that matplotlib writes: {' '.join(known)}")


@contextlib.contextmanager
def own_style():
    """Gives matplotlib with the settings above during the block, whatever a matplotlibrc says; figures are
    made and saved in one.
    """
    matplotlib = _matplotlib()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # all but the backend
        matplotlib.rcParams.update(STYLE)
        yield matplotlib


def save_picture(figure, out):
    """Write a Figure to `out` in the format of its suffix. Raises UserError, and an old file stays then."""
    try:
        with own_style(), atomic_file(out) as temporary:
            figure.savefig(temporary, format=_suffix(out))
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror or error}); choose another place") from error


def literal(text, most=110):
    """A text's last `most` letters for matplotlib, which takes a bare dollar for the start of a formula."""
    text = printable(text)
    return (text if len(text) <= most else f"…{text[1 - most :]}").replace("$", r"\$")


def _suffix(out):
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
    """A log. steps: the printed steps, epochs: the finished epochs, in order, each a dict of the log's names
    and values, and `at`, where it starts, in epochs. chance: the loss at chance, or None. linear: whether it
    is a linear evaluation.
    """

    name: str
    steps: list
    epochs: list
    chance: float | None
    linear: bool


def read_run(path):
    """The Run of an output folder or of the log in it. Raises UserError when there is none.

    Of a repeated (epoch, step) the last line counts. A start removes the earlier lines from its position on:
    for a new run all of them.
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
            kind, position = entry["kind"], (entry["epoch"], entry.get("step", math.inf))
        except (ValueError, TypeError, LookupError):  # a line that was cut off when the run was killed
            continue
        if kind == "start":
            found, start = {earlier: found[earlier] for earlier in found if earlier < position}, entry
        else:
            found[position] = entry | {"at": position[0] + entry.get("step", 0) / start.get("steps", 1)}
    if not found:
        raise UserError(f"{log} holds no step and no epoch yet; try again when the run has printed some")
    entries = [found[position] for position in sorted(found)]
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
    "RankMe: effective rank of features": ["rankme"],
    "Norm of the gradient": ["grad_norm"],
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
    legend_columns = max(1, min(COLUMNS, 110 // max(len(literal(run.name)) for run in runs)))
    rows, legend_rows = math.ceil(len(panels) / COLUMNS), math.ceil(len(runs) / legend_columns)
    with own_style() as matplotlib:
        size = WIDTH, 0.5 + 2.2 * rows + 0.2 * legend_rows
        figure = matplotlib.figure.Figure(size, layout="constrained")
        axes = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True).ravel()
        for (title, names), axis in zip(panels.items(), axes, strict=False):
            axis.set_title(title)
            axis.tick_params(labelbottom=True, length=0)
            for number, run in enumerate(runs):
                for name, dashes in zip(names, ("-", "--"), strict=False):
                    _draw_run(axis, run, name, number, dashes)
            if title == LOSS:
                _draw_chance(axis, runs)
            else:  # 0 is in view
                axis.update_datalim([(0, 0)], updatex=False)
                axis.autoscale_view()
        for axis in axes[len(panels) :]:
            axis.remove()
        after = "validation" if runs[0].linear else "kNN and RankMe"
        caption = (
            f"epochs (plain: single steps; markers: means of an epoch, at its middle; {after}: after it)"
        )
        figure.supxlabel(caption, fontsize=8, color=GRAY)
        handles = [matplotlib.lines.Line2D([], [], **_look(number)) for number in range(len(runs))]
        names = [literal(run.name) for run in runs]
        figure.legend(handles, names, loc="outside upper left", ncols=legend_columns, frameon=False)
    return figure


def panels_of(runs):
    """{title: names of the log's quantities, a second one dashed} for what at least one log has."""
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
    """The steps of a run as a thin line, and the means of its epochs as a strong one with markers."""
    look, (x, y), means = _look(number), curve(run.steps, name), curve(run.epochs, name)
    if x:
        faint = {"linewidth": 0.7, "alpha": 0.3} if len(means[0]) > 1 else {"linewidth": 1.4}
        dot = {"marker": "." if len(x) == 1 else None, "color": look["color"]}
        axis.plot(x, y, linestyle=dashes, **faint, **dot, gid=f"{number} {name} steps")
    if means[0]:
        after = 1 if name.startswith(("knn/", "rankme", "val_")) else 0.5
        x, every = [at + after for at in means[0]], math.ceil(len(means[0]) / 12)
        gid = f"{number} {name} epochs"
        axis.plot(x, means[1], linestyle=dashes, linewidth=1.4, markevery=every, **look, gid=gid)


def _draw_chance(axis, runs):
    """The losses at chance as dotted lines."""
    for chance in {run.chance for run in runs} - {None}:
        axis.axhline(chance, color=BLACK, linestyle=":", gid="chance")
        axis.set_title(f"{LOSS}; dotted: at chance")


def _look(number):
    """Color and marker of a run."""
    color, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
    return {"color": color, "marker": marker, "markersize": 4.5}


def main():
    parser = Parser(prog="python -m moco.plot", description=__doc__.splitlines()[0], allow_abbrev=False)
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
