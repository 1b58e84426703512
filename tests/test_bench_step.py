"""The measurement of the training step: what is compared does the same work, and it is compared in turns."""

import json
import multiprocessing
import tempfile
import time
from dataclasses import replace

import pytest
import torch
from tiny import TinyEncoder

from moco import bench, bench_report, bench_step, bench_step_report, bench_train
from moco.bench_train import Watched, setting
from moco.builder import MoCo
from moco.errors import UserError
from moco.execution import Execution

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--batch-size", "16", "--moco-k", "64", "--rounds", "1", "--steps", "1"]
STEP = [*TINY, "--size", "32", "--arch", "resnet18", "--bn-splits", "2"]


@pytest.fixture
def tiny(monkeypatch):
    """A Setting whose encoder has one convolution."""
    monkeypatch.setattr(bench_train, "base_encoder", lambda arch: TinyEncoder)
    return setting("cpu", batch_size=16, size=16, moco_k=64, bn_splits=4)


def test_the_report_of_the_step_is_one_object_with_consistent_ratios(cli):
    report = json.loads(cli(bench.main, "step", *STEP, "--json")[1])
    rows = report["rows"]
    assert " ".join(rows) == "published faithful channels_last fast fast_v2 fast_unsplit ceiling"
    for row in rows.values():
        for ratio in (row["images_per_s"], row["to_ceiling"], row["to_faithful"], row["to_published"]):
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert all(rows[name][f"to_{name}"]["median"] == 1 for name in ("ceiling", "faithful", "published"))
    # Of one round, so that the ratio of medians is the median of ratios.
    rate = {name: row["images_per_s"]["median"] for name, row in rows.items()}
    assert rows["fast"]["to_ceiling"]["median"] == pytest.approx(rate["fast"] / rate["ceiling"], rel=2e-3)
    assert report["ifm_to_v2"]["median"] == pytest.approx(rate["fast"] / rate["fast_v2"], rel=2e-3)
    split = rate["fast"] / rate["fast_unsplit"]
    assert report["split_to_unsplit"]["median"] == pytest.approx(split, rel=2e-3)
    assert report["left_out"].keys() == {"bf16", "compile"}
    assert (report["hours_200_epochs"], rows["fast"]["peak_bytes"]) == (None, None)

    loss = {name: row["first_loss"] for name, row in rows.items()}
    assert loss["published"] == pytest.approx(loss["faithful"], abs=1e-5)
    assert loss["fast_v2"] != pytest.approx(loss["faithful"], abs=1e-2)  # another loss
    both = [report["loss"][name]["loss"] for name in ("two_cross_entropies", "contrast")]
    assert both[0] == pytest.approx(both[1], abs=1e-5)
    _check_tables(report)


def _check_tables(report):
    report |= {"device": "cuda", "hours_200_epochs": 2.5}
    report["hardware"]["gpu"] = "a GPU"
    for row in report["rows"].values():
        row["peak_bytes"] = 45.6e9
        row["images_per_s"] = {"median": 3456.7, "low": 3333.3, "high": 3555.5}
    text = bench_step_report.step_tables(report)
    assert max(map(len, text.splitlines())) <= 80
    for words in ("ceiling: encoders alone", "45.6", "2.50 hours", "--only bf16", "moco.contrast", "a GPU"):
        assert words in text


def test_published_and_faithful_steps_compute_the_same(tiny):
    images, plain = tiny.images(), Execution(CPU)
    published = bench_step.published_run(tiny, images, plain)
    faithful = bench_step.training_run(tiny, images, plain)
    first, second = published(4), published(4)
    assert first == pytest.approx(faithful(4), abs=1e-5)
    assert second == pytest.approx(faithful(4), abs=1e-5)  # of trained weights and a queue that has turned
    assert abs(first - second) > 1e-3
    other = bench_step.training_run(replace(tiny, bn_splits=1), images, plain)
    assert abs(other(4) - first) > 1e-4

    keys = []
    for model in (tiny.model(MoCo), tiny.model(bench_step.Published)):
        model.encoder_q.bn.bias.data += torch.arange(8) / 7
        model._momentum_update_key_encoder()
        keys.append(model.encoder_k.bn.bias)
    assert torch.equal(*keys) and keys[0].any()


def test_the_ceiling_is_two_forward_passes_and_one_backward(tiny, monkeypatch):
    calls = []

    class Spied(TinyEncoder):
        def forward(self, x):
            features = super().forward(x)
            features.requires_grad and features.register_hook(lambda grad: calls.append("backward"))
            calls.append(("forward", torch.is_grad_enabled(), tuple(x.shape)))
            return features

    monkeypatch.setattr(bench_train, "base_encoder", lambda arch: Spied)
    bench_step.bare_run(tiny, tiny.images(), Execution(CPU))(2)
    shape = (16, 3, 16, 16)
    assert calls == [("forward", True, shape), ("forward", False, shape), "backward"] * 2


def test_rows_take_turns():
    order, done = [], []
    taken = bench_report.in_turns(
        "abc", 4, lambda name: order.append(name) or len(order), lambda: done.append(len(order))
    )
    assert "".join(order) == "abcbcacababc"
    assert done == [3, 6, 9, 12]
    assert taken["b"] == [2, 4, 9, 11]


def test_what_this_device_cannot_do_is_left_out_with_the_reason(tiny, monkeypatch, cli):
    def check(self):
        if self.channels_last:
            raise UserError("no such layout here")

    monkeypatch.setattr(Execution, "check", check)
    words = ["step", *STEP, "--moco-k", "40", "--json", "--only"]
    wanted = ("published", "channels_last", "bf16", "fast", "faithful")
    report = json.loads(cli(bench.main, *words, *wanted)[1])
    assert {name: row["execution"] for name, row in report["rows"].items()} == {
        "faithful": "float32", "bf16": "encoders in bf16", "fast": "float32"
    }  # fmt: skip
    assert report["left_out"]["channels_last"] == "no such layout here"
    assert "must be a multiple" in report["left_out"]["published"]
    assert report["rows"]["fast"]["to_ceiling"] is None and "loss" not in report
    assert " - " in bench_step_report.step_tables(report)
    assert "no such layout here" in cli(bench.main, *words, "channels_last")[2]

    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_step, "bare_run", too_large)
    report = json.loads(cli(bench.main, *words, "ceiling", "faithful")[1])
    assert list(report["rows"]) == ["faithful"]
    assert "lower --batch-size" in report["left_out"]["ceiling"]


def test_peak_memory_is_measured():
    def work(count):
        first = torch.zeros(count)
        second = first + 1
        del first
        return (second * 2).sum()

    assert bench_step_report.peak_bytes(lambda: work(250_000), CPU) == pytest.approx(2e6, rel=0.01)
    assert bench_step_report.peak_bytes(lambda: work(500_000), CPU) == pytest.approx(4e6, rel=0.01)


def test_the_loss_alone_takes_less_memory_and_no_model(cli, monkeypatch):
    monkeypatch.setattr(bench_step, "_steps", None)
    words = ["--json", "--loss-only", "--batch-size", "64", "--moco-k", "8192"]
    loss = json.loads(cli(bench.main, "step", *TINY, *words)[1])["loss"]
    peaks = [loss[name]["peak_bytes"] for name in ("two_cross_entropies", "contrast")]
    logits = 4 * 64 * 8193
    assert 2 * logits < peaks[0] < 10 * logits
    assert loss["memory_ratio"] == pytest.approx(peaks[1] / peaks[0], abs=1e-4)
    assert loss["memory_ratio"] < 1 and loss["time_ratio"]["low"] > 0


def test_tf32_is_set_for_a_row_and_put_back():
    def now():
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    before = now()
    for on, inside in ((True, (True, "high")), (False, (False, "highest")), (None, before)):
        with bench_step_report._tf32_set(on, torch.device("cuda")):
            assert now() == inside
        assert now() == before


def test_end_to_end_reads_the_images_of_the_folder(folders, tiny, cli):
    words = ["train", folders, *TINY, "--size", "16", "--steps", "3", "--workers", "1"]
    report = json.loads(cli(bench.main, *words, "--json")[1])
    assert report["images"] == {"folder": str(folders), "distinct": 24}  # 48 are taken
    files = report["files"]
    ratio = files["images_per_s"]["median"] / report["resident"]["images_per_s"]["median"]
    assert files["to_resident"]["median"] == pytest.approx(ratio, rel=2e-3)
    assert 0 < files["waited_percent"]["median"] < 100
    assert not multiprocessing.active_children()
    text = bench_step_report.train_table(report | {"hours_200_epochs": 2.5})
    assert max(map(len, text.splitlines())) <= 80
    assert "24 different images" in text and "2.50" in text


def test_photographs_for_the_end_to_end_run_are_removed(tiny, tmp_path, monkeypatch, cli):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(bench_train, "MADE", 2)
    seen, original = [], bench_train.image_folder
    monkeypatch.setattr(bench_train, "image_folder", lambda *at: seen.append(at[0]) or original(*at))
    code, output, errors = cli(bench.main, "train", *TINY, "--size", "16", "--workers", "0")
    assert code == 0 and "2 different images: photographs made for it" in output, errors
    assert len(seen) == 1 and seen[0].startswith(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_waiting_is_that_for_batches_and_not_for_steps():
    def loader():
        for batch in range(3):
            time.sleep(0.03)
            yield batch

    watched = Watched(loader(), CPU)
    for _ in watched:
        time.sleep(0.06)
    first, waited = watched.waits()
    assert 0.03 <= first < waited and 0.09 <= waited < 0.09 + 0.18  # with the steps it would be all of that


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["step", "--batch-size", "12"], "--batch-size 12 does not give --bn-splits 8 equal groups"),
        (["step", "--batch-size", "8"], "equal groups of 2 or more"),
        (["step", "--moco-k", "-5"], "--moco-k must be at least 1"),
        (["step", "--steps", "0"], "--steps must be at least 1"),
        (["step", "--arch", "resnet19"], "did you mean"),
        (["step", "--arch", "inception_v3", "--size", "16"], "cannot take --size 16"),
        (["step", "--only", "fastest"], "invalid choice: 'fastest'"),
        (["step", "--only", "published_tf32"], "TF32 is a mode of GPUs"),
        (["step", "--without", *bench.STEP_ROWS], "no row is left"),
        (["train", "missing"], "there is no folder missing"),
        (["train", "BARE"], "is not complete"),
        (["train", "IMAGES", "--batch-size", "32"], "24 images, fewer than a step's 32; lower --batch-size"),
        (["train", "IMAGES", "--workers", "-1"], "--workers must be 0 or more"),
    ],
)
def test_wrong_use_is_a_sentence(words, message, folders, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BARE" / "train").mkdir(parents=True)
    words = [folders if word == "IMAGES" else word for word in words]
    code, output, errors = cli(bench.main, words[0], "--device", "cpu", *words[1:])
    assert (code, output) == (2, "")
    assert message in errors and "Traceback" not in errors


@pytest.mark.parametrize("command", ["step", "train"])
def test_a_gpu_that_is_not_there_is_a_sentence(command, monkeypatch, cli):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, errors = cli(bench.main, command, "--device", "cuda")
    assert (code, "use --device cpu" in errors) == (2, True)


@pytest.mark.parametrize("command", ["step", "train"])
def test_help_is_narrow(command, monkeypatch, cli):
    monkeypatch.setenv("COLUMNS", "80")
    code, output, _ = cli(bench.main, command, "--help")
    assert code == 0 and "--bn-splits" in output
    assert max(map(len, output.splitlines())) <= 80
