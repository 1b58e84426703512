"""The table and the figure of a sweep: means over seeds and differences by seed, with 95 % t intervals."""

import math

from moco.plot import GRAY, PALETTE, WIDTH, own_style

READINGS = {
    "readout": "Read with the random bits that each image has:",
    "readout_shared_bits": "The same encoders read from images that all have the random bits of the first\n"
    "training image: what is kept of the pictures where bits do not tell images apart.",
}
TITLES = dict(zip(READINGS, ("own bits", "shared bits"), strict=True))  # of panels
INTRO = """\
Linear readout in percent of held-out images, mean over seeds ± half of the 95 % t interval (seeds decide
weights, order, views and random bits; images are the same for all). Training loss: of the last epoch, in
nats; it compares within one T, method and epsilon."""
DIFFERENCE = "Difference to epsilon 0 (of epsilon 0: to the untrained encoder) with the same seed, in points:"

# Student's t below which 97.5 % lie, for 1 to 30 degrees of freedom; beyond, the last is a little too wide.
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788)
T_975 += (2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639)
T_975 += (2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423)


def interval(values):
    """(mean, half the width of its 95 % t interval) of independent values; without two the half is nan."""
    n = len(values)
    mean = math.fsum(values) / n if n else math.nan
    if n < 2:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, T_975[min(n - 1, len(T_975)) - 1] * math.sqrt(variance / n)


def cell(values, digits=1, sign=""):
    """A mean with its interval as text, or alone where one value gives none, or nothing."""
    mean, half = interval(values)
    if math.isnan(mean):
        return ""
    text = f"{mean:{sign}.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def rows(results):
    """{(T, bits, method, epsilon): {seed: run}} of the trained runs that did not diverge, sorted.

    method is "" for epsilon 0.
    """
    found = {}
    for run in results:
        if run["trained"] and not run.get("diverged"):
            method = run["method"] if run["epsilon"] else ""
            key = run["T"], run["bits"], method, run["epsilon"]
            found.setdefault(key, {})[run["seed"]] = run
    return dict(sorted(found.items()))


def untrained(results):
    """{bits: {seed: run}} of the encoders before training, sorted."""
    found = {}
    for run in results:
        if not run["trained"]:
            found.setdefault(run["bits"], {})[run["seed"]] = run
    return dict(sorted(found.items()))


def accuracies(runs, reading, factor):
    """{seed: percent} of {seed: run}. Runs without random bits have one reading, which is both."""
    return {seed: run.get(reading, run["readout"])[factor]["accuracy"] for seed, run in runs.items()}


def differences(runs, base, reading, factor):
    """[accuracy of a run - that of the run of `base` with the same seed], of the seeds that both have."""
    one, two = (accuracies(those, reading, factor) for those in (runs, base))
    return [one[seed] - two[seed] for seed in one if seed in two]


def table(results):
    """Markdown, for each reading: values of each setting beside the untrained encoder's, and differences with
    the same seed.
    """
    found, start = rows(results), untrained(results)
    readout = next(run["readout"] for run in results if "readout" in run)
    lines = [INTRO]
    for reading, title in READINGS.items():
        if not any(reading in run for run in results):
            continue
        lines += ["", title, "", *_head(["training loss", *readout])]
        lines += [_row(["chance", *[""] * 5, *(f"{one['chance']:.1f}" for one in readout.values())])]
        lines += [_row(["untrained", b, "", "", *_values(start[b], reading, readout)]) for b in start]
        lines += [_row([*key, *_values(runs, reading, readout)]) for key, runs in found.items()]
        changes = []
        for key, runs in found.items():
            T, bits, _, epsilon = key
            base = found.get((T, bits, "", 0), {}) if epsilon else start.get(bits, {})
            columns = [differences(runs, base, reading, factor) for factor in readout]
            if columns[0]:
                changes.append(_row([*key, len(columns[0]), *(cell(column, sign="+") for column in columns)]))
        if changes:
            lines += ["", DIFFERENCE, "", *_head(readout), *changes]
    diverged = [run["name"] for run in results if run.get("diverged")]
    lines += ["", f"Diverged and left out: {', '.join(diverged)}"] if diverged else []
    return "\n".join(lines) + "\n"


def _values(runs, reading, factors):
    losses = [run["losses"]["training"] for run in runs.values() if "losses" in run]
    columns = [list(accuracies(runs, reading, factor).values()) for factor in factors]
    return [len(runs), cell(losses, 3), *map(cell, columns)]


def _head(columns):
    names = ["T", "bits", "method", "epsilon", "seeds", *columns]
    return [_row(names), _row(["---"] * len(names))]


def _row(cells):
    return f"| {' | '.join(map(number, cells))} |"


def number(value):
    """All digits of a number, so that no two are the same, and 0 as 0.0 is; a word as it is."""
    return value if isinstance(value, str) else repr(float(value)).removesuffix(".0")


def figure_of(results):
    """matplotlib's Figure: readouts against random bits, a row of panels for each T and reading, a panel for
    each factor. At least one trained run must have a readout.
    """
    found, start = rows(results), untrained(results)
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
                values = {b: accuracies(start.get(b, {}), reading, factor) for b in bits}
                _curve(axis, values, color=GRAY, linestyle=":", marker=".", label="untrained")
                for index, loss in enumerate(losses):
                    shift = 0.1 * (index - (len(losses) - 1) / 2)  # so that no interval hides another
                    values = {
                        b + shift: accuracies(found.get((T, b, *loss), {}), reading, factor) for b in bits
                    }
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


def _curve(axis, values, **style):
    """Means of {x: {seed: value}} with bars for their 95 % t intervals; a single run has no bar."""
    places = [x for x in sorted(values) if values[x]]
    means, halves = zip(*(interval(values[x].values()) for x in places), strict=True) if places else ((), ())
    bars = [0 if math.isnan(half) else half for half in halves]
    axis.errorbar(places, means, yerr=bars, capsize=2, linewidth=1.2, markersize=4, **style)
