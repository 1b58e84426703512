"""The limits of losses, the table and the figures: SciPy's intervals of the right runs, and no other runs."""

import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from moco.losses import chance
from moco.shortcuts.__main__ import runs_of
from moco.shortcuts.figure import course_figure, figure_of
from moco.shortcuts.report import cell, interval, limits, number, settings_of, table
from moco.trifeature import FACTORS

GRID = {
    "seeds": (0, 1, 2),
    "bits": (0, 4),
    "bits_per": ["image", "view"],
    "moco_t": (0.07, 0.2),
    "moco_k": (64, 1024),
    "method": ["infonce", "ifm", "match_ifm"],
    "epsilon": [0.5],
}
READINGS = ("own", "shared", "redrawn")


@pytest.fixture
def results():
    """Results of a sweep as moco.shortcuts records them, of random numbers, in any order."""
    rng = random.Random(0)
    found = []
    for name, run in runs_of(SimpleNamespace(**GRID)).items():
        readings = READINGS if run["bits"] else READINGS[:1]
        accuracies = {r: {f: {"accuracy": rng.uniform(20, 90)} for f in FACTORS} for r in readings}
        measured = {"name": name, "readout": accuracies}
        if run["trained"]:
            matched = rng.uniform(1, 3)
            mismatched = matched + (1.5 if run["bits_per"] == "image" else 0.0) if run["bits"] else None
            measured["loss"] = {"training": 2.0, "matched": matched, "mismatched": mismatched}
            measured["course"] = {"info_nce": [3.0, rng.uniform(2, 3)], "queue_mean": [0.1, 0.2]}
            if run["method"] != "infonce":
                measured["course"]["ifm_factor"] = [1.0, rng.uniform(1.1, 1.3)]
                measured["course"]["ifm_weight"] = [1.0, rng.uniform(1.2, 1.4)]
        place = [run[name] for name in ("T", "K", "bits", "bits_per")] if run["trained"] else None
        found.append(run | measured | (limits(*place) if place else {}))
    rng.shuffle(found)
    return found


def chosen(results, **place):
    """The runs in a place, by seed."""
    mine = [run for run in results if place.items() <= run.items()]
    return sorted(mine, key=lambda run: run["seed"])


def percents(runs, reading, factor):
    return np.array([run["readout"].get(reading, run["readout"]["own"])[factor]["accuracy"] for run in runs])


def half(values):
    return stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))


def sections(text):
    """[{setting: cells}] of the tables: for each reading values, then differences."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells[:1] == ["T"]:
            found.append({})
        elif cells and cells[0] != "---":
            count = 5 if len(found) % 2 else 7
            found[-1][tuple(cells[:count])] = cells[count:]
    return found


def test_the_limits_are_losses_of_features_that_hold_so_much():
    for T, K in itertools.product((0.07, 0.2), (64, 1024)):
        for bits in (0, 3, 10):
            found = limits(T, K, bits)
            same = K / 2**bits  # negatives whose cosine is 1, too
            literal = -math.log(math.exp(1 / T) / (math.exp(1 / T) * (1 + same) + (K - same)))
            assert found["L_shortcut"] == pytest.approx(literal)
            assert found["L_all"] == pytest.approx(-math.log(math.exp(1 / T) / (math.exp(1 / T) + K)))
            assert found["left"] == pytest.approx(found["L_shortcut"] - found["L_all"])
        assert limits(T, K, 0)["L_shortcut"] == limits(T, K, 9, "view")["L_shortcut"] == chance(K)
    assert [round(limits(0.2, 1024, bits)["left"], 1) for bits in (0, 2, 4, 6, 10)] == [
        4.9,
        3.5,
        2.2,
        1.1,
        0.1,
    ]


def test_an_interval_is_scipys():
    rng = np.random.default_rng(0)
    for n in range(2, 32):
        values = rng.normal(3, 5, n).tolist()
        assert interval(values) == pytest.approx((np.mean(values), half(values)), rel=1e-4)
    many = rng.normal(3, 5, 100).tolist()
    assert 1 < interval(many)[1] / half(many) < 1.03  # beyond the table a little too wide
    assert math.isnan(interval([2.0])[1])
    assert (cell([1, 2]), cell([1.0], 2, "+"), cell([])) == ("1.5 ± 6.4", "+1.00", "")
    assert cell([-0.04, -0.02], sign="+") == "+0.0 ± 0.1"  # no sign of what is rounded away
    assert [number(v) for v in (0, 0.1, 1e-7, 4)] == ["0", "0.1", "1e-07", "4"]


def test_every_cell_of_the_table_is_of_its_runs(results):
    found = sections(table(results))
    assert len(found) == 2 * len(READINGS)
    for reading, values, changes in zip(READINGS, found[::2], found[1::2], strict=True):
        assert len(values) == 2 + 3 * 3 * 4 and len(changes) == 3 * 3 * 4
        for bits in (0, 4):
            start = chosen(results, trained=False, bits=bits)
            cells = [cell(percents(start, reading, factor)) for factor in FACTORS]
            assert values["", "", str(bits), "untrained", ""] == ["3", *[""] * 6, *cells]
        for T, K, per in itertools.product((0.07, 0.2), (64, 1024), ("image", "view")):
            place = {"T": T, "K": K, "bits": 4, "bits_per": per}
            words = str(T), str(K), "4 per view" if per == "view" else "4"
            runs = {method: chosen(results, **place, method=method) for method in GRID["method"]}
            for method, mine in runs.items():
                epsilon = "0" if method == "infonce" else "0.5"
                seeds, *lowest, loss, w, factor = values[(*words, method, epsilon)][:7]
                assert seeds == "3" and lowest == [f"{v:.2f}" for v in limits(T, K, 4, per).values()]
                assert loss == cell([run["loss"]["matched"] for run in mine], 3)
                for text, name in ((w, "ifm_weight"), (factor, "ifm_factor")):
                    assert text == cell([run["course"].get(name, [1.0])[-1] for run in mine], 3)
                cells = [cell(percents(mine, reading, factor)) for factor in FACTORS]
                assert values[(*words, method, epsilon)][7:] == cells
            pairs = {("ifm", "InfoNCE"): "infonce", ("ifm", "its control"): "match_ifm"}
            pairs["match_ifm", "InfoNCE"] = "infonce"
            for (method, less), base in pairs.items():
                one, two = runs[method], runs[base]
                columns = [percents(one, reading, f) - percents(two, reading, f) for f in FACTORS]
                expected = [cell(column, sign="+") for column in columns]
                assert changes[(*words, method, "0.5", "3", less)] == expected


def test_what_diverged_or_did_not_learn_is_named_and_counts_nowhere(results):
    pytest.importorskip("matplotlib")
    place = {"seed": 1, "method": "ifm", "T": 0.2, "K": 64, "bits_per": "image"}
    (diverged,) = chosen(results, **place, bits=0)
    (unlearned,) = chosen(results, **place, bits=4)
    for name in ("readout", "loss", "course"):
        del diverged[name]
    diverged["diverged"] = True
    unlearned["loss"]["mismatched"] = unlearned["loss"]["matched"] + 0.99
    text = table(results)
    values, changes = sections(text)[:2]
    for bits in ("0", "4"):
        assert (
            values["0.2", "64", bits, "ifm", "0.5"][0] == "2" != values["0.2", "64", bits, "infonce", "0"][0]
        )
        assert ("0.2", "64", bits, "ifm", "0.5", "2", "InfoNCE") in changes
    assert f"Diverged and left out: {diverged['name']}\n" in text
    assert text.endswith(f"not learned (less than 1 nat): {unlearned['name']}\n")
    figure_of(results), course_figure(results)


def test_a_sweep_that_has_just_begun_has_a_table(results):
    start = [run for run in results if not run["trained"]][:1]
    assert "| untrained |" in table(start) and "Differences" not in table(start) and settings_of(start) == {}


def lines(axis):
    """{label: [(x, y, half of the bar)]} of what `errorbar` drew; without labels numbered."""
    found = {}
    for number_, container in enumerate(axis.containers):
        line, _, (bars,) = container
        halves = [(low_high[1, 1] - low_high[0, 1]) / 2 for low_high in bars.get_segments()]
        label = container.get_label()
        found[number_ if label.startswith("_") else label] = list(zip(*line.get_data(), halves, strict=True))
    return found


def shares(points, K):
    """The points with `left` as its share of that without bits, at T 0.07."""
    return [(left / limits(0.07, K, 0)["left"], *others) for left, *others in points]


def test_the_figure_shows_every_mean_and_interval(results):
    pytest.importorskip("matplotlib")
    axes = figure_of(results).axes
    names = {
        ("image", 1024): "T 0.07",
        ("image", 64): "T 0.07, K 64",
        ("view", 64): "T 0.07, K 64, bits per view",
    }
    for axis, factor, as_share in zip(axes, ("shape", "shape", "color"), (False, True, True), strict=False):
        assert axis.get_title(loc="left") == f"{factor}: linear accuracy, %"
        curves = lines(axis)
        for (per, K), name in names.items():
            expected = []
            for bits in (4, 0) if per == "image" else (4,):
                mine = chosen(results, T=0.07, K=K, bits=bits, bits_per=per, method="infonce")
                values = percents(mine, "own", factor)
                expected.append((limits(0.07, K, bits, per)["left"], np.mean(values), half(values)))
            expected = shares(expected, K) if as_share else expected
            assert [pytest.approx(point, rel=1e-4) for point in expected] == curves[name]
        drawn = [(line.get_linestyle(), list(line.get_ydata())) for line in axis.lines]
        for dashes, reading, place in (
            ("--", "shared", {"method": "infonce", "T": 0.07, "K": 64}),
            (":", "own", {}),
        ):
            place |= {"bits_per": "image"} if place else {"trained": False}
            means = [np.mean(percents(chosen(results, bits=b, **place), reading, factor)) for b in (4, 0)]
            assert any(style == dashes and y == pytest.approx(means) for style, y in drawn)
    assert len(axes) == 3 + 2
    for axis, bits in zip(axes[3:], (0, 4), strict=True):
        assert axis.get_title(loc="left") == f"shape at {bits} bits: change by IFM, points"
        shown = {c.lines[0].get_markerfacecolor() == "white": set() for c in axis.containers}
        assert set(shown) == {False, True}
        for container, points in zip(axis.containers, lines(axis).values(), strict=True):
            shown[container.lines[0].get_markerfacecolor() == "white"] |= set(points)
        for T, K, per in itertools.product((0.07, 0.2), (64, 1024), ("image", "view")[: 1 + bool(bits)]):
            place = {"T": T, "K": K, "bits": bits, "bits_per": per}
            of_ifm = chosen(results, **place, method="ifm")
            at = np.mean([run["course"]["ifm_factor"][-1] for run in of_ifm])
            for base, is_control in (("infonce", False), ("match_ifm", True)):
                two = chosen(results, **place, method=base)
                change = percents(of_ifm, "own", "shape") - percents(two, "own", "shape")
                x = 1.01 * at if is_control else at
                expected = pytest.approx((x, np.mean(change), half(change)), rel=1e-3)
                assert any(point == expected for point in shown[is_control])
    plain = [run for run in results if run.get("method") in (None, "infonce")]
    assert len(figure_of(plain).axes) == 3  # no effects to show


def test_the_course_is_of_every_setting(results):
    pytest.importorskip("matplotlib")
    axes = course_figure(results).axes
    assert len(axes) == 2 * 3 and all(axis.get_visible() for axis in axes)
    for row, bits in zip((axes[:3], axes[3:]), (0, 4), strict=True):
        for axis, name in zip(row, ("info_nce", "ifm_factor", "queue_mean"), strict=True):
            shown = [(line.get_linestyle(), line.get_ydata()) for line in axis.lines]
            assert len(shown) == 2 * 2 * (2 if name == "ifm_factor" else 3)
            for T, K, method in itertools.product((0.07, 0.2), (64, 1024), GRID["method"]):
                mine = chosen(results, T=T, K=K, bits=bits, bits_per="image", method=method)
                courses = [run["course"][name] for run in mine if name in run["course"]]
                means = pytest.approx(np.mean(courses, axis=0)) if courses else None
                style = {"infonce": "-", "ifm": "--", "match_ifm": ":"}[method]
                assert not courses or any(dashes == style and y == means for dashes, y in shown)
    few = [run for run in results if run["bits"] or run.get("method") in (None, "infonce")]
    axes = course_figure(few).axes
    assert [axis.get_visible() for axis in axes] == [True, False, True, True, True, True]
    assert axes[4].get_ylim()[1] < 1.5  # the empty panel above does not set it
