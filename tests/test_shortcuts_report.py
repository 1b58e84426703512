"""What a sweep tells: intervals as scipy's, and a table and a figure that hold the results' numbers."""

import itertools
import random
import sys

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from moco.intervals import interval, t_quantile
from moco.shortcuts_figure import draw, figure_of
from moco.shortcuts_report import table, write_report

EPSILONS, TEMPERATURES, SEEDS = (0, 0.05, 0.5), (0.07, 0.2), (0, 1, 2)
FACTORS = ("shape", "texture", "color")
PLACES = list(itertools.product(TEMPERATURES, EPSILONS))


@pytest.mark.parametrize("degrees", [*range(1, 13), 29, 100])
def test_quantiles_are_scipys(degrees):
    for p in (0.005, 0.3, 0.5, 0.9, 0.975, 0.995):
        assert t_quantile(p, degrees) == pytest.approx(stats.t.ppf(p, degrees), rel=1e-9, abs=1e-12)


def test_intervals_are_scipys():
    for n, level in itertools.product((2, 3, 4, 7), (0.95, 0.8)):
        values = np.random.default_rng(n).normal(40, 3, n)
        mean, half = interval(values.tolist(), level)
        low, high = stats.t.interval(level, n - 1, values.mean(), stats.sem(values))
        assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-12)
    assert interval([3.0, 3.0]) == (3.0, 0.0)
    assert interval([3.0])[0] == 3.0 and all(map(np.isnan, (interval([3.0])[1], *interval([]))))


def made(kind="trifeature", recipes=("crops", "v2"), bits=(0,), temperatures=TEMPERATURES):
    """Results of a sweep, in the order of their end, which is any."""
    rng = random.Random(0)

    def readout():
        values = {factor: rng.uniform(20, 90) for factor in FACTORS}
        return {name: {"accuracy": v, "chance": 10.0, "converged": True} for name, v in values.items()}

    found = [
        {"name": f"untrained_bits{b}_seed{s}", "trained": False, "seed": s, "bits": b, "readout": readout()}
        for s, b in itertools.product(SEEDS, bits)
    ]
    for s, b, recipe, T, epsilon in itertools.product(SEEDS, bits, recipes, temperatures, EPSILONS):
        place = {"seed": s, "bits": b, "recipe": recipe, "T": T, "epsilon": epsilon}
        losses = {"info_nce": rng.uniform(1, 3)}
        found.append({"name": f"{recipe}_T{T}_eps{epsilon}_bits{b}_seed{s}", "trained": True, **place,
                      "readout": readout(), "losses": losses})  # fmt: skip
    rng.shuffle(found)
    return [{"kind": kind, **result} for result in found]


def of(results, **place):
    """The runs of a setting by seed, as the tests find them."""
    mine = [r for r in results if all(r.get(name) == value for name, value in place.items())]
    return sorted(mine, key=lambda result: result["seed"])


def scores(runs, factor):
    values = [[run["readout"][f]["accuracy"] for f in FACTORS] for run in runs]
    return np.array([min(v) if factor == "worst" else v[FACTORS.index(factor)] for v in values])


def half(values):
    return stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))


def cells(text):
    """The rows of both tables: [{column: cell}, ...] each."""
    found = []
    for lines in text.split("Difference to epsilon 0"):
        head, _, *body = [line.split("|")[1:-1] for line in lines.splitlines() if line[:1] == "|"]
        found.append([dict(zip(map(str.strip, head), map(str.strip, row), strict=True)) for row in body])
    return found


def test_the_table_holds_means_intervals_and_paired_differences():
    results = made()
    plain, differences = cells(table(results))
    assert len(plain) == 2 + 12 and len(differences) == 8 + 4
    assert plain[0]["recipe"] == "chance" and "bits" not in plain[0]
    assert plain[1]["recipe"] == "untrained"
    for column in (*FACTORS, "worst"):
        values = scores(of(results, trained=False), column)
        assert f"{values.mean():.1f} ± {half(values):.1f}" in table(results).splitlines()[7]
    for row in plain[2:]:
        place = {"recipe": row["recipe"], "T": float(row["T"]), "epsilon": float(row["epsilon"])}
        runs = of(results, **place)
        losses = np.array([run["losses"]["info_nce"] for run in runs])
        assert row["seeds"] == "3" and row["InfoNCE"] == f"{losses.mean():.3f} ± {half(losses):.3f}"
        for column in (*FACTORS, "worst"):
            values = scores(runs, column)
            assert row[column] == f"{values.mean():.1f} ± {half(values):.1f}"
    for row in differences[:8]:
        place = {"recipe": row["recipe"], "T": float(row["T"])}
        runs, base = (of(results, **place, epsilon=e) for e in (float(row["epsilon"]), 0))
        for column in (*FACTORS, "worst"):
            values = scores(runs, column) - scores(base, column)
            assert row[column] == f"{values.mean():+.1f} ± {half(values):.1f}"
        one, two = ([run["losses"]["info_nce"] for run in group] for group in (runs, base))
        loss = np.array(one) - np.array(two)
        assert row["pairs"] == "3" and row["InfoNCE"] == f"{loss.mean():+.3f} ± {half(loss):.3f}"


def test_the_table_holds_differences_over_all_temperatures_where_there_are_several():
    results = [result for result in made() if result["name"] != "v2_T0.2_eps0_bits0_seed1"]
    text = table(results)
    places = itertools.product(("crops", "v2"), EPSILONS[1:])
    for row, (recipe, epsilon) in zip(cells(text)[1][8:], places, strict=True):
        assert (row["recipe"], row["T"], row["epsilon"]) == (recipe, "all", f"{epsilon:g}")
        pairs = list(itertools.product(TEMPERATURES, SEEDS))
        if recipe == "v2":
            pairs.remove((0.2, 1))
        values = []
        for T, seed in pairs:
            (one,), (two,) = (of(results, recipe=recipe, T=T, seed=seed, epsilon=e) for e in (epsilon, 0))
            values.append(scores([one], "shape")[0] - scores([two], "shape")[0])
        assert row["pairs"] == str(len(pairs))
        assert row["shape"] == f"{np.mean(values):+.1f} ± {half(values):.1f}"
    assert "T all: pairs of every T" in text
    assert "all" not in table([result for result in results if result.get("T") != 0.2])
    assert "all" not in table([result for result in results if result["seed"] == 0])


def diverged(results, **place):
    """The same results, in which the runs of a place diverged."""
    found = []
    for result in results:
        if result["trained"] and all(result[name] == value for name, value in place.items()):
            result = {k: v for k, v in result.items() if k not in ("readout", "losses")}
            result |= {"diverged": True, "reason": "the loss of epoch 3 became nan or infinite"}
        found.append(result)
    return found


def test_diverged_runs_are_shown_and_their_pairs_left_out(tmp_path):
    results = diverged(made(), recipe="v2", T=0.2, epsilon=0, seed=1)
    results = diverged(results, recipe="crops", T=0.07, epsilon=0.5)
    text = table(results)
    plain, differences = cells(text)
    by_place = {(row["recipe"], row["T"], row.get("epsilon")): row for row in plain}
    some, none = by_place["v2", "0.2", "0"], by_place["crops", "0.07", "0.5"]
    values = scores([r for r in of(results, recipe="v2", T=0.2, epsilon=0) if "readout" in r], "shape")
    assert some["seeds"] == "2, 1 diverged" and some["shape"] == f"{values.mean():.1f} ± {half(values):.1f}"
    assert none["seeds"] == "0, 3 diverged" and none["shape"] == ""
    pairs = {(row["recipe"], row["T"], row["epsilon"]): row["pairs"] for row in differences}
    assert pairs["v2", "0.2", "0.5"] == "2" and ("crops", "0.07", "0.5") not in pairs and len(pairs) == 7 + 4
    assert text.count("diverged: the loss of epoch 3 became nan or infinite") == 4
    assert "v2_T0.2_eps0_bits0_seed1 diverged: the loss" in text
    figure_of("trifeature", results)
    everything = diverged(made())
    told = write_report(tmp_path, "trifeature", everything)
    assert told.count("0, 3 diverged") == 12 and [path.name for path in tmp_path.iterdir()] == ["table.md"]
    assert write_report(tmp_path, "trifeature", everything[:0]) == "nothing to show yet"


def test_readouts_that_did_not_converge_are_named():
    results = made()
    assert "not converge" not in table(results)
    results[5]["readout"]["shape"]["converged"] = False
    assert f"Readouts of these did not converge: {results[5]['name']}\n" in table(results)


def curves(axis):
    """{label or place in the order of drawing: (x, y, halves of y)} of what has error bars."""
    found = {}
    for number, bars in enumerate(axis.containers):
        line, _, segments = bars.lines
        ends = segments[-1].get_segments()
        halves = [(end[1][1] - end[0][1]) / 2 for end in ends]
        label = bars.get_label()
        key = number if label.startswith("_") else label
        found[key] = (list(line.get_xdata()), list(line.get_ydata()), halves)
    return found


def test_the_figure_holds_the_readouts_against_loss_temperature_and_epsilon():
    results = made()
    figure = figure_of("trifeature", results)
    panels = np.array(figure.axes).reshape(6, 3)
    for row, (recipe, factor) in zip(panels, itertools.product(("crops", "v2"), FACTORS), strict=True):
        assert row[0].get_ylabel() == f"{factor}, % ({recipe})"

        def expected(T, epsilon, recipe=recipe, factor=factor):
            values = scores(of(results, recipe=recipe, T=T, epsilon=epsilon), factor)
            return values.mean(), half(values)

        points = list(curves(row[0]).values())
        for (x, y, halves), (T, epsilon) in zip(points, PLACES, strict=True):
            runs = of(results, recipe=recipe, T=T, epsilon=epsilon)
            assert x == pytest.approx([np.mean([run["losses"]["info_nce"] for run in runs])])
            assert (*y, *halves) == pytest.approx(expected(T, epsilon))
        for axis, name, own, other in (
            (row[1], "epsilon", EPSILONS, TEMPERATURES), (row[2], "T", TEMPERATURES, EPSILONS),
        ):  # fmt: skip
            found = curves(axis)
            assert list(found) == [f"{name} {value:g}" for value in own]
            for value, (x, y, halves) in zip(own, found.values(), strict=True):
                pairs = [(T, value) if name == "epsilon" else (value, T) for T in other]
                assert np.round(x).tolist() == list(range(len(other)))  # beside their tick
                means = [expected(*pair) for pair in pairs]
                assert y == pytest.approx([mean for mean, _ in means])
                assert halves == pytest.approx([width for _, width in means])
            assert len({x[0] for x, *_ in found.values()}) == len(own)  # none hides another
        level = scores(of(results, trained=False), factor).mean()
        for axis in row:
            (line,) = [line for line in axis.lines if line.get_label() == "untrained"]
            assert line.get_ydata()[0] == pytest.approx(level)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    above, below = labels[::2], labels[1::2]  # it is filled by columns
    assert above == [f"epsilon {e:g}" for e in EPSILONS] and below == ["untrained", "T 0.07", "T 0.2"]
    for axis, values in zip(panels[-1][1:], (TEMPERATURES, EPSILONS), strict=True):
        assert [tick.get_text() for tick in axis.get_xticklabels()] == [f"{v:g}" for v in values]


def test_the_figure_holds_the_readouts_against_random_bits(tmp_path):
    results = made("randbit", recipes=("v2",), bits=(0, 3, 8), temperatures=(0.2,))
    figure = figure_of("randbit", results)
    for axis, factor in zip(figure.axes, FACTORS, strict=True):
        found = curves(axis)
        assert list(found) == [f"epsilon {e:g}" for e in EPSILONS]
        for epsilon, (x, y, halves) in zip(EPSILONS, found.values(), strict=True):
            values = [scores(of(results, bits=b, epsilon=epsilon), factor) for b in (0, 3, 8)]
            assert np.round(x).tolist() == [0, 3, 8]
            assert y == pytest.approx([v.mean() for v in values])
            assert halves == pytest.approx([half(v) for v in values])
        (line,) = [line for line in axis.lines if line.get_label() == "untrained"]
        levels = [scores(of(results, trained=False, bits=b), factor).mean() for b in (0, 3, 8)]
        assert list(line.get_xdata()) == [0, 3, 8] and list(line.get_ydata()) == pytest.approx(levels)
    assert [row["bits"] for row in cells(table(results))[0]] == ["", *"038", *("000333888")]
    draw("randbit", results, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.format == "PNG" and image.width == 1000


def test_one_seed_has_no_interval_and_can_be_drawn():
    results = [result for result in made() if result["seed"] == 0]
    assert "±" not in "".join(table(results).splitlines()[4:])
    figure = figure_of("trifeature", results)
    figure.draw_without_rendering()
    assert [len(axis.containers) for axis in figure.axes[:3]] == [6, 3, 2]


def test_without_matplotlib_there_is_a_table_and_its_pip_line(tmp_path, monkeypatch):
    results = made()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        told = write_report(tmp_path, "trifeature", results)
    assert told.endswith("table.md; no figure: the figure needs matplotlib: `pip install matplotlib`")
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]
    assert (tmp_path / "table.md").read_text() == table(results) and told.startswith(table(results))
