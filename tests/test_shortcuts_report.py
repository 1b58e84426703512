"""What a sweep tells: intervals as scipy's, and a table that holds the results' numbers."""

import itertools
import re
import sys

import numpy as np
import pytest
from scipy import stats
from sweep_results import (
    EPSILONS,
    FACTORS,
    SEEDS,
    TEMPERATURES,
    diverged,
    half,
    made,
    of,
    scores,
    second_reading,
)

from moco.intervals import interval, t_quantile
from moco.measure import RENEWED, SHARED
from moco.shortcuts_report import SECOND, table, write_report


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


def cells(text):
    """The rows of all tables: [{column: cell}, ...] each."""
    found = []
    for lines in re.split("Difference (?:to|of) epsilon 0", text):
        head, _, *body = [line.split("|")[1:-1] for line in lines.splitlines() if line[:1] == "|"]
        found.append([dict(zip(map(str.strip, head), map(str.strip, row), strict=True)) for row in body])
    return found


def test_the_table_holds_means_intervals_and_paired_differences():
    results = made()
    plain, differences, learned = cells(table(results))
    assert len(plain) == 2 + 12 and len(differences) == 8 + 4
    assert plain[0]["recipe"] == "chance" and "bits" not in plain[0]
    randbit = made("randbit", recipes=("v2",), bits=(0, 3, 8), temperatures=(0.2,))
    assert [row["bits"] for row in cells(table(randbit))[0]] == ["", *"038", *("000333888")]
    assert plain[1]["recipe"] == "untrained"
    for column in (*FACTORS, "worst"):
        values = scores(of(results, trained=False), column)
        assert plain[1][column] == f"{values.mean():.1f} ± {half(values):.1f}"
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
        assert row["seeds"] == "3" and row["InfoNCE"] == f"{loss.mean():+.3f} ± {half(loss):.3f}"
    assert [(row["recipe"], row["T"], row["epsilon"]) for row in learned] == [
        (recipe, T, "0") for recipe in ("crops", "v2") for T in ("0.07", "0.2")
    ]
    start = of(results, trained=False)
    for row in learned:
        runs = of(results, recipe=row["recipe"], T=float(row["T"]), epsilon=0)
        for column in (*FACTORS, "worst"):
            values = scores(runs, column) - scores(start, column)
            assert row[column] == f"{values.mean():+.1f} ± {half(values):.1f}"
    assert "InfoNCE" not in learned[0]
    kept = [result for result in results if result["trained"] or result["seed"] != 1]
    assert {row["seeds"] for row in cells(table(kept))[2]} == {"2"}
    of_bits = cells(table(randbit))[2]
    start, runs = of(randbit, trained=False, bits=3), of(randbit, trained=True, bits=3, epsilon=0)
    assert [row["bits"] for row in of_bits] == ["0", "3", "8"]
    assert of_bits[1]["shape"].startswith(f"{(scores(runs, 'shape') - scores(start, 'shape')).mean():+.1f} ±")


def test_the_table_holds_differences_over_all_temperatures_where_there_are_several():
    results = [result for result in made() if result["name"] != "v2_T0.2_eps0_bits0_seed1"]
    text = table(results)
    places = itertools.product(("crops", "v2"), EPSILONS[1:])
    for row, (recipe, epsilon) in zip(cells(text)[1][8:], places, strict=True):
        assert (row["recipe"], row["T"], row["epsilon"]) == (recipe, "all", f"{epsilon:g}")
        seeds = SEEDS if recipe == "crops" else (0, 2)  # those with every T, one value each
        for column in (*FACTORS, "worst"):
            values = []
            for seed in seeds:
                gains = []
                for T in TEMPERATURES:
                    place = {"recipe": recipe, "T": T, "seed": seed}
                    one, two = (scores(of(results, **place, epsilon=e), column) for e in (epsilon, 0))
                    gains.append(one[0] - two[0])
                values.append(np.mean(gains))
            assert row[column] == f"{np.mean(values):+.1f} ± {half(values):.1f}"
        assert row["seeds"] == str(len(seeds)) and row["InfoNCE"] == ""
    assert "T all: the mean over T of each seed that has every T" in text
    assert "about 1.8 of these 36 intervals of factors would leave out 0" in text  # 12 rows of 3
    for fewer, left in (({"T": 0.2}, set()), ({"recipe": "crops", "T": 0.07}, {"v2"})):
        these = [r for r in results if any(r.get(name) != value for name, value in fewer.items())]
        assert {row["recipe"] for row in cells(table(these))[1] if row["T"] == "all"} == left
    three = made(temperatures=(0.07, 0.2, 0.5))
    these = diverged(three, recipe="v2", T=0.5, epsilon=0.5)  # no mean of two T beside means of three
    everywhere = {(row["recipe"], row["epsilon"]) for row in cells(table(these))[1] if row["T"] == "all"}
    assert everywhere == {("crops", "0.05"), ("crops", "0.5"), ("v2", "0.05")}
    assert "all" not in {row["T"] for row in cells(table([r for r in results if r["seed"] == 0]))[1]}


def test_diverged_runs_are_shown_and_their_pairs_left_out(tmp_path):
    results = diverged(made(), recipe="v2", T=0.2, epsilon=0, seed=1)
    results = diverged(results, recipe="crops", T=0.07, epsilon=0.5)
    text = table(results)
    plain, differences, learned = cells(text)
    assert {(row["recipe"], row["T"]): row["seeds"] for row in learned}["v2", "0.2"] == "2"
    by_place = {(row["recipe"], row["T"], row.get("epsilon")): row for row in plain}
    some, none = by_place["v2", "0.2", "0"], by_place["crops", "0.07", "0.5"]
    values = scores([r for r in of(results, recipe="v2", T=0.2, epsilon=0) if "readout" in r], "shape")
    assert some["seeds"] == "2, 1 diverged" and some["shape"] == f"{values.mean():.1f} ± {half(values):.1f}"
    assert none["seeds"] == "0, 3 diverged" and none["shape"] == ""
    pairs = {(row["recipe"], row["T"], row["epsilon"]): row["seeds"] for row in differences}
    assert pairs["v2", "0.2", "0.5"] == pairs["v2", "all", "0.5"] == "2" and len(pairs) == 7 + 3
    assert not {("crops", "0.07", "0.5"), ("crops", "all", "0.5")} & pairs.keys()  # of T 0.2 alone
    assert text.count("diverged: the loss of epoch 3 became nan or infinite") == 4
    assert "v2_T0.2_eps0_bits0_seed1 diverged: the loss" in text
    everything = diverged(made())
    told = write_report(tmp_path, "trifeature", everything)
    assert told.count("0, 3 diverged") == 12 and [path.name for path in tmp_path.iterdir()] == ["table.md"]
    assert write_report(tmp_path, "trifeature", everything[:0]) == "nothing to show yet"


def test_runs_that_diverged_before_any_readout_have_a_table_too(tmp_path):
    (wild,) = of(made(), trained=False, seed=1)
    wild = {k: v for k, v in wild.items() if k != "readout"} | {"diverged": True, "reason": "a feature nan"}
    others = [result for result in made() if result["name"] != wild["name"]]
    plain, *_ = cells(table([*others, wild]))
    values = scores(of(others, trained=False), "shape")
    assert plain[1]["seeds"] == "2" and plain[1]["shape"] == f"{values.mean():.1f} ± {half(values):.1f}"
    assert f"{wild['name']} diverged: a feature nan\n" in table([*others, wild])
    trained = diverged(of(made(), recipe="v2", T=0.2, epsilon=0))
    told = write_report(tmp_path, "trifeature", [wild, *trained])
    assert told.count("diverged: ") == 4 and "| v2 | 0.2 | 0 | 0, 3 diverged |" in told
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]


def test_both_readings_with_statistics_are_shown():
    results, other = made(recipes=("crops",)), made(recipes=("crops",))[::-1]
    results = [r | {RENEWED: o["readout"]} for r, o in zip(results, other, strict=True)]
    first, second = table(results).split(SECOND[RENEWED])
    renewed = [{**r, "readout": r[RENEWED]} for r in results]
    assert cells(first) == cells(table(made(recipes=("crops",)))) != cells(second)
    assert cells(second) == cells(table(renewed).split(SECOND[RENEWED])[0])
    old = [r if r["seed"] else {k: v for k, v in r.items() if k != RENEWED} for r in results]
    names = ", ".join(r["name"] for r in old if r["seed"] == 0)
    assert f"These were not read with renewed statistics of BatchNorm: {names}\n" in table(old)
    assert "statistics" not in table(made())


def test_both_readings_of_encoders_with_bits_are_shown():
    results = made("randbit", recipes=("v2",), bits=(0, 3), temperatures=(0.2,), shared=True)
    assert SECOND[SHARED] not in table(made("randbit", bits=(0, 3)))
    first, second = table(results).split(SECOND[SHARED])
    own = [{k: v for k, v in result.items() if k != SHARED} for result in results]
    assert cells(first) == cells(table(own)) and cells(second) == cells(table(second_reading(results)))
    for one, two in zip(cells(first)[0], cells(second)[0], strict=True):
        assert (one == two) == (one["bits"] != "3")  # chance, and runs without bits, are the same
    alone = [result for result in results if result["bits"] == 3]
    assert len(cells(table(alone).split(SECOND[SHARED])[1])[0]) == 2 + 3
    assert "were not read with the same bits" not in table(results) + table(made("randbit", bits=(0, 3)))
    old = [r if r["seed"] else {k: v for k, v in r.items() if k != SHARED} for r in results]
    counts = {(row["bits"], row["seeds"]) for row in cells(table(old).split(SECOND[SHARED])[1])[0]}
    assert counts == {("", ""), ("0", "3"), ("3", "2")}  # what has no second reading has no place in it
    names = ", ".join(r["name"] for r in old if r["bits"] and r["seed"] == 0)
    assert f"These were not read with the same bits for all images: {names}\n" in table(old)
    only = [r if not r["trained"] else {k: v for k, v in r.items() if k != SHARED} for r in results]
    text = table(only)  # no trained run has it
    assert SECOND[SHARED] not in text and "same bits for all" not in text
    wild = table(diverged(results, bits=3, epsilon=0.5)).split(SECOND[SHARED])[1]
    assert cells(wild)[0][-1]["seeds"] == "0, 3 diverged"


def test_of_one_factor_there_is_no_worst():
    results = [r | {"readout": {"class": r["readout"]["shape"]}} for r in made()]
    plain, differences, _ = cells(table(results))
    assert "worst" not in plain[0].keys() | differences[0].keys() and plain[2]["class"]
    assert "worst" not in table(results) and "worst: the factor" in table(made())


def test_values_that_differ_in_the_last_digits_are_told_apart():
    results = [r | {"epsilon": 0.12345678 + 1e-8 * (r["epsilon"] == 0.5)} for r in made() if r["trained"]]
    assert {row["epsilon"] for row in cells(table(results))[0]} == {"", "0.12345678", "0.12345679"}


def test_one_seed_has_no_interval():
    text = table([result for result in made() if result["seed"] == 0])
    plain, differences, learned = cells(text)
    assert "If epsilon changed nothing" not in text and "If epsilon changed nothing" in table(made())
    assert not any("±" in text for row in plain + differences + learned for text in row.values())


def test_the_row_of_chance_holds_the_loss_of_telling_nothing_apart():
    results = [result | {"moco_k": 1024} for result in made()]
    assert cells(table(results))[0][0]["InfoNCE"] == f"{np.log(1025):.3f}"
    assert cells(table(made()))[0][0]["InfoNCE"] == ""


def test_without_matplotlib_there_is_a_table_and_its_pip_line(tmp_path, monkeypatch):
    results = made()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        told = write_report(tmp_path, "trifeature", results)
    assert told.endswith("table.md; no figure: the figure needs matplotlib: `pip install matplotlib`")
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]
    assert (tmp_path / "table.md").read_text() == table(results) and told.startswith(table(results))
