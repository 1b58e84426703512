"""The table of a sweep of moco.shortcuts: means over seeds, differences to epsilon 0, 95 % intervals."""

import math
from pathlib import Path

from moco.errors import UserError
from moco.files import atomic_file
from moco.intervals import interval

TABLE, FIGURE = "table.md", "figure.png"
WORST = "worst"  # the factor that a run reads worst
SETTING = ("recipe", "T", "bits", "epsilon")  # what runs of one row share; seeds differ
TITLES = {"recipe": "recipe", "T": "T", "bits": "bits", "epsilon": "epsilon"}


def write_report(out, kind, results):
    """Write table.md and, with matplotlib, figure.png into the folder `out`. Returns what to print."""
    if not any("readout" in result for result in results):
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
    """The names of what was read, in order."""
    return list(next(result["readout"] for result in results if "readout" in result))


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
    """The runs without training, of a number of bits or of all."""
    return [r for r in results if not r["trained"] and (bits is None or r["bits"] == bits)]


def table(results):
    """Markdown: readouts of each row, then their differences to the row with epsilon 0."""
    names = [name for name in SETTING if name != "bits" or any(r["bits"] for r in results)]
    columns = [*factors_in(results), WORST]
    lines = [
        "Linear readout in percent of held-out images, mean over seeds ± half of the 95 % t interval;",
        "worst: the factor that a run reads worst. InfoNCE: the plain loss over an epoch of training",
        "pairs at the end.",
        "",
        *_head([TITLES[name] for name in names] + ["seeds", "InfoNCE", *columns]),
        *_plain_rows(results, names, columns),
    ]
    found = rows(results)
    for key, runs in found.items():
        good = list(sound(runs).values())
        cells = [cell([run["losses"]["info_nce"] for run in good], 3)]
        cells += [cell([score(run, column) for run in good]) for column in columns]
        lines.append(_line([*_setting(key, names), _count(runs), *cells]))
    lines += _difference_lines(found, names, columns)
    for run in (run for runs in found.values() for run in runs.values() if run.get("diverged")):
        lines += ["", f"{run['name']} diverged: {run['reason']}"]
    unsure = [r["name"] for r in results if not all(x["converged"] for x in r.get("readout", {}).values())]
    if unsure:
        lines += ["", f"Readouts of these did not converge: {', '.join(unsure)}"]
    return "\n".join(lines) + "\n"


def cell(values, digits=1, sign=False):
    """A mean with its interval, or alone where one value gives none, or nothing."""
    mean, half = interval(values)
    if math.isnan(mean):
        return ""
    text = f"{mean:{'+' if sign else ''}.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def _plain_rows(results, names, columns):
    """The rows of chance and of untrained encoders."""
    chances = next(result["readout"] for result in results if "readout" in result)
    by_chance = [f"{chances[c]['chance']:.1f}" if c in chances else "" for c in columns]
    blank = [""] * (len(names) - 1)
    yield _line(["chance", *blank, "", "", *by_chance])
    for bits in sorted({result["bits"] for result in untrained(results)}):
        runs = untrained(results, bits)
        setting = ["untrained", *blank]
        if "bits" in names:
            setting[names.index("bits")] = f"{bits}"
        cells = [cell([score(run, column) for run in runs]) for column in columns]
        yield _line([*setting, str(len(runs)), "", *cells])


def _difference_lines(found, names, columns):
    """Each row less the row of epsilon 0 with all else equal, over the seeds that both have."""
    pairs = {}
    for key, runs in found.items():
        base = sound(found.get((*key[:-1], 0.0), {}))
        mine = [(run, base[seed]) for seed, run in sound(runs).items() if seed in base]
        if key[-1] != 0 and mine:
            pairs[key] = mine
    if not pairs:
        return []
    text = "Difference to epsilon 0 with the same seed, in points"
    if len({T for _, T, *_ in pairs}) > 1 and max(map(len, pairs.values())) > 1:  # not of one seed
        pairs |= _over_temperatures(pairs)
        text += "; T all: pairs of every T, taken as independent"
    head = _head([TITLES[name] for name in names] + ["pairs", "InfoNCE", *columns])
    lines = [_difference_line(key, mine, names, columns) for key, mine in pairs.items()]
    return ["", f"{text}:", "", *head, *lines]


def _over_temperatures(pairs):
    """The same pairs, those of all temperatures together."""
    together = {}
    for (recipe, _, *rest), mine in pairs.items():
        together.setdefault((recipe, "all", *rest), []).extend(mine)
    return dict(sorted(together.items()))


def _difference_line(key, pairs, names, columns):
    losses = [run["losses"]["info_nce"] - plain["losses"]["info_nce"] for run, plain in pairs]
    cells = [cell([score(run, c) - score(plain, c) for run, plain in pairs], 1, True) for c in columns]
    return _line([*_setting(key, names), str(len(pairs)), cell(losses, 3, True), *cells])


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
