"""The study's numbers are those of the runs in .results/, and its bounds those of moco.losses."""

import json
import math
import re
from datetime import datetime
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from moco.losses import weight_bounds
from moco.shortcuts import __main__ as shortcuts
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
    for T, bits in ifm_places():
        mine = ifm_settings(T=T, bits=bits)
        controls = [bases(setting)["its control"] for setting in mine]
        spans = []
        for settings in (mine, controls):
            factors = [interval(factors_of(RUNS[setting]))[0] for setting in settings]
            spans.append(span(factors, digits=2) if len(factors) > 1 else f"{factors[0]:.2f}")
        cells = [cell(changes_of(mine, *pair), sign="+") for pair in pairs]
        found.append(row(f"{T}, {bits}", len(seeds_of(mine)), *spans, *cells))
    return found


def ifm_places():
    """The (T, number of bits) with IFM, sorted."""
    return sorted({(setting.T, setting.bits) for setting in ifm_settings()})


def ifm_settings(**place):
    """The Settings with IFM, not with its control, of this T and bits, if given."""
    return [each for each in RUNS if len(bases(each)) == 2 and place.items() <= each._asdict().items()]


def seeds_of(settings):
    """The seeds of which all of the Settings and all their bases have runs, sorted."""
    compared = {*settings, *(base for setting in settings for base in bases(setting).values())}
    seeds = set.intersection(*(set(RUNS[each]) for each in compared))
    assert seeds >= {0, 1, 2}
    return sorted(seeds)


def changes_of(settings, readout, less):
    """For each seed the mean over Settings of an accuracy less that of their bases, in points.

    readout, less: of READOUTS and BASES.
    """
    factor, reading = READOUTS[readout]
    pairs = [(RUNS[setting], RUNS[bases(setting)[BASES[less]]]) for setting in settings]
    means = []
    for seed in seeds_of(settings):
        percents = ([accuracies(runs, reading, factor)[seed] for runs in pair] for pair in pairs)
        means.append(fmean(one - two for one, two in percents))
    return means


def plain(T, bits, K=1024, per="image"):
    return RUNS[Setting(T, K, bits, per, "infonce", 0.0)]


def misses(x_of, temperatures=(0.07, 0.1, 0.2)):
    """By how many points, root mean square, an increasing curve over x_of(setting), fitted to all settings
    but one, misses that one's mean accuracy on shape, read with own bits, after InfoNCE.
    """
    shapes = {
        each: fmean(accuracies(runs, "own", "shape").values())
        for each, runs in RUNS.items()
        if each.method == "infonce" and each.bits_per == "image" and each.T in temperatures
    }
    errors = []
    for out, shape in shapes.items():
        others = {}
        for each in shapes.keys() - {out}:
            others.setdefault(x_of(each), []).append(shapes[each])
        x = sorted(others)
        curve = isotonic_regression([fmean(others[at]) for at in x], weights=[len(others[at]) for at in x]).x
        errors.append(shape - np.interp(x_of(out), x, curve))
    return np.sqrt(np.mean(np.square(errors)))


def left_of(setting):
    return limits(*setting[:3])["left"]


def share_of(setting):
    return left_of(setting) / left_of(setting._replace(bits=0))


def bits_of(setting):
    return -setting.bits


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
    solved = 1 + 0.5 / math.expm1(5)
    assert_says(README, f"an image with an InfoNCE of 5 has a weight of at most {solved:.4f}")


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
    cases = {(T, bits): ifm_settings(T=T, bits=bits) for T, bits in ifm_places() if T < 0.2}
    changes = [changes_of(mine, "shape", "InfoNCE") for mine in cases.values()]
    of_controls = [
        np.subtract(change, changes_of(mine, "shape", "control"))
        for change, mine in zip(changes, cases.values(), strict=True)
    ]
    changes, of_controls = (list(map(interval, each)) for each in (changes, of_controls))
    assert len(cases) == 4 and all(abs(mean) <= half for mean, half in [*changes, *of_controls])
    ends = sorted(mean + half for mean, half in changes)
    means = {place: fmean(accuracies(plain(*place), "own", "shape").values()) for place in cases}
    without = {T: fmean(accuracies(plain(T, 0), "own", "shape").values()) for T, _ in cases}
    taken = span([without[T] - means[T, bits] for T, bits in cases], digits=0)
    change, control = (span([mean for mean, _ in each], "+") for each in (changes, of_controls))
    factors = [interval(factors_of(RUNS[one]))[0] for mine in cases.values() for one in mine]
    every = [
        (T, *interval(changes_of(ifm_settings(T=T, bits=bits), readout, less)))
        for T, bits in ifm_places()
        for readout in READOUTS
        for less in BASES
    ]
    outside = [T for T, mean, half in every if abs(mean) > half]
    assert_says(
        README,
        f"factors of {span(factors, digits=2)}) it changes the linear accuracy on shape, which the bits "
        f"lower by {taken} points, by {change} in the mean over methods and epsilon of each case, in none by "
        f"more than its interval, which ends at {ends[2]:+.1f} or less in three of the four and at "
        f"{ends[3]:+.1f} in the other.",
        f"changed shape by {control} in the means of the cases, none more than its interval",
        f"Of the {len(every)} intervals of the table {len(outside)} leave out 0 (",
        f"independent), {outside.count(0.2)} of them at T 0.2",
    )
    for text in (README, FRONT):
        assert_says(
            text,
            f"which the bits lower by {taken} points, by {change} in the mean over methods and epsilon; in "
            f"three of the four cases the 95 % interval ends at {ends[2]:+.1f} or less",
        )


def test_the_sentences_about_the_control_that_trains_badly_are_of_the_runs():
    mine = {bits: Setting(0.07, 1024, bits, "image", "ifm_only", 0.5) for bits in (4, 8)}
    ill = {bits: bases(setting)["its control"] for bits, setting in mine.items()}
    sound = {bits: [one for one in ifm_settings(T=0.07, bits=bits) if one != mine[bits]] for bits in mine}
    bad = {
        (bits, readout): cell(changes_of([ill[bits]], readout, "InfoNCE"), sign="+")
        for bits in ill
        for readout in READOUTS
    }
    good = {
        (bits, readout): cell(changes_of(sound[bits], readout, "control"), sign="+")
        for bits in sound
        for readout in READOUTS
    }
    runs = RUNS[ill[8]], RUNS[mine[8]]
    factors = [f"{interval(factors_of(each))[0]:.2f}" for each in runs]
    losses = [f"{fmean(run['loss']['matched'] for run in each.values()):.2f}" for each in runs]
    assert_says(
        README,
        f"it has {bad[4, 'shape']} on shape with 4 bits, and {bad[8, 'shape']} on shape and "
        f"{bad[8, 'color']} on color with 8.",
        f"its factor ends at {factors[0]}, IFM's at {factors[1]}, and its InfoNCE at {losses[0]}, IFM's at "
        f"{losses[1]}.",
        f"is {good[4, 'shape']} on shape with 4 bits, and with 8 {good[8, 'shape']} on shape, "
        f"{good[8, 'shape, shared bits']} on shape with shared bits, and {good[8, 'color']} on color.",
    )


def test_the_sentences_about_suppression_are_of_the_runs():
    def dash(values):
        return f"{min(values):.0f}-{max(values):.0f}"

    def means(bits, reading="own"):
        return [fmean(accuracies(plain(T, bits), reading, "shape").values()) for T in (0.07, 0.1, 0.2)]

    without, by_bits = means(0)[1], means(12)[1]  # at T 0.1
    views = {b: accuracies(plain(0.1, b, per="view"), "own", "shape").values() for b in (4, 8, 12)}
    shared, before = means(12, "shared"), fmean(accuracies(untrained(STUDY)[12], "shared", "shape").values())
    assert 1.9 < shared[1] / before < 2.4  # "twice"
    color = interval(accuracies(plain(0.1, 12), "own", "color").values())
    color_before = interval(accuracies(untrained(STUDY)[12], "own", "color").values())
    assert abs(color[0] - color_before[0]) < min(color[1], color_before[1])  # "what it is before training"
    low = (0.07, 0.1)  # temperatures
    cold = Setting(0.2, 1024, 12, "image", "infonce", 0.0)
    assert_says(
        README,
        f"from {dash(means(0))} % to {dash(means(12))} % (chance is 10; to {dash(shared)} % where",
        f"from {dash(means(0))} % to within {max(means(12)) - 10:.0f} points of chance, where the "
        f"untrained network gives {fmean(accuracies(untrained(STUDY)[12], 'own', 'shape').values()):.0f} %",
        f"({', '.join(f'{fmean(views[b]):.0f}' for b in (4, 8))} and {fmean(views[12]):.0f} % at 4, 8 and 12",
        f"the encoders reach {cell(views[12])} % on the shape",
        f"instead of {without:.1f} without the channels and {by_bits:.1f} with the shortcut: of those "
        f"{without - by_bits:.0f} points the channels alone take {without - fmean(views[12]):.0f}",
        f"misses that one by {misses(left_of):.1f} points (root mean square) over the nats, "
        f"{misses(bits_of):.1f} over the bits, and {misses(share_of):.1f} over `left` as a share",
        f"the share and the bits hardly differ ({misses(share_of, low):.1f} and {misses(bits_of, low):.1f})",
        f"the accuracy is {fmean(accuracies(plain(0.1, 0, 64), 'own', 'shape').values()):.0f} % with 64 keys",
        f"and {means(4)[1]:.0f} % with 1024 keys and 4 bits",
        f"give {shared[1]:.0f} % on the shape at 12 bits and T 0.1",
        f"InfoNCE ends at {fmean(run['loss']['matched'] for run in RUNS[cold].values()):.2f}, where bits "
        f"alone could reach {limits(0.2, 1024, 12)['L_shortcut']:.2f}",
    )


def test_the_sentences_about_the_course_are_of_the_runs():
    courses = {
        (setting.T, setting.bits): [run["course"]["queue_mean"] for run in runs.values()]
        for setting, runs in RUNS.items()
        if (setting.method, setting.bits_per, setting.K) == ("infonce", "image", 1024)
    }
    ends = {place: f"{fmean(course[-1] for course in each):.2f}" for place, each in courses.items()}
    highest = max(value for each in courses.values() for course in each for value in course)
    cold = [
        run["course"]["queue_mean"]
        for setting, runs in RUNS.items()
        if setting.T == 0.2
        for run in runs.values()
    ]
    start = max(map(max, cold))
    factors = [[run["course"]["ifm_factor"] for run in RUNS[each].values()] for each in ifm_settings()]
    first, second = ([fmean(course[n] for course in each) for each in factors] for n in (0, 1))
    most = max(course[0] for each in factors for course in each)
    plainly, *steps = map(json.loads, (ROOT / ".results" / "first_steps.jsonl").read_text().splitlines())
    longer = [step["grad_norm"] / plainly["grad_norm"] for step in steps]
    assert_says(
        README,
        f"are at most {highest:.2f}, early, and end without bits at {ends[0.2, 0]} (T 0.2), {ends[0.1, 0]} "
        f"(T 0.1) and {ends[0.07, 0]} (T 0.07).",
        f"at T 0.2 the epoch means of |mu| are at most {start:.2f}, early (at K 65536 a bound of "
        f"{min(weight_bounds(65536, 1e3, 0.2, 1.0, 'ifm', start)):.2f}), and end at "
        f"{max(course[-1] for course in cold):.2f} or less",
        f"factor is up to {max(first):.1f} in the first epoch ({most:.1f} in one run), while keys are alike, "
        f"{span(second)} in the second",
        f"lengthened the gradient {span(longer)} times, and the factor was "
        f"{span([step['ifm_factor'] for step in steps])} (",
    )


def test_every_run_has_learned_its_bits():
    for folder in FOLDERS:
        assert all(learned(run) for run in read_results(folder) if run["trained"])


def test_the_commands_are_those_of_the_runs(monkeypatch):
    commands = README.split("```bash")[1].split("```")[0]
    definition, calls = commands.strip().split("\n", 1)
    words = re.fullmatch(r'sweep\(\) \{ python -m moco\.shortcuts (.*) "\$@"; \}', definition)[1]
    names = {}
    for call in re.findall(r"sweep( [^&#\n]*)", calls):
        monkeypatch.setattr("sys.argv", ["shortcuts", *words.split(), *call.split()])
        names |= shortcuts.runs_of(shortcuts.parse_args()[0])
    assert set(names) == {run["name"] for run in STUDY}
    ends = sorted(datetime.fromisoformat(run["time"].replace("Z", "+00:00")) for run in STUDY)
    gaps = [(two - one).total_seconds() for one, two in zip(ends, ends[1:], strict=False)]
    hours = sum(gap for gap in gaps if gap < 300) / 3600  # longer ones are breaks
    trained = sum(run["trained"] for run in STUDY)
    each = 2 * 3600 * hours / trained
    assert_says(
        README, f"The {trained} trained runs took {hours:.1f} hours of two cores of an AMD EPYC: {each:.0f} s"
    )


def assert_says(text, *phrases):
    text = " ".join(text.split())
    for words in phrases:
        assert words in text, words


def test_what_is_cited_is_there():
    for name in (".results/README.md", "moco/shortcuts/README.md", "README.md"):
        path = ROOT / name
        for link in re.findall(r"\]\(((?!http)[^)#\s]+)\)", path.read_text()):
            assert (path.parent / link).exists(), link
    assert all(folder.name in (ROOT / ".results" / "README.md").read_text() for folder in FOLDERS)
