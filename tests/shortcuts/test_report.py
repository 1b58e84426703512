"""The table and the figure of a sweep: SciPy's intervals of the right runs, and none of what diverged."""

import itertools
import math
import random

import numpy as np
import pytest
from scipy import stats

from moco.shortcuts.report import READINGS, cell, figure_of, interval, number, rows, table

SEEDS, TEMPERATURES, BITS = (0, 1, 2), (0.07, 0.2), (0, 4)
LOSSES = ((None, 0), ("ifm", 0.1), ("ifm_only", 0.1))
FACTORS = ("shape", "texture", "color")


@pytest.fixture
def results():
    """Results of a sweep as moco.shortcuts records them, of random numbers, in any order."""
    rng = random.Random(0)

    def measured(bits):
        readings = READINGS if bits else ("readout",)
        return {r: {f: {"accuracy": rng.uniform(20, 90), "chance": 10.0} for f in FACTORS} for r in readings}

    found = [
        {"name": f"untrained_{s}_{b}", "trained": False, "seed": s, "bits": b, **measured(b)}
        for s, b in itertools.product(SEEDS, BITS)
    ]
    for s, b, T, (method, epsilon) in itertools.product(SEEDS, BITS, TEMPERATURES, LOSSES):
        run = {"trained": True, "seed": s, "bits": b, "T": T, "method": method, "epsilon": epsilon}
        losses = {"training": rng.uniform(1, 3)}
        found.append({"name": f"{s}_{b}_{T}_{method}", **run, **measured(b), "losses": losses})
    rng.shuffle(found)
    return found


def half(values):
    return stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))


def score(results, reading, factor, **place):
    """Of the runs in a place, by seed."""
    mine = [r for r in results if all(r.get(name) == value for name, value in place.items())]
    mine = sorted(mine, key=lambda run: run["seed"])
    return np.array([r.get(reading, r["readout"])[factor]["accuracy"] for r in mine])


def sections(text):
    """{(reading, "values" or "differences"): {setting: cells}} of the tables."""
    found, reading, what = {}, None, None
    for line in text.splitlines():
        if line.startswith(("Read with", "The same")):
            reading, what = ("own" if line.startswith("Read") else "shared"), "values"
        elif line.startswith("Difference"):
            what = "differences"
        elif line.startswith("| ") and not line.startswith(("| T |", "| --- |")):
            cells = [cell.strip() for cell in line.split("|")[1:-1]]
            found.setdefault((reading, what), {})[tuple(cells[:4])] = cells[4:]
    return found


def test_an_interval_is_scipys():
    rng = np.random.default_rng(0)
    for n in range(2, 32):
        values = rng.normal(3, 5, n).tolist()
        assert interval(values) == pytest.approx((np.mean(values), half(values)), rel=1e-4)
    many = rng.normal(3, 5, 100).tolist()
    assert 1 < interval(many)[1] / half(many) < 1.03  # beyond the table a little too wide
    assert math.isnan(interval([2.0])[1])
    assert (cell([1, 2]), cell([1.0], 2, "+"), cell([])) == ("1.5 ± 6.4", "+1.00", "")
    assert [number(v) for v in (0, 0.1, 1e-7, 4, "all")] == ["0", "0.1", "1e-07", "4", "all"]


def test_every_cell_of_the_table_is_of_its_runs(results):
    found = sections(table(results))
    assert len(found) == 4
    for name, reading in zip(("own", "shared"), READINGS, strict=True):
        values, differences = found[name, "values"], found[name, "differences"]
        assert values["chance", "", "", ""] == ["", "", "10.0", "10.0", "10.0"]
        assert len(values) == 1 + 2 + 12 and len(differences) == 12
        for bits in BITS:
            start = {f: score(results, reading, f, trained=False, bits=bits) for f in FACTORS}
            assert values["untrained", str(bits), "", ""] == ["3", "", *map(cell, start.values())]
            for T, (method, epsilon) in itertools.product(TEMPERATURES, LOSSES):
                of = {"trained": True, "bits": bits, "T": T}
                key = str(T), str(bits), method or "", str(epsilon)
                plain = {f: score(results, reading, f, **of, epsilon=0) for f in FACTORS}
                mine = {f: score(results, reading, f, **of, method=method) for f in FACTORS}
                changes = [mine[f] - (plain if method else start)[f] for f in FACTORS]
                assert values[key][2:] == [cell(mine[f]) for f in FACTORS]
                assert differences[key] == ["3", *(cell(change, sign="+") for change in changes)]
    plain = [r for r in results if r.get("T") == 0.2 and not r["bits"] and not r["epsilon"]]
    nats = found["own", "values"]["0.2", "0", "", "0"][1]
    assert nats == cell([r["losses"]["training"] for r in plain], 3)


def test_what_diverged_is_named_and_counts_nowhere(results):
    for run in results:
        if run["trained"] and run["seed"] == 1 and run["method"] == "ifm" and run["T"] == 0.2:
            for name in (*READINGS, "losses"):
                run.pop(name, None)
            run["diverged"] = True
    text = table(results)
    for what in ("values", "differences"):
        counts = sections(text)["own", what]
        assert counts["0.2", "4", "ifm", "0.1"][0] == "2" and counts["0.2", "4", "", "0"][0] == "3"
    last = text.splitlines()[-1].removeprefix("Diverged and left out: ")
    assert set(last.split(", ")) == {"1_0_0.2_ifm", "1_4_0.2_ifm"}


def test_a_sweep_that_has_just_begun_has_a_table(results):
    start = [run for run in results if not run["trained"]][:1]
    assert "| untrained |" in table(start) and "Difference" not in table(start) and rows(start) == {}


def test_the_figure_shows_every_mean_and_interval(results):
    pytest.importorskip("matplotlib")
    figure = figure_of(results)
    assert len(figure.axes) == 2 * 2 * 3
    (axis,) = (a for a in figure.axes if a.get_title(loc="left") == "texture, shared bits, T 0.07")
    lines = {container.get_label(): container for container in axis.containers}
    methods = {"InfoNCE": None, "ifm, epsilon 0.1": "ifm", "ifm_only, epsilon 0.1": "ifm_only"}
    assert set(lines) == {"untrained", *methods}
    for label, method in methods.items():
        line, _, (bars,) = lines[label]
        for place, bits in enumerate(BITS):
            of = {"trained": True, "bits": bits, "T": 0.07, "method": method}
            values = score(results, "readout_shared_bits", "texture", **of)
            low, high = bars.get_segments()[place][:, 1]
            assert line.get_ydata()[place] == pytest.approx(np.mean(values))
            assert (high - low) / 2 == pytest.approx(half(values), rel=1e-4)
            assert abs(line.get_xdata()[place] - bits) < 0.2
    single = [run for run in results if run["seed"] == 0 and run["bits"] == 0]
    assert len(figure_of(single).axes) == 2 * 3  # one reading
