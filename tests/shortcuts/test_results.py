"""The study's numbers are those of the runs in .results/, and its bounds those of moco.losses."""

import re
from pathlib import Path
from statistics import fmean

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

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(path for path in (ROOT / ".results").iterdir() if path.is_dir())
README = (ROOT / "moco" / "shortcuts" / "README.md").read_text()
FRONT = (ROOT / "README.md").read_text()
STUDY = read_results(ROOT / ".results" / "randbit")
RUNS = settings_of(STUDY)


def rows(first):
    """The cells of README's table rows whose first cell begins with `first`."""
    lines = [line.strip("| ").split(" | ") for line in README.splitlines() if line.startswith(f"| {first}")]
    assert lines, first
    return lines


def row(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def suppression():
    """The README's table of what InfoNCE leaves of shape and color, as rows."""
    bits = sorted({setting.bits for setting in RUNS if setting.method == "infonce"})
    start = untrained(STUDY)

    def percents(T, reading, factor):
        of = (plain(T, b) if T else start[b] for b in bits)
        return [cell(accuracies(runs, reading, factor).values()) for runs in of]

    lefts = {T: [next(iter(plain(T, b).values()))["left"] for b in bits] for T in (0.07, 0.1, 0.2)}
    found = [row("random bits", *bits), row(*["---"] * (1 + len(bits)))]
    found += [row(f"nats left, T {T}", *(f"{left:.2f}" for left in lefts[T])) for T in lefts]
    found += [row(f"shape, own bits, T {T}", *percents(T, "own", "shape")) for T in lefts]
    found += [row("shape, shared bits, T 0.1", *percents(0.1, "shared", "shape"))]
    found += [row("color, own bits, T 0.1", *percents(0.1, "own", "color"))]
    found += [row(f"untrained: {f}, own bits", *percents(None, "own", f)) for f in ("shape", "color")]
    return [*found, row("untrained: shape, shared bits", *percents(None, "shared", "shape"))]


def effects():
    """The README's table of what IFM changes, as rows."""
    columns = [f"{factor}, {less}" for factor in ("shape", "color") for less in ("- InfoNCE", "- control")]
    found = [row("T, bits", "method, epsilon", "InfoNCE reached", "factor", *columns), row(*["---"] * 8)]
    for setting, runs in RUNS.items():
        if len(bases(setting)) == 2:  # neither InfoNCE nor a control
            changes = [
                cell(differences(runs, RUNS.get(base, {}), "own", factor), sign="+")
                for factor in ("shape", "color")
                for base in bases(setting).values()
            ]
            loss = cell([run["loss"]["matched"] for run in runs.values()], 2)
            names = f"{setting.T}, {setting.bits}", f"{setting.method}, {setting.epsilon}"
            found.append(row(*names, loss, cell(factors_of(runs), 2), *changes))
    means = [
        mean_change(factor, base) for factor in ("shape", "color") for base in ("InfoNCE", "its control")
    ]
    return [*found, row("mean of all", "", "", "", *means)]


def mean_change(factor, less, reading="own"):
    """The mean over all settings with IFM of a change, by seed, with its interval."""
    by_seed = {}
    for setting, runs in RUNS.items():
        if len(bases(setting)) == 2:
            base = RUNS[bases(setting)[less]]
            assert runs.keys() == base.keys() >= {0, 1, 2}
            one, two = (accuracies(those, reading, factor) for those in (runs, base))
            for seed in one:
                by_seed.setdefault(seed, []).append(one[seed] - two[seed])
    assert len({len(values) for values in by_seed.values()}) == 1
    return cell([fmean(values) for values in by_seed.values()], sign="+")


def plain(T, bits, K=1024, per="image"):
    return RUNS[Setting(T, K, bits, per, "infonce", 0.0)]


@pytest.mark.parametrize("table_of", [suppression, effects])
def test_the_tables_are_of_the_runs(table_of):
    expected = "\n".join(table_of())
    assert expected.count("\n") >= 6 and f"\n\n{expected}\n\n" in README


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


def test_the_sentences_are_of_the_runs():
    per_view = cell(accuracies(plain(0.1, 12, per="view"), "own", "shape").values())
    means = [mean_change("shape", base) for base in ("InfoNCE", "its control")]
    for words in (
        f"read {per_view} % of the shape from images with bits of their own",
        f"does not bring the shape back: {means[0]} points in the mean",
        f"shape by {means[0]} points in the mean of all settings, and by {means[1]} against a larger step",
    ):
        assert words in " ".join(README.split())
    assert f"it changes the shape by {means[0]} points in the mean" in " ".join(FRONT.split())
    for folder in FOLDERS:
        assert all(learned(run) for run in read_results(folder) if run["trained"])


def test_what_is_cited_is_there():
    for name in (".results/README.md", "moco/shortcuts/README.md", "README.md"):
        path = ROOT / name
        for link in re.findall(r"\]\(((?!http)[^)#\s]+)\)", path.read_text()):
            assert (path.parent / link).exists(), link
    assert all(folder.name in (ROOT / ".results" / "README.md").read_text() for folder in FOLDERS)
