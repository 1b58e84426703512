"""The figure of a sweep of moco.shortcuts: readouts against InfoNCE's loss, T and epsilon, or random bits."""

import math

from moco.errors import UserError
from moco.intervals import interval
from moco.shortcuts_report import factors_in, rows, score, sound, untrained

MARKERS = "os^Dv<>P"
STYLES = ("-", "--", "-.", ":")


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
    found = {key: good for key, runs in rows(results).items() if (good := list(sound(runs).values()))}
    factors = factors_in(results)
    lines = _lines_of(kind, found, factors)
    of_bits = kind == "randbit"
    figure = Figure(figsize=(10, 1.1 + (2.6 if of_bits else 1.9) * len(lines)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    shared = {} if of_bits else {"sharex": "col", "sharey": "row"}
    axes = figure.subplots(len(lines), len(factors) if of_bits else 3, squeeze=False, **shared)
    for row, line in zip(axes, lines, strict=True):
        (_against_bits if of_bits else _against_all)(row, line, found, factors, results)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        low, high = axis.get_ylim()  # an interval of two seeds can be wider than what is possible
        axis.set_ylim(max(low, -2), min(high, 102))
    if not of_bits:
        for axis, label in zip(axes[-1], ("InfoNCE loss", "T", "epsilon"), strict=True):
            axis.set_xlabel(label)
    figure.align_ylabels(axes[:, 0])
    _legend(figure, axes)
    return figure


def _lines_of(kind, found, factors):
    """What each row of panels is about."""
    if kind == "randbit":
        return list(dict.fromkeys(key[:2] for key in found))  # recipe and T
    return [(recipe, factor) for recipe in dict.fromkeys(key[0] for key in found) for factor in factors]


def _against_all(row, line, found, factors, results):
    """A factor under a recipe against loss, T and epsilon, the latter two evenly spaced."""
    recipe, factor = line
    mine = {key: runs for key, runs in found.items() if key[0] == recipe}
    epsilons, temperatures = (sorted({key[i] for key in found}) for i in (3, 1))
    shades = _shades(len(epsilons))
    for (_, T, _, epsilon), runs in mine.items():
        losses = [run["losses"]["info_nce"] for run in runs]
        style = {"color": shades[epsilons.index(epsilon)], "marker": _marker(temperatures.index(T))}
        _points(row[0], [losses], [_scores(runs, factor)], **style)
    for e, epsilon in enumerate(epsilons):
        chosen = {temperatures.index(k[1]): runs for k, runs in mine.items() if k[3] == epsilon}
        style = {"label": f"epsilon {epsilon:g}", "color": shades[e], "marker": "."}
        _curve(row[1], chosen, factor, _beside(e, len(epsilons)), **style)
    for t, T in enumerate(temperatures):
        chosen = {epsilons.index(k[3]): runs for k, runs in mine.items() if k[1] == T}
        gray = f"{0.6 * t / max(1, len(temperatures) - 1):.2f}"
        style = {"label": f"T {T:g}", "color": gray, "marker": _marker(t), "linestyle": STYLES[t % 4]}
        _curve(row[2], chosen, factor, _beside(t, len(temperatures)), **style)
    for axis, values in ((row[1], temperatures), (row[2], epsilons)):
        axis.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    runs = untrained(results)
    if runs:
        mean, half = interval(_scores(runs, factor))
        for axis in row:
            axis.axhline(mean, color="gray", linestyle=":", label="untrained")
            if not math.isnan(half):
                axis.axhspan(mean - half, mean + half, color="gray", alpha=0.15, linewidth=0)
    row[0].set_ylabel(f"{factor}, % ({recipe})")


def _against_bits(row, line, found, factors, results):
    """All factors under a recipe and a temperature, each against the number of bits."""
    recipe, T = line
    epsilons, counts = (sorted({key[i] for key in found}) for i in (3, 2))
    gap = min((b - a for a, b in zip(counts, counts[1:], strict=False)), default=1)
    shades, bits = _shades(len(epsilons)), sorted({run["bits"] for run in untrained(results)})
    for axis, factor in zip(row, factors, strict=True):
        for e, epsilon in enumerate(epsilons):
            chosen = {k[2]: runs for k, runs in found.items() if (k[0], k[1], k[3]) == (*line, epsilon)}
            style = {"label": f"epsilon {epsilon:g}", "color": shades[e], "marker": _marker(e)}
            _curve(axis, chosen, factor, gap * _beside(e, len(epsilons)), **style)
        levels = [interval(_scores(untrained(results, count), factor)) for count in bits]
        axis.plot(bits, [mean for mean, _ in levels], color="gray", linestyle=":", label="untrained")
        low, high = [mean - half for mean, half in levels], [mean + half for mean, half in levels]
        axis.fill_between(bits, low, high, color="gray", alpha=0.15, linewidth=0)
        axis.set_xticks(counts)
        axis.set_xlabel("random bits")
        axis.set_ylabel(f"{factor}, %")
        axis.set_title(f"{recipe}, T {T:g}", fontsize="medium")


def _curve(axis, chosen, factor, beside, **style):
    """A line through {x: runs}, moved sideways so that intervals at the same x do not hide each other."""
    places = sorted(chosen)
    x = [[place + beside] for place in places]
    _points(axis, x, [_scores(chosen[place], factor) for place in places], **style)


def _points(axis, x, y, **style):
    """Means of lists of values, joined, with bars for their 95 % intervals where several values give one."""
    if not y:
        return
    (x_means, x_halves), (y_means, y_halves) = (zip(*map(interval, lists), strict=True) for lists in (x, y))
    bars = {"xerr": x_halves, "yerr": y_halves}
    axis.errorbar(x_means, y_means, **bars, capsize=2, linewidth=1.2, markersize=5, elinewidth=0.8, **style)


def _scores(runs, factor):
    return [score(run, factor) for run in runs]


def _beside(number, of):
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
