"""Draws the curves of one or several runs, from the logs in their folders, into one picture.

    python -m moco.plot runs/ifm -o ifm.png
    python -m moco.plot runs/ifm runs/moco -o both.png
    python -m moco.plot runs/linear -o linear.png       (a curve per --lr of a linear evaluation)

It needs matplotlib (`pip install matplotlib`).
"""

import argparse
import math
from dataclasses import dataclass

from moco.errors import UserError, run_program
from moco.log_reader import LINEAR_NAME, NAME, by_head, read_log, run_names
from moco.pictures import (
    BLACK,
    GREY,
    PALETTE,
    WIDTH,
    check_picture,
    literal,
    own_style,
    save_picture,
)

MARKERS = "os^Dv"  # 35 runs before a pair of colour and marker comes again
COLUMNS = 3
CAPTION = "epochs (no markers: single steps; markers: means over an epoch, at its middle; {}: after it)"


@dataclass(frozen=True)
class Panel:
    """A panel of the picture. names: of the log's quantities; the second one is dashed.

    factor: from the log's unit to the title's. bottom, top: limits of the axis, where they are fixed.
    after: the values are of the end of an epoch, not means over it. exact: free of noise, so that single
    steps are enough.
    """

    title: str
    names: tuple
    factor: float = 1
    bottom: float | None = None
    top: float | None = None
    after: bool = False
    exact: bool = False


LOSS = Panel("Loss (nats)", ("loss",))
ACCURACY = Panel("Contrastive accuracy, top 1 (%)", ("acc1",), bottom=0)
TRAINING = Panel("Training accuracy, top 1 (%)", ("acc1",), bottom=0)
VALIDATION = Panel("Validation accuracy, top 1 (%)", ("val_acc1",), bottom=0, after=True)
LEARNING_RATE = Panel("Learning rate", ("lr",), bottom=0, exact=True)
OTHERS = (
    Panel("Cosine: positive (solid), negative (dashed)", ("pos_similarity", "neg_similarity")),
    Panel("Alignment: mean |q − k|² of positives", ("alignment",), bottom=0),
    Panel("Uniformity: log mean exp(−2|q − q′|²)", ("uniformity",)),
    LEARNING_RATE,
    Panel("Images per second", ("images_per_s",), bottom=0),
    Panel("Queue filled (%)", ("queue_fill",), factor=100, bottom=0, top=100, exact=True),
)


def figure_of(logs, names):
    """A matplotlib Figure with the curves of RunLogs, all of pre-training or all of linear evaluation, which
    `names` call in the legend.

    A line's gid is "RUN QUANTITY steps" or "RUN QUANTITY epochs", RUN counted from 0; that of a loss at
    chance is "chance". A quantity that no log has gets no panel; a value that is null leaves a gap.
    """
    panels = _panels(logs)
    beside = COLUMNS if max(map(len, names)) <= 30 else 2  # names in a row of the legend
    rows, legend_rows = math.ceil(len(panels) / COLUMNS), math.ceil(len(logs) / beside)
    with own_style() as matplotlib:
        size = WIDTH, 0.5 + 2.2 * rows + 0.2 * legend_rows
        figure = matplotlib.figure.Figure(size, layout="constrained")
        axes = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True).ravel().tolist()
        for panel, axis in zip(panels, axes, strict=False):
            _draw(panel, axis, logs)
        for axis in axes[len(panels) :]:
            axis.remove()
        _limit_epochs(axes[0])
        figure.supxlabel(CAPTION.format("validation" if logs[0].linear else "kNN"), fontsize=8, color=GREY)
        handles = [
            matplotlib.lines.Line2D([], [], color=_colour(run), marker=_marker(run), markersize=5)
            for run in range(len(logs))
        ]
        names = [literal(name) for name in names]
        figure.legend(handles, names, loc="outside upper left", ncols=beside, frameon=False)
    return figure


def curve(entries, name, factor=1):
    """(epochs, values) of a quantity in the lines of a log: two lists, nan where it is null or no number.

    "knn/shape" is the entry shape of the dict knn. Lines that do not have it are left out, and both lists are
    empty where no line has a number.
    """
    first, _, rest = name.partition("/")
    x, y = [], []
    for entry in entries:
        held = entry.get(first, {}) if rest else entry
        if isinstance(held, dict) and (key := rest or first) in held:
            value = held[key]
            x.append(entry["at"])
            y.append(value * factor if isinstance(value, (int, float)) else math.nan)
    return (x, y) if any(map(math.isfinite, y)) else ([], [])


def _panels(logs):
    """Those that there is anything for, in their order."""
    found = [entry["knn"] for log in logs for entry in log.epochs if isinstance(entry.get("knn"), dict)]
    knn = [
        Panel(f"kNN accuracy: {literal(label)} (%)", (f"knn/{label}",), bottom=0, after=True)
        for label in dict.fromkeys(label for labels in found for label in labels)
    ]
    accuracies = (TRAINING, VALIDATION) if logs[0].linear else (ACCURACY, *knn)
    lines = [entry for log in logs for entry in (*log.steps, *log.epochs)]
    return [
        panel for panel in (LOSS, *accuracies, *OTHERS) if any(curve(lines, name)[0] for name in panel.names)
    ]


def _draw(panel, axis, logs):
    """One panel with the curves of all runs."""
    axis.set_title(panel.title)
    for run, log in enumerate(logs):
        for name, dashes in zip(panel.names, ("-", (0, (4, 2))), strict=False):
            look = {"color": _colour(run), "linestyle": dashes}
            _draw_run(panel, axis, log, name, run, look, len(logs))
    if panel is LOSS:
        _draw_chance(axis, logs)
    peaks = [max(filter(math.isfinite, line.get_ydata())) for line in axis.lines]
    if panel is LEARNING_RATE and 0 < 10 * min(peaks) < max(peaks):  # one would lie on the axis
        bottom = min(peaks) / 1000
        axis.set_yscale("log")
        axis.set_ylim(bottom=bottom)
        axis.set_title(f"{panel.title} (logarithmic, from {bottom:.1g})")
        axis.yaxis.set_major_formatter("{x:g}")
    elif panel.bottom is not None:
        top = axis.get_ylim()[1] if panel.top is None else panel.top
        edge = 0.04 * (top - panel.bottom)  # half a marker
        axis.set_ylim(panel.bottom - edge, top + edge)
    axis.tick_params(which="both", labelbottom=True, length=0)


def _draw_run(panel, axis, log, name, run, look, runs):
    means_x, means = curve(log.epochs, name, panel.factor)
    steps_x, steps = curve(log.steps, name, panel.factor)
    if panel.after:
        means_x = [x + 0.5 for x in means_x]
    faint = len(means) > 1 and not panel.exact
    if steps:
        # Equal curves of several runs stay visible: the first ones are drawn wider.
        wider = min(1.2, 4 / runs) * (runs - 1 - run) if panel.exact else 0
        width = 0.7 if faint else 1.4 + wider
        dot = "." if len(steps) == 1 else None
        strength = {"linewidth": width, "alpha": 0.3 if faint else 1}
        drawn = "steps-post" if panel is LEARNING_RATE else "default"  # it is set once an epoch
        axis.plot(steps_x, steps, drawstyle=drawn, **look, **strength, marker=dot, gid=f"{run} {name} steps")
    if means and not (panel.exact and steps):
        apart = 0.025 * run % 0.12, 0.12  # the first marker and the distances, in diagonals of the panel
        marks = {"marker": _marker(run), "markersize": 4.5, "markevery": 1 if len(means) < 12 else apart}
        marks |= {"drawstyle": "steps-mid" if panel is LEARNING_RATE else "default"}
        axis.plot(means_x, means, linewidth=1.4, zorder=3, **look, **marks, gid=f"{run} {name} epochs")


def _draw_chance(axis, logs):
    """Dotted lines, in the colour of the run where the runs differ and it alone has the level."""
    owners = {}
    for run, log in enumerate(logs):
        for chance in log.chances:
            owners.setdefault(chance, []).append(run)
    for chance, runs in owners.items():
        colour = _colour(runs[0]) if len(runs) == 1 < len(logs) else BLACK
        axis.axhline(chance, color=colour, linestyle=(0, (1, 1.5)), linewidth=1.4, gid="chance")
    if owners:
        levels = ", ".join(f"{chance:.2f}" for chance in sorted(owners)) if len(owners) < 3 else "levels"
        axis.set_title(f"{LOSS.title}; dotted: chance {levels}")


def _limit_epochs(axis):
    """A readable range and few ticks also where all there is stands in one place."""
    left, right = axis.get_xlim()
    axis.xaxis.get_major_locator().set_params(nbins=6, steps=[1, 2, 5, 10])
    low, high = axis.dataLim.intervalx
    if low == high:
        left, right = low - 0.05, low + 1
    axis.set_xlim(left, right)


def _colour(run):
    return PALETTE[run % len(PALETTE)]


def _marker(run):
    return MARKERS[run % len(MARKERS)]


def main():
    parser = argparse.ArgumentParser(
        prog="python -m moco.plot", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN",
        help=f"output folder of a run, or its log: {NAME} of a pre-training, {LINEAR_NAME} of a linear "
        f"evaluation (a folder with both stands for {NAME})",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--out", required=True, metavar="OUT.png", help="picture to write; .pdf and .svg work as well"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT.png if it exists")
    args = parser.parse_args()
    logs = [read_log(run) for run in args.runs]
    if len({log.linear for log in logs}) > 1:
        one, other = (next(log.path for log in logs if log.linear == linear) for linear in (False, True))
        raise UserError(
            f"{one} is of a pre-training and {other} of a linear evaluation: draw them in two pictures"
        )
    check_picture(args.out, args.force)
    names = run_names(log.path for log in logs)
    curves = [own for log, name in zip(logs, names, strict=True) for own in by_head(log, name)]
    save_picture(figure_of(*zip(*curves, strict=True)), args.out)
    print(args.out)


if __name__ == "__main__":
    run_program(main)
