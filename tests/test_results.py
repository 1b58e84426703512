"""The results that the README speaks of: its tables are those of the runs in .results/."""

import itertools
from pathlib import Path

import pytest

from moco.shortcuts_report import SECOND, table
from moco.sweep import read_results

ROOT = Path(__file__).resolve().parent.parent
SWEEPS = sorted(path.parent for path in (ROOT / ".results").glob("*/results.jsonl"))
EXCERPTS = {"trifeature-short-grid", "randbit-one-reading", "randbit-lr"}  # of which the README shows a part
NAMED = "runs"  # the first column of tables with rows of several sweeps


@pytest.mark.parametrize("folder", SWEEPS, ids=lambda folder: folder.name)
def test_tables_are_those_of_the_runs(folder):
    results = read_results(folder)
    assert len({result["name"] for result in results}) == len(results) > 0
    assert (folder / "table.md").read_text() == table(results)


def test_the_readme_shows_what_was_measured():
    measured = {}
    for folder in SWEEPS:
        first, _, second = (folder / "table.md").read_text().partition(SECOND)
        measured |= {folder.name: tables(first), f"{folder.name} (shared bits)": tables(second)}
    _, section = (ROOT / "README.md").read_text().split("\n## Does it work?\n")
    shown = {}
    for head, body in tables(section.split("\n## ")[0]):
        for row in body:
            name = row[0] if head[0] == NAMED else "trifeature"
            first = int(head[0] == NAMED)
            shown.setdefault(name, []).append((head[first:], row[first:]))
    assert shown.keys() <= measured.keys() and {folder.name for folder in SWEEPS} <= shown.keys()
    for name, found in shown.items():
        assert [one for one in found if one not in flat(measured[name])] == []
        if name.split(" ")[0] not in EXCERPTS:  # none is left out: of further sweeps, no difference
            needed = measured[name][0 if name == "trifeature" else 1 :]
            assert [one for one in flat(needed) if one not in found] == []
    assert len(shown["trifeature"]) == 40


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
