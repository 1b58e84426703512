"""The figure of a sweep: readouts against the number of random bits, for every reading, T and loss."""

import math

from moco.plot import GRAY, PALETTE, WIDTH, own_style, save_picture
from moco.shortcuts.report import READINGS, interval, number, rows, scores, untrained

TITLES = dict(zip(READINGS, ("own bits", "shared bits"), strict=True))


def draw(results, path):
    """Write a picture of the results, of which at least one trained run has a readout, to `path`. UserError
    without matplotlib.
    """
    save_picture(figure_of(results), path)


def figure_of(results):
    """matplotlib's Figure: a row of panels for each T and reading, a panel for each factor."""
    found = rows(results)
    factors = list(next(iter(next(iter(found.values())).values()))["readout"])
    readings = [reading for reading in READINGS if any(reading in run for run in results)]
    lines = [(T, reading) for T in dict.fromkeys(key[0] for key in found) for reading in readings]
    losses = list(dict.fromkeys(key[2:] for key in found))
    bits = sorted({key[1] for key in found})
    with own_style() as matplotlib:
        size = (WIDTH, 0.8 + 2.3 * len(lines))
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(lines), len(factors), squeeze=False, sharex=True)
        for row, (T, reading) in zip(axes, lines, strict=True):
            for axis, factor in zip(row, factors, strict=True):
                start = {b: _values(untrained(results, b), reading, factor) for b in bits}
                _curve(axis, start, color=GRAY, linestyle=":", marker=".", label="untrained")
                for index, loss in enumerate(losses):
                    shift = 0.1 * (index - (len(losses) - 1) / 2)  # so that no interval hides another
                    values = {b + shift: _values(found.get((T, b, *loss), {}), reading, factor) for b in bits}
                    label = f"{loss[0]}, epsilon {number(loss[1])}" if loss[0] else "InfoNCE"
                    _curve(axis, values, color=PALETTE[index % len(PALETTE)], marker="o", label=label)
                axis.set_title(f"{factor}, {TITLES[reading]}, T {number(T)}")
                axis.set_xticks(bits)
        for axis in axes[-1]:
            axis.set_xlabel("random bits")
        for axis in axes[:, 0]:
            axis.set_ylabel("linear readout, %")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)), frameon=False)
    return figure


def _values(runs, reading, factor):
    return [scores(run, reading)[factor] for run in runs.values() if factor in run["readout"]]


def _curve(axis, values, **style):
    """Means of {x: values} with bars for their 95 % t intervals; a single run has no bar."""
    places = [x for x in sorted(values) if values[x]]
    means, halves = zip(*(interval(values[x]) for x in places), strict=True) if places else ((), ())
    bars = [0 if math.isnan(half) else half for half in halves]
    axis.errorbar(places, means, yerr=bars, capsize=2, linewidth=1.2, markersize=4, **style)
