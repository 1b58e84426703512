"""The results that the README speaks of: its tables are those of the runs in .results/."""

from pathlib import Path

import pytest

from moco.shortcuts_report import table
from moco.sweep import read_results

ROOT = Path(__file__).resolve().parent.parent
SWEEPS = sorted(path.parent for path in (ROOT / ".results").glob("*/results.jsonl"))


@pytest.mark.parametrize("folder", SWEEPS, ids=lambda folder: folder.name)
def test_tables_are_those_of_the_runs(folder):
    results = read_results(folder)
    assert len({result["name"] for result in results}) == len(results) > 0
    assert (folder / "table.md").read_text() == table(results)


def test_the_readme_shows_what_was_measured():
    _, section = (ROOT / "README.md").read_text().split("\n## Does it work?\n")
    quoted = {line for line in section.split("\n## ")[0].splitlines() if line.startswith("|")}
    measured = {folder.name: set(tables(folder / "table.md")) for folder in SWEEPS}
    assert measured["trifeature"] <= quoted and len(measured["trifeature"]) > 40  # none is left out
    assert quoted <= set.union(*measured.values())


def tables(path):
    return [line for line in path.read_text().splitlines() if line.startswith("|")]
