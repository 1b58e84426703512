"""Views with colors of their own: Trifeature's colors, independent of image and view, and nothing else."""

import math
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from command_lines import MOCO
from test_resume import WORDS, content, pretrained
from test_shortcuts import LISTS, SMALL, sweep_of

import main_moco
from moco import experiments, measure, shortcuts, trifeature
from moco.builder import MoCo
from moco.checkpoint import save_checkpoint
from moco.checkpoint_reader import read_checkpoint
from moco.data import EpochBatches
from moco.experiments import Experiments
from moco.factors import COLORS, SETTINGS
from moco.plain_loss import plain_loss
from moco.recolor import colors_of, recolored
from moco.sweep import read_results
from moco.views import normalise

FLAGS = [*(word for word in WORDS if word != "--aug-plus"), "--crops-only", "--recolor"]


@pytest.fixture(scope="module")
def white(tmp_path_factory):
    """A folder of 24 of Trifeature's images, all in white."""
    root = tmp_path_factory.mktemp("white")
    trifeature.generate(root / "all", size=48, renders=1, progress=False, hide="color=white")
    (root / "train").mkdir()
    for folder in sorted((root / "all" / "train").iterdir())[:24]:
        folder.rename(root / "train" / folder.name)
    (root / "all" / SETTINGS).rename(root / SETTINGS)
    return root


def test_white_pictures_with_a_color_are_those_drawn_in_it():
    bound = 2 / 255 / 0.224  # roundings to bytes, once on drawing and once here
    for texture in ("solid", "noise", "pluses"):
        drawn = {}
        for color in COLORS:
            rng = np.random.default_rng(3)
            pixels = trifeature.render("star", texture, color, 48, rng)
            drawn[color] = normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        views = drawn["white"].expand(len(COLORS), -1, -1, -1)
        found = recolored(views, torch.tensor(list(COLORS.values())))
        expected = torch.cat(list(drawn.values()))
        assert float((found - expected).abs().max()) < bound
        corner = slice(None), slice(None), 0, 0  # the ground keeps its grey
        assert torch.allclose(found[corner], views[corner], atol=1e-6)
        assert float((found - expected.roll(1, 0)).abs().amax((1, 2, 3)).min()) > 10 * bound  # control


def test_colors_are_even_and_independent_of_view_epoch_and_seed():
    known = [tuple(row) for row in torch.tensor(list(COLORS.values())).tolist()]
    ways = ((3, 0, 0), (3, 0, 1), (3, 1, 0), (4, 0, 0))
    drawn = [[known.index(tuple(row)) for row in colors_of(*way, range(3000)).tolist()] for way in ways]
    for found in drawn:
        counts = Counter(found)
        assert len(counts) == 10 and max(abs(n - 300) for n in counts.values()) < 5 * math.sqrt(270)
    for other in drawn[1:]:
        same = sum(a == b for a, b in zip(drawn[0], other, strict=True))
        assert abs(same - 300) < 5 * math.sqrt(270)
    assert colors_of(3, 1, 0, [7, 2999, 7]).tolist() == [list(known[drawn[2][i]]) for i in (7, 2999, 7)]


def test_each_step_of_a_run_has_its_own_colors_in_both_views(white, monkeypatch, tmp_path):
    """The model gets views in the colors that (seed, epoch, view, image) give."""
    seen, real = [], MoCo.forward

    def forward(self, *views, **options):
        seen.append(views)
        return real(self, *views, **options)

    monkeypatch.setattr(MoCo, "forward", forward)
    assert pretrained(0, 1, [*FLAGS, "--output-dir", tmp_path], white) == 0
    batches = EpochBatches(24, 8, seed=3)
    levels = normalise(torch.full((1, 3, 1, 1), 128, dtype=torch.uint8))
    checked = 0
    for number, views in enumerate(seen):
        batches.epoch, step = divmod(number, 3)
        for n, view in enumerate(views):
            colors = colors_of(3, batches.epoch, n, batches.indices()[step].tolist())
            apart = view - levels
            for image, color in zip(apart, colors, strict=True):
                # All pixels lie on the line from grey to the color.
                direction = (color - 128 / 255) / torch.tensor((0.229, 0.224, 0.225))
                along = (image * direction[:, None, None]).sum(0) / direction.square().sum()
                assert float((image - along * direction[:, None, None]).abs().max()) < 1e-5
                checked += float(along.max()) > 0.2
    assert len(seen) == 6 and checked > 40  # most crops have some of the shape


def test_processes_give_their_images_the_colors_that_one_process_gives(white):
    """And to both views of an image its bits."""

    def altered(rank, world):
        batches = EpochBatches(24, 8, 3, rank, world)
        alter, size = Experiments(2, True, 3, white, batches), 8 // world
        batches.epoch = 1
        return [alter([torch.ones(size, 3, 2, 2)] * 2, step) for step in range(3)]

    whole, parts = altered(0, 1), [altered(rank, 2) for rank in (0, 1)]
    for step, views in enumerate(whole):
        for n, view in enumerate(views):
            assert view.shape == (8, 5, 2, 2)
            assert torch.equal(view, torch.cat([part[step][n] for part in parts]))
        one, two = views
        assert not torch.equal(one[:, :3], two[:, :3]) and torch.equal(one[:, 3:], two[:, 3:])
    assert not torch.equal(whole[0][0], whole[1][0])


def test_the_plain_loss_is_of_recolored_views(white, monkeypatch, tmp_path):
    assert pretrained(0, 1, [*FLAGS, "--output-dir", tmp_path], white) == 0
    checkpoint = read_checkpoint(tmp_path / "checkpoint_0001.pth.tar")

    def loss(**changed):
        model = measure._model(checkpoint, "there", checkpoint["settings"])
        return plain_loss(model, white, checkpoint["settings"] | changed, torch.device("cpu"))[0]

    drawn, real = [], colors_of
    monkeypatch.setattr(experiments, "colors_of", lambda *way: drawn.append(way) or real(*way))
    found = loss()
    assert [way[:3] for way in drawn] == [(3, 2, 0), (3, 2, 1)] * 3  # of the epoch that would come next
    assert loss(recolor=False) != found == loss() and math.isfinite(found)


def test_an_older_run_without_the_setting_goes_on_with_a_note(white, tmp_path, capsys):
    plain = [word for word in FLAGS if word != "--recolor"]
    assert pretrained(0, 1, [*plain, "--epochs", "1", "--output-dir", tmp_path], white) == 0
    newest = tmp_path / "checkpoint_0000.pth.tar"
    checkpoint = torch.load(newest, weights_only=True)
    del checkpoint["settings"]["recolor"]
    save_checkpoint(checkpoint, newest)
    capsys.readouterr()
    assert pretrained(0, 1, [*FLAGS, "--resume", str(newest), "--output-dir", tmp_path], white) == 0
    assert f"note: recolor was False in {newest} and is True from here on" in capsys.readouterr().out


def test_a_run_that_stops_within_an_epoch_goes_on_exactly(white, run_ranks, tmp_path):
    whole, stopped, other = (tmp_path / name for name in ("whole", "stopped", "other"))
    for folder in (whole, stopped, other):
        folder.mkdir()
    assert run_ranks(1, pretrained, [*FLAGS, "--output-dir", whole], white) == [0]
    words = [*FLAGS, "--output-dir", stopped]
    assert run_ranks(1, pretrained, words, white, (0, 4, signal.SIGTERM)) == [75]
    assert run_ranks(1, pretrained, [*words, "--resume", "auto"], white) == [0]
    assert content(stopped) == content(whole)
    plain = [word for word in FLAGS if word != "--recolor"]
    assert run_ranks(1, pretrained, [*plain, "--output-dir", other], white) == [0]
    assert content(other)["state_dict"] != content(whole)["state_dict"]  # negative control


@pytest.mark.parametrize(
    ("data", "words", "message"),
    [
        (
            "folders",
            ["--crops-only", "--recolor"],
            "a run with --recolor gives colors to pictures that are drawn in white, and those",
        ),
        ("white", ["--aug-plus", "--recolor"], "--recolor takes views as --crops-only makes them; add that"),
    ],
)
def test_what_cannot_be_recolored_is_one_sentence(folders, white, tmp_path, cli, data, words, message):
    place = {"folders": folders, "white": white}[data]
    base = [word for word in MOCO if word != "--aug-plus"]
    code, _, errors = cli(main_moco.main, *base, *words, "--output-dir", tmp_path / "out", place)
    assert code == 2 and message in errors and errors.count("\n") == 1


def test_a_sweep_trains_with_colors_at_random_and_reads_from_one(tmp_path, cli, monkeypatch):
    sweep_of(monkeypatch, {})
    words = ["trifeature", *SMALL, *LISTS, "--renders", "1", "--moco-t", "0.2", "--recolor"]
    white = ["--hide", "color=white", "--recipe", "crops"]
    for wrong in (["--recipe", "crops"], ["--hide", "color=white", "--recipe", "v2"]):
        code, _, errors = cli(shortcuts.main, *words, *wrong, "--out", tmp_path / "s")
        assert code == 2 and "add --hide color=white --recipe crops" in errors and errors.count("\n") == 1
    code, _, errors = cli(shortcuts.main, *words, *white, "--read-without", "color", "--out", tmp_path / "s")
    assert code == 0, errors
    results = {result["trained"]: result for result in read_results(tmp_path / "s")}
    assert all(result["recolor"] is True for result in results.values())
    assert "--recolor" in results[True]["command"] and "--recolor" not in results[False]["command"]
