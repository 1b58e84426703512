"""The study's numbers are those of the runs in .results/, and its bounds those of moco.losses."""

import re
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from moco.losses import weight_bounds
from moco.shortcuts.report import (
    Setting,
    accuracies,
    bases,
    cell,
    factors_of,
    interval,
    learned,
    limits,
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
READOUTS = {"shape": ("shape", "own"), "shape, shared bits": ("shape", "shared"), "color": ("color", "own")}
BASES = {"InfoNCE": "InfoNCE", "control": "its control"}


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

    found = [row("random bits", *bits), row(*["---"] * (1 + len(bits)))]
    for T in (0.07, 0.1, 0.2):
        found.append(row(f"nats left, T {T}", *(f"{limits(T, 1024, b)['left']:.2f}" for b in bits)))
    found += [row(f"shape, own bits, T {T}", *percents(T, "own", "shape")) for T in (0.07, 0.1, 0.2)]
    found += [row("shape, shared bits, T 0.1", *percents(0.1, "shared", "shape"))]
    found += [row("color, own bits, T 0.1", *percents(0.1, "own", "color"))]
    found += [row(f"untrained: {f}, own bits", *percents(None, "own", f)) for f in ("shape", "color")]
    return [*found, row("untrained: shape, shared bits", *percents(None, "shared", "shape"))]


def queues():
    """The README's table of the shape that InfoNCE leaves with queues of other sizes, as rows."""
    smallest = min(RUNS, key=lambda setting: setting.K)
    bits = sorted({setting.bits for setting in RUNS if setting[:2] == smallest[:2]})  # of this T and K
    found = [row("shape, own bits, T 0.1", *(f"{b} bits" for b in bits)), row(*["---"] * (1 + len(bits)))]
    for K in sorted({setting.K for setting in RUNS}):
        percents = [cell(accuracies(plain(0.1, b, K), "own", "shape").values()) for b in bits]
        nats = [f"{limits(0.1, K, b)['left']:.2f}" for b in bits]
        cells = (f"{percent} ({left} nats)" for percent, left in zip(percents, nats, strict=True))
        found.append(row(f"K {K}", *cells))
    return found


def effects():
    """The README's table of what IFM changes, as rows: means over methods and epsilon."""
    pairs = [(readout, less) for readout in READOUTS for less in BASES]
    columns = [f"{readout}, - {less}" for readout, less in pairs]
    found = [row("T, bits", "factor", "control's", *columns), row(*["---"] * 9)]
    for T, bits in sorted({(setting.T, setting.bits) for setting in ifm_settings()}):
        mine = ifm_settings(T=T, bits=bits)
        controls = [bases(setting)["its control"] for setting in mine]
        spans = []
        for settings in (mine, controls):
            factors = [interval(factors_of(RUNS[setting]))[0] for setting in settings]
            spans.append(f"{min(factors):.2f} to {max(factors):.2f}")
        changes = [mean_change(mine, *READOUTS[readout], BASES[less]) for readout, less in pairs]
        found.append(row(f"{T}, {bits}", *spans, *changes))
    return found


def ifm_settings(**place):
    """The Settings with IFM, not with its control, of this T and bits, if given."""
    return [each for each in RUNS if len(bases(each)) == 2 and place.items() <= each._asdict().items()]


def mean_change(settings, factor, reading, less):
    """The mean over Settings of an accuracy less that of their bases, in points, with the interval of the
    seeds' means, of the seeds that all of them have.
    """
    pairs = [(RUNS[setting], RUNS[bases(setting)[less]]) for setting in settings]
    seeds = set.intersection(*(set(runs) for pair in pairs for runs in pair))
    assert seeds >= {0, 1, 2}
    means = []
    for seed in sorted(seeds):
        percents = ([accuracies(runs, reading, factor)[seed] for runs in pair] for pair in pairs)
        means.append(fmean(one - two for one, two in percents))
    return cell(means, sign="+")


def plain(T, bits, K=1024, per="image"):
    return RUNS[Setting(T, K, bits, per, "infonce", 0.0)]


def misses(x_of):
    """By how many points, root mean square, the best rising curve over x_of(setting) misses the means of the
    shape, read with own bits, after InfoNCE.
    """
    settings = [each for each in RUNS if each.method == "infonce" and each.bits_per == "image"]
    x = [x_of(setting) for setting in settings]
    y = np.array([fmean(accuracies(RUNS[setting], "own", "shape").values()) for setting in settings])
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    means = np.bincount(place, y) / counts
    curve = isotonic_regression(means, weights=counts.astype(float)).x
    return np.sqrt(np.mean((y - curve[place]) ** 2))


def left_of(setting):
    return limits(*setting[:3])["left"]


def share_of(setting):
    return left_of(setting) / left_of(setting._replace(bits=0))


@pytest.mark.parametrize("table_of", [suppression, queues, effects])
def test_the_tables_are_of_the_runs(table_of):
    expected = "\n".join(table_of())
    assert expected.count("\n") >= 4 and f"\n\n{expected}\n\n" in README


def test_the_bounds_are_those_of_the_losses():
    found = [*rows("K 65536, T"), *rows("K 1024, T")]
    assert len(found) == 5
    for name, *cells in found:
        K, T = map(float, re.findall(r"[\d.]+", name)[:2])
        most = [min(weight_bounds(int(K), 1e3, T, 1.0, "ifm", length)) for length in (0.0, 0.1, 0.3)]
        most.append(min(weight_bounds(1, 0.1, T, 1.0, "ifm")))  # for any K
        for text, bound in zip(cells, most, strict=True):
            digits = len(text.partition(".")[2])
            assert float(text.replace(",", "")) == pytest.approx(bound, abs=0.51 * 10**-digits)


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
    text, front = (" ".join(each.split()) for each in (README, FRONT))
    mine = ifm_settings(T=0.07, bits=4)
    controls = [bases(setting)["its control"] for setting in mine]
    more, than_control = (mean_change(mine, "shape", "own", less) for less in BASES.values())
    before, after = (fmean(accuracies(plain(0.07, bits), "own", "shape").values()) for bits in (0, 4))
    losing = Setting(0.07, 1024, 8, "image", "ifm_only", 0.5)
    others = [setting for setting in ifm_settings(T=0.07, bits=8) if setting != losing]
    ends = [
        fmean(run["loss"]["matched"] for run in RUNS[setting].values())
        for setting in (bases(losing)["its control"], losing)
    ]
    changes = re.findall(r"\| ([+-][\d.]+) ± ([\d.]+)", "\n".join(effects()))
    outside = sum(abs(float(mean)) > float(half) for mean, half in changes)
    view = cell(accuracies(plain(0.1, 12, per="view"), "own", "shape").values())
    for words in (
        f"{more} of {before - after:.0f} points in one of four cases",
        f"by {more} points, of {before - after:.0f} that the bits take, and against its control by "
        f"{than_control};",
        f"(the control has {mean_change(controls, 'shape', 'own', 'InfoNCE')} over InfoNCE)",
        f"Of the {len(changes)} intervals of the table {outside} leave out 0",
        f"without it IFM less its control is {mean_change(others, 'color', 'own', 'its control')}",
        f"its InfoNCE ends at {ends[0]:.2f}, IFM's at {ends[1]:.2f}",
        f"the encoders reach {view} % on the shape",
        f"misses the accuracies of all settings by {misses(share_of):.1f} points (root mean square), "
        f"against the nats by {misses(left_of):.1f}, against the number of bits by "
        f"{misses(lambda setting: -setting.bits):.1f}",
    ):
        assert words in text
    assert f"by {more} points in one of four cases" in front
    for folder in FOLDERS:
        assert all(learned(run) for run in read_results(folder) if run["trained"])


def test_what_is_cited_is_there():
    for name in (".results/README.md", "moco/shortcuts/README.md", "README.md"):
        path = ROOT / name
        for link in re.findall(r"\]\(((?!http)[^)#\s]+)\)", path.read_text()):
            assert (path.parent / link).exists(), link
    assert all(folder.name in (ROOT / ".results" / "README.md").read_text() for folder in FOLDERS)
