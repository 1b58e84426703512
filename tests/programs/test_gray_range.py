"""--gray-range in every program that reads images, on CT slices: none can read floats without it."""

import linear_runs
import pytest
from command_lines import TINY
from odd_images import CT, encoded, photograph
from run_files import content
from sheets import draw_sheet, pictures
from started_runs import run


@pytest.fixture
def slices(tmp_path):
    """`slices(name)`: a data set of that kind of CT, two classes of 8 training and 2 validation images."""

    def make(name):
        for split, seeds in (("train", range(8)), ("val", range(8, 10))):
            for label in ("sick", "well"):
                folder = tmp_path / name / split / label
                folder.mkdir(parents=True)
                for seed in seeds:
                    (folder / f"{seed} {name}").write_bytes(CT[name][0](seed))
        return tmp_path / name

    return make


@pytest.mark.parametrize("name", ["12-bit.png", "hounsfield.tif"])
def test_a_run_warns_of_dark_images_and_trains_on_others_with_a_range(slices, tmp_path, name):
    folder, (low, high) = slices(name), CT[name][1]
    words = [*TINY, "--epochs", "1", folder, "--output-dir"]
    said = run(*words, tmp_path / "dark")
    assert (
        f" use {low} to {high} of " in said and f" 16 of 256 gray levels; --gray-range {low} {high} " in said
    )
    with_range = ["--gray-range", low, high]
    assert "warning: 16" not in run(*words, tmp_path / "bright", *with_range)
    entries = [
        content(tmp_path / name, "checkpoint_0000.pth.tar")["state_dict"] for name in ("dark", "bright")
    ]
    assert entries[0] != entries[1]
    run(*words, tmp_path / "cached", *with_range, "--cache", "decoded", "-j", "1")
    assert content(tmp_path / "cached", "checkpoint_0000.pth.tar")["state_dict"] == entries[1]
    again = run(*words, tmp_path / "dark", *with_range, "--resume", "auto", "--epochs", "2")
    assert "note: gray_range was None in " in again and f"is [{low:.1f}, {high:.1f}] from here on" in again


def test_a_range_that_shows_nothing_is_warned_of_in_both_programs_and_val_is_looked_at_too(
    slices, tmp_path, run_ranks
):
    folder = slices("12-bit.png")
    warning = "use 0 to 4095 of 10000 to 20000: they come out in 1 of 256 gray levels"
    wrong_range = ["--epochs", "1", "--gray-range", 10000, 20000]
    assert warning in run(*TINY, *wrong_range, folder, "--output-dir", tmp_path / "moco")
    for image in (folder / "train").rglob("*.png"):
        image.write_bytes(encoded(photograph(), "PNG"))
    assert warning not in run(*TINY, *wrong_range, folder, "--output-dir", tmp_path / "photos")  # control
    [code], said = linear_runs.run(run_ranks, 1, folder, tmp_path / "linear", *wrong_range, "--schedule", "1")
    assert code == 0 and warning in said


def test_floats_are_refused_without_a_range_and_read_with_it(slices, tmp_path, run_ranks, cli, monkeypatch):
    folder, with_range = slices("float.tif"), ["--gray-range", -1.024, 3.071]
    out = tmp_path / "out"
    said = run(*TINY, "--knn", "1", folder, "--output-dir", out, code=2)
    assert (
        "warning: float gray images use -1.024 to 3.071 and cannot be read without --gray-range -1.024"
        in said
    )
    assert "float.tif cannot be read as an image (its float values " in said.splitlines()[-1]
    said = run(*TINY, "--knn", "1", folder, "--output-dir", out, *with_range)
    assert said.count(" * kNN class ") == 2 and "warning: float" not in said

    codes, said = linear_runs.run(run_ranks, 1, folder, tmp_path / "refused")
    assert "cannot be read as an image (its float values " in codes[0] and "warning: float gray" in said
    for more in ([], ["--cache", "decoded"]):
        linear = tmp_path / f"linear{len(more)}"
        codes, said = linear_runs.run(run_ranks, 1, folder, linear, *more, *with_range)
        assert codes == [0] and "best Acc@1 " in said and "warning: float" not in said

    checkpoint = out / "checkpoint_0001.pth.tar"
    few = ["--count", "2", "--image-size", "16"]
    shown = pictures(draw_sheet(cli, monkeypatch, "pairs", folder, *few, *with_range))
    assert len(shown) == 6 and shown[0].max() == 255 and shown[0].min() == 0
    near = ["neighbors", checkpoint, folder, *few, "--neighbors", "2", "-j", "0"]
    assert len(pictures(draw_sheet(cli, monkeypatch, *near))) == 6  # the range is that of the checkpoint
