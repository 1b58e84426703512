"""Several linear classifiers in one pass: each is what it would be alone, whatever becomes of the others."""

import json
import os
import re

import pytest
import torch
import torch.nn.functional as F
from linear_runs import CPU, WORDS, load, run, tiny_encoder  # noqa: F401
from test_resume import content_hash
from tiny import TinyEncoder
from torch import nn

from moco.data import Loading, labelled_folders
from moco.distributed import Process, wrap
from moco.draws import linear_train
from moco.heads import Layers, make_heads, train_step
from moco.views import normalise


def literal(rank, world, folder, lr, amp):
    """The published protocol with one classifier, as upstream writes it."""
    process = Process(rank, world, rank, world, world, CPU)
    loader = Loading(16, "pil", 8, 0).training(
        labelled_folders(folder)[0], linear_train(), process, 3, views=1, photometric=True
    )
    torch.manual_seed(3)
    model = TinyEncoder(num_classes=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in ("fc.weight", "fc.bias")
    model.fc.weight.data.normal_(mean=0.0, std=0.01)
    model.fc.bias.data.zero_()
    model = wrap(model, process).eval()
    sgd = torch.optim.SGD(model.module.fc.parameters(), lr, momentum=0.9, weight_decay=0.01, fused=True)
    for epoch in range(3):
        loader.batch_sampler.epoch = epoch
        sgd.param_groups[0]["lr"] = lr * 0.1 if epoch == 1 else lr * 0.1 * 0.1 if epoch == 2 else lr
        for batch in loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                output = model(normalise(batch.pixels[0])).float()
            sgd.zero_grad()
            F.cross_entropy(output, batch.targets).backward()
            sgd.step()
    return content_hash(model.state_dict()), content_hash(sgd.state_dict())


@pytest.mark.parametrize(("world", "amp"), [(1, False), (1, True), (2, False)])
def test_one_value_is_the_published_protocol_to_the_bit(run_ranks, folders, tmp_path, world, amp):
    words = ["--lr", "2", *["--amp", "bf16"] * amp]
    assert run(run_ranks, world, folders, tmp_path, *words)[0] == [0] * world
    ours = load(tmp_path)
    found = content_hash(ours["state_dict"]), content_hash(ours["optimizer"])
    assert found == run_ranks(world, literal, folders, 2.0, amp)[0]
    assert found[0] != run_ranks(world, literal, folders, 2.0001, amp)[0][0]  # negative control
    assert {"epoch", "arch", "best_acc1", "seed"} < ours.keys() and list(ours["state_dict"])[
        -1
    ] == "module.fc.bias"


def weights(checkpoint, head=None):
    state = checkpoint["state_dict"] if head is None else checkpoint["heads"][head]["state_dict"]
    return torch.cat([t.flatten() for name, t in state.items() if name.removeprefix("module.fc.") in FC])


FC = ("weight", "bias")


@pytest.mark.parametrize(
    ("world", "more"), [(1, ()), (2, ()), (1, ("--amp", "bf16", "--channels-last"))], ids=str
)
def test_heads_are_what_separate_runs_find(run_ranks, folders, tmp_path, world, more):
    lrs = ["1", "3", "10", "30"]
    codes, output = run(run_ranks, world, folders, tmp_path / "all", "--lr", *lrs, *more)
    assert codes == [0] * world
    together = load(tmp_path / "all")
    alone = []
    for i, lr in enumerate(lrs):
        assert run(run_ranks, world, folders, tmp_path / lr, "--lr", lr, *more)[0] == [0] * world
        alone.append(load(tmp_path / lr))
        torch.testing.assert_close(weights(together, i), weights(alone[-1]), rtol=0, atol=1e-6)
        assert together["heads"][i]["history"] == [
            pytest.approx(entry, rel=1e-5) for entry in alone[-1]["heads"][0]["history"]
        ]
    for i in range(4):  # negative control: it tells the learning rates apart
        for j in range(i):
            assert (weights(together, i) - weights(alone[j])).abs().max() > 1e-3

    # the best of them is kept as upstream keeps one
    best = max(alone, key=lambda checkpoint: checkpoint["best_acc1"])
    assert together["best_acc1"] == best["best_acc1"]
    lr = best["lr"]
    kept, same = (
        load(tmp_path / "all", "model_best.pth.tar"),
        load(tmp_path / f"{lr:g}", "model_best.pth.tar"),
    )
    assert kept["lr"] == lr and kept.keys() == same.keys() and "heads" not in kept
    assert kept["state_dict"].keys() == same["state_dict"].keys() == best["state_dict"].keys()
    torch.testing.assert_close(weights(kept), weights(same), rtol=0, atol=1e-6)
    assert together["state_dict"].keys() == best["state_dict"].keys()
    assert torch.equal(weights(together), weights(together, lrs.index(f"{lr:g}")))
    printed = [float(x) for x in re.findall(r"^ \* Acc@1 (\S+) Acc@5 \S+$", output, re.MULTILINE)]
    assert len(printed) == 3 and max(printed) == pytest.approx(best["best_acc1"], abs=1e-3)


@pytest.mark.parametrize("world", [1, 2])
def test_a_head_that_diverges_leaves_the_others_alone(run_ranks, folders, tmp_path, world):
    codes, output = run(run_ranks, world, folders, tmp_path / "all", "--lr", "1", "1e38", "3")
    assert codes == [0] * world
    assert re.search(r"^--lr 1e\+38 diverged: the loss of epoch 0 is (nan|inf) at lr 1e\+38$", output, re.M)
    assert output.count(" diverged: ") == 1 and output.count("1e+38: diverged") == 3
    assert run(run_ranks, world, folders, tmp_path / "two", "--lr", "1", "3")[0] == [0] * world
    together, two = load(tmp_path / "all"), load(tmp_path / "two")
    assert not weights(together, 1).isfinite().all() and together["heads"][1]["diverged"] == 0
    for ours, theirs in ((0, 0), (2, 1)):
        assert torch.equal(weights(together, ours), weights(two, theirs))
    report = json.loads((tmp_path / "all" / "linear.json").read_text())
    assert [head["diverged"] for head in report["heads"]] == [None, 0, None]
    assert report["best"]["acc1"] == together["best_acc1"]

    codes, output = run(run_ranks, world, folders, tmp_path / "none", "--lr", "1e38", "2e38")
    assert (
        len(set(codes)) == 1 and "every other --lr diverged before; start again with a lower --lr" in codes[0]
    )
    assert os.listdir(tmp_path / "none") == ["linear.jsonl"]


def test_a_head_that_overflows_in_fp16_does_not_stop_the_others():
    def trained(scales):
        torch.manual_seed(0)
        layers = Layers(nn.Linear(4, 3), len(scales))
        made = iter(scales)
        heads = make_heads(
            layers, [0.1 * (i + 1) for i in range(len(scales))], 0.9, 0.0,
            lambda: torch.amp.GradScaler("cpu", init_scale=next(made), growth_interval=3),
        )  # fmt: skip
        features, labels = 30 * torch.randn(8, 4), torch.randint(3, (8,))
        skipped = [0] * len(heads)
        for _ in range(8):
            before = [layer.weight.clone() for layer in layers.each]
            train_step(heads, [F.cross_entropy(logits, labels) for logits in layers(features)])
            for i, layer in enumerate(layers.each):
                skipped[i] += torch.equal(layer.weight, before[i])
        return heads, skipped

    heads, skipped = trained([2.0**10, 2.0**127])  # gradients of the second are infinite at first
    alone, _ = trained([2.0**10])
    assert skipped[0] == 0 and 0 < skipped[1] < 8
    assert torch.equal(heads[0].layer.weight, alone[0].layer.weight)
    assert heads[0].scaler.get_scale() == alone[0].scaler.get_scale() == 2.0**12
    assert heads[1].layer.weight.isfinite().all()
