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


def test_the_readme_quotes_rows_of_these_tables():
    _, section = (ROOT / "README.md").read_text().split("\n## Does it work?\n")
    section = section.split("\n## ")[0]
    quoted = [line for line in section.splitlines() if line.startswith(("| crops", "| v2", "| untrained"))]
    measured = {line for folder in SWEEPS for line in (folder / "table.md").read_text().splitlines()}
    assert len(quoted) >= 8 and not set(quoted) - measured
