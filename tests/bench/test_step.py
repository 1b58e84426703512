"""The measurement of the training step: what is compared does the same work, and it is compared in turns."""

import json
import multiprocessing
from functools import partial

import pytest
import torch
from tiny import TinyEncoder

from moco.bench import __main__ as bench
from moco.bench import report as bench_report
from moco.bench import step as bench_step
from moco.bench.step import setting_of, training_run
from moco.builder import MoCo

SIZES = {"arch": "tiny", "batch_size": 16, "size": 16, "moco_k": 64, "bn_splits": 4}
TINY = [word for name, value in SIZES.items() for word in (f"--{name.replace('_', '-')}", value)]
TINY += ["--device", "cpu", "--rounds", "1", "--steps", "1"]


def ratio(one, other):
    return pytest.approx(one["median"] / other["median"], rel=2e-3)  # of one round: of medians as of ratios


def test_the_rows_of_a_step_are_compared_with_each_other(cli):
    tables = json.loads(cli(bench.main, "step", *TINY, "--json")[1])["tables"]
    steps, losses = tables.values()
    published, here, layout, fast, v2, unsplit, ceiling = steps.values()
    for row in steps.values():
        rate = row["pairs/s"]
        assert 0 < rate["low"] <= rate["median"] <= rate["high"]
        assert row["of the ceiling"]["median"] == ratio(rate, ceiling["pairs/s"])
        assert row["of published"]["median"] == ratio(rate, published["pairs/s"])
        assert row["of --fast"]["median"] == ratio(rate, fast["pairs/s"])
    for row in (here, layout, fast):
        assert row["first loss"] == pytest.approx(published["first loss"], abs=1e-5)
    for row in (v2, unsplit):
        assert row["first loss"] != pytest.approx(published["first loss"], abs=1e-4)  # it does other work
    first, second = losses.values()
    assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)
    assert second["of the first's memory"] == pytest.approx(second["MB"] / first["MB"], abs=1e-3)
    assert second["MB"] < first["MB"] / 10
    assert 2 * 4 * 256 * 65537 < 1e6 * first["MB"] < 10 * 4 * 256 * 65537  # logits, N x (1+K) float32


def test_published_steps_and_ours_compute_the_same():
    s = setting_of("cpu", **SIZES)
    images = s.images()
    published, ours = training_run(s, images, published=True), training_run(s, images)
    first, second = published(4), published(4)
    assert first == pytest.approx(ours(4), abs=1e-5)
    assert second == pytest.approx(ours(4), abs=1e-5)  # of trained weights, after the queue is full
    assert abs(first - second) > 1e-3
    assert abs(training_run(s, images, bn_splits=1)(4) - first) > 1e-4
    # What cannot be measured here computes the same too, within bf16's precision.
    bf16 = training_run(s, images, amp=torch.bfloat16, channels_last=True)
    assert bf16(4) == pytest.approx(first, rel=0.02)

    keys = []
    for model in (s.model(MoCo), s.model(bench_step.Published)):
        model.encoder_q.bn.bias.data += torch.arange(8) / 7
        model._momentum_update_key_encoder()
        keys.append(model.encoder_k.bn.bias)
    assert torch.equal(*keys) and keys[0].any()


def test_the_ceiling_is_two_forward_passes_and_one_backward(monkeypatch):
    calls = []

    class Spied(TinyEncoder):
        def forward(self, x):
            features = super().forward(x)
            features.requires_grad and features.register_hook(lambda grad: calls.append("backward"))
            calls.append(("forward", torch.is_grad_enabled(), tuple(x.shape)))
            return features

    s = setting_of("cpu", **SIZES)
    monkeypatch.setattr(bench_step, "base_encoder", lambda arch: Spied)
    bench_step.encoders_run(s, s.images())(2)
    shape = (16, 3, 16, 16)
    assert calls == [("forward", True, shape), ("forward", False, shape), "backward"] * 2


def test_rows_take_turns_after_a_round_that_does_not_count():
    order = []
    turns = {name: lambda number, name=name: order.append((name, number)) or len(order) for name in "abc"}
    taken = bench_report.in_turns(turns, 3, "turns")
    assert "".join(name for name, _ in order) == "abcbcacababc"
    assert [number for _, number in order] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert taken["b"].tolist() == [4, 9, 11]  # without the 2 of the first round


def test_a_row_that_does_not_fit_or_compile_is_left_out_with_the_reason(cli, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_step, "encoders_run", fail)
    output = cli(bench.main, "step", *TINY, "--json", "--only", "here", "ceiling")[1]
    [rows] = json.loads(output)["tables"].values()
    assert rows["ceiling: the encoders alone"] == {"first loss": "left out: CUDA out of memory"}
    assert rows["here, float32"]["pairs/s"] and "of the ceiling" not in rows["here, float32"]


def test_peak_memory_is_measured():
    def work(count):
        first = torch.zeros(count)
        second = first + 1
        del first
        return (second * 2).sum()

    for count in (250_000, 500_000):
        peak = bench_step.peak_bytes(partial(work, count), torch.device("cpu"))
        assert peak == pytest.approx(8 * count, rel=0.01)


def test_the_step_from_files_reads_the_images_of_the_folder(folders, cli, monkeypatch):
    read = []
    genuine = bench_step.DeviceAugment.__call__
    monkeypatch.setattr(
        bench_step.DeviceAugment,
        "__call__",
        lambda self, batch: read.append(set(batch.indices.tolist())) or genuine(self, batch),
    )
    words = [*TINY, "--batch-size", "8", "--steps", "2", "--only", "here", "--data", folders, "-j", "1"]
    code, output, errors = cli(bench.main, "step", *words, "--json")
    assert code == 0, errors
    [rows] = json.loads(output)["tables"].values()
    assert list(rows) == ["here, float32", "here, --fast", f"here, --fast, from {folders} with 1 workers"]
    assert all(row["of --fast"]["median"] > 0 for row in rows.values())
    assert len(read) == 1 + 2 * 2 and len(set.union(*read)) > 16 and set.union(*read) <= set(range(24))
    assert not multiprocessing.active_children()


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
        (["--only", "amp"], "--only amp: on cpu the rows are published, here,"),
        (["--data", "missing"], "there is no folder missing"),
        (["--data", "IMAGES", "-b", "16", "--steps", "2"], "has images for 1 steps, not 2; lower --steps"),
        (["--device", "cuda"], "use --device cpu"),
    ],
)
def test_wrong_use_is_a_sentence(words, message, folders, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = [folders if word == "IMAGES" else word for word in words]
    code, output, errors = cli(bench.main, "step", "--device", "cpu", "-j", "0", *words)
    assert (code, output) == (2, "")
    assert message in errors and "Traceback" not in errors
