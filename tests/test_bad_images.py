"""Images that cannot be read, in whole runs: named, or replaced alike on every rerun and named."""

import os
import re
import signal

import numpy as np
import pytest
import torch
from command_lines import SMALL, losses_of
from conftest import make_folders
from PIL import Image
from test_decoders import DAMAGED, ODD, encoded
from test_resume import WORDS, content, pretrained

import main_lincls
import main_moco
from moco.bad_images import TRIES, BadImages
from moco.data import Loading, image_folder
from moco.decoders import decode_pillow
from moco.distributed import Process
from moco.draws import moco_v2
from moco.errors import UserError
from moco.samples import Photographs
from moco.watch import PREEMPTED

KINDS = ["truncated.jpg", "text.jpg", "empty.jpg", "bomb.png"]
SKIP = ["--on-bad-image", "skip"]
NAMED = r"epoch {}: {} images? could not be read; (?:others were|another was) taken instead:\n((?:  .*\n)+)"

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def damage(root, kinds=KINDS, link=True):
    """Put damaged files into root/train/bee, and a link to nowhere: their paths, in ImageFolder's order."""
    bad = [root / "train" / "bee" / name for name in kinds]
    for path in bad:
        path.write_bytes(DAMAGED[path.name]())
    if link:
        bad.append(root / "train" / "bee" / "link.jpg")
        bad[-1].symlink_to("nowhere")
    return sorted(map(str, bad))


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """A data set of 27 good and 5 bad training images, which are all in every epoch, and the bad paths."""
    root = tmp_path_factory.mktemp("spoilt")
    make_folders(root, train=9)
    return root, damage(root)


def named(output, epoch):
    """The paths that the output names for an epoch, which must be as many as it says."""
    found = re.search(NAMED.format(epoch, r"(\d+)"), output)
    if found is None:
        return []
    paths = found[2].split()
    assert len(paths) == int(found[1])
    return paths


@pytest.mark.parametrize("kind", [*KINDS, "link.jpg"])
def test_error_names_the_path(tmp_path, cli, kind):
    make_folders(tmp_path, classes=("ant", "bee"), train=4)
    (path,) = damage(tmp_path, [kind] if kind in KINDS else [], link=kind == "link.jpg")
    (tmp_path / "train" / "ant" / "0.jpg").unlink()  # 8 images: a step takes all
    words = [*WORDS, "-j", "1" if kind == "text.jpg" else "0", "--output-dir", tmp_path / "out", tmp_path]
    code, output, errors = cli(main_moco.main, *words)
    assert code == 2 and "Loss" not in output
    assert (
        errors.startswith(f"program: error: {path} cannot be read as an image (") and errors.count("\n") == 1
    )


def test_skip_ends_the_run_names_all_and_repeats(spoilt, folders, tmp_path, cli):
    root, bad = spoilt
    runs = []
    for number, workers in enumerate(("0", "0", "3")):
        out = tmp_path / str(number)
        code, output, errors = cli(main_moco.main, *WORDS, *SKIP, "-j", workers, "--output-dir", out, root)
        assert (code, errors) == (0, "")
        assert [named(output, epoch) for epoch in (0, 1)] == [bad, bad]
        runs.append((losses_of(output), content(out)))
        assert len(runs[0][0]) == 2 * 4
    assert runs[0] == runs[1] == runs[2]
    words = [*WORDS, *SKIP, "--output-dir", tmp_path / "good"]
    code, output, _ = cli(main_moco.main, *words, folders)
    assert code == 0 and "could not be read" not in output  # negative control: nothing is bad
    assert losses_of(output) != runs[0][0]


def test_two_processes_name_all_once_and_a_stopped_run_goes_on_exactly(run_ranks, spoilt, tmp_path, capfd):
    root, bad = spoilt
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    words = [*WORDS, *SKIP, "-j", "2", "--output-dir"]
    assert run_ranks(2, pretrained, [*words, tmp_path / "whole"], root) == [0, 0]
    output, _ = capfd.readouterr()
    assert named(output, 0) == named(output, 1) == bad
    assert output.count("could not be read") == 2
    stop = (1, 6, signal.SIGTERM)  # in the middle of the second epoch
    assert run_ranks(2, pretrained, [*words, tmp_path / "parts"], root, stop) == [PREEMPTED] * 2
    first, _ = capfd.readouterr()
    assert run_ranks(2, pretrained, [*words, tmp_path / "parts", "--resume", "auto"], root) == [0, 0]
    second, _ = capfd.readouterr()
    assert sorted({*named(first, 1), *named(second, 1)}) == bad
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    assert content(tmp_path / "parts") != content(tmp_path / "whole", "checkpoint_0000.pth.tar")


def samples(root, workers, ranks=1, seed=3):
    """{(epoch, global position): (class, pixels)} of two epochs, whatever the processes."""
    images, found = image_folder(root, "train"), {}
    for rank in range(ranks):
        process = Process(rank, ranks, rank, ranks, ranks, torch.device("cpu"))
        bad_images = BadImages("skip", len(images), seed)
        loader = Loading(16, "pil", 8, workers * ranks).training(
            images, moco_v2(), process, seed, bad_images=bad_images
        )
        for epoch in (0, 1):
            loader.batch_sampler.epoch = epoch
            for step, batch in enumerate(loader):
                for i, target in enumerate(batch.targets.tolist()):
                    place = step * 8 + rank * (8 // ranks) + i
                    found[epoch, place] = target, batch.pixels[:, i].numpy().tobytes()
        loader.close()
    return found


def test_the_same_samples_with_any_workers_and_processes(spoilt):
    root, _ = spoilt
    expected = samples(root, 0)
    assert len(expected) == 2 * 32
    for workers, ranks in ((1, 1), (4, 1), (0, 2), (1, 2)):
        assert samples(root, workers, ranks) == expected
    assert samples(root, 0, seed=4) != expected


def test_the_image_that_is_taken_brings_its_class_and_depends_on_epoch_and_index(spoilt):
    root, bad = spoilt
    images = image_folder(root, "train")
    paths, targets = [path for path, _ in images.samples], np.array(images.targets)
    photographs, lost = Photographs(paths, targets, decode_pillow), [paths.index(path) for path in bad]
    reader = BadImages("skip", len(paths), 3)
    taken = {(epoch, i): reader.read(photographs, epoch, i) for epoch in range(9) for i in range(len(paths))}
    for (_, index), (instead, pixels) in taken.items():
        assert instead not in lost and (instead == index) == (index not in lost)
        assert np.array_equal(pixels, np.asarray(Image.open(paths[instead])))
    chosen = {index: [taken[epoch, index][0] for epoch in range(9)] for index in lost}
    assert len(set(map(tuple, chosen.values()))) == len(lost) and all(
        len(set(c)) > 3 for c in chosen.values()
    )
    assert reader.lines(7, paths)[1:] == [f"  {path}" for path in bad]
    assert reader.lines(8, paths) == []  # told once

    one = Photographs(paths, np.arange(len(paths)), decode_pillow)  # each image a class of its own
    other, _ = reader.read(one, 0, lost[0])
    sample = Loading(16, "pil", 32, 0).training(
        images, moco_v2(), Process(0, 1, 0, 1, 1, torch.device("cpu")), 3, bad_images=reader
    )
    keys = next(iter(sample.batch_sampler))
    sample._loader.dataset.fill.photographs = one
    (batch,) = sample
    assert batch.targets[keys.index((0, lost[0]))] == other


def test_when_nothing_can_be_read(tmp_path, cli):
    make_folders(tmp_path, classes=("ant",))
    for path in (tmp_path / "train" / "ant").iterdir():
        path.write_text("no image")
    code, _, errors = cli(main_moco.main, *WORDS, *SKIP, "--output-dir", tmp_path / "out", tmp_path)
    assert code == 2 and errors.count("\n") == 1
    assert f"cannot be read, nor can {TRIES} images drawn in its place" in errors


@pytest.mark.parametrize("how", ["error", "skip"])
def test_files_that_vanish_during_training(tmp_path, cli, monkeypatch, how):
    make_folders(tmp_path)
    real, gone = main_moco.rank_accuracy, []

    def vanish(ranks):
        if not gone:
            for number in range(6):
                gone.append(tmp_path / "train" / "cat" / f"{number}.jpg")
                gone[-1].unlink()
        return real(ranks)

    monkeypatch.setattr(main_moco, "rank_accuracy", vanish)
    words = [*WORDS, "--on-bad-image", how, "--output-dir", tmp_path / "out", tmp_path]
    code, output, errors = cli(main_moco.main, *words)
    assert len(gone) == 6 and len(losses_of(output)) >= 1
    if how == "error":
        assert code == 2 and re.search(
            r"train/cat/[0-5]\.jpg cannot be read as an image \(No such file or directory\)", errors
        )
    else:
        assert code == 0 and set(named(output, 0)) < set(map(str, gone))  # the others were read before
        assert named(output, 1) == sorted(map(str, gone))


def test_linear_evaluation_skips_in_training_and_never_in_validation(tmp_path, cli):
    make_folders(tmp_path)
    bad = damage(tmp_path, ["text.jpg"])
    words = [*SMALL, "-a", "shufflenet_v2_x0_5", "--epochs", "2", "-b", "13"]
    words += ["--output-dir", tmp_path / "out", tmp_path]
    code, output, _ = cli(main_lincls.main, *words, *SKIP)
    assert code == 0 and named(output, 0) == named(output, 1) == bad
    code, _, errors = cli(main_lincls.main, *words)
    assert code == 2 and re.search(r"bee/(text|link)\.jpg cannot be read", errors)
    (tmp_path / "val" / "ant" / "1.jpg").write_text("no image")
    code, output, errors = cli(main_lincls.main, *words, *SKIP)
    assert code == 2 and "Acc@1 " in output and " * Acc@1" not in output
    assert "val/ant/1.jpg cannot be read" in errors and "validation counts every image" in errors


def test_with_caches(tmp_path, cli):
    make_folders(tmp_path, train=9)
    bad = damage(tmp_path, link=False)
    words = [*WORDS, "--epochs", "1", "-b", "31", "--output-dir", tmp_path / "out", tmp_path]
    runs = [cli(main_moco.main, *words, *SKIP, *more) for more in ([], ["--cache", "files"])]
    assert [code for code, *_ in runs] == [0, 0]
    assert losses_of(runs[0][1]) == losses_of(runs[1][1])
    assert named(runs[1][1], 0) == bad
    for more in ([], SKIP):
        code, _, errors = cli(main_moco.main, *words, *more, "--cache", "decoded")
        assert code == 2 and errors.count("error: ") == 1
        assert ("--cache decoded decodes all images" if more else "cannot be read as an image") in errors


@pytest.mark.parametrize("more", [[], ["--device-aug", "exact", "--resize", "torch"]], ids=["pil", "torch"])
def test_odd_images_are_no_bad_images(tmp_path, cli, more):
    for number, name in enumerate(ODD):
        folder = tmp_path / "train" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(ODD[name]())  # what is in a file counts, not its name
    deep = Image.fromarray(np.arange(6000, dtype=np.uint16).reshape(60, 100))
    (tmp_path / "train" / "a" / "16 bits.png").write_bytes(encoded(deep, "PNG"))
    count = len(ODD) + 1
    words = [*WORDS, "--epochs", "1", "-b", count, *SKIP, *more, "--output-dir", tmp_path / "out", tmp_path]
    code, output, errors = cli(main_moco.main, *words)
    assert (code, errors) == (0, "") and f"{count} images of" in output and len(losses_of(output)) == 1
    assert "could not be read" not in output


def test_without_shared_memory_it_is_refused(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    BadImages("error", 9, 0)
    with pytest.raises(UserError, match="--on-bad-image skip needs shared memory"):
        BadImages("skip", 9, 0)
