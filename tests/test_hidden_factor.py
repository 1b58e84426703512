"""Trifeature with a factor taken out of its pictures, and sweeps on it."""

import json

import numpy as np
import pytest
from PIL import Image
from test_shortcuts import LISTS, SMALL, sweep_of

from moco import shortcuts, trifeature
from moco.errors import UserError
from moco.factors import COMBINATIONS, FACTORS, SETTINGS, factors_of
from moco.sweep import read_results


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Folders with the same 1000 images, once as they are and once for each factor that can be hidden."""
    out = tmp_path_factory.mktemp("trifeature")
    for hide in (None, *FACTORS, "color=blue"):
        trifeature.generate(out / str(hide), size=32, renders=1, progress=False, hide=hide)
    return out


def images(folder):
    """{(shape, texture, color): pixels (32, 32, 3) uint8}"""
    return {tuple(p.parent.name.split("_")): np.array(Image.open(p)) for p in folder.glob("*/*/0.png")}


HIDDEN = [(0, "shape", "triangle"), (1, "texture", "solid"), (2, "color", "red"), (2, "color=blue", "blue")]


@pytest.mark.parametrize("place, hide, shown", HIDDEN)
def test_a_hidden_factor_has_one_value_everywhere_and_all_else_is_as_it_was(sets, place, hide, shown):
    plain, hidden = images(sets / "None"), images(sets / hide)
    assert plain.keys() == hidden.keys() == set(COMBINATIONS)
    same = {key for key in plain if (plain[key] == hidden[key]).all()}
    assert same == {key for key in plain if key[place] == shown}  # the folders' names stay, the pixels do not
    assert {p.parent.name for p in (sets / hide).glob("val/*/*")} == {
        p.parent.name for p in (sets / "None").glob("val/*/*")
    }


def test_without_colour_the_pixels_lie_between_grey_and_one_colour(sets):
    def hues(found):  # directions in which pixels differ from the grey of the ground
        apart = np.concatenate([(x.astype(float) - x[0, 0]).reshape(-1, 3) for x in found.values()])
        lengths = np.linalg.norm(apart, axis=1)
        return (apart[lengths > 60] / lengths[lengths > 60, None]).std(axis=0).max()

    assert hues(images(sets / "color")) < 0.02 and hues(images(sets / "None")) > 0.3


def test_a_set_says_what_it_hides(sets):
    told = {path.name: json.loads((path / SETTINGS).read_text()) for path in sets.iterdir()}
    plain = {"version": 1, "size": 32, "renders": 1, "seed": 0}
    assert told == {"None": plain} | {hide: plain | {"hide": hide} for hide in (*FACTORS, "color=blue")}
    shortcuts._draw(sets / "color", 32, 1, "color")  # taken as it is
    for hide in (None, "shape", "color=blue"):
        with pytest.raises(UserError, match="was drawn with .*'hide': 'color'.*choose another --out"):
            shortcuts._draw(sets / "color", 32, 1, hide)


def test_what_is_hidden_is_none_of_the_factors_to_read(sets, tmp_path):
    assert factors_of(sets / "None") == ["shape", "texture", "color"]
    assert factors_of(sets / "texture") == ["shape", "color"]
    assert factors_of(sets / "color=blue") == ["shape", "texture"]
    assert factors_of(tmp_path) == ["class"]
    for damaged in ("{", "[1]", "3", '{"hide": 3}', '{"hide": "size"}'):
        (tmp_path / SETTINGS).write_text(damaged)
        with pytest.raises(UserError, match="trifeature.json cannot be read .*; draw the set again"):
            factors_of(tmp_path)


def test_a_sweep_draws_without_the_factor_and_does_not_read_it(tmp_path, cli, monkeypatch):
    sweep_of(monkeypatch, {})
    words = ["trifeature", *SMALL, *LISTS, "--renders", "1", "--recipe", "crops", "--moco-t", "0.2"]
    code, output, errors = cli(shortcuts.main, *words, "--hide", "color", "--out", tmp_path / "s")
    assert code == 0, errors
    assert json.loads((tmp_path / "s/data/trifeature.json").read_text())["hide"] == "color"
    results = read_results(tmp_path / "s")
    assert len(results) == 2 and all(result["hide"] == "color" for result in results)
    words_of = [result["command"] for result in results if not result["trained"]][0]
    assert words_of[words_of.index("--factors") + 1 :][:3] == ["shape", "texture", "--untrained"]
    code, _, errors = cli(shortcuts.main, *words, "--out", tmp_path / "s")
    assert code == 2 and "holds a sweep with hide color, not None: give it the same" in errors


def test_a_sweep_trains_on_all_factors_and_reads_without_one(tmp_path, cli, monkeypatch):
    sweep_of(monkeypatch, {})
    words = ["trifeature", *SMALL, *LISTS, "--renders", "1", "--recipe", "crops", "--moco-t", "0.2"]
    code, _, errors = cli(shortcuts.main, *words, "--read-without", "color", "--out", tmp_path / "s")
    assert code == 0, errors
    there = [json.loads((tmp_path / f"s/{d}/trifeature.json").read_text()) for d in ("data", "data_to_read")]
    assert [settings.get("hide") for settings in there] == [None, "color"]
    results = {result["trained"]: result for result in read_results(tmp_path / "s")}
    assert all(result["read_without"] == "color" for result in results.values())
    trains, reads = str(tmp_path / "s/data"), str(tmp_path / "s/data_to_read")
    assert results[True]["command"][2] == trains and reads not in results[True]["command"]
    assert results[False]["command"][3] == trains
    given = results[False]["command"][results[False]["command"].index("--factors") :][:6]
    assert given == ["--factors", "shape", "texture", "--read", reads, "--untrained"]
    code, _, errors = cli(shortcuts.main, *words, "--out", tmp_path / "s")
    assert code == 2 and "holds a sweep with read_without color, not None: give it the same" in errors


def test_a_sweep_reads_from_another_value_than_it_trains_on(tmp_path, cli, monkeypatch):
    sweep_of(monkeypatch, {})
    words = ["trifeature", *SMALL, *LISTS, "--renders", "1", "--recipe", "crops", "--moco-t", "0.2"]
    other = ["--hide", "color", "--read-without", "color=blue"]
    code, _, errors = cli(shortcuts.main, *words, *other, "--out", tmp_path / "s")
    assert code == 0, errors
    there = [json.loads((tmp_path / f"s/{d}/{SETTINGS}").read_text()) for d in ("data", "data_to_read")]
    assert [settings["hide"] for settings in there] == ["color", "color=blue"]
    given = next(result["command"] for result in read_results(tmp_path / "s") if not result["trained"])
    given = given[given.index("--factors") :][:5]
    assert given == ["--factors", "shape", "texture", "--read", str(tmp_path / "s/data_to_read")]


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["trifeature", "--hide", "color", "--factors", "color"],
            "'color' to read; choose of shape, texture",
        ),
        (["randbit", "--hide", "color", "--data", "FOLDERS"], "--hide draws Trifeature, and --data takes"),
        (["randbit", "--read-without", "color", "--data", "FOLDERS"], "--read-without draws Trifeature, and"),
        (
            ["trifeature", "--read-without", "colour"],
            "--read-without colour: there is no such factor; choose",
        ),
        (["trifeature", "--hide", "color=pale"], "--hide color=pale: color has no such value; choose one of"),
        (["trifeature", "--hide", "color="], "--hide color=: color has no such value; choose one of red, "),
        (
            ["trifeature", "--hide", ""],
            "--hide : there is no such factor; choose one of shape, texture, color",
        ),
        (
            ["trifeature", "--read-without", ""],
            "--read-without : there is no such factor; choose one of shape",
        ),
        (
            ["trifeature", "--read-without", "color", "--hide", "shape"],
            "another value of the same factor, as in",
        ),
        (
            ["trifeature", "--read-without", "color=red", "--hide", "color"],
            "another value of the same factor",
        ),
        (
            ["trifeature", "--read-without", "color", "--factors", "color"],
            "'color' to read; choose of shape,",
        ),
    ],
)
def test_what_cannot_be_hidden_or_read_is_refused(folders, tmp_path, cli, words, message):
    words = [folders if word == "FOLDERS" else word for word in words]
    code, output, errors = cli(shortcuts.main, *words, *SMALL, "--out", tmp_path / "out")
    assert (code, output) == (2, "") and message in errors and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()
