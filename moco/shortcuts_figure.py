"""The figure of a sweep of moco.shortcuts: readouts against InfoNCE's loss, T and epsilon, or random bits."""

from moco.errors import UserError
from moco.intervals import interval
from moco.shortcuts_report import factors_in, rows, score, sound, untrained

MARKERS = "os^Dv<>P"


def draw(kind, results, path):
    """Write a PNG, 1000 pixels wide, to `path`. Raises UserError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the figure needs matplotlib: `pip install matplotlib`") from error
    found = {key: good for key, runs in rows(results).items() if (good := list(sound(runs).values()))}
    factors = factors_in(results)
    panels = _against_bits if kind == "randbit" else _against_all
    lines = _lines_of(kind, found, factors)
    columns = len(factors) if kind == "randbit" else 3
    figure = Figure(figsize=(10, 0.9 + 2.3 * len(lines)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(lines), columns, squeeze=False, sharey="row" if kind != "randbit" else False)
    for row, line in zip(axes, lines, strict=True):
        panels(row, line, found, factors, results)
    for axis in axes.flat:  # an interval of two seeds can be wider than what is possible
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, -2), min(high, 102))
    handles, labels = _entries(axes)
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 5), frameon=False)
    figure.savefig(path, format="png")


def _lines_of(kind, found, factors):
    recipes = list(dict.fromkeys(key[0] for key in found))
    if kind == "randbit":
        return [(recipe, T) for recipe, T in dict.fromkeys(key[:2] for key in found)]
    return [(recipe, factor) for recipe in recipes for factor in factors]


def _against_all(row, line, found, factors, results):
    """A factor under a recipe against loss, T and epsilon."""
    recipe, factor = line
    mine = {key: runs for key, runs in found.items() if key[0] == recipe}
    epsilons, temperatures = (sorted({key[i] for key in found}) for i in (3, 1))
    for e, epsilon in enumerate(epsilons):
        for t, T in enumerate(temperatures):
            runs = [run for key, runs in mine.items() if (key[1], key[3]) == (T, epsilon) for run in runs]
            x = [run["losses"]["info_nce"] for run in runs]
            _points(row[0], [x], [_scores(runs, factor)], color=_color(e), marker=MARKERS[t % len(MARKERS)])
        chosen = [(key[1], runs) for key, runs in mine.items() if key[3] == epsilon]
        _curve(row[1], chosen, factor, label=f"epsilon {epsilon:g}", color=_color(e), marker=".")
    for t, T in enumerate(temperatures):
        chosen = [(key[3], runs) for key, runs in mine.items() if key[1] == T]
        marker = MARKERS[t % len(MARKERS)]
        _curve(
            row[2],
            chosen,
            factor,
            label=f"T {T:g}",
            color=f"{0.65 * t / len(temperatures):.2f}",
            marker=marker,
        )
    level, _ = interval([score(run, factor) for run in untrained(results)])
    for axis, label in zip(row, ("InfoNCE loss", "T", "epsilon"), strict=True):
        axis.axhline(level, color="gray", linestyle=":", label="untrained")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    row[0].set_ylabel(f"{factor}, % ({recipe})")


def _against_bits(row, line, found, factors, results):
    """All factors under a recipe and a temperature, each against the number of bits."""
    recipe, T = line
    epsilons = sorted({key[3] for key in found})
    for axis, factor in zip(row, factors, strict=True):
        for e, epsilon in enumerate(epsilons):
            chosen = [(k[2], runs) for k, runs in found.items() if (k[0], k[1], k[3]) == (*line, epsilon)]
            _curve(axis, chosen, factor, label=f"epsilon {epsilon:g}", color=_color(e), marker="o")
        bits = sorted({run["bits"] for run in untrained(results)})
        levels = [interval([score(run, factor) for run in untrained(results, b)])[0] for b in bits]
        axis.plot(bits, levels, color="gray", linestyle=":", label="untrained")
        axis.set_xlabel("random bits")
        axis.set_ylabel(f"{factor}, %")
        axis.set_title(f"{recipe}, T {T:g}", fontsize="medium")
        axis.grid(alpha=0.3)


def _curve(axis, chosen, factor, **style):
    """A line through (x, runs)."""
    chosen = sorted(chosen, key=lambda pair: pair[0])
    _points(axis, [[x] for x, _ in chosen], [_scores(runs, factor) for _, runs in chosen], **style)


def _points(axis, x, y, **style):
    """Means of lists of values, joined, with bars for their 95 % intervals where several values give one."""
    (x_means, x_halves), (y_means, y_halves) = (
        zip(*map(interval, lists), strict=True) if lists and all(lists) else ((), ()) for lists in (x, y)
    )
    bars = {"xerr": x_halves, "yerr": y_halves}
    axis.errorbar(x_means, y_means, **bars, capsize=2, linewidth=1.2, markersize=5, elinewidth=0.8, **style)


def _scores(runs, factor):
    return [score(run, factor) for run in runs]


def _color(number):
    return f"C{number % 10}"


def _entries(axes):
    """The legend's handles and labels, each label once."""
    found = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)
