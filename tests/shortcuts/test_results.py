"""The study's numbers are those of the runs in .results/, and its bounds those of moco.losses."""

import re
from pathlib import Path

import pytest

from moco.losses import weight_bounds
from moco.shortcuts.report import (
    Setting,
    accuracies,
    bases,
    cell,
    differences,
    factors_of,
    learned,
    settings_of,
    table,
    untrained,
)
from moco.shortcuts.sweep import read_results
from moco.trifeature import FACTORS

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(path for path in (ROOT / ".results").iterdir() if path.is_dir())
README = (ROOT / "moco" / "shortcuts" / "README.md").read_text()
TEXT = " ".join(README.split())
STUDY = read_results(ROOT / ".results" / "randbit")
RUNS = settings_of(STUDY)


def rows(first):
    """The cells of README's table rows whose first cell begins with `first`."""
    lines = [line.strip("| ").split(" | ") for line in README.splitlines() if line.startswith(f"| {first}")]
    assert lines, first
    return lines


def plain(T, bits, K=1024, per="image"):
    return RUNS[Setting(T, K, bits, per, "infonce", 0.0)]


def percent(runs, reading, factor):
    return cell(accuracies(runs, reading, factor).values())


def test_the_bounds_are_those_of_the_losses():
    found = [*rows("K 65536"), *rows("K 1024")]
    assert len(found) == 4
    for name, *cells in found:
        K, T = map(float, re.findall(r"[\d.]+", name)[:2])
        for length, text in zip((0.0, 0.1, 0.3, 0.5), cells, strict=True):
            digits = len(text.partition(".")[2])
            most = min(weight_bounds(int(K), 1e3, T, 1.0, "ifm", length))  # for any epsilon
            assert float(text.replace(",", "")) == pytest.approx(most, abs=0.51 * 10**-digits)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_every_run_is_recorded_once_and_whole(folder):
    results = read_results(folder)
    assert len(results) == len({run["name"] for run in results}) > 0
    assert table(results) == (folder / "table.md").read_text()
    for run in results:
        if not run.get("diverged"):
            readouts = run["readout"].values()
            assert all(each["converged"] for factors in readouts for each in factors.values())
    sizes = [len(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert max(sizes) < 4000  # bytes


def test_what_is_cited_is_there():
    for name in (".results/README.md", "moco/shortcuts/README.md", "README.md"):
        path = ROOT / name
        for link in re.findall(r"\]\(((?!http)[^)#\s]+)\)", path.read_text()):
            assert (path.parent / link).exists(), link
    assert all(folder.name in (ROOT / ".results" / "README.md").read_text() for folder in FOLDERS)
