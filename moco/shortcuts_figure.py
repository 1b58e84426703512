"""The figure of a sweep of moco.shortcuts: readouts against InfoNCE's loss, T and epsilon, or random bits."""

import math

from moco.errors import UserError
from moco.intervals import interval
from moco.shortcuts_readings import GAIN, readings
from moco.shortcuts_results import WORST, number

MARKERS = "os^Dv<>P"
STYLES = ("-", "--", "-.", ":")
_LEVEL = {"color": "gray", "linestyle": ":", "label": "untrained"}
_LEVEL_0 = {"color": "black", "linewidth": 0.8, "label": "no gain"}


def draw(kind, results, path):
    """Write a PNG, 1000 pixels wide, to `path`. Raises UserError without matplotlib."""
    figure_of(kind, results).savefig(path, format="png")


def figure_of(kind, results):
    """matplotlib's Figure of the results, of which at least one trained run has a readout; see `draw`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the figure needs matplotlib: `pip install matplotlib`") from error
    found_ways, of_bits = readings(results), kind == "randbit"
    found = found_ways[0]
    if of_bits:
        lines = [(place, reading) for place in found.places for reading in found_ways]
    else:
        lines = [((recipe, what), found) for recipe in found.recipes for what in found.shown]
    height = 1.5 + (2.6 if of_bits else 1.6) * len(lines)
    figure = Figure(figsize=(10, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    shared = {} if of_bits else {"sharey": "row"}
    axes = figure.subplots(len(lines), len(found.shown) if of_bits else 3, squeeze=False, **shared)
    for row, (line, reading) in zip(axes, lines, strict=True):
        (_against_bits if of_bits else _against_all)(row, line, reading)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for first in range(0, 0 if of_bits else len(lines), len(found.shown)):
        _share_x(axes[first : first + len(found.shown)])
    figure.align_ylabels(axes[:, 0])
    figure.supxlabel(_note(found, of_bits, len(found_ways) > 1), fontsize="small", x=0.01, ha="left")
    _legend(figure, axes)
    return figure


def _against_all(row, line, found):
    """One quantity under a recipe against loss, T and epsilon, the latter two evenly spaced."""
    recipe, what = line
    epsilons, temperatures = found.epsilons, found.temperatures
    shades = _shades(len(epsilons))
    values = {key: found.values(key, what) for key in found.runs if key[0] == recipe}
    for key in values:
        style = {"color": shades[epsilons.index(key[3])], "marker": _marker(temperatures.index(key[1]))}
        _points(row[0], [found.losses(key, what)], [values[key]], **style)
    for e, epsilon in enumerate(epsilons):
        chosen = {temperatures.index(k[1]): values[k] for k in values if k[3] == epsilon}
        style = {"label": f"epsilon {number(epsilon)}", "color": shades[e], "marker": "."}
        curve(row[1], chosen, aside(e, len(epsilons)), **style)
    for t, T in enumerate(temperatures):
        chosen = {epsilons.index(k[3]): values[k] for k in values if k[1] == T}
        gray = f"{0.6 * t / max(1, len(temperatures) - 1):.2f}"
        style = {"label": f"T {number(T)}", "color": gray, "marker": _marker(t), "linestyle": STYLES[t % 4]}
        curve(row[2], chosen, aside(t, len(temperatures)), **style)
    for axis, ticks in ((row[1], temperatures), (row[2], epsilons)):
        axis.set_xticks(range(len(ticks)), [number(tick) for tick in ticks])
    if found.chance is not None:
        row[0].axvline(found.chance, color="gray", linestyle="-.", linewidth=1, label="loss at chance")
    mean, half = interval(found.levels(what))
    for axis in row if not math.isnan(mean) else ():
        axis.axhline(mean, **_LEVEL_0 if what == GAIN else _LEVEL)
        if not math.isnan(half):
            axis.axhspan(mean - half, mean + half, color="gray", alpha=0.15, linewidth=0)
    row[0].set_ylabel(f"{found.label(what)}\n({recipe})")
    for axis in row:
        if what != GAIN:
            within_percent(axis)


def _share_x(rows):
    """Give the panels of a recipe the same x, and the lowest of them its name."""
    for column, label in zip(rows.T, ("InfoNCE loss", "T", "epsilon"), strict=True):
        for axis in column[:-1]:
            axis.sharex(column[-1])
            axis.tick_params(labelbottom=False)
        column[-1].set_xlabel(label)
        column[-1].autoscale(axis="x")


def _against_bits(row, line, found):
    """All quantities under a recipe and a temperature, each against the number of bits."""
    recipe, T = line
    epsilons, counts = found.epsilons, found.bits
    gap = min((b - a for a, b in zip(counts, counts[1:], strict=False)), default=1)
    shades, bits = _shades(len(epsilons)), sorted({run["bits"] for run in found.untrained})
    for axis, what in zip(row, found.shown, strict=True):
        for e, epsilon in enumerate(epsilons):
            settings = [key for key in found.runs if key[:2] == line and key[3] == epsilon]
            chosen = {key[2]: found.values(key, what) for key in settings}
            style = {"label": f"epsilon {number(epsilon)}", "color": shades[e], "marker": _marker(e)}
            curve(axis, chosen, gap * aside(e, len(epsilons)), **style)
        levels = [interval(found.levels(what, count)) for count in bits]
        ends = bits if len(bits) > 1 else [bit + side * gap / 2 for bit in bits for side in (-1, 1)]
        levels = levels if len(bits) > 1 else levels * 2
        axis.plot(ends, [mean for mean, _ in levels], **_LEVEL_0 if what == GAIN else _LEVEL)
        low, high = [mean - half for mean, half in levels], [mean + half for mean, half in levels]
        axis.fill_between(ends, low, high, color="gray", alpha=0.15, linewidth=0)
        axis.set_xticks(counts)
        axis.set_xlabel("random bits")
        axis.set_ylabel(found.label(what))
        axis.set_title("\n".join(filter(None, (f"{recipe}, T {number(T)}", found.how))), fontsize="medium")
        if what != GAIN:
            within_percent(axis)


def _note(found, of_bits, twice):
    """What a reader must know, in lines that fit the figure."""
    first = "Bars: 95 % t intervals over seeds; hollow: of one run, which has none."
    if not of_bits:
        first += " T and epsilon: evenly spaced. Losses compare within a T."
    second = "Gain: over epsilon 0 with the same seed, in points."
    if WORST in found.columns:
        second = f"Worst: the factor that a run reads worst. {second}"
    if twice:
        shared, own = (
            " Shared bits: all images read with those of one.",
            " Read with BatchNorm's own statistics.",
        )
        second += shared if of_bits else own
    if found.diverged:
        second += f" {found.diverged} of {found.tried} runs diverged and are left out."
    return f"{first}\n{second}"


def within_percent(axis):
    """An interval of two seeds can be wider than what is possible."""
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, -1), min(high, 101))


def curve(axis, chosen, beside, **style):
    """A line through {x: values}, moved sideways so that intervals at the same x do not hide each other."""
    places = [place for place in sorted(chosen) if chosen[place]]
    _points(axis, [[place + beside] for place in places], [chosen[place] for place in places], **style)


def _points(axis, x, y, **style):
    """Means of lists of values, joined, with bars for their 95 % intervals, hollow where there is none."""
    if not any(y):
        return
    (x_means, x_halves), (y_means, y_halves) = (zip(*map(interval, lists), strict=True) for lists in (x, y))
    bars = {"xerr": x_halves, "yerr": y_halves}
    axis.errorbar(x_means, y_means, **bars, capsize=2, linewidth=1.2, markersize=5, elinewidth=0.8, **style)
    single = [number for number, half in enumerate(y_halves) if math.isnan(half)]
    hollow = {"marker": style["marker"], "color": style["color"], "markerfacecolor": "white"}
    axis.plot([x_means[n] for n in single], [y_means[n] for n in single], linestyle="", markersize=5,
              zorder=3, label="_", **hollow)  # fmt: skip


def aside(number, of):
    """Where a curve stands beside the middle, in units of the distance of two neighbours."""
    return 0.4 * (number - (of - 1) / 2) / max(of, 4)


def _shades(count):
    """Colours in an order, from dark to light."""
    import matplotlib

    return [matplotlib.colormaps["plasma"](0.85 * n / max(1, count - 1)) for n in range(count)]


def _marker(number):
    return MARKERS[number % len(MARKERS)]


def _legend(figure, axes):
    """One for all panels, each label once: epsilons in the first line, all else in the second."""
    from matplotlib.lines import Line2D

    found = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            line = handle if isinstance(handle, Line2D) else handle.lines[0]
            found.setdefault(label, line)
    first = [label for label in found if label.startswith("epsilon")]
    second = [label for label in found if label not in first]
    width = max(len(first), len(second))
    lines = [[*labels, *[""] * (width - len(labels))] for labels in (first, second)]
    labels = [label for pair in zip(*lines, strict=True) for label in pair]  # it is filled by columns
    handles = [found.get(label, Line2D([], [], linestyle="")) for label in labels]
    figure.legend(handles, labels, loc="outside upper center", ncols=width, frameon=False)
