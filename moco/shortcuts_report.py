"""The table of a sweep of moco.shortcuts: means over seeds, differences to epsilon 0, 95 % intervals."""

import math
from pathlib import Path

from moco.errors import UserError
from moco.files import atomic_file
from moco.intervals import interval

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
    with atomic_file(Path(out) / TABLE) as temporary:
        temporary.write_text(text)
    if not any(sound(runs) for runs in rows(results).values()):
        return f"{text}\n{Path(out) / TABLE}"
    try:
        from moco.shortcuts_figure import draw

        with atomic_file(Path(out) / FIGURE) as temporary:
            draw(kind, results, temporary)
        return f"{text}\n{Path(out) / TABLE}, {Path(out) / FIGURE}"
    except UserError as error:
        return f"{text}\n{Path(out) / TABLE}; no figure: {error.sentence}"


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
    """Markdown: readouts of each row, then their differences to the row with epsilon 0."""
    names = [name for name in SETTING if name != "bits" or any(r["bits"] for r in results)]
    columns = columns_of(results)
    lines = [
        "Linear readout in percent of held-out images, mean over seeds ± half of the 95 % t interval",
        "(seeds decide weights, order and views; data and held-out part are the same for all); worst:",
        "the factor that a run reads worst. InfoNCE: the plain loss over an epoch of training pairs at",
        "the end, new keys all of the last key encoder; comparable within one T.",
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
    lines += _difference_lines(differences(found, columns), names, columns)
    for remark in _remarks(results):
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


def _difference_lines(pairs, names, columns):
    """The second table: differences of each row, then their means over temperatures."""
    if not pairs:
        return []
    text = ["Difference to epsilon 0 with the same seed, in points."]
    together = _over_temperatures(pairs)
    if together:
        text += ["T all: the mean over T of each seed that has every T."]
    cells = len(pairs | together) * len(columns)
    text += [f"Of {cells} intervals of readouts about {cells / 20:.0f} would leave out 0 by chance alone."]
    head = _head([TITLES[name] for name in names] + ["seeds", LOSS, *columns])
    lines = [_difference_line(key, mine, names, columns) for key, mine in (pairs | together).items()]
    return ["", *text, "", *head, *lines]


def _over_temperatures(pairs):
    """{row with T "all": {seed: differences}} of what was run at several T with the same seeds.

    Runs of one seed at several T start from the same weights and see the same order, so they are one sample.
    Without the loss, which means something else at each T.
    """
    by_place = {}
    for (recipe, T, *rest), mine in pairs.items():
        by_place.setdefault((recipe, "all", *rest), {})[T] = mine
    together = {}
    for place, of_each in sorted(by_place.items()):
        seeds = sorted(set.intersection(*map(set, of_each.values())))
        if len(of_each) > 1 and len(seeds) > 1:
            together[place] = {seed: _mean_of([mine[seed] for mine in of_each.values()]) for seed in seeds}
    return together


def _mean_of(differences):
    """Column by column, without the loss."""
    columns = [name for name in differences[0] if name != LOSS]
    return {name: sum(one[name] for one in differences) / len(differences) for name in columns}


def _difference_line(key, of_seeds, names, columns):
    texts = [
        cell([found[column] for found in of_seeds.values() if column in found], digits, sign=True)
        for column, digits in ((LOSS, 3), *((column, 1) for column in columns))
    ]
    return _line([*_setting(key, names), str(len(of_seeds)), *texts])


def _value(run, column):
    return run["losses"]["info_nce"] if column == LOSS else score(run, column)


def _remarks(results):
    """Sentences on what a reader of the numbers must know of single runs."""
    from moco.readout import WEIGHT_DECAYS

    for run in results:
        if run.get("diverged"):
            yield f"{run['name']} diverged: {run['reason']}"
    unsure = [r["name"] for r in results if not all(x["converged"] for x in r.get("readout", {}).values())]
    if unsure:
        yield f"Readouts of these did not converge: {', '.join(unsure)}"
    chosen = {}
    for result in results:
        for factor, readout in result.get("readout", {}).items():
            chosen.setdefault(factor, []).append(readout.get("weight_decay"))
    least = min(WEIGHT_DECAYS)
    counts = [f"{factor} {found.count(least)} of {len(found)}" for factor, found in chosen.items()]
    if any(least in found for found in chosen.values()):
        yield f"Readouts that chose the least weight decay there is, {least:g}: {', '.join(counts)}"
    made_by = {}
    for result in results:
        for name, version in (result.get("versions", {}) | {"code": result.get("code")}).items():
            if version is not None:
                made_by.setdefault(name, []).append(version)
    for name, found in made_by.items():
        if len(set(found)) > 1:
            each = ", ".join(f"{version} ({found.count(version)} runs)" for version in dict.fromkeys(found))
            yield f"Not all runs were measured by the same {name}: {each}"


def _setting(key, names):
    return [
        f"{v:g}" if not isinstance(v, str) else v for n, v in zip(SETTING, key, strict=True) if n in names
    ]


def _count(runs):
    bad = len(runs) - len(sound(runs))
    return f"{len(runs) - bad}" + (f", {bad} diverged" if bad else "")


def _head(cells):
    return [_line(cells), _line(["---"] * len(cells))]


def _line(cells):
    return f"| {' | '.join(cells)} |"
