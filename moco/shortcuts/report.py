"""What runs come to: the limits of their losses, means over seeds, differences by seed, and the table."""

import math
from typing import NamedTuple

from moco.shortcuts.measure import READINGS
from moco.trifeature import FACTORS

INFONCE, MATCH = "infonce", "match_"  # a method, and the start of the names of the controls of the others
LEARNED = 1.0  # nats by which the wrong bits must raise the loss: else a run has not learned the bits
INTRO = """\
Linear accuracy in percent of held-out images (chance 10), mean over seeds ± half of the 95 % t interval.
Seeds decide weights, order, views and random bits; the pictures are the same for all. `bits alone`: the
lowest loss by the bits, in nats; `all`: by everything; `left`: their difference; `loss`: the InfoNCE reached;
`w` and `factor`: the mean of IFM's weights and its factor on the gradient in the last epoch, of a control
those that IFM would have."""
TITLES = {
    "own": "Read with the random bits that each image has:",
    "shared": "The same encoders read from images that all have the bits of the first training image:",
    "redrawn": "The same encoders read with bits that are drawn anew for each image:",
}
LIMITS = ("bits alone", "all", "left")  # of the losses
DIFFERENCES = "Differences with the same seed, in points:"

# Student's t below which 97.5 % lie, for 1 to 30 degrees of freedom; beyond, the last is a little too wide.
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788)
T_975 += (2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639)
T_975 += (2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423)


class Setting(NamedTuple):
    """What differs between runs, but for the seed."""

    T: float
    K: int
    bits: int
    bits_per: str
    method: str
    epsilon: float


def limits(T, K, bits, bits_per="image"):
    """The lowest losses in nats, as {"L_shortcut", "L_all", "left"}: of random bits alone, of everything
    together, and their difference, which only the picture can still give.

    Of K negatives a share 2^-bits has the query's bits and its cosine 1. All others are taken at cosine 0,
    which more codes than dimensions do not reach. Bits that change from view to view tell nothing.
    """
    same = 2.0**-bits if bits_per == "image" else 1.0
    shortcut = math.log(1 + K * same + K * (1 - same) * math.exp(-1 / T))
    everything = math.log(1 + K * math.exp(-1 / T))
    return {"L_shortcut": shortcut, "L_all": everything, "left": shortcut - everything}


def learned(run):
    """Whether a run has learned its random bits: the loss with those of another image is LEARNED higher."""
    if not run["bits"] or run["bits_per"] == "view":
        return True
    return run["loss"]["mismatched"] - run["loss"]["matched"] >= LEARNED


def settings_of(results):
    """{Setting: {seed: run}} of the trained runs that ended well and have learned their bits, sorted."""
    found = {}
    for run in results:
        if run["trained"] and not run.get("diverged") and learned(run):
            setting = Setting(*(run[name] for name in Setting._fields))
            found.setdefault(setting, {})[run["seed"]] = run
    return dict(sorted(found.items()))


def untrained(results):
    """{bits: {seed: run}} of the networks before training, sorted."""
    found = {}
    for run in results:
        if not run["trained"] and not run.get("diverged"):
            found.setdefault(run["bits"], {})[run["seed"]] = run
    return dict(sorted(found.items()))


def bases(setting):
    """What the runs of a setting are compared with: {words: Setting}."""
    if setting.method == INFONCE:
        return {}
    found = {"InfoNCE": setting._replace(method=INFONCE, epsilon=0.0)}
    if not setting.method.startswith(MATCH):
        found["its control"] = setting._replace(method=f"{MATCH}{setting.method}")
    return found


def accuracies(runs, reading, factor):
    """{seed: percent} of {seed: run}. Runs without random bits have one reading, which is all of them."""
    readouts = {seed: run["readout"] for seed, run in runs.items()}
    return {seed: each.get(reading, each["own"])[factor]["accuracy"] for seed, each in readouts.items()}


def differences(runs, base, reading, factor):
    """[accuracy of a run - that of the run of `base` with the same seed], of the seeds that both have."""
    one, two = (accuracies(those, reading, factor) for those in (runs, base))
    return [one[seed] - two[seed] for seed in one if seed in two]


def factors_of(runs, name="ifm_factor"):
    """IFM's factor on the gradient, or the mean of its weights by the name "ifm_weight", in the last epoch of
    each run of {seed: run}; 1 for InfoNCE.
    """
    return [1.0 if run["method"] == INFONCE else run["course"][name][-1] for run in runs.values()]


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
    mean, half = interval(list(values))
    if math.isnan(mean):
        return ""
    text = f"{round(mean, digits) + 0.0:{sign}.{digits}f}"  # -0.0 + 0.0 is 0.0
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def table(results):
    """Markdown, for each reading: values of each setting beside the untrained network's, and differences."""
    found, start, lines = settings_of(results), untrained(results), [INTRO]
    for reading in READINGS:
        if not any(reading in run.get("readout", {}) for run in results):
            continue
        lines += ["", TITLES[reading], "", *_head("seeds", *LIMITS, "loss", "w", "factor", *FACTORS)]
        for bits, runs in start.items():
            percents = (cell(accuracies(runs, reading, factor).values()) for factor in FACTORS)
            lines.append(_row("", "", bits, "untrained", "", len(runs), *[""] * 6, *percents))
        for setting, runs in found.items():
            percents = (cell(accuracies(runs, reading, factor).values()) for factor in FACTORS)
            lowest = limits(setting.T, setting.K, setting.bits, setting.bits_per).values()
            loss = cell((run["loss"]["matched"] for run in runs.values()), 3)
            w, factor = (cell(factors_of(runs, name), 3) for name in ("ifm_weight", "ifm_factor"))
            numbers = (f"{value:.2f}" for value in lowest)
            lines.append(_row(*_words(setting), len(runs), *numbers, loss, w, factor, *percents))
        changes = []
        for setting, runs in found.items():
            for words, base in bases(setting).items():
                columns = [differences(runs, found.get(base, {}), reading, factor) for factor in FACTORS]
                if columns[0]:
                    cells = (cell(column, sign="+") for column in columns)
                    changes.append(_row(*_words(setting), len(columns[0]), words, *cells))
        if changes:
            lines += ["", DIFFERENCES, "", *_head("seeds", "less", *FACTORS), *changes]
    trained = [run for run in results if run["trained"]]
    diverged = [run["name"] for run in results if run.get("diverged")]
    unlearned = [run["name"] for run in trained if not run.get("diverged") and not learned(run)]
    lines += ["", f"Diverged and left out: {', '.join(diverged)}"] if diverged else []
    if unlearned:
        lines += [
            "",
            f"Left out, as the bits were not learned (less than {LEARNED:g} nat): {', '.join(unlearned)}",
        ]
    return "\n".join(lines) + "\n"


def _words(setting):
    T, K, bits, per, method, epsilon = setting
    return number(T), K, f"{bits} per view" if per == "view" else bits, method, number(epsilon)


def _head(*columns):
    names = ["T", "K", "bits", "method", "epsilon", *columns]
    return [_row(*names), _row(*["---"] * len(names))]


def _row(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def number(value):
    """All digits of a number, so that no two are the same, and 0 as 0.0 is."""
    return repr(float(value)).removesuffix(".0")
