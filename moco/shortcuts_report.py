"""The table of a sweep of moco.shortcuts: means over seeds, differences to epsilon 0, 95 % intervals."""

import math
from pathlib import Path

from moco.errors import UserError
from moco.files import atomic_file
from moco.intervals import interval
from moco.measure import RENEWED, SHARED
from moco.shortcuts_remarks import remarks
from moco.shortcuts_results import (
    LOSS,
    SETTING,
    WORST,
    columns_of,
    differences,
    learned,
    loss_at_chance,
    number,
    over_temperatures,
    rows,
    score,
    second_readings,
    sound,
    untrained,
    value,
)

TABLE, FIGURE = "table.md", "figure.png"
SECOND = {
    SHARED: "The same encoders read from images that all have the random bits of the first training image:\n"
    "what is kept of the pictures where bits do not tell images apart.",
    RENEWED: "The same encoders read with BatchNorm's statistics taken anew, of the training images that\n"
    "are read: not of those trained on, and not 0 and 1 where nothing was trained.",
}


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


def table(results):
    """Markdown: readouts of each row, differences to the row with epsilon 0, and its own to no training.

    Of encoders that were read in two ways, both.
    """
    several = WORST in columns_of(results)
    lines = [
        "Linear readout in percent of held-out images, mean over seeds ± half of the 95 % t interval",
        "(seeds decide weights, order, views and random bits; pictures and held-out part are the same",
        "for all). InfoNCE: the plain loss in nats over an epoch of training pairs at the end, new keys",
        "all of the last key encoder; comparable within one T.",
        *(["worst: the factor that a run reads worst, which need not be the same in each."] * several),
        "",
        *_tables(results),
    ]
    for reading, found in second_readings(results).items():
        lines += ["", SECOND[reading], "", *_tables(found)]
    for remark in remarks(results):
        lines += ["", remark]
    return "\n".join(lines) + "\n"


def _tables(results):
    """The three tables of one way of reading."""
    names = [name for name in SETTING if name != "bits" or any(r["bits"] for r in results)]
    columns, found = columns_of(results), rows(results)
    lines = [
        *head_lines([*names, "seeds", LOSS, *columns]),
        *_plain_rows(results, names, columns),
    ]
    for key, runs in found.items():
        good = list(sound(runs).values())
        cells = [cell([value(run, LOSS) for run in good], 3)]
        cells += [cell([score(run, column) for run in good]) for column in columns]
        lines.append(line([*_setting(key, names), _count(runs), *cells]))
    lines += _difference_lines(found, names, columns)
    return lines + _learned_lines(results, found, names, columns)


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
    chance_cells = [f"{chances[c]['chance']:.1f}" if c in chances else "" for c in columns]
    blank, loss = [""] * (len(names) - 1), loss_at_chance(results)
    yield line(["chance", *blank, "", "" if loss is None else f"{loss:.3f}", *chance_cells])
    for bits in sorted({result["bits"] for result in untrained(results)}):
        runs = untrained(results, bits)
        setting = ["untrained", *blank]
        if "bits" in names:
            setting[names.index("bits")] = f"{bits}"
        cells = [cell([score(run, column) for run in runs]) for column in columns]
        yield line([*setting, str(len(runs)), "", *cells])


def _difference_lines(found, names, columns):
    """The second table: differences of each row, then their means over temperatures."""
    pairs = differences(found, columns)
    if not pairs:
        return []
    text = ["Difference to epsilon 0 with the same seed, of seeds whose runs did not diverge: nats, points."]
    together = over_temperatures(pairs, {key[:3] for key in found})
    if together:
        text += ["T all: the mean over T of each seed that has every T."]
    text += by_chance(pairs | together, columns, "epsilon changed nothing")
    head = head_lines([*names, "seeds", LOSS, *columns])
    every = pairs | together
    lines = [line(difference_cells(key, every[key], names, (LOSS, *columns))) for key in every]
    return ["", *text, "", *head, *lines]


def by_chance(pairs, columns, if_so):
    """A sentence on how many intervals of differences would leave out 0 by chance, if there are any."""
    factors = [column for column in columns if column != WORST]  # WORST is one of them again
    cells = sum(len(factors) for of_seeds in pairs.values() if len(of_seeds) > 1)
    text = f"If {if_so}, about {cells / 20:.1f} of these {cells} intervals of factors would leave out 0."
    return [text] if cells else []


def _learned_lines(results, found, names, columns):
    """The third table: what training with epsilon 0 changed, by seed."""
    pairs = learned(found, results, columns)
    if not pairs:
        return []
    text = "Difference of epsilon 0 to the untrained encoder of the same seed, from which it started: points."
    head = head_lines([*names, "seeds", *columns])
    return ["", text, "", *head, *(line(difference_cells(key, pairs[key], names, columns)) for key in pairs)]


def difference_cells(key, of_seeds, names, columns):
    """The cells of a row of differences; empty ones for what it has not."""
    texts = [
        cell([d[c] for d in of_seeds.values() if c in d], 3 if c == LOSS else 1, sign=True) for c in columns
    ]
    return [*_setting(key, names), str(len(of_seeds)), *texts]


def _setting(key, names):
    return [v if isinstance(v, str) else number(v) for n, v in zip(SETTING, key, strict=True) if n in names]


def _count(runs):
    bad = len(runs) - len(sound(runs))
    return f"{len(runs) - bad}" + (f", {bad} diverged" if bad else "")


def head_lines(cells):
    """The first two lines of a table."""
    return [line(cells), line(["---"] * len(cells))]


def line(cells):
    """A row of a table."""
    return f"| {' | '.join(cells)} |"
