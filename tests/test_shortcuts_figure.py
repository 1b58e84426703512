"""The figure of a sweep: panels hold the results' means, intervals and gains, and say what they show."""

import itertools
import math

import numpy as np
import pytest
from PIL import Image
from sweep_results import (
    EPSILONS,
    FACTORS,
    PLACES,
    TEMPERATURES,
    diverged,
    half,
    made,
    of,
    scores,
    second_reading,
)

from moco.measure import RENEWED
from moco.shortcuts_figure import draw, figure_of


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
    results = [result | {"moco_k": 1024} for result in made()]
    figure = figure_of("trifeature", results)
    panels = np.array(figure.axes).reshape(10, 3)
    shown = (*FACTORS, "worst", "gain")
    for row, (recipe, what) in zip(panels, itertools.product(("crops", "v2"), shown), strict=True):
        label = "gain of worst" if what == "gain" else f"{what}, %"
        assert row[0].get_ylabel() == f"{label}\n({recipe})"

        def expected(T, epsilon, recipe=recipe, what=what):
            factor = "worst" if what == "gain" else what
            values, plain = (scores(of(results, recipe=recipe, T=T, epsilon=e), factor) for e in (epsilon, 0))
            values = values - plain if what == "gain" else values
            return values.mean(), half(values)

        own_places = [place for place in PLACES if what != "gain" or place[1] != 0]
        points = list(curves(row[0]).values())
        for (x, y, halves), (T, epsilon) in zip(points, own_places, strict=True):
            runs = of(results, recipe=recipe, T=T, epsilon=epsilon)
            assert x == pytest.approx([np.mean([run["losses"]["info_nce"] for run in runs])])
            assert (*y, *halves) == pytest.approx(expected(T, epsilon))
        for axis, name, own, other in (
            (row[1], "epsilon", EPSILONS, TEMPERATURES), (row[2], "T", TEMPERATURES, EPSILONS),
        ):  # fmt: skip
            ticks = list(other)
            if what == "gain":
                own, other = (tuple(v for v in values if v != 0) for values in (own, other))
            found = curves(axis)
            assert list(found) == [f"{name} {value:g}" for value in own]
            for value, (x, y, halves) in zip(own, found.values(), strict=True):
                pairs = [(T, value) if name == "epsilon" else (value, T) for T in other]
                assert [ticks[place] for place in np.round(x).astype(int)] == list(other)  # beside their tick
                means = [expected(*pair) for pair in pairs]
                assert y == pytest.approx([mean for mean, _ in means])
                assert halves == pytest.approx([width for _, width in means])
            assert len({x[0] for x, *_ in found.values()}) == len(own)  # none hides another
        (at_chance,) = [line for line in row[0].lines if line.get_label() == "loss at chance"]
        assert at_chance.get_xdata()[0] == pytest.approx(math.log(1025))
        level = 0 if what == "gain" else scores(of(results, trained=False), what).mean()
        for axis in row:
            name = "no gain" if what == "gain" else "untrained"
            levels = [line for line in axis.lines if line.get_label() in ("no gain", "untrained")]
            assert [line.get_label() for line in levels] == [name]
            assert levels[0].get_ydata()[0] == pytest.approx(level)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    above, below = labels[::2], labels[1::2]  # it is filled by columns
    assert above == [*(f"epsilon {e:g}" for e in EPSILONS), "", ""]
    assert below == ["loss at chance", "untrained", "T 0.07", "T 0.2", "no gain"]
    for place in np.ndindex(panels.shape):  # what a recipe's panels share
        assert panels[place].get_xlim() == panels[place[0] // 5 * 5, place[1]].get_xlim()
    assert panels[0][0].get_xlim() != panels[9][0].get_xlim()
    for axis, values in zip(panels[-1][1:], (TEMPERATURES, EPSILONS), strict=True):
        assert [tick.get_text() for tick in axis.get_xticklabels()] == [f"{v:g}" for v in values]


def test_the_figure_holds_the_readouts_against_random_bits(tmp_path):
    results = made("randbit", recipes=("v2",), bits=(0, 3, 8), temperatures=(0.2,))
    figure = figure_of("randbit", results)
    *axes, gains = figure.axes
    for axis, factor in zip(axes, (*FACTORS, "worst"), strict=True):
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
    found = curves(gains)
    assert list(found) == [f"epsilon {e:g}" for e in EPSILONS[1:]]
    for epsilon, (x, y, halves) in zip(EPSILONS[1:], found.values(), strict=True):
        places = [[of(results, bits=b, epsilon=e) for e in (epsilon, 0)] for b in (0, 3, 8)]
        values = [scores(runs, "worst") - scores(plain, "worst") for runs, plain in places]
        assert np.round(x).tolist() == [0, 3, 8] and y == pytest.approx([v.mean() for v in values])
        assert halves == pytest.approx([half(v) for v in values])
    draw("randbit", results, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.format == "PNG" and image.width == 1000


def test_the_second_reading_of_encoders_with_bits_has_panels_of_its_own():
    results = made("randbit", bits=(0, 3), temperatures=(0.2,), shared=True)
    figure = figure_of("randbit", results)
    panels = np.array(figure.axes).reshape(4, 5)
    titles = [f"{recipe}, T 0.2{how}" for recipe in ("crops", "v2") for how in ("", "\nshared bits")]
    assert [row[0].get_title() for row in panels] == titles
    alone = figure_of("randbit", second_reading(results))
    for own, only in zip(panels[1::2].flat, alone.axes, strict=True):
        assert curves(own) == curves(only) and own.get_ylabel() == only.get_ylabel()
    assert curves(panels[0][0]) != curves(panels[1][0])  # negative control
    assert "read with those of one" in figure.get_supxlabel()
    assert "read with those of one" not in alone.get_supxlabel()
    trained = [{k: v for k, v in r.items() if k != "readout_shared_bits"} for r in results if r["trained"]]
    these = [r for r in (*trained, *of(results, trained=False)) if r["bits"]]
    assert len(figure_of("randbit", these).axes) == 2 * 5  # no trained run was read twice


def test_of_one_number_of_bits_the_untrained_level_is_seen():
    results = made("randbit", recipes=("v2",), bits=(8,), temperatures=(0.2,))
    axis = figure_of("randbit", results).axes[0]
    (line,) = [line for line in axis.lines if line.get_label() == "untrained"]
    level = scores(of(results, trained=False), "shape").mean()
    assert list(line.get_xdata()) == [7.5, 8.5] and list(line.get_ydata()) == pytest.approx([level] * 2)


def test_a_single_run_is_hollow_and_has_no_bars():
    results = [r for r in made() if r["seed"] == 0 or (r.get("recipe"), r.get("T")) != ("v2", 0.2)]
    figure = figure_of("trifeature", results)
    figure.draw_without_rendering()
    panels = np.array(figure.axes).reshape(10, 3)
    for row, recipe in zip(panels[::5], ("crops", "v2"), strict=True):
        for axis, of_each in zip(row, (1, len(TEMPERATURES), len(EPSILONS)), strict=True):
            hollow = [line for line in axis.lines if line.get_markerfacecolor() == "white"]
            points = [point for line in hollow for point in line.get_xdata()]
            assert len(points) == (len(EPSILONS) if recipe == "v2" else 0)  # all those of T 0.2
            assert all(len(bars.lines[0].get_xdata()) == of_each for bars in axis.containers)
    assert "hollow: of one run" in figure.get_supxlabel() and "diverged" not in figure.get_supxlabel()


def test_of_one_seed_and_of_diverged_runs_there_is_a_figure():
    figure = figure_of("trifeature", [result for result in made() if result["seed"] == 0])
    figure.draw_without_rendering()
    assert [len(axis.containers) for axis in figure.axes[:3]] == [6, 3, 2]
    results = diverged(made(), recipe="v2", T=0.2, epsilon=0)
    figure = figure_of("trifeature", diverged(results, T=0.07, epsilon=0.5))
    figure.draw_without_rendering()
    assert [len(axis.containers) for axis in figure.axes[:3]] == [5, 3, 2]
    assert "9 of 36 runs diverged and are left out" in figure.get_supxlabel()
    figure = figure_of("trifeature", diverged(made(), epsilon=0.5))  # what was tried keeps its place
    assert [tick.get_text() for tick in figure.axes[-1].get_xticklabels()] == [f"{e:g}" for e in EPSILONS]


def test_gains_stand_at_the_losses_of_their_own_runs():
    results = diverged(made(), recipe="crops", T=0.2, epsilon=0, seed=1)
    axis = np.array(figure_of("trifeature", results).axes).reshape(10, 3)[4][0]
    found = list(curves(axis).values())[len(EPSILONS) - 1]  # after those of T 0.07
    runs = [r for r in of(results, recipe="crops", T=0.2, epsilon=EPSILONS[1]) if r["seed"] != 1]
    assert found[0] == pytest.approx([np.mean([run["losses"]["info_nce"] for run in runs])])


def test_of_one_factor_the_gain_is_its_own():
    results = [r | {"readout": {"class": r["readout"]["shape"]}} for r in made()]
    figure = figure_of("trifeature", results)
    assert {axis.get_ylabel()[:13] for axis in figure.axes} == {
        "class, %\n(cro",
        "class, %\n(v2)",
        "gain of class",
        "",
    }
    assert "worst" not in figure.get_supxlabel().lower()


def test_a_sweep_with_renewed_statistics_shows_the_first_reading_and_says_so():
    results = made(recipes=("crops",))
    renewed = [r | {RENEWED: o["readout"]} for r, o in zip(results, results[::-1], strict=True)]
    plain, figure = (figure_of("trifeature", found) for found in (results, renewed))
    for one, two in zip(plain.axes, figure.axes, strict=True):
        assert list(map(str, curves(one).values())) == list(map(str, curves(two).values()))
    assert (
        figure._supxlabel.get_text() == plain._supxlabel.get_text() + " Read with BatchNorm's own statistics."
    )
