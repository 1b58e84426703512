"""The picture of moco.shortcuts_compare: readouts of two sweeps and of untrained encoders against epsilon."""

import math
from itertools import product

from moco.intervals import interval
from moco.pictures import BLUE, RED, WIDTH, literal, own_style
from moco.shortcuts_figure import aside, curve, within_percent
from moco.shortcuts_results import WORST, number, rows, score, sound, untrained

LOOKS = (
    {"color": BLUE, "marker": "o"},
    {"color": RED, "marker": "s"},
)
NOTE = (
    "Percent of held-out images. Bars and bands: 95 % t intervals over seeds; hollow: of one run, which has\n"
    "none. Epsilon: evenly spaced."
)


def figure_of(names, results, columns, how=None):
    """matplotlib's Figure of two sweeps of these names: a panel for each factor, recipe, T and random bits.

    results: (of the first, of the second), lists of runs, of which some settings are in both. how: the way
    in which encoders were read, if it is a second one.
    """
    diverged = sum(result.get("diverged", False) for of_sweep in results for result in of_sweep)
    found = [{key: sound(runs) for key, runs in rows(of_sweep).items()} for of_sweep in results]
    shared = [key for key in found[0] if key in found[1] or (*key[:3], 0.0) in found[1]]
    recipes, temperatures, bits = (sorted({key[n] for key in shared}) for n in range(3))
    lines = list(product(recipes, (column for column in columns if column != WORST)))
    places = list(product(temperatures, bits))
    with own_style() as matplotlib:
        size = WIDTH, 1.1 + 2.3 * len(lines)
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(lines), len(places), squeeze=False, sharex=True, sharey="row")
        for (recipe, factor), row in zip(lines, axes, strict=True):
            for (T, count), axis in zip(places, row, strict=True):
                _panel(axis, names, found, untrained(results[0], count), (recipe, T, count), factor)
                of_bits = f", {count} random bits" if bits != [0] else ""
                axis.set_title(f"{recipe}, T {number(T)}{of_bits}")
            row[0].set_ylabel(f"{factor}, %")
        for axis in axes[-1]:
            axis.set_xlabel("epsilon")
        figure.align_ylabels(axes[:, 0])
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
        note = (
            NOTE
            + f" Read with {how}." * bool(how)
            + f" Runs that diverged, left out: {diverged}." * bool(diverged)
        )
        figure.supxlabel(note, fontsize="small", x=0.01, ha="left")
    return figure


def _panel(axis, names, found, starts, place, factor):
    """The curves of both sweeps in one setting, over the level of the untrained encoders `starts`."""
    of_place = [{key[3]: runs for key, runs in keys.items() if key[:3] == place} for keys in found]
    epsilons = sorted(of_place[0].keys() | of_place[1].keys())
    for n, (name, runs, looks) in enumerate(zip(names, of_place, LOOKS, strict=True)):
        values = {
            epsilons.index(e): [score(run, factor) for run in by_seed.values()] for e, by_seed in runs.items()
        }
        curve(axis, values, aside(n, len(names)), label=literal(name), **looks)
    plain = [score(run, factor) for run in of_place[1].get(0, {}).values()]
    for values, color, style, label in (
        (plain, RED, "--", literal(f"{names[1]}, epsilon 0")),
        ([score(run, factor) for run in starts], "gray", ":", "untrained"),
    ):
        mean, half = interval(values)
        if not math.isnan(mean):
            axis.axhline(mean, color=color, linestyle=style, linewidth=1, label=label)
        if not math.isnan(half):
            axis.axhspan(mean - half, mean + half, color=color, alpha=0.12, linewidth=0)
    axis.set_xticks(range(len(epsilons)), [number(epsilon) for epsilon in epsilons])
    axis.set_xlim(-0.5, len(epsilons) - 0.5)
    within_percent(axis)
