"""Whole runs of pre-training: what they print and write, and what does not change a bit of them."""

import math
import os
import re
import shutil
import signal

import pytest
import torch
from command_lines import TINY, losses_of
from run_files import checkpoints, content
from started_runs import at_step, run, send
from written_logs import NUMBERS, expected_scalars, lines_of, scalars

import main_moco
from moco.data.folders import paths_of, pretraining_images

STEP = re.compile(
    r"Epoch: \[\d\]\[\d/\d\]\tTime +[\d.]+ \( *[\d.]+\)\tData +[\d.]+ \( *[\d.]+\)\tLoss \d\.\d{4}e[+-]\d\d "
    r"\(\d\.\d{4}e[+-]\d\d\)\tAcc@1 +[\d.]+ \( *[\d.]+\)\tAcc@5 +[\d.]+ \( *[\d.]+\)$",
    re.MULTILINE,
)
START = {
    *("kind", "time", "command", "settings", "versions", "git", "host", "device", "processes", "images"),
    *("steps", "global_batch", "batchnorm_groups", "chance", "epoch", "step", "cpu", "pretrained"),
}


def test_it_prints_and_writes_what_upstream_does(pretrained, folders):
    output, out = pretrained
    assert len(STEP.findall(output)) == 2 * 3 == output.count("Epoch: ")
    assert "ln(1+K) = 3.0445" in output
    assert re.search(r"^epoch 1: loss \d\.\d{4}, lr \S+, \d+ images/s, run: 0 s left$", output, re.MULTILINE)
    lines = [line for line in output.splitlines() if "Epoch: [" not in line and str(folders) not in line]
    assert len(lines) > 5 and max(map(len, lines)) <= 80
    assert "share statistics" not in output  # as there are two BatchNorm groups
    assert "more than\n  once" not in output
    assert sorted(os.listdir(out)) == ["checkpoint_0000.pth.tar", "checkpoint_0001.pth.tar", "log.jsonl"]
    checkpoint = torch.load(out / "checkpoint_0001.pth.tar", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["arch"]) == (2, "resnet18")
    upstream = {
        "module.encoder_q.conv1.weight",
        "module.encoder_k.fc.2.bias",
        "module.queue",
        "module.queue_ptr",
    }
    assert upstream <= set(checkpoint["state_dict"])
    assert checkpoint["state_dict"]["module.queue_ptr"].tolist() == [48 % 20]
    parameters = checkpoint["optimizer"]["param_groups"][0]["params"]
    assert len(parameters) == 2 * 64  # both encoders', as upstream's


def test_notes_on_one_batchnorm_group_and_on_a_long_queue(folders, tmp_path):
    output = run(*TINY, folders, "--output-dir", tmp_path, "--moco-k", "25", "--epochs", "1")
    assert "statistics that give the positive away" in output
    assert "warning: 25 keys of 24 images: the queue holds every image more than\n  once" in output


def test_the_log_says_what_was_printed(folders, tmp_path, cli):
    words = [*TINY, "-p", "2", "--knn", "2", "--tensorboard", "--output-dir", tmp_path, folders]
    code, output, errors = cli(main_moco.main, *words)
    assert code == 0, errors
    start, *others = lines_of(tmp_path)
    assert set(start) == START and start["kind"] == "start"
    assert start["command"][:2] == ["program", "-a"] and start["settings"]["method"] == "ifm"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", start["time"])
    assert set(start["versions"]) == {"python", "torch", "torchvision", "numpy", "pillow"}
    plain = {"processes": 1, "images": 24, "steps": 3, "global_batch": 8, "epoch": 0, "step": 0}
    plain |= {"batchnorm_groups": 1, "device": "cpu"}
    assert {name: start[name] for name in plain} == plain and start["chance"] > math.log(21)

    steps = [entry for entry in others if entry["kind"] == "step"]
    assert [(entry["epoch"], entry["step"]) for entry in steps] == [(0, 0), (0, 2), (1, 0), (1, 2)]
    assert all(set(entry) == {"kind", "epoch", "step"} | NUMBERS for entry in steps)
    assert [f"{entry['loss']:.4e}" for entry in steps] == losses_of(output)
    assert [entry["queue_fill"] for entry in steps] == [0.4, 1, 1, 1]
    assert all(isinstance(entry[name], (int, float)) for entry in steps for name in NUMBERS)
    assert all(-1 <= entry["pos_similarity"] <= 1 for entry in steps)
    for entry in steps:
        assert entry["alignment"] == pytest.approx(2 - 2 * entry["pos_similarity"], abs=1e-4)

    epochs = [entry for entry in others if entry["kind"] == "epoch"]
    assert [set(entry) - NUMBERS for entry in epochs] == [
        {"kind", "epoch"},
        {"kind", "epoch", "knn", "rankme"},
    ]
    means = re.findall(r"^epoch \d: loss (\d\.\d{4})", output, re.MULTILINE)
    assert [f"{entry['loss']:.4f}" for entry in epochs] == means
    assert (
        f" * kNN class {epochs[1]['knn']['class']:.1f}, RankMe {epochs[1]['rankme']:.1f} (" in output
        and output.count("kNN") == 1
    )
    for entry, two in zip(epochs, (steps[:2], steps[2:]), strict=True):
        for name in ("pos_similarity", "uniformity"):
            assert entry[name] == pytest.approx((two[0][name] + two[1][name]) / 2, rel=1e-5)
        assert entry["images_per_s"] == pytest.approx(24 / entry["seconds"])
    found = scalars(tmp_path / "tensorboard")
    assert found == pytest.approx(expected_scalars(others), rel=1e-6)
    assert len(found) == 6 * len(NUMBERS) + 2


@pytest.mark.parametrize("world", [1, 2])
def test_seeing_a_run_changes_no_bit_of_it(folders, tmp_path, world):
    runs = {"unseen": ["-p", "100"], "seen": ["-p", "1", "--knn", "1", "--tensorboard"]}
    if world == 1:
        runs["another seed"] = ["--seed", "4"]
    for name, words in runs.items():
        run(
            *TINY,
            "--bn-splits",
            "2",
            "-j",
            "0",
            *words,
            "--output-dir",
            tmp_path / name,
            folders,
            world=world,
        )
    unseen, seen, *others = (content(tmp_path / name) for name in runs)
    logs = seen.pop("log"), unseen.pop("log")  # also holds what is computed in printed steps alone
    assert seen == unseen and logs[0] != logs[1]
    others.append(content(tmp_path / "seen", "checkpoint_0000.pth.tar"))
    for other in others:  # negative control
        assert all(seen[name] != other[name] for name in ("state_dict", "optimizer"))
    lines = lines_of(tmp_path / "seen")
    assert [len(line.get("knn", {})) for line in lines[1:]] == [0, 0, 0, 1] * 2
    assert lines[0]["processes"] == world


@pytest.mark.parametrize("world", [1, 2])
def test_a_stop_while_evaluating_or_within_an_epoch_leaves_no_gap_in_log_and_curves(folders, tmp_path, world):
    """The first run is stopped in step 4 of 6, the second while it evaluates the second epoch of three."""

    def stop_in_knn():
        real = main_moco.KnnMonitor._measure

        def percent(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            return real(*arguments)

        main_moco.KnnMonitor._measure = percent

    words = [*TINY, "--epochs", "3", "--knn", "1", "--tensorboard", "--resume", "auto", "-j", "0", folders]
    words += ["--output-dir", tmp_path / "parts"]
    stop = lambda: at_step(4, send(signal.SIGTERM), rank=world - 1)  # noqa: E731
    run(*words, world=world, prepare=stop, code=75)
    with open(tmp_path / "parts" / "log.jsonl", "a") as file:
        file.write('{"kind":"step","epoch":1,"st')  # as a kill in mid-line leaves it
    run(*words, world=world, prepare=stop_in_knn, code=75)
    assert checkpoints(tmp_path / "parts")[-2:] == ["checkpoint_0001.pth.tar", "tensorboard"]
    run(*words, world=world)
    lines = lines_of(tmp_path / "parts")
    places = [(line["epoch"], line["step"]) for line in lines if line["kind"] == "start"]
    assert places[0] == (0, 0) and places[1][0] == 1 and places[2] == (2, 0)
    entries = [line for line in lines if line["kind"] != "start"]
    order = [(entry["kind"], entry["epoch"], entry.get("step")) for entry in entries]
    assert order == [
        (kind, epoch, step)
        for epoch in range(3)
        for kind, step in (("step", 0), ("step", 1), ("step", 2), ("epoch", None))
    ]
    assert scalars(tmp_path / "parts" / "tensorboard") == pytest.approx(expected_scalars(entries), rel=1e-6)

    run(*words[:-1], tmp_path / "whole", world=world)
    times = {"seconds", "data_seconds", "images_per_s", "memory_mb"}
    expected = [line for line in lines_of(tmp_path / "whole") if line["kind"] != "start"]
    for entry, other in zip(entries, expected, strict=True):
        assert {k: v for k, v in entry.items() if k not in times} == {
            k: v for k, v in other.items() if k not in times
        }


def test_unlabeled_images_train_wherever_they_lie_and_by_a_list(folders, tmp_path, cli):
    """Images beside a nested folder, a corrupt file and a hidden folder."""
    photos = tmp_path / "photos"
    shutil.copytree(folders / "train" / "ant", photos)
    shutil.copytree(folders / "train" / "bee", photos / "2024" / "may")
    (photos / "2024" / "bad.jpg").write_bytes(b"no image")
    (photos / ".thumbnails").mkdir()
    (photos / ".thumbnails" / "0.jpg").write_bytes(b"no image")

    def trained(*words, code=0):
        out = [*TINY, "--epochs", "2", "-b", "17", "--output-dir", tmp_path / "out", "--overwrite"]
        ended, *said = cli(main_moco.main, *out, *words)
        assert ended == code, said
        return said

    errors = trained(photos, code=2)[1]
    assert f"{photos}/2024/bad.jpg cannot be read" in errors and errors.count("\n") == 1
    output, errors = trained(photos, "--on-bad-image", "skip")
    assert f"{photos}: 17 images in 3 folders" in output and "1 hidden folder left out" in output
    assert "bad image: " in errors
    losses, names = (
        losses_of(output),
        [path[len(f"{photos}/") :] for path in paths_of(pretraining_images(photos))],
    )
    assert len(set(losses)) == 2 and names[-9:-7] == ["2024/bad.jpg", "2024/may/0.jpg"]

    there = photos.rename(tmp_path / "elsewhere")
    assert losses_of(trained(there, "--on-bad-image", "skip")[0]) == losses
    (there / "list.txt").write_text("\n".join(names))
    assert losses_of(trained("--images", there / "list.txt", "--on-bad-image", "skip")[0]) == losses
    (there / "list.txt").write_text("\n".join(reversed(names)))  # negative control: the order counts
    assert losses_of(trained("--images", there / "list.txt", "--on-bad-image", "skip")[0]) != losses


def test_what_is_not_printed_is_not_computed(folders, tmp_path, cli, monkeypatch):
    called, real = [], main_moco.similarities
    monkeypatch.setattr(main_moco, "similarities", lambda *args: called.append(1) or real(*args))
    words = [*TINY, "--epochs", "1", folders, "--output-dir", tmp_path, "-p", "2"]
    assert cli(main_moco.main, *words)[0] == 0
    assert len(called) == 2 and len([line for line in lines_of(tmp_path) if line["kind"] == "step"]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has half precision")
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_on_a_cpu_is_refused(folders, tmp_path, cli, amp):
    code, _, errors = cli(main_moco.main, *TINY, "--amp", amp, folders, "--output-dir", tmp_path)
    assert code == 2 and f"--amp {amp} needs a GPU" in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("world", "flag"),
    [
        (1, "--channels-last"),
        (2, "--channels-last"),
        pytest.param(1, "--compile", marks=pytest.mark.slow),
        pytest.param(2, "--compile", marks=pytest.mark.slow),
    ],
)
def test_layout_and_compilation_keep_losses_and_names(folders, tmp_path, world, flag):
    """A run with the flag for an epoch, continued without it."""
    words = [*TINY, "-j", "0", folders, "--output-dir"]
    run(*words, tmp_path / "plain", world=world)
    output = run(*words, tmp_path / "flag", "--epochs", "1", flag, world=world, seconds=300)
    assert {"--channels-last": "channels_last", "--compile": "compiled"}[flag] in output
    output = run(*words, tmp_path / "flag", "--resume", "auto", world=world)
    assert f"note: {flag[2:].replace('-', '_')} was True" in output
    losses, expected = (
        [line["loss"] for line in lines_of(tmp_path / name) if line["kind"] == "step"]
        for name in ("flag", "plain")
    )
    assert losses == pytest.approx(expected, rel=1e-5) and len(losses) == 6
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)  # negative control
    names = [
        list(torch.load(tmp_path / name / "checkpoint_0001.pth.tar", weights_only=True)["state_dict"])
        for name in ("plain", "flag")
    ]
    assert names[0] == names[1]


def test_weights_without_a_gradient_are_left_out_of_its_norm(folders, tmp_path, cli, monkeypatch):
    class Frozen(main_moco.MoCo):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            next(self.encoder_q.parameters()).requires_grad_(False)

    norms = []
    for name, model in (("whole", main_moco.MoCo), ("frozen", Frozen)):
        monkeypatch.setattr(main_moco, "MoCo", model)
        code, _, errors = cli(main_moco.main, *TINY, "--output-dir", tmp_path / name, folders)
        assert code == 0, errors
        norms.append(lines_of(tmp_path / name)[1]["grad_norm"])
    assert 0 < norms[1] < norms[0]


@pytest.mark.parametrize("world", [1, 2])
def test_the_control_of_ifm_multiplies_the_gradient_of_info_nce_by_its_factor(folders, tmp_path, world):
    ifm = "--method", "ifm", "--epsilon", "0.5"
    runs = {"plain": (), "ifm": ifm, "control": (*ifm, "--match-ifm")}
    words = [word for word in TINY if word not in ("--method", "ifm")]
    entries = {}
    for name, flags in runs.items():
        run(*words, "-p", "1", *flags, "--output-dir", tmp_path / name, folders, world=world)
        entries[name] = [line for line in lines_of(tmp_path / name) if line["kind"] == "step"]
    plain, with_ifm, control = (each[0] for each in entries.values())
    assert "ifm_factor" not in plain and with_ifm["ifm_factor"] == control["ifm_factor"] > 1.001
    assert control["loss"] == plain["loss"] != with_ifm["loss"]
    assert control["info_nce"] == with_ifm["info_nce"] == pytest.approx(plain["loss"], rel=1e-6)
    longer = control["grad_norm"] / plain["grad_norm"]  # of all processes: so is the factor
    assert longer == pytest.approx(control["ifm_factor"], rel=1e-5)
    assert plain["grad_norm"] < with_ifm["grad_norm"] < 1.0001 * control["grad_norm"]  # not all parallel
    assert entries["control"][3]["loss"] != entries["plain"][3]["loss"]  # and they are taken
