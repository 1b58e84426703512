"""The table of a sweep of moco.shortcuts: means over seeds, differences to epsilon 0, 95 % intervals."""

import math
from pathlib import Path

from moco.errors import UserError
from moco.files import atomic_file
from moco.intervals import interval
from moco.shortcuts_remarks import remarks

TABLE, FIGURE = "table.md", "figure.png"
WORST = "worst"  # the factor that a run reads worst
LOSS = "InfoNCE"
SETTING = ("recipe", "T", "bits", "epsilon")  # what runs of one row share; seeds differ
TITLES = {"recipe": "recipe", "T": "T", "bits": "bits", "epsilon": "epsilon"}


def write_report(out, kind, results):
    """Write table.md and, with matplotlib, figure.png into the folder `out`. Returns what to print."""
    if not results:
        return "nothing to show yet"
    text = table(results)
    try:
        return f"{text}\n{_write(Path(out), kind, results, text)}"
    except OSError as error:
        raise UserError(f"cannot write the report to {out} ({error.strerror}); make room") from error


def _write(out, kind, results, text):
    """Returns what was written."""
    with atomic_file(out / TABLE) as temporary:
        temporary.write_text(text)
    if not any(sound(runs) for runs in rows(results).values()):
        return f"{out / TABLE}"
    try:
        from moco.shortcuts_figure import draw

        with atomic_file(out / FIGURE) as temporary:
            draw(kind, results, temporary)
        return f"{out / TABLE}, {out / FIGURE}"
    except UserError as error:
        return f"{out / TABLE}; no figure: {error.sentence}"


def factors_in(results):
    """The names of what was read, in order; none while all runs diverged."""
    return list(next((result["readout"] for result in results if "readout" in result), ()))


def columns_of(results):
    """What a table or figure shows of each run: the factors and, of several, the worst."""
    factors = factors_in(results)
    return [*factors, WORST] if len(factors) > 1 else factors


def score(result, factor):
    """Accuracy in percent of one factor, or of the one that the run reads worst."""
    if factor == WORST:
        return min(readout["accuracy"] for readout in result["readout"].values())
    return result["readout"][factor]["accuracy"]


def rows(results):
    """{(recipe, T, bits, epsilon): its runs by seed}, sorted, of trained runs, diverged ones too."""
    found = {}
    for result in sorted(results, key=lambda result: result["seed"]):
        if result["trained"]:
            found.setdefault(tuple(result[name] for name in SETTING), {})[result["seed"]] = result
    return dict(sorted(found.items()))


def sound(runs):
    """Those of a row's runs that did not diverge, by seed."""
    return {seed: run for seed, run in runs.items() if not run.get("diverged")}


def untrained(results, bits=None):
    """The readouts without training, of a number of bits or of all."""
    return [r for r in results if not r["trained"] and "readout" in r and (bits is None or r["bits"] == bits)]


def loss_at_chance(results):
    """InfoNCE of an encoder that tells nothing apart, or None where runs do not say how many keys."""
    keys = {result["moco_k"] for result in results if "moco_k" in result}
    return math.log(1 + keys.pop()) if len(keys) == 1 else None


def table(results):
    """Markdown: readouts of each row, differences to the row with epsilon 0, and its own to no training."""
    names = [name for name in SETTING if name != "bits" or any(r["bits"] for r in results)]
    columns = columns_of(results)
    several = WORST in columns
    lines = [
        "Linear readout in percent of held-out images, mean over seeds ± half of the 95 % t interval",
        "(seeds decide weights, order, views and random bits; pictures and held-out part are the same",
        "for all). InfoNCE: the plain loss in nats over an epoch of training pairs at the end, new keys",
        "all of the last key encoder; comparable within one T.",
        *(["worst: the factor that a run reads worst, which need not be the same in each."] * several),
        "",
        *_head([TITLES[name] for name in names] + ["seeds", LOSS, *columns]),
        *_plain_rows(results, names, columns),
    ]
    found = rows(results)
    for key, runs in found.items():
        good = list(sound(runs).values())
        cells = [cell([_value(run, LOSS) for run in good], 3)]
        cells += [cell([score(run, column) for run in good]) for column in columns]
        lines.append(_line([*_setting(key, names), _count(runs), *cells]))
    lines += _difference_lines(found, names, columns)
    lines += _learned_lines(results, found, names, columns)
    for remark in remarks(results):
        lines += ["", remark]
    return "\n".join(lines) + "\n"


def differences(found, columns):
    """Each row of `rows` less that of epsilon 0: {row: {seed: {column: difference}}} of seeds in both."""
    pairs = {}
    for key, runs in found.items():
        base = sound(found.get((*key[:-1], 0.0), {}))
        mine = {seed: (run, base[seed]) for seed, run in sound(runs).items() if seed in base}
        if key[-1] != 0 and mine:
            pairs[key] = {
                seed: {c: _value(run, c) - _value(plain, c) for c in (LOSS, *columns)}
                for seed, (run, plain) in mine.items()
            }
    return pairs


def cell(values, digits=1, sign=False):
    """A mean with its interval, or alone where one value gives none, or nothing."""
    mean, half = interval(values)
    if math.isnan(mean):
        return ""
    text = f"{mean:{'+' if sign else ''}.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def _plain_rows(results, names, columns):
    """The rows of chance and of untrained encoders."""
    chances = next((result["readout"] for result in results if "readout" in result), {})
    by_chance = [f"{chances[c]['chance']:.1f}" if c in chances else "" for c in columns]
    blank, loss = [""] * (len(names) - 1), loss_at_chance(results)
    yield _line(["chance", *blank, "", "" if loss is None else f"{loss:.3f}", *by_chance])
    for bits in sorted({result["bits"] for result in untrained(results)}):
        runs = untrained(results, bits)
        setting = ["untrained", *blank]
        if "bits" in names:
            setting[names.index("bits")] = f"{bits}"
        cells = [cell([score(run, column) for run in runs]) for column in columns]
        yield _line([*setting, str(len(runs)), "", *cells])


def _difference_lines(found, names, columns):
    """The second table: differences of each row, then their means over temperatures."""
    pairs = differences(found, columns)
    if not pairs:
        return []
    text = ["Difference to epsilon 0 with the same seed, of seeds whose runs did not diverge: nats, points."]
    together = _over_temperatures(pairs, {key[:3] for key in found})
    if together:
        text += ["T all: the mean over T of each seed that has every T."]
    cells = sum(len(columns) for of_seeds in (pairs | together).values() if len(of_seeds) > 1)
    if cells:
        text += [f"If epsilon changed nothing, about {cells / 20:.1f} of these {cells} intervals of readouts "
                 "would leave out 0."]  # fmt: skip
    head = _head([TITLES[name] for name in names] + ["seeds", LOSS, *columns])
    every = pairs | together
    lines = [_line(_difference(key, every[key], names, (LOSS, *columns))) for key in every]
    return ["", *text, "", *head, *lines]


def _learned_lines(results, found, names, columns):
    """The third table: what training with epsilon 0 changed, by seed."""
    pairs = {}
    for key, runs in found.items():
        start = {run["seed"]: run for run in untrained(results, key[2])}
        mine = {seed: (run, start[seed]) for seed, run in sound(runs).items() if seed in start}
        if key[-1] == 0 and mine:
            pairs[key] = {
                seed: {c: score(run, c) - score(before, c) for c in columns}
                for seed, (run, before) in mine.items()
            }
    if not pairs:
        return []
    text = "Difference of epsilon 0 to the untrained encoder of the same seed, from which it started: points."
    head = _head([TITLES[name] for name in names] + ["seeds", *columns])
    return ["", text, "", *head, *(_line(_difference(key, pairs[key], names, columns)) for key in pairs)]


def _over_temperatures(pairs, places):
    """{row with T "all": {seed: differences}} of the seeds, if several, that have every T of `places`.

    places: {(recipe, T, bits)}. Runs of one seed at several T start from the same weights and see the same
    order, so they are one sample. Without the loss, which means something else at each T.
    """
    together = {}
    for recipe, bits, epsilon in sorted({(recipe, bits, epsilon) for recipe, _, bits, epsilon in pairs}):
        temperatures = [T for own, T, count in places if (own, count) == (recipe, bits)]
        of_each = [pairs.get((recipe, T, bits, epsilon), {}) for T in temperatures]
        seeds = sorted(set.intersection(*map(set, of_each)))
        if len(of_each) > 1 and len(seeds) > 1:
            means = {seed: _mean_of([mine[seed] for mine in of_each]) for seed in seeds}
            together[recipe, "all", bits, epsilon] = means
    return together


def _mean_of(differences):
    """Column by column, without the loss."""
    columns = [name for name in differences[0] if name != LOSS]
    return {name: sum(one[name] for one in differences) / len(differences) for name in columns}


def _difference(key, of_seeds, names, columns):
    """The cells of a row; empty ones for what it has not."""
    texts = [
        cell([d[c] for d in of_seeds.values() if c in d], 3 if c == LOSS else 1, sign=True) for c in columns
    ]
    return [*_setting(key, names), str(len(of_seeds)), *texts]


def _value(run, column):
    return run["losses"]["info_nce"] if column == LOSS else score(run, column)


def _setting(key, names):
    return [v if isinstance(v, str) else number(v) for n, v in zip(SETTING, key, strict=True) if n in names]


def number(value):
    """All its digits, so that no two are the same, and 0 as 0.0 is."""
    return repr(float(value)).removesuffix(".0")


def _count(runs):
    bad = len(runs) - len(sound(runs))
    return f"{len(runs) - bad}" + (f", {bad} diverged" if bad else "")


def _head(cells):
    return [_line(cells), _line(["---"] * len(cells))]


def _line(cells):
    return f"| {' | '.join(cells)} |"
