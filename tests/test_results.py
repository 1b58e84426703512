"""The results that the README speaks of: its tables are those of the runs in .results/."""

import itertools
import statistics
from pathlib import Path

import pytest

from moco.intervals import interval
from moco.measure import NAMES, RENEWED
from moco.shortcuts_compare import comparison
from moco.shortcuts_report import SECOND, cell, table
from moco.sweep import read_results

ROOT = Path(__file__).resolve().parent.parent
DETAILS = ROOT / ".results" / "README.md"
SWEEPS = sorted(path.parent for path in (ROOT / ".results").glob("*/results.jsonl"))
RENEWED_NAME, LESS = " (renewed statistics)", " less "
PAIRS = [
    ("with_color", "without_color"), ("more_with_color", "more_without_color"),
    ("blue_with_color", "blue_without_color"), ("with_color", "recolored"),
    ("recolored", "without_color"), ("with_color36", "recolored36"),
    ("with_color36", "hidden_color"), ("recolored36", "hidden_color"),
]  # fmt: skip
EXCERPTS = {  # of which a part is shown
    "trifeature64", "trifeature-short-grid", "randbit-one-reading", "randbit-lr", "randbit-lr (shared bits)",
    "with_color20", "without_color20",
}  # fmt: skip
NAMED = "runs"  # the first column of tables with rows of several sweeps


@pytest.mark.parametrize("folder", SWEEPS, ids=lambda folder: folder.name)
def test_tables_are_those_of_the_runs(folder):
    results = read_results(folder)
    assert len({result["name"] for result in results}) == len(results) > 0
    assert (folder / "table.md").read_text() == table(results)


def section():
    """The README's answer."""
    return (ROOT / "README.md").read_text().split("\n## Does it work?\n")[1].split("\n## ")[0]


def test_the_readmes_show_what_was_measured():
    measured = {}
    for folder in SWEEPS:
        text = (folder / "table.md").read_text()
        for name, sentence in SECOND.items():
            text, _, second = text.partition(sentence)
            measured[f"{folder.name} ({NAMES[name]})"] = tables(second)
        measured[folder.name] = tables(text)
    for pair in PAIRS:
        text = comparison(*(ROOT / ".results" / name for name in pair))
        first, _, second = text.partition(SECOND[RENEWED])
        measured |= {LESS.join(pair): tables(first), LESS.join(pair) + RENEWED_NAME: tables(second)}
    shown = {}
    for head, body in tables(section()) + tables(DETAILS.read_text()):
        for row in body:
            name = row[0] if head[0] == NAMED else "trifeature"
            first = int(head[0] == NAMED)
            shown.setdefault(name, []).append((head[first:], row[first:]))
    named = {name.removesuffix(RENEWED_NAME) for name in shown}
    assert shown.keys() <= measured.keys() and {folder.name for folder in SWEEPS} <= named
    for name, found in shown.items():
        assert [one for one in found if one not in flat(measured[name])] == []
        if name not in EXCERPTS:  # none is left out: of further sweeps, no difference
            needed = measured[name][0 if name == "trifeature" or LESS in name else 1 :]
            assert [one for one in flat(needed) if one not in found] == []
    assert len(shown["trifeature"]) == 46  # 6 of them in both


def test_untrained_encoders_are_read_by_both_kinds_of_fit_to_the_same_accuracies():
    found = [read_results(ROOT / ".results" / name) for name in ("hidden_color", "without_color")]
    one, two = (
        {
            (r["seed"], f): readout["accuracy"]
            for r in of
            for f, readout in r["readout"].items()
            if not r["trained"]
        }
        for of in found
    )
    assert one == {key: two[key] for key in one} and len(one) == 6


def test_the_readme_says_of_texture_and_cost_what_pairs_of_runs_give():
    text = " ".join((section() + DETAILS.read_text()).split())
    names = ("trifeature", "more_seeds")
    main, more = ({r["name"]: r for r in read_results(ROOT / ".results" / name)} for name in names)

    def change(runs, place, epsilon, seed):
        pair = (runs[f"{place}_eps{value}_seed{seed}"] for value in (epsilon, "0"))
        one, plain = (run["readout"]["texture"]["accuracy"] for run in pair)
        return one - plain

    cells = list(itertools.product(("0.07", "0.2"), ("0.1", "0.2", "0.5")))
    for recipe, words in (("crops", "pairs of runs it is read lower, by"), ("v2", "by")):
        changes = [[change(main, f"{recipe}_T{T}", e, seed) for T, e in cells] for seed in range(3)]
        lower = sum(value < 0 for of_seed in changes for value in of_seed)
        mean, half = interval(list(map(statistics.fmean, changes)))
        comma = "," if recipe == "v2" else ""
        assert f"in {lower} of 18{comma} {words} {-mean:.1f} ± {half:.1f}" in text
    seven = [change(main if seed < 3 else more, "crops_T0.2", "0.1", seed) for seed in range(7)]
    assert f"all seven seeds, {cell(seven)}, exclude" in text
    ratios = [
        main[name.replace(f"_eps{run['epsilon']}_", "_eps0_")]["seconds"]["pretrain"]
        / run["seconds"]["pretrain"]
        for name, run in main.items()
        if run.get("epsilon")
    ]
    low, middle, high = statistics.quantiles(ratios, n=4)
    assert f"at {middle:.3f} times ({low:.3f} and {high:.3f}, {len(ratios)} pairs" in text


def test_the_readme_says_what_three_seeds_gave_and_what_length_gave():
    """What no table has: changes by epsilon of the first seeds alone, and shape after 36 epochs less 12."""
    text, runs = " ".join(section().split()), {}
    for name in ("with_color", "with_color36", "recolored", "recolored36"):
        for run in read_results(ROOT / ".results" / name):
            if run["trained"]:
                for factor, readout in run[RENEWED].items():
                    runs[name, factor, run["epsilon"], run["T"], run["seed"]] = readout["accuracy"]
    both, seeds = (0.07, 0.2), range(3)
    changes = [
        [statistics.fmean(runs["with_color", "texture", e, T, s] - runs["with_color", "texture", 0, T, s]
                          for T in both) for s in seeds]
        for e in (0.1, 0.2, 0.5)
    ]  # fmt: skip
    one, two, three = (f"{mean:+.1f} ± {half:.1f}" for mean, half in map(interval, changes))
    assert f"first three seeds alone gave texture {one}, {two} and {three};" in text
    gains = [
        statistics.fmean(runs[f"{name}36", "shape", 0, T, s] - runs[name, "shape", 0, T, s]
                         for T in both for s in seeds)
        for name in ("recolored", "with_color")
    ]  # fmt: skip
    assert "`recolored` gained {:.1f} points of shape, `with_color` {:.1f} (".format(*gains) in text


def tables(text):
    """Markdown's tables: (cells of the head, rows of cells) each."""
    found = []
    for is_table, lines in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")):
        if is_table:
            head, _, *body = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
            found.append((head, body))
    return found


def flat(parts):
    return [(head, row) for head, body in parts for row in body]
