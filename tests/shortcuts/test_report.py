"""The table and the figure of a sweep: SciPy's intervals of the right runs, and none of what diverged."""

import math

import numpy as np
import pytest
from scipy import stats
from sweep_results import BITS, FACTORS, LOSSES, SEEDS, TEMPERATURES, made

from moco.shortcuts.figures import draw, figure_of
from moco.shortcuts.report import READINGS, cell, interval, number, rows, table, untrained


def half(values):
    return stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))


def test_an_interval_is_scipys():
    rng = np.random.default_rng(0)
    for n in range(2, 32):
        values = rng.normal(3, 5, n).tolist()
        assert interval(values) == pytest.approx((np.mean(values), half(values)), rel=1e-4)
    many = rng.normal(3, 5, 100).tolist()
    assert 1 < interval(many)[1] / half(many) < 1.03  # beyond the table a little too wide
    assert interval([2.0])[0] == 2 and math.isnan(interval([2.0])[1]) and math.isnan(interval([])[0])
    assert (cell([1, 2]), cell([1.0], 2, "+"), cell([])) == ("1.5 ± 6.4", "+1.00", "")
    assert [number(v) for v in (0, -0.0, 0.1, 1e-7, 4, "all")] == ["0", "-0", "0.1", "1e-07", "4", "all"]


def sections(text):
    """{(reading, what): {setting: cells}} of the tables."""
    found, reading, what = {}, None, None
    for line in text.splitlines():
        if line.startswith(("Read with", "The same")):
            reading, what = ("own" if line.startswith("Read") else "shared"), "values"
        elif line.startswith("Difference"):
            what = "to epsilon 0" if "to epsilon 0" in line else "to untrained"
        elif line.startswith("| ") and not line.startswith(("| T |", "| --- |")):
            cells = [cell.strip() for cell in line.split("|")[1:-1]]
            found.setdefault((reading, what), {})[tuple(cells[:4])] = cells[4:]
    return found


def score(results, reading, factor, **place):
    """Of the runs in a place, by seed."""
    mine = [r for r in results if all(r.get(name) == value for name, value in place.items())]
    mine = sorted(mine, key=lambda run: run["seed"])
    return np.array([r.get(reading, r["readout"])[factor]["accuracy"] for r in mine])


def test_every_cell_of_the_table_is_of_its_runs():
    results = made()
    found = sections(table(results))
    assert len(found) == 6
    for name, reading in zip(("own", "shared"), READINGS, strict=True):
        values, to_plain, to_start = (found[name, w] for w in ("values", "to epsilon 0", "to untrained"))
        assert values["chance", "", "", ""] == ["", "", "10.0", "10.0", "10.0"]
        assert len(values) == 1 + 2 + 12 and len(to_plain) == 8 and len(to_start) == 4
        for bits in BITS:
            start = {f: score(results, reading, f, trained=False, bits=bits) for f in FACTORS}
            cells = values["untrained", str(bits), "", ""]
            assert cells[0] == "3" and cells[2:] == [cell(start[f].tolist()) for f in FACTORS]
            for T in TEMPERATURES:
                of = {"trained": True, "bits": bits, "T": T}
                plain = {f: score(results, reading, f, **of, epsilon=0) for f in FACTORS}
                for method, epsilon in LOSSES:
                    key = str(T), str(bits), method or "", str(epsilon)
                    mine = {f: score(results, reading, f, **of, method=method) for f in FACTORS}
                    assert values[key][2:] == [cell(mine[f].tolist()) for f in FACTORS]
                    changes = {f: mine[f] - (plain if method else start)[f] for f in FACTORS}
                    expected = [f"{np.mean(c):+.1f} ± {half(c):.1f}" for c in changes.values()]
                    assert (to_plain if method else to_start)[key][2:] == expected
                    assert (key in to_plain) == bool(method)
    nats = found["own", "values"]["0.2", "0", "", "0"][1]
    losses = [
        r["losses"]["info_nce"] for r in results if r.get("T") == 0.2 and not r["bits"] and not r["epsilon"]
    ]
    assert nats == f"{np.mean(losses):.3f} ± {half(losses):.3f}"
    assert (
        found["own", "to epsilon 0"]["0.2", "0", "ifm", "0.1"][1]
        and not found["own", "to untrained"]["0.2", "0", "", "0"][1]
    )


def test_what_diverged_is_named_and_counts_nowhere():
    results = made()
    for run in results:
        if run["trained"] and run["seed"] == 1 and run["method"] == "ifm" and run["T"] == 0.2:
            for name in (*READINGS, "losses"):
                run.pop(name, None)
            run |= {"diverged": True}
    text = table(results)
    found = sections(text)
    assert found["own", "values"]["0.2", "4", "ifm", "0.1"][0] == "2"
    assert found["own", "to epsilon 0"]["0.2", "4", "ifm", "0.1"][0] == "2"
    assert found["own", "values"]["0.2", "4", "", "0"][0] == "3"
    last = text.splitlines()[-1]
    assert last.startswith("Diverged and left out: ") and set(last[23:].split(", ")) == {
        "1_0_0.2_ifm",
        "1_4_0.2_ifm",
    }


def test_a_sweep_that_has_just_begun_has_a_table():
    results = made()
    start = [run for run in results if not run["trained"]][:1]
    assert "| untrained |" in table(start) and "Difference" not in table(start)
    assert rows(start) == {} and list(untrained(start, start[0]["bits"])) == [start[0]["seed"]]


def test_the_figure_shows_every_mean_and_interval(tmp_path):
    pytest.importorskip("matplotlib")
    results = made()
    figure = figure_of(results)
    assert len(figure.axes) == 2 * 2 * 3
    (axis,) = (a for a in figure.axes if a.get_title(loc="left") == "texture, shared bits, T 0.07")
    lines = {c.get_label(): c for c in axis.containers}
    assert set(lines) == {"untrained", "InfoNCE", "ifm, epsilon 0.1", "ifm_only, epsilon 0.1"}
    for label, method in (
        ("InfoNCE", None),
        ("ifm, epsilon 0.1", "ifm"),
        ("ifm_only, epsilon 0.1", "ifm_only"),
    ):
        line, _, (bars,) = lines[label]
        for place, (b, mean, (low, high)) in enumerate(
            zip(BITS, line.get_ydata(), [s[:, 1] for s in bars.get_segments()], strict=True)
        ):
            of = {"trained": True, "bits": b, "T": 0.07, "method": method}
            values = score(results, "readout_shared_bits", "texture", **of)
            assert len(values) == len(SEEDS) and mean == pytest.approx(np.mean(values))
            assert (high - low) / 2 == pytest.approx(half(values), rel=1e-4)
            assert abs(line.get_xdata()[place] - b) < 0.2
    single = [run for run in results if run["seed"] == 0 and run["bits"] == 0]
    draw(single, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure_of(single).axes) == 2 * 3  # one reading
