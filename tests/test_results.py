"""The results that the README speaks of: its tables are those of the runs in .results/."""

from pathlib import Path

import pytest

from moco.shortcuts_report import SECOND, table
from moco.sweep import read_results

ROOT = Path(__file__).resolve().parent.parent
SWEEPS = sorted(path.parent for path in (ROOT / ".results").glob("*/results.jsonl"))


@pytest.mark.parametrize("folder", SWEEPS, ids=lambda folder: folder.name)
def test_tables_are_those_of_the_runs(folder):
    results = read_results(folder)
    assert len({result["name"] for result in results}) == len(results) > 0
    assert (folder / "table.md").read_text() == table(results)


def test_the_readme_shows_what_was_measured():
    measured = {}
    for folder in SWEEPS:
        first, _, second = (folder / "table.md").read_text().partition(SECOND)
        measured |= {folder.name: rows(first), f"{folder.name}, shared bits": rows(second)}
    measured = {name: found for name, found in measured.items() if found}
    whole = measured.pop("trifeature")
    _, section = (ROOT / "README.md").read_text().split("\n## Does it work?\n")
    quoted = rows(section.split("\n## ")[0])
    assert set(whole) <= set(quoted) and len(whole) > 40  # none is left out

    others = [row for row in quoted if row not in whole and not row.startswith("| runs |")]
    named = [row.removeprefix("| ").split(" | ", 1) for row in others]  # each begins with its sweep's name
    assert {name for name, _ in named} == measured.keys()
    assert [row for row in named if f"| {row[1]}" not in measured[row[0]]] == []


def rows(text):
    """The lines of all tables, without those under a head."""
    return [line for line in text.splitlines() if line.startswith("|") and not line.startswith("| ---")]
