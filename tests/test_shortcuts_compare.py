"""Two sweeps set against each other, by seed."""

import json

import numpy as np
import pytest
from PIL import Image
from sweep_results import EPSILONS, FACTORS, SEEDS, diverged, half, made, of, scores
from test_shortcuts_figure import curves

from moco import shortcuts_compare
from moco.errors import UserError
from moco.measure import RENEWED
from moco.shortcuts_compare import comparison, figure
from moco.shortcuts_report import SECOND
from moco.sweep import RESULTS, SETTINGS

WITH, WITHOUT = {"image_size": 32, "read_without": "color"}, {"image_size": 32, "hide": "color"}


def folder_of(folder, results, settings):
    folder.mkdir()
    (folder / SETTINGS).write_text(json.dumps(settings))
    (folder / RESULTS).write_text("".join(json.dumps(result) + "\n" for result in results))
    return folder


def others(results):
    """The same runs with other readouts, as of another training; untrained ones read the same."""
    rng = np.random.default_rng(1)
    for result in json.loads(json.dumps(results)):
        for readout in result["readout"].values() if result["trained"] else ():
            readout["accuracy"] += rng.uniform(-20, 5)
        yield result


def cells(text):
    head, _, *body = (
        [c.strip() for c in row.split("|")[1:-1]] for row in text.splitlines() if row[:1] == "|"
    )
    return [dict(zip(head, row, strict=True)) for row in body]


def test_differences_are_paired_by_seed(tmp_path, capsys, monkeypatch):
    base = made()
    first = list(others(base))
    folders = [folder_of(tmp_path / "a", first, WITH), folder_of(tmp_path / "b", base[::-1], WITHOUT)]
    text = comparison(*folders)
    assert text.splitlines()[:2] == [
        "Linear readout of a less that of b with the same seed: points.",
        "The sweeps differ in pictures: hide None and color; read_without color and None.",
    ]
    assert "about 2.7 of these 54 intervals" in text  # 12 places and 6 over both T, of three factors
    table = cells(text)
    assert table[0] == {
        "recipe": "untrained",
        "T": "",
        "epsilon": "",
        "less epsilon": "",
        "seeds": "3",
    } | dict.fromkeys((*FACTORS, "worst"), "+0.0 ± 0.0")
    assert len(table) == 1 + 12 + 6
    for row in table[1:]:
        place = {"recipe": row["recipe"], "epsilon": float(row["epsilon"]), "trained": True}
        assert row["less epsilon"] == row["epsilon"]
        temperatures = [0.07, 0.2] if row["T"] == "all" else [float(row["T"])]
        for factor in (*FACTORS, "worst"):
            apart = [scores(of(first, **place, T=T), factor) - scores(of(base, **place, T=T), factor)
                     for T in temperatures]  # fmt: skip
            values = np.mean(apart, axis=0)
            assert row[factor] == f"{values.mean():+.1f} ± {half(values):.1f}"
    monkeypatch.setattr("sys.argv", ["shortcuts_compare", *map(str, folders)])
    shortcuts_compare.main()
    assert capsys.readouterr().out == text


def test_only_what_both_have_is_compared(tmp_path):
    base = made(recipes=("crops",))
    part = [r for r in others(base) if r["seed"] != 2 and r.get("T") != 0.07]
    part = diverged(part, seed=1, epsilon=0)
    folders = [folder_of(tmp_path / "a", part, WITH), folder_of(tmp_path / "b", base, WITH)]
    text = comparison(*folders)
    assert "The sweeps have the same settings." in text
    found = [(row["recipe"], row["T"], row["epsilon"], row["seeds"]) for row in cells(text)]
    counts = (("0", "1, 1 diverged"), ("0.05", "2"), ("0.5", "2"))
    places = [("crops", "0.2", epsilon, count) for epsilon, count in counts]
    assert found == [("untrained", "", "", "2"), *places]
    (wild,) = (run["name"] for run in part if run.get("diverged"))
    assert f"\na: {wild} diverged: the loss of epoch 3 became nan or infinite\n" in text
    assert "±" not in cells(text)[1]["shape"] and "about 0.3 of these 6 intervals" in text


def test_an_epsilon_that_the_second_lacks_is_compared_with_its_epsilon_0(tmp_path):
    base = made(recipes=("crops",))
    first = list(others(base))
    plain = [r for r in base if not r["trained"] or r["epsilon"] == 0]
    table = cells(
        comparison(folder_of(tmp_path / "a", first, WITH), folder_of(tmp_path / "b", plain, WITHOUT))
    )
    assert {(row["epsilon"], row["less epsilon"]) for row in table[1:]} == {
        (e, "0") for e in ("0", "0.05", "0.5")
    }
    (row,) = (row for row in table if (row["T"], row["epsilon"]) == ("0.2", "0.5"))
    values = scores(of(first, T=0.2, epsilon=0.5), "shape") - scores(of(plain, T=0.2, epsilon=0), "shape")
    assert row["shape"] == f"{values.mean():+.1f} ± {half(values):.1f}"
    perturbed = [r for r in first if not r["trained"] or r["epsilon"]]
    alone = folder_of(tmp_path / "c", perturbed, WITH)
    axes = figure(alone, tmp_path / "b").axes
    assert len(axes) == 6 and len(curves(axes[0])["c"][0]) == 2 and len(curves(axes[0])["b"][0]) == 1


def test_runs_that_all_diverged_keep_their_row(tmp_path):
    base = made(recipes=("crops",))
    wild = diverged(base, epsilon=0.5, T=0.2)
    text = comparison(folder_of(tmp_path / "a", wild, WITH), folder_of(tmp_path / "b", base, WITH))
    row = next(row for row in cells(text) if (row["T"], row["epsilon"]) == ("0.2", "0.5"))
    assert row["seeds"] == "0, 3 diverged" and row["shape"] == "" and text.count(" diverged: the loss") == 3


def test_two_readings_are_compared_each_with_its_own(tmp_path):
    base, other = made(recipes=("crops",)), made(recipes=("crops",))[::-1]
    first, second = list(others(base)), list(others(other))
    one = [r | {RENEWED: o["readout"]} for r, o in zip(first, other, strict=True)]
    two = [r | {RENEWED: o["readout"]} for r, o in zip(base, second, strict=True)]
    folders = folder_of(tmp_path / "a", one, WITH), folder_of(tmp_path / "b", two, WITHOUT)
    own, renewed = comparison(*folders).split(SECOND[RENEWED])
    assert cells(own) == cells(comparison(folder_of(tmp_path / "c", first, WITH), folders[1]))
    plain = [[r | {"readout": r[RENEWED]} for r in of_sweep] for of_sweep in (one, two)]
    again = [folder_of(tmp_path / n, [{k: v for k, v in r.items() if k != RENEWED} for r in p], WITH)
             for n, p in zip("de", plain, strict=True)]  # fmt: skip
    assert cells(renewed) == cells(comparison(*again)) != cells(own)
    picture = figure(*folders)
    assert "Read with renewed statistics." in picture._supxlabel.get_text()
    values = [scores(of(plain[0], T=0.07, epsilon=e), "shape").mean() for e in EPSILONS]
    assert curves(picture.axes[0])["a"][1] == pytest.approx(values)


def test_what_else_differs_between_sweeps_is_told(tmp_path):
    base = made(recipes=("crops",))
    first = folder_of(tmp_path / "a", base, WITH | {"epochs": 12, "renew_statistics": True})
    text = comparison(first, folder_of(tmp_path / "b", base, WITHOUT | {"epochs": 36, "recolor": True}))
    assert "read_without color and None; recolor None and True.\n" in text
    assert "They differ in more than pictures, so differences are of that, too: epochs 12 and 36.\n" in text


def test_random_bits_are_a_column(tmp_path):
    results = made("randbit", recipes=("crops",), bits=(0, 8), temperatures=(0.2,))
    folders = [folder_of(tmp_path / name, results, {}) for name in "ab"]
    assert [row["bits"] for row in cells(comparison(*folders))] == list("08000888")


def test_what_cannot_be_compared_is_refused(tmp_path):
    base = made(recipes=("crops",))
    first = folder_of(tmp_path / "a", base, WITH)
    plain = folder_of(tmp_path / "plain", base, {"image_size": 32})
    with pytest.raises(UserError, match="different pictures .for all: color red and None.*cannot"):
        comparison(first, plain)
    comparison(first, folder_of(tmp_path / "named", base, {"image_size": 32, "hide": "color=red"}))
    blue = folder_of(tmp_path / "blue", base, WITHOUT | {"read_without": "color=blue"})
    with pytest.raises(UserError, match="different pictures .for all: color red and color blue"):
        comparison(first, blue)
    larger = folder_of(tmp_path / "larger", base, WITHOUT | {"image_size": 64})
    with pytest.raises(UserError, match="different pictures .image_size: 32 and 64"):
        comparison(first, larger)
    two = [r | {"readout": {f: r["readout"][f] for f in FACTORS[:2]}} for r in base]
    with pytest.raises(
        UserError, match="different factors: shape, texture, color, worst and shape, texture, w"
    ):
        comparison(first, folder_of(tmp_path / "two", two, WITHOUT))
    apart = [r | {"seed": r["seed"] + len(SEEDS)} for r in base]
    with pytest.raises(UserError, match="no trained run of .*a has the same T, recipe and seed"):
        comparison(first, folder_of(tmp_path / "apart", apart, WITH))
    with pytest.raises(UserError, match="empty has no run that was read; let its sweep finish some"):
        comparison(first, folder_of(tmp_path / "empty", [], WITH))
    with pytest.raises(UserError, match="nowhere holds no sweep .*give the --out of one"):
        comparison(tmp_path / "nowhere", first)


def test_the_picture_holds_both_readouts_and_the_levels(tmp_path, capsys, monkeypatch):
    base = made(recipes=("crops",))
    first = list(others(base))
    plain = [r for r in base if not r["trained"] or r["epsilon"] == 0]
    folders = [folder_of(tmp_path / "a", first, WITH), folder_of(tmp_path / "b", plain, WITHOUT)]
    picture = figure(*folders)
    panels = np.array(picture.axes).reshape(3, 2)
    for row, factor in zip(panels, FACTORS, strict=True):
        assert row[0].get_ylabel() == f"{factor}, %"
        for axis, T in zip(row, (0.07, 0.2), strict=True):
            assert axis.get_title(loc="left") == f"crops, T {T}"
            assert axis.get_xlim() == (-0.5, len(EPSILONS) - 0.5)  # also of one epsilon, which would fill it
            found = curves(axis)
            for name, results, epsilons in (("a", first, EPSILONS), ("b", plain, (0,))):
                runs = [of(results, T=T, epsilon=epsilon) for epsilon in epsilons]
                values = [scores(of_epsilon, factor) for of_epsilon in runs]
                x, y, halves = found[name]
                assert np.round(x).tolist() == list(range(len(epsilons)))
                assert y == pytest.approx([v.mean() for v in values])
                assert halves == pytest.approx([half(v) for v in values])
            levels = {line.get_linestyle(): line.get_ydata()[0] for line in axis.lines
                      if len(line.get_xdata()) == 2 and list(line.get_xdata()) == [0, 1]}  # fmt: skip
            ways = {"--": of(plain, T=T, epsilon=0), ":": of(base, trained=False)}
            assert levels == pytest.approx({k: scores(runs, factor).mean() for k, runs in ways.items()})
    labels = [text.get_text() for text in picture.legends[0].get_texts()]
    assert sorted(labels) == ["a", "b", "b, epsilon 0", "untrained"]
    out = tmp_path / "both.png"
    monkeypatch.setattr("sys.argv", ["shortcuts_compare", *map(str, folders), "-o", str(out)])
    shortcuts_compare.main()
    assert Image.open(out).size[0] == 2000 and capsys.readouterr().out.endswith(f"\n\n{out}\n")
    with pytest.raises(UserError, match="both.png exists already.*--force"):
        shortcuts_compare.main()
    assert capsys.readouterr().out == ""


def test_the_picture_has_a_panel_for_each_number_of_bits(tmp_path):
    results = made("randbit", recipes=("crops",), bits=(0, 8), temperatures=(0.2,))
    folders = [folder_of(tmp_path / name, results, {}) for name in "ab"]
    titles = [axis.get_title(loc="left") for axis in figure(*folders).axes]
    assert titles == ["crops, T 0.2, 0 random bits", "crops, T 0.2, 8 random bits"] * 3
