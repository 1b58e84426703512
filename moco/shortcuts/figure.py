"""The two figures of a sweep: what is read against what is left and against IFM's factor; and its course."""

import math

from moco.plot import BLACK, BLUE, GRAY, GREEN, ORANGE, PURPLE, RED, SKY, own_style
from moco.shortcuts.report import (
    INFONCE,
    MATCH,
    accuracies,
    bases,
    differences,
    factors_of,
    interval,
    limits,
    number,
    settings_of,
    untrained,
)
from moco.trifeature import FACTORS

WIDTH = 7  # inches: letters of 8 points are readable at 700 pixels
COURSE = {
    "info_nce": "InfoNCE in training, nats",
    "ifm_factor": "IFM's factor",
    "queue_mean": "length of the queue's mean",
}
COLORS, MARKERS = (BLUE, ORANGE, RED, GREEN, PURPLE, SKY), "os^Dv*"
CHANCE = 10  # percent
TICKS = (1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100)  # of factors

# Published accuracies, in percent, of the digit in MNIST's images with so many random bits, by T (Chen, Luo &
# Li 2021, in the authors' notebook randbits_mnist.ipynb): SimCLR with batches of 1000, so 1998 negatives.
PUBLISHED_BITS, PUBLISHED_K = (0, 5, 10, 15, 20), 1998
PUBLISHED = {
    0.05: (89.9, 70.6, 33.0, 14.3, 9.9),
    0.1: (89.2, 61.2, 18.7, 9.8, 10.3),
    0.2: (90.0, 33.0, 10.4, 10.0, 9.9),
}


def figure_of(results):
    """matplotlib's Figure, a column for each of Trifeature's factors, of at least one trained run. Above:
    what is read with own bits after InfoNCE against the nats that only the picture can give, dashed with the
    bits of one image for all; below, if there are such runs: by how much IFM and its control change the
    former against IFM's factor on the gradient.
    """
    found, start = settings_of(results), untrained(results)
    colors, changed = _colors(found), any(setting.method != INFONCE for setting in found)
    with own_style() as matplotlib:
        figure = matplotlib.figure.Figure((WIDTH, 3.4 + 2.4 * changed), layout="constrained")
        axes = figure.subplots(1 + changed, len(FACTORS), squeeze=False, sharex="row", sharey="row")
        for axis, factor in zip(axes[0], FACTORS, strict=True):
            _draw_suppression(axis, found, start, factor, colors)
            axis.set_title(f"{factor}, read in %")
            axis.set_xlabel("nats left to the picture")
        for axis, factor in zip(axes[1] if changed else (), FACTORS, strict=changed):
            _draw_effects(axis, found, factor, colors)
            axis.set_title(f"{factor}, change in points")
            axis.set_xlabel("IFM's factor on the gradient")
        handles = {}
        for axis in axes[:, 0]:
            handles |= {
                label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
            }
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _draw_suppression(axis, found, start, factor, colors):
    curves = {}
    for setting, runs in found.items():
        if setting.method == INFONCE:
            own, shared = (list(accuracies(runs, each, factor).values()) for each in ("own", "shared"))
            before = list(accuracies(start.get(setting.bits, {}), "own", factor).values())
            left = next(iter(runs.values()))["left"]
            point = left, *interval(own), interval(shared)[0], interval(before)[0]
            curves.setdefault((setting.T, setting.K, setting.bits_per), []).append(point)
    sizes = sorted({K for _, K, _ in curves}, key=lambda K: (K != 1024, K))
    for (T, K, per), points in curves.items():
        left, means, halves, shared, before = zip(*sorted(points), strict=True)
        look = {"color": colors[T], "marker": MARKERS[sizes.index(K) % len(MARKERS)], "markersize": 4}
        look |= {"markerfacecolor": "white", "linestyle": ""} if per == "view" else {"linewidth": 1}
        label = f"T {number(T)}" + f", K {K}" * (K != 1024) + ", bits per view" * (per == "view")
        axis.errorbar(left, means, yerr=_bars(halves), capsize=2, label=label, **look)
        if K == 1024 and per == "image":
            axis.plot(left, shared, color=colors[T], linewidth=0.8, linestyle="--")
            axis.plot(left, before, color=colors[T], linewidth=0.8, linestyle=":")
    for label, dashes in (("one image's bits for all", "--"), ("untrained", ":")):
        axis.plot([], [], color=GRAY, linewidth=0.8, linestyle=dashes, label=label)
    axis.axhline(CHANCE, color=BLACK, linewidth=0.5, label="chance")
    if factor == "shape":
        for T, percents in PUBLISHED.items():
            left = [limits(T, PUBLISHED_K, bits)["left"] for bits in PUBLISHED_BITS]
            axis.plot(left, percents, "x", color=GRAY, markersize=4, label="published: MNIST's digits")
    axis.set_ylim(0, 105)


def _draw_effects(axis, found, factor, colors):
    for setting, runs in found.items():
        if setting.method == INFONCE:
            continue
        changes = differences(runs, found.get(bases(setting)["InfoNCE"], {}), "own", factor)
        if not changes:
            continue
        mean, half = interval(changes)
        is_control = setting.method.startswith(MATCH)
        look = {"color": colors[setting.T], "markersize": 4, "linewidth": 1}
        look |= {"marker": "s" if setting.method.endswith("only") else "o"}
        look |= {"markerfacecolor": "white"} if is_control else {}
        at = interval(factors_of(runs))[0]
        axis.errorbar([at], [mean], yerr=_bars([half]), capsize=2, linestyle="", **look)
    for name, marker, face in (("ifm", "o", GRAY), ("ifm_only", "s", GRAY), ("control", "o", "white")):
        axis.plot([], [], linestyle="", marker=marker, color=GRAY, markerfacecolor=face, label=name)
    axis.axhline(0, color=BLACK, linewidth=0.8)
    _show_factors(axis, "x")


def course_figure(results):
    """matplotlib's Figure: loss, IFM's factor and the length of the queue's mean over each run's epochs."""
    found = settings_of(results)
    colors = _colors(found)
    with own_style() as matplotlib:
        figure = matplotlib.figure.Figure((WIDTH, 2.8), layout="constrained")
        for axis, (name, title) in zip(figure.subplots(1, len(COURSE)), COURSE.items(), strict=True):
            for setting, runs in found.items():
                look = {"color": colors[setting.T], "linewidth": 0.6, "alpha": 0.6}
                look["linestyle"] = "--" if setting.method.startswith(MATCH) else "-"
                for run in runs.values():
                    values = run["course"].get(name, [])
                    axis.plot(range(1, len(values) + 1), values, **look)
            axis.set_title(title)
            axis.set_xlabel("epochs")
            if name == "ifm_factor":
                _show_factors(axis, "y")
        lines = {f"T {number(T)}": {"color": color} for T, color in colors.items()}
        lines["control"] = {"color": GRAY, "linestyle": "--"}
        lines = [matplotlib.lines.Line2D([], [], label=label, **look) for label, look in lines.items()]
        figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), frameon=False)
    return figure


def _show_factors(axis, which):
    """Make an axis ("x" or "y") logarithmic, from at most 1 to at least 1.2, with the TICKS in between."""
    axis.set(**{f"{which}scale": "log"})
    low, high = getattr(axis, f"get_{which}lim")()
    low, high = min(low, 1), max(high, 1.2)
    axis.minorticks_off()
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axis.set(**{f"{which}lim": (low, high), f"{which}ticks": ticks})
    getattr(axis, f"{which}axis").set_major_formatter("{x:g}")


def _colors(found):
    temperatures = sorted({setting.T for setting in found})
    return {T: COLORS[n % len(COLORS)] for n, T in enumerate(temperatures)}


def _bars(halves):
    """Lengths of error bars; a single run has none."""
    return [0 if math.isnan(half) else half for half in halves]
