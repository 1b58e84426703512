"""The study's numbers are those of the runs in .results/, and its bounds those of moco.losses."""

import json
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
    found = [row("T, bits", "seeds", "factor", "control's", *columns), row(*["---"] * 10)]
    for T, bits in sorted({(setting.T, setting.bits) for setting in ifm_settings()}):
        mine = ifm_settings(T=T, bits=bits)
        controls = [bases(setting)["its control"] for setting in mine]
        spans = []
        for settings in (mine, controls):
            factors = [interval(factors_of(RUNS[setting]))[0] for setting in settings]
            spans.append(span(factors, digits=2) if len(factors) > 1 else f"{factors[0]:.2f}")
        changes = [mean_change(mine, *READOUTS[readout], BASES[less]) for readout, less in pairs]
        found.append(row(f"{T}, {bits}", len(seeds_of(mine)), *spans, *changes))
    return found


def ifm_settings(**place):
    """The Settings with IFM, not with its control, of this T and bits, if given."""
    return [each for each in RUNS if len(bases(each)) == 2 and place.items() <= each._asdict().items()]


def seeds_of(settings):
    """The seeds of which all of the Settings and all their bases have runs, sorted."""
    compared = {*settings, *(base for setting in settings for base in bases(setting).values())}
    seeds = set.intersection(*(set(RUNS[each]) for each in compared))
    assert seeds >= {0, 1, 2}
    return sorted(seeds)


def mean_change(settings, factor, reading, less):
    """The mean over Settings of an accuracy less that of their bases, in points, with the interval of the
    seeds' means.
    """
    pairs = [(RUNS[setting], RUNS[bases(setting)[less]]) for setting in settings]
    means = []
    for seed in seeds_of(settings):
        percents = ([accuracies(runs, reading, factor)[seed] for runs in pair] for pair in pairs)
        means.append(fmean(one - two for one, two in percents))
    return cell(means, sign="+")


def plain(T, bits, K=1024, per="image"):
    return RUNS[Setting(T, K, bits, per, "infonce", 0.0)]


def misses(x_of):
    """By how many points, root mean square, the best rising curve over x_of(setting) of all other settings
    misses the mean accuracy on shape, read with own bits, after InfoNCE.
    """
    settings = [each for each in RUNS if each.method == "infonce" and each.bits_per == "image"]
    x = np.array([x_of(setting) for setting in settings])
    y = np.array([fmean(accuracies(RUNS[setting], "own", "shape").values()) for setting in settings])
    found = []
    for out in range(len(x)):
        others, place, counts = np.unique(np.delete(x, out), return_inverse=True, return_counts=True)
        means = np.bincount(place, np.delete(y, out)) / counts
        curve = isotonic_regression(means, weights=counts.astype(float)).x
        found.append(y[out] - np.interp(x[out], others, curve))
    return np.sqrt(np.mean(np.square(found)))


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


def span(values, sign="", digits=1):
    return f"{min(values):{sign}.{digits}f} to {max(values):{sign}.{digits}f}"


def test_the_sentences_about_ifm_are_of_the_runs():
    cases = [(T, bits) for T in (0.07, 0.1) for bits in (4, 8)]
    settings = {case: ifm_settings(T=case[0], bits=case[1]) for case in cases}
    changes = [change_of(mean_change(each, "shape", "own", "InfoNCE")) for each in settings.values()]
    assert all(abs(mean) <= half for mean, half in changes)
    means = {
        case: fmean(accuracies(plain(*case), "own", "shape").values())
        for case in [(0.07, 0), (0.1, 0), *cases]
    }
    taken = [means[T, 0] - means[T, bits] for T, bits in cases]
    change, taken = span([mean for mean, _ in changes], "+"), span(taken, digits=0)
    factors = [interval(factors_of(RUNS[one]))[0] for each in settings.values() for one in each]
    outside = [
        row.startswith("| 0.2,")
        for row in effects()[2:]
        for mean, half in map(change_of, row.split(" | ")[4:])
        if abs(mean) > half
    ]
    losing = {bits: Setting(0.07, 1024, bits, "image", "match_ifm_only", 0.5) for bits in (4, 8)}
    pairs = [losing[8], losing[8]._replace(method="ifm_only")]
    ends = [fmean(run["loss"]["matched"] for run in RUNS[each].values()) for each in pairs]
    others = {
        bits: [one for one in settings[0.07, bits] if bases(one)["its control"] != losing[bits]]
        for bits in losing
    }
    bad = [mean_change([losing[bits]], what, "own", "InfoNCE") for bits, what in ((4, "shape"), (8, "color"))]
    good = [
        mean_change(others[bits], what, "own", "its control") for bits, what in ((4, "shape"), (8, "color"))
    ]
    assert_says(
        README,
        f"the accuracy changes by {change} points in the means of four cases, of {taken} that the bits take",
        f"factors of {span(factors, digits=2)}), the linear accuracy on shape changes by {change} points in "
        f"the means of the four cases, of {taken} that the bits take, and in none by more than its interval.",
        f"Of the 36 intervals of the table {len(outside)} leave out 0 (",
        f"share runs), {sum(outside)} of them at T 0.2",
        f"it has {bad[0]} on shape against InfoNCE with 4 bits, and {bad[1]} on color with 8",
        f"its InfoNCE ends at {ends[0]:.2f}, IFM's at {ends[1]:.2f}",
        f"IFM less its control is {good[0]} on shape with 4 bits, and {good[1]} on color with 8",
    )
    assert_says(FRONT, f"by {change} points in the means of four cases, of {taken} that the bits take")


def test_the_other_sentences_are_of_the_runs():
    views = {b: accuracies(plain(0.1, b, per="view"), "own", "shape").values() for b in (4, 8, 12)}
    shown = [f"{fmean(values):.0f}" for values in views.values()]
    courses = {
        (setting.T, setting.bits): [run["course"]["queue_mean"] for run in runs.values()]
        for setting, runs in RUNS.items()
        if (setting.method, setting.bits_per, setting.K) == ("infonce", "image", 1024)
    }
    ends = {place: f"{fmean(course[-1] for course in each):.2f}" for place, each in courses.items()}
    assert {ends[place] for place in ends if place[1] >= 8} <= {"0.01", "0.02"}
    highest = max(value for each in courses.values() for course in each for value in course)
    cold = [
        run["course"]["queue_mean"]
        for setting, runs in RUNS.items()
        if setting.T == 0.2
        for run in runs.values()
    ]
    first = [
        run["course"]["ifm_factor"][0] for runs in RUNS.values() for run in runs.values() if run["epsilon"]
    ]
    plainly, *steps = map(json.loads, (ROOT / ".results" / "first_steps.jsonl").read_text().splitlines())
    longer = [step["grad_norm"] / plainly["grad_norm"] for step in steps]
    assert_says(
        README,
        f"({shown[0]}, {shown[1]} and {shown[2]} % at 4, 8 and 12 bits)",
        f"the encoders reach {cell(views[12])} % on the shape",
        f"misses a setting by {misses(share_of):.1f} points (root mean square), "
        f"by {misses(left_of):.1f} over the nats, "
        f"and by {misses(lambda setting: -setting.bits):.1f} over the number of bits",
        f"is at most {highest:.2f}, early, and ends at {ends[0.2, 0]} (T 0.2), {ends[0.1, 0]} (T 0.1) and "
        f"{ends[0.07, 0]} (T 0.07) without bits",
        f"at T 0.2 |mu| is at most {max(map(max, cold)):.2f}, early",
        f"factor is up to {max(first):.1f} in the mean of the first epoch",
        f"lengthened the gradient {span(longer)} times, and the factor was "
        f"{span([step['ifm_factor'] for step in steps])} (",
    )
    for folder in FOLDERS:
        assert all(learned(run) for run in read_results(folder) if run["trained"])


def assert_says(text, *phrases):
    text = " ".join(text.split())
    for words in phrases:
        assert words in text, words


def change_of(cell):
    """(mean, half) of a cell as "+1.0 ± 2.0"."""
    return tuple(map(float, cell.strip("| ").split(" ± ")))


def test_what_is_cited_is_there():
    for name in (".results/README.md", "moco/shortcuts/README.md", "README.md"):
        path = ROOT / name
        for link in re.findall(r"\]\(((?!http)[^)#\s]+)\)", path.read_text()):
            assert (path.parent / link).exists(), link
    assert all(folder.name in (ROOT / ".results" / "README.md").read_text() for folder in FOLDERS)
