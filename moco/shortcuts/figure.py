"""The two figures of a sweep: readouts against what is left and against IFM's factor; and its course."""

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

WIDTH = 7  # inches: letters of 8 points are readable at 700 pixels
COURSE = {
    "info_nce": "InfoNCE, nats",
    "ifm_factor": "IFM's factor",
    "queue_mean": "|queue's mean|",
}
COLORS, MARKERS = (BLUE, ORANGE, RED, GREEN, PURPLE, SKY), "os^Dv*"
CHANCE, USUAL_K = 10, 1024  # percent; the size of the queue that labels do not name
TICKS = (1, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100)  # of factors

# Published accuracies, in percent, of the digit in MNIST's images with so many random bits, by T (Chen, Luo &
# Li 2021, in the authors' notebook randbits_mnist.ipynb): SimCLR with batches of 1000, so 1998 negatives.
PUBLISHED_BITS, PUBLISHED_K = (0, 5, 10, 15, 20), 1998
PUBLISHED = {
    0.05: (89.9, 70.6, 33.0, 14.3, 9.9),
    0.1: (89.2, 61.2, 18.7, 9.8, 10.3),
    0.2: (90.0, 33.0, 10.4, 10.0, 9.9),
}


def figure_of(results):
    """matplotlib's Figure of at least one trained run. Above: the linear accuracy on shape and color with own
    bits after InfoNCE, of shape against the nats that only the picture can give and against their share of
    those without bits, of color against that share; dashed with the bits of one image for all. Below, if
    there are such runs: how IFM changes that on shape, less InfoNCE and less its control, against IFM's
    factor on the gradient, a panel for each number of bits.
    """
    found, start = settings_of(results), untrained(results)
    looks, of_ifm = _looks(found), {each: found[each] for each in found if len(bases(each)) == 2}
    with own_style() as matplotlib:
        figure = matplotlib.figure.Figure((WIDTH, 3.6 + 2.4 * bool(of_ifm)), layout="constrained")
        parts = figure.subfigures(1 + bool(of_ifm), 1, squeeze=False)[:, 0]
        axes = parts[0].subplots(1, 3)
        places = (("shape", False), ("shape", True), ("color", True))
        for axis, (factor, as_share) in zip(axes, places, strict=True):
            _draw_suppression(axis, found, start, factor, as_share, looks)
            axis.set_title(f"{factor}: linear accuracy, %")
            axis.set_xlabel("nats left / without bits" if as_share else "nats left to the picture")
        handles, labels = axes[0].get_legend_handles_labels()
        lines = sorted(zip(labels, handles, strict=True), key=lambda each: not each[0].startswith("T "))
        if of_ifm:
            every = sorted({setting.bits for setting in of_ifm})
            below = parts[1].subplots(1, len(every), squeeze=False, sharey=True)[0]
            for axis, bits in zip(below, every, strict=True):
                mine = {setting: runs for setting, runs in of_ifm.items() if setting.bits == bits}
                _draw_effects(axis, mine, found, looks)
                axis.set_title(f"shape at {bits} bits: change by IFM, points")
                axis.set_xlabel("IFM's factor, last epoch")
            handles, labels = below[0].get_legend_handles_labels()
            lines += zip(labels, handles, strict=True)
        labels, handles = zip(*lines, strict=True)
        parts[0].legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _draw_suppression(axis, found, start, factor, as_share, looks):
    curves = {}
    for setting, runs in found.items():
        if setting.method == INFONCE:
            own, shared = (list(accuracies(runs, each, factor).values()) for each in ("own", "shared"))
            before = list(accuracies(start.get(setting.bits, {}), "own", factor).values())
            at = _left(setting.T, setting.K, setting.bits, as_share, setting.bits_per)
            point = at, *interval(own), interval(shared)[0], interval(before)[0]
            curves.setdefault((setting.T, setting.K, setting.bits_per), []).append(point)
    for (T, K, per), points in curves.items():
        at, means, halves, shared, before = zip(*sorted(points), strict=True)
        look = looks[T, K] | {"markersize": 4}
        label = _name(T, K) + ", bits per view" * (per == "view")
        view = {"markerfacecolor": "white", "linestyle": ""} if per == "view" else {"linewidth": 1}
        axis.errorbar(at, means, yerr=_bars(halves), capsize=2, label=label, **look | view)
        if per == "image":
            axis.plot(at, shared, color=look["color"], linewidth=0.8, linestyle="--")
            axis.plot(at, before, color=look["color"], linewidth=0.8, linestyle=":")
    for label, dashes in (("one image's bits for all", "--"), ("untrained, own bits", ":")):
        axis.plot([], [], color=GRAY, linewidth=0.8, linestyle=dashes, label=label)
    axis.axhline(CHANCE, color=BLACK, linewidth=0.5, label="chance")
    if factor == "shape":
        for T, percents in PUBLISHED.items():
            at = [_left(T, PUBLISHED_K, bits, as_share) for bits in PUBLISHED_BITS]
            color = next((look["color"] for (other, _), look in looks.items() if other == T), GRAY)
            axis.plot(at, percents, "x", color=color, markersize=4)
        axis.plot([], [], "x", color=GRAY, markersize=4, label="MNIST's digits, published")
    axis.set_ylim(0, 105)


def _left(T, K, bits, as_share, bits_per="image"):
    left = limits(T, K, bits, bits_per)["left"]
    return left / limits(T, K, 0)["left"] if as_share else left


def _draw_effects(axis, of_ifm, found, looks):
    for setting, runs in of_ifm.items():
        at = interval(factors_of(runs))[0]
        look = looks[setting.T, setting.K] | {"markersize": 4, "linewidth": 0.8, "linestyle": ""}
        for base, face in zip(bases(setting).values(), ({}, {"markerfacecolor": "white"}), strict=True):
            if changes := differences(runs, found.get(base, {}), "own", "shape"):
                mean, half = interval(changes)
                axis.errorbar([at], [mean], yerr=_bars([half]), capsize=2, **look | face)
                at *= 1.01  # beside it
    for label, face in (("IFM - InfoNCE", GRAY), ("IFM - its control", "white")):
        look = {"color": GRAY, "marker": "o", "markersize": 4, "markerfacecolor": face}
        axis.plot([], [], linestyle="", label=label, **look)
    axis.axhline(0, color=BLACK, linewidth=0.8)
    _show_factors(axis, "x")


def course_figure(results):
    """matplotlib's Figure: InfoNCE, IFM's factor and the length of the queue's mean over the epochs, means
    over seeds, in a row for each number of bits with IFM, and for the lowest and the highest number.
    """
    found = {setting: runs for setting, runs in settings_of(results).items() if setting.bits_per == "image"}
    looks, every = _looks(found), sorted({setting.bits for setting in found})
    changed = {setting.bits for setting in found if setting.method != INFONCE}
    rows = sorted({every[0], every[-1], *changed})
    with own_style() as matplotlib:
        figure = matplotlib.figure.Figure((WIDTH, 0.6 + 1.7 * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), len(COURSE), squeeze=False, sharex=True, sharey="col")
        for row, bits in zip(axes, rows, strict=True):
            for axis, (name, title) in zip(row, COURSE.items(), strict=True):
                for setting, runs in found.items():
                    courses = [run["course"][name] for run in runs.values() if name in run["course"]]
                    if setting.bits == bits and courses:
                        means = [interval(values)[0] for values in zip(*courses, strict=True)]
                        style, look = _line(setting.method), looks[setting.T, setting.K]
                        axis.plot(range(1, len(means) + 1), means, style, color=look["color"], linewidth=0.8)
                axis.set_title(f"{bits} bits: {title}")
                axis.set_visible(bool(axis.lines))
        for name, column in zip(COURSE, axes.T, strict=True):
            drawn = [axis for axis in column if axis.get_visible()]
            if name == "ifm_factor" and drawn:
                _show_factors(drawn[0], "y")
            for axis in drawn[-1:]:
                axis.set_xlabel("epochs")
                axis.tick_params(labelbottom=True)
        lines = {_name(T, K): {"color": look["color"]} for (T, K), look in looks.items()}
        styles = {"InfoNCE": INFONCE, "IFM": "ifm", "its control": f"{MATCH}ifm"}
        lines |= {name: {"color": GRAY, "linestyle": _line(method)} for name, method in styles.items()}
        lines = [matplotlib.lines.Line2D([], [], label=label, **look) for label, look in lines.items()]
        figure.legend(handles=lines, loc="outside upper center", ncols=4, frameon=False)
    return figure


def _line(method):
    return "-" if method == INFONCE else ":" if method.startswith(MATCH) else "--"


def _name(T, K):
    return f"T {number(T)}" + f", K {K}" * (K != USUAL_K)


def _looks(found):
    """{(T, K): its color and marker}, the usual K first."""
    places = sorted(
        {(setting.T, setting.K) for setting in found}, key=lambda place: (place[1] != USUAL_K, place)
    )
    return {
        place: {"color": COLORS[n % len(COLORS)], "marker": MARKERS[n % len(MARKERS)]}
        for n, place in enumerate(places)
    }


def _show_factors(axis, which):
    """Make an axis ("x" or "y") logarithmic, from at most 1 to at least 1.2, with the TICKS in between."""
    axis.set(**{f"{which}scale": "log"})
    low, high = getattr(axis, f"get_{which}lim")()
    low, high = min(low, 1), max(high, 1.2)
    axis.minorticks_off()
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axis.set(**{f"{which}lim": (low, high), f"{which}ticks": ticks})
    getattr(axis, f"{which}axis").set_major_formatter("{x:g}")


def _bars(halves):
    """Lengths of error bars; a single run has none."""
    return [0 if math.isnan(half) else half for half in halves]
