"""The checks that come before measurements pass as the program is, and find what each is there to find."""

import json
from functools import partial

import pytest
import torch
from tiny import TinyEncoder  # noqa: F401  (which makes `-a tiny` known)

from moco.batchnorm import SplitBatchNorm2d
from moco.bench import __main__ as bench
from moco.bench import checks
from moco.bench.training import Training, setting_of
from moco.data.augment import moco_v2
from moco.data.device import DeviceAugment
from moco.run import checkpoint

CPU = torch.device("cpu")
TINY = setting_of("cpu", arch="tiny", batch_size=8, size=16, moco_k=64, bn_splits=2)


def test_views_are_compared_with_pils_to_the_bit(monkeypatch):
    augment, batch = DeviceAugment(moco_v2(), CPU, photometric=True), TINY.batch()
    assert checks.pixels(augment, batch) == ("16 views of 16 px against PIL's", None)
    genuine = augment.apply

    def with_another_bit(pixels, records):
        views = genuine(pixels, records)
        views[3, 1, 2, 5] = torch.nextafter(views[3, 1, 2, 5], torch.tensor(9.0))
        return views

    monkeypatch.setattr(augment, "apply", with_another_bit)
    assert checks.pixels(augment, batch)[1].startswith("1 values in 1 views differ, by up to ")


def test_views_that_could_not_be_compiled_are_a_failure_with_the_reason(monkeypatch):
    augment = DeviceAugment(moco_v2(), CPU, photometric=True)
    monkeypatch.setattr(DeviceAugment, "__str__", lambda self: "uncompiled and so slow: because")
    assert checks.pixels(augment, TINY.batch())[1] == "uncompiled and so slow: because"


def test_a_resumed_run_is_compared_with_one_that_never_stopped(monkeypatch):
    start = partial(Training, TINY, TINY.images())
    compared, differs = checks.resume(start)
    state = start().model.state_dict()
    weights = sum(name.startswith("encoder_q") for name, _ in start().model.named_parameters())
    assert compared.startswith(f"{len(state) + weights} tensors after 3 + 3 steps") and differs is None

    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "load_optimizer", lambda *_: None)  # no momentum
        assert "tensors differ, the first is" in checks.resume(start)[1]
    names = checkpoint.published_names

    def without_the_queue(model):
        return names(model) | {"queue": start().model.queue}

    monkeypatch.setattr(checks, "published_names", without_the_queue)
    assert "queue" in checks.resume(start)[1]


def test_algorithms_are_deterministic_only_during_the_check(monkeypatch):
    during = []
    monkeypatch.setattr(
        checks, "save", lambda *_: during.append(torch.are_deterministic_algorithms_enabled())
    )
    with pytest.raises(Exception, match="there is no checkpoint"):
        checks.resume(partial(Training, TINY, TINY.images()))
    assert during == [True] and not torch.are_deterministic_algorithms_enabled()


def test_both_forms_of_batchnorm_are_compared_with_float64(monkeypatch):
    genuine = SplitBatchNorm2d.forward

    def with_a_scaled_gradient(self, x):
        if torch.compiler.is_compiling() or x.dtype != torch.float64:  # the reference is eager in float64
            x = x + 0.05 * (x - x.detach())
        return genuine(self, x)

    monkeypatch.setattr(SplitBatchNorm2d, "forward", with_a_scaled_gradient)
    compared, differs = checks.batchnorm(4, CPU)
    assert "4 groups, within float64 1e-10, float32 0.0001" in compared
    forms = (
        "compiled, float64",
        "eager, float32",
        "compiled, float32",
        "eager, bfloat16",
        "compiled, bfloat16",
    )
    assert [fault.split(" by ")[0] for fault in differs.split("; ")] == [
        f"{form}: gradient of x" for form in forms
    ]


def test_a_failed_check_is_said_and_the_rest_is_measured(tmp_path, cli, monkeypatch):
    words = ["--device", "cpu", "-a", "tiny", "-b", 8, "--size", 16, "--moco-k", 64, "--bn-splits", 2]
    words += ["--rounds", 1, "--steps", 1, "--only", "checks", "here", "--json", tmp_path / "found.json"]

    def fail(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(checks, "restore", fail)
    code, output, errors = cli(bench.main, "step", *words)
    assert code == 1, errors
    found = json.loads((tmp_path / "found.json").read_text())
    assert [check["verdict"] for check in found["checks"].values()] == ["passed", "FAILED", "passed"]
    assert "- passed: exact pixels (16 views of 16 px against PIL's)\n" in output
    assert "- FAILED: resume (): RuntimeError: no such kernel\n" in output
    assert found["tables"]["a step"]["here"]["pairs/s"]["median"] > 0 and "pairs/s" in output
