"""The tables of a sweep: means over seeds and differences paired by seed, with 95 % t intervals."""

import math

READINGS = {
    "readout": "Read with the random bits that each image has:",
    "readout_shared_bits": "The same encoders read from images that all have the random bits of the first\n"
    "training image: what is kept of the pictures where bits do not tell images apart.",
}
LOSS = "InfoNCE"
INTRO = """\
Linear readout in percent of held-out images, mean over seeds ± half of the 95 % t interval (seeds decide
weights, order, views and random bits; images are the same for all). InfoNCE: the plain loss in nats after
training; it compares within one T."""

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
    """A mean with its interval, or alone where one value gives none, or nothing."""
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


def untrained(results, bits):
    """{seed: run} of the encoders before training."""
    return {run["seed"]: run for run in results if not run["trained"] and run["bits"] == bits}


def scores(run, reading):
    """What was measured: {LOSS: nats, factor: percent}. A run without random bits has one reading, which is
    both.
    """
    loss = {LOSS: run["losses"]["info_nce"]} if "losses" in run else {}
    readouts = run.get(reading, run["readout"])
    return loss | {factor: readout["accuracy"] for factor, readout in readouts.items()}


def differences(runs, base, reading):
    """{column: [difference to the run of `base` with the same seed]} of the seeds that both have."""
    pairs = [(scores(runs[s], reading), scores(base[s], reading)) for s in sorted(runs.keys() & base.keys())]
    return (
        {column: [one[column] - two[column] for one, two in pairs] for column in pairs[0][1]} if pairs else {}
    )


def table(results):
    """Markdown, for each reading: values of each setting beside the untrained encoder, differences to
    epsilon 0 with the same seed, and what training with epsilon 0 changed.
    """
    lines, found = [INTRO], rows(results)
    factors = list(next((run["readout"] for run in results if "readout" in run), ()))
    for reading, title in READINGS.items():
        if not any(reading in run for run in results):
            continue
        lines += ["", title, "", *_head(factors), *_values(results, found, reading, factors)]
        for title, base_of in (
            ("Difference to epsilon 0 with the same seed, in nats and points:", _plain(found)),
            (
                "Difference of epsilon 0 to the untrained encoder that it started from, in points:",
                lambda key: {} if key[3] else untrained(results, key[1]),
            ),
        ):
            pairs = {key: differences(runs, base_of(key), reading) for key, runs in found.items()}
            body = [_line(key, columns, factors, sign="+") for key, columns in pairs.items() if columns]
            lines += ["", title, "", *_head(factors), *body] if body else []
    diverged = [run["name"] for run in results if run.get("diverged")]
    lines += ["", f"Diverged and left out: {', '.join(diverged)}"] if diverged else []
    return "\n".join(lines) + "\n"


def _plain(found):
    return lambda key: found.get((*key[:2], "", 0), {}) if key[3] else {}


def _head(factors):
    names = ["T", "bits", "method", "epsilon", "seeds", LOSS, *factors]
    return [_row(names), _row(["---"] * len(names))]


def _values(results, found, reading, factors):
    chances = next(run["readout"] for run in results if "readout" in run)
    yield _row(["chance", "", "", "", "", "", *(f"{chances[factor]['chance']:.1f}" for factor in factors)])
    for bits in sorted({run["bits"] for run in results if not run["trained"]}):
        yield _line(("untrained", bits, "", ""), _columns(untrained(results, bits), reading), factors)
    for key, runs in found.items():
        yield _line(key, _columns(runs, reading), factors)


def _columns(runs, reading):
    values = [scores(run, reading) for _, run in sorted(runs.items())]
    return {name: [one[name] for one in values] for name in values[0]}


def _line(key, columns, factors, sign=""):
    cells = [cell(columns.get(name, []), 3 if name == LOSS else 1, sign) for name in (LOSS, *factors)]
    return _row([*map(number, key), str(max(map(len, columns.values()))), *cells])


def _row(cells):
    return f"| {' | '.join(cells)} |"


def number(value):
    """All digits of a number, so that no two are the same, and 0 as 0.0 is; a word as it is."""
    return value if isinstance(value, str) else repr(float(value)).removesuffix(".0")
