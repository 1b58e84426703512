"""The measurement of the training step: what is compared does the same work, and it is compared in turns."""

import json
import math
import multiprocessing
import weakref
from functools import partial

import pytest
import torch
from tiny import TinyEncoder
from torch import nn

from moco.bench import __main__ as bench
from moco.bench import report as bench_report
from moco.bench import step as bench_step
from moco.bench import training
from moco.bench.training import Encoders, Published, PublishedTraining, Training, setting_of
from moco.builder import MoCo
from moco.data.device import DeviceAugment

SIZES = {"arch": "tiny", "batch_size": 16, "size": 16, "moco_k": 64, "bn_splits": 4}
TINY = [word for name, value in SIZES.items() for word in (f"--{name.replace('_', '-')}", value)]
TINY += ["--device", "cpu", "--rounds", "1", "--steps", "1"]


def ratio(one, other):
    return pytest.approx(one["median"] / other["median"], rel=2e-3)  # of one round: of medians as of ratios


@pytest.fixture
def report_of(cli, tmp_path):
    """`report_of(*words)`: the JSON of `python -m moco.bench step` with a tiny network, and the output."""

    def run(*words):
        code, output, errors = cli(bench.main, "step", *TINY, "--json", tmp_path / "found.json", *words)
        assert code == 0, errors
        return json.loads((tmp_path / "found.json").read_text()), output

    return run


def test_the_rows_of_a_step_are_compared_with_each_other(report_of):
    found, output = report_of()
    steps, needs, ratios, losses, augmentation = found["tables"].values()
    published, here, _, fast, v2, _, ceiling = steps.values()
    for row in steps.values():
        rate = row["pairs/s"]
        assert 0 < rate["low"] <= rate["median"] <= rate["high"]
        assert row["of the ceiling"]["median"] == ratio(rate, ceiling["pairs/s"])
        assert row["of published"]["median"] == ratio(rate, published["pairs/s"])
    assert ratios["IFM / plain"]["ratio"]["median"] == ratio(fast["pairs/s"], v2["pairs/s"])
    hours = 126_689 * 200 / here["pairs/s"]["median"] / 3600
    assert needs["here"]["ImageNet-100, h"] == pytest.approx(hours, rel=1e-3)
    first_losses = [row["first loss"] for row in needs.values()]
    for loss in first_losses[1:4]:
        assert loss == pytest.approx(first_losses[0], abs=1e-5)
    for loss in first_losses[4:6]:
        assert loss != pytest.approx(first_losses[0], abs=1e-4)  # it does other work
    assert first_losses[6] is None
    first, second = losses.values()
    assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)
    assert second["of the first's memory"] == pytest.approx(second["MB"] / first["MB"], abs=1e-3)
    assert second["MB"] < first["MB"] / 10
    assert 2 * 4 * 256 * 65537 < 1e6 * first["MB"] < 10 * 4 * 256 * 65537  # logits, N x (1+K) float32
    assert augmentation["on cpu"]["MB"] > 2 * 16 * 3 * 16 * 16 * 4 / 1e6  # the views in float32
    assert [check["verdict"] for check in found["checks"].values()] == ["passed"] * 3
    assert output.startswith(f"# {found['about']['cpu']}\n") and "`python -m moco.bench " in output


def test_published_steps_and_ours_compute_the_same():
    s = setting_of("cpu", **SIZES)
    images = s.images()
    published, ours = PublishedTraining(s, images), Training(s, images)
    first, second = published(4), published(4)
    assert first == pytest.approx(float(ours(4)), abs=1e-5)
    assert second == pytest.approx(float(ours(4)), abs=1e-5)  # of trained weights, after the queue is full
    assert abs(first - second) > 1e-3
    assert abs(Training(s, images, bn_splits=1)(4) - first) > 1e-4

    keys = []
    for model in (s.model(MoCo), s.model(Published)):
        model.encoder_q.bn.bias.data += torch.arange(8) / 7
        model._momentum_update_key_encoder()
        keys.append(model.encoder_k.bn.bias)
    assert torch.equal(*keys) and keys[0].any()


def test_rows_for_a_gpu_share_what_is_compiled(monkeypatch):
    """Once for each network and pass: forward with a gradient, and without. Here they are only traced."""
    compiled, compile_module = [], nn.Module.compile

    def backend(graph, _):
        compiled.append(torch.is_grad_enabled())
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend=backend))
    s, losses, counts = setting_of("cpu", **SIZES), {}, {}
    images, batch, augment = s.images(), s.batch(), DeviceAugment(bench_step.moco_v2(), "cpu", True)
    rows = bench_step.rows_of(torch.device("cuda"), 4, lambda steps: map(augment, [batch] * steps))
    for name, (_, kind, options) in rows.items():
        run = kind(s, images, **options)
        losses[name] = float(run(4))
        counts[name] = len(compiled)
        assert run.precision == ("float32" if name in ("published", "here", "channels_last") else "bfloat16")
    torch._dynamo.reset()
    assert [counts[name] for name in ("amp", "fast", "fast_v2", "augmented")] == [0, 2, 2, 2]
    assert counts["fast_unsplit"] == counts["ceiling"] == 4 and compiled == [True, False] * 2
    for name in ("here", "channels_last", "amp", "fast"):
        assert losses[name] == pytest.approx(losses["published"], rel=0.02), name
    for name in ("fast_v2", "augmented", "fast_unsplit"):
        assert losses[name] != losses["fast"], name
    assert math.isnan(losses["ceiling"])


def test_the_precision_of_a_row_is_that_during_its_steps(report_of, monkeypatch):
    genuine, settings = PublishedTraining.step, ["float32"]

    def step(self, *views):
        settings.append("TF32")
        try:
            return genuine(self, *views)
        finally:
            settings.pop()

    monkeypatch.setattr(PublishedTraining, "step", step)
    monkeypatch.setattr(training, "precision", lambda device: settings[-1])
    _, needs = report_of("--only", "here", "published")[0]["tables"].values()
    assert {name: row["precision"] for name, row in needs.items()} == {"published": "TF32", "here": "float32"}


def test_the_ceiling_is_two_forward_passes_and_one_backward(monkeypatch):
    calls = []

    class Spied(TinyEncoder):
        def forward(self, x):
            features = super().forward(x)
            features.requires_grad and features.register_hook(lambda grad: calls.append("backward"))
            calls.append(("forward", torch.is_grad_enabled(), tuple(x.shape)))
            return features

    s = setting_of("cpu", **SIZES)
    monkeypatch.setattr(training, "base_encoder", lambda *_, **__: Spied)
    Encoders(s, s.images())(2)
    shape = (16, 3, 16, 16)
    assert calls == [("forward", True, shape), ("forward", False, shape), "backward"] * 2


def test_rows_take_turns_after_a_round_that_does_not_count():
    order = []
    turns = {name: lambda number, name=name: order.append((name, number)) or len(order) for name in "abc"}
    taken = bench_report.in_turns(turns, 3, "turns")
    assert "".join(name for name, _ in order) == "abcbcacababc"
    assert [number for _, number in order] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert taken["b"].tolist() == [4, 9, 11]  # without the 2 of the first round


@pytest.mark.parametrize("fitting", [0, 1, 2])
def test_a_row_that_does_not_fit_is_left_out_and_frees_its_memory(fitting, report_of, monkeypatch):
    """At the first step or in a later turn."""
    genuine, model, alive = Training.step, [], []

    def too_large(self, *views):
        model.append(weakref.ref(self.model))
        if len(model) > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return genuine(self, *views)

    def spied(self, *views):
        if type(self) is Training and len(model) > fitting:
            alive.append(model[0]() is not None)
        return genuine(self, *views)

    monkeypatch.setattr(PublishedTraining, "step", too_large)
    monkeypatch.setattr(Training, "step", spied)
    report, output = report_of("--only", "published", "here", "ceiling", "--rounds", "2")
    steps, _ = report["tables"].values()
    assert steps["published"] == {} and steps["here"]["of the ceiling"]["median"] > 0
    assert "of published" not in steps["here"]
    note = "left out: published (OutOfMemoryError: CUDA out of memory)"
    assert report["notes"] == [note] and f"- {note}" in output
    assert len(model) == fitting + 1 and alive and not any(alive)


def test_peak_memory_is_measured():
    def work(count):
        first = torch.zeros(count)
        second = first + 1
        del first
        return (second * 2).sum()

    for count in (250_000, 500_000):
        peak = bench_step.peak_bytes(partial(work, count), torch.device("cpu"))
        assert peak == pytest.approx(8 * count, rel=0.01)


def test_the_step_from_files_reads_the_images_of_the_folder(folders, report_of, monkeypatch):
    read, genuine = [], DeviceAugment.__call__
    monkeypatch.setattr(
        DeviceAugment,
        "__call__",
        lambda self, batch: read.append(set(batch.indices.tolist())) or genuine(self, batch),
    )
    words = ["--batch-size", "8", "--steps", "2", "--only", "here", "--data", folders, "-j", "1"]
    steps, _, ratios = report_of(*words)[0]["tables"].values()
    assert list(steps) == ["here", "here, --fast", "here, --fast, from files, 1 workers"]
    of_memory = ratios["from files / from memory"]["ratio"]["median"]
    rates = [row["pairs/s"] for row in steps.values()]
    assert of_memory == ratio(rates[2], rates[1])
    assert ratios["share of waiting for files"]["ratio"]["median"] == pytest.approx(1 - of_memory, abs=1e-3)
    assert len(read) == 1 + 2 * 2 and len(set.union(*read)) > 16 and set.union(*read) <= set(range(24))
    assert not multiprocessing.active_children()


def test_files_are_made_where_none_are_named(report_of, monkeypatch):
    made = []
    photographs = bench_step.photographs
    monkeypatch.setattr(bench_step, "photographs", lambda *_: made.append(photographs(None, 3)) or made[0])
    steps, *_ = report_of("--only", "fast", "-j", "0", "--data")[0]["tables"].values()
    assert list(steps) == ["here, --fast", "here, --fast, from files, 0 workers"] and made


def test_tables_are_markdown():
    spread = {"median": 82.14, "low": 80.0, "high": 1473.2}
    rows = {"one": {"a": spread, "b": 0.04123}, "two": {"b": None, "c": "text"}}
    assert bench_report.text({"tables": {"t": rows}}).splitlines() == [
        "| t   |                   a |      b |    c |",
        "| --- | ------------------: | -----: | ---: |",
        "| one | 82.1 [80.0, 1473.2] | 0.0412 |    - |",
        "| two |                   - |      - | text |",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", "12"], "has no --bn-splits 8 equal groups"),
        (["--arch", "inception_v3", "--size", "16"], "cannot take --size 16"),
        (["--only", "amp"], "--only amp: on cpu there are published, here,"),
        (["--data", "missing"], "there is no folder missing"),
        (["--data", "IMAGES", "-b", "16", "--steps", "2"], "has images for 1 steps, not 2; lower --steps"),
        (["--device", "cuda"], "use --device cpu"),
        (["--json", "missing/file"], "the folder missing does not exist"),
    ],
)
def test_wrong_use_is_a_sentence(words, message, folders, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = [folders if word == "IMAGES" else word for word in words]
    code, output, errors = cli(bench.main, "step", "--device", "cpu", "-j", "0", *words)
    assert (code, output) == (2, "")
    assert message in errors and "Traceback" not in errors
