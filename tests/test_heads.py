"""Several linear classifiers in one pass: each is what it would be alone, whatever becomes of the others."""

import contextlib
import io
import json
import os
import re
import signal
import sys

import pytest
import torch
import torch.nn.functional as F
from command_lines import SMALL
from tiny import TinyEncoder
from torch import nn

import main_lincls
from moco.checkpoint import content_hash
from moco.data import Loading, labelled_folders
from moco.distributed import Process, wrap
from moco.draws import linear_train
from moco.errors import UserError
from moco.heads import Layers, make_heads, train_step
from moco.linear_options import check
from moco.views import normalise
from moco.watch import PREEMPTED

CPU = torch.device("cpu")
WORDS = [*SMALL, "--epochs", "3", "--schedule", "1", "2", "--wd", "0.01"]


@pytest.fixture(autouse=True)
def tiny_encoder(monkeypatch):
    monkeypatch.setattr(main_lincls, "base_encoder", lambda arch: TinyEncoder)


def evaluated(rank, world, words, folder, stop=None):
    """Run linear evaluation in this process: (how it ended, what it printed). It gets a signal within the
    call number `stop[1]` of `accuracy` on rank `stop[0]`.
    """
    sys.argv = ["main_lincls.py", *map(str, words), str(folder)]
    calls, real, said = [0], main_lincls.accuracy, io.StringIO()

    def counted(*inputs):
        calls[0] += 1
        if stop == (rank, calls[0]):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*inputs)

    main_lincls.accuracy = counted
    try:
        with contextlib.redirect_stdout(said):
            args = main_lincls.parse_args()
            check(args)
            main_lincls.evaluate_features(Process(rank, world, rank, world, world, CPU), args, folder)
    except SystemExit as end:
        return end.code, said.getvalue()
    except UserError as error:
        return str(error), said.getvalue()
    finally:
        main_lincls.accuracy = real
    return 0, said.getvalue()


def run(run_ranks, world, folders, out, *words, stop=None):
    """The exit codes and rank 0's output of a run that writes to the folder `out`."""
    out.mkdir(exist_ok=True)
    ends = run_ranks(world, evaluated, [*WORDS, "--output-dir", out, *words], folders, stop)
    return [code for code, _ in ends], ends[0][1]


def load(out, name="checkpoint.pth.tar"):
    return torch.load(out / name, weights_only=True)


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
    assert os.listdir(tmp_path / "none") == []


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


def entries(out):
    """What checkpoint.pth.tar and linear.json hold."""
    return content_hash(load(out)), (out / "linear.json").read_text()


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """`whole(run_ranks, world)`: the folder of a run with two values that never stopped."""
    made = {}

    def get(run_ranks, world):
        if world not in made:
            made[world] = tmp_path_factory.mktemp(f"whole{world}")
            assert run(run_ranks, world, folders, made[world], "--lr", "1", "3")[0] == [0] * world
        return made[world]

    return get


# Two heads, so two calls a step: 3 training and 2 validation steps an epoch. In two processes it is heard a
# step later, and they have but one validation step in common: a signal in it stops the next epoch.
@pytest.mark.parametrize(
    ("world", "call", "where"), [(1, 1, 0), (1, 9, 0), (1, 13, 1), (1, 19, 1), (2, 3, 0), (2, 15, 2)]
)
def test_a_signal_stops_it_and_it_goes_on_exactly(run_ranks, folders, tmp_path, whole, world, call, where):
    words, path = ["--lr", "1", "3"], tmp_path / "checkpoint.pth.tar"
    codes, output = run(run_ranks, world, folders, tmp_path, *words, stop=(world - 1, call))
    assert codes == [PREEMPTED] * world
    name = "SIGTERM" if world == 1 else "a signal to another process"
    kept = "no epoch is finished, so nothing is saved"
    if where > 0:
        kept = f"the last finished epoch is in {path}; --resume auto goes on from there"
    assert output.splitlines()[-1] == f"stopped in epoch {where}, as {name} said: {kept}"
    assert path.exists() == (where > 0) and not (tmp_path / "linear.json").exists()
    if where > 0:
        assert load(tmp_path)["epoch"] == where
    codes, output = run(run_ranks, world, folders, tmp_path, *words, "--resume", "auto")
    assert codes == [0] * world and f"Epoch: [{where}]" in output and f"Epoch: [{where - 1}]" not in output
    assert entries(tmp_path) == entries(whole(run_ranks, world))


def test_another_value_leaves_other_files(run_ranks, folders, tmp_path, whole):
    assert run(run_ranks, 1, folders, tmp_path, "--lr", "1", "4")[0] == [0]  # negative control of the above
    for ours, theirs in zip(entries(tmp_path), entries(whole(run_ranks, 1)), strict=True):
        assert ours != theirs


def test_a_signal_stops_a_validation_of_its_own(run_ranks, folders, tmp_path, whole):
    words = ["-e", "--resume", whole(run_ranks, 1) / "model_best.pth.tar"]
    codes, output = run(run_ranks, 1, folders, tmp_path, *words, stop=(0, 1))
    assert codes == [PREEMPTED] and output.endswith("as SIGTERM said: the validation is not finished\n")
    assert " * Acc@1" not in output
    codes, output = run(run_ranks, 1, folders, tmp_path, *words)
    assert codes == [0] and " * Acc@1" in output and os.listdir(tmp_path) == []


def test_resuming_refuses_other_values_and_takes_upstreams_file(folders, tmp_path, cli):
    words = [*WORDS, folders, "--output-dir", tmp_path]
    assert cli(main_lincls.main, *words, "--lr", "1", "3", "--epochs", "1", "--schedule")[0] == 0
    for lrs in (["1"], ["3", "1"], ["1", "3", "10"], ["1", "4"]):
        code, _, errors = cli(main_lincls.main, *words, "--resume", "auto", "--lr", *lrs)
        assert code == 2 and f"is of --lr 1 3, not {' '.join(lrs)}: go on with the same values" in errors
        assert errors.count("\n") == 1
    assert cli(main_lincls.main, *words, "--resume", "auto", "--lr", "1", "3")[0] == 0

    best = tmp_path / "model_best.pth.tar"
    kept = torch.load(best, weights_only=True)
    for path, accuracy in ((best, kept["best_acc1"]), (tmp_path / "checkpoint.pth.tar", None)):
        code, output, errors = cli(main_lincls.main, *words, "-e", "--resume", path)
        assert code == 0 and " * Acc@1 " in output, errors
        assert accuracy is None or f" * Acc@1 {accuracy:.3f} " in output
    upstreams = {name: kept[name] for name in ("epoch", "arch", "state_dict", "best_acc1", "optimizer")}
    torch.save(upstreams, tmp_path / "upstreams")
    words += ["--epochs", "4", "--resume", tmp_path / "upstreams", "--lr"]
    code, output, errors = cli(main_lincls.main, *words, f"{kept['lr']:g}")
    assert code == 0 and f"Epoch: [{kept['epoch']}]" in output, errors
    code, _, errors = cli(main_lincls.main, *words, "1", "3")
    assert code == 2 and "is of --lr one unknown value, not 1 3" in errors


def test_values_of_lr_and_what_follows_them(monkeypatch, cli, folders):
    def parsed(*words):
        monkeypatch.setattr(sys, "argv", ["main_lincls.py", *words])
        return main_lincls.parse_args()

    for words in (["--lr", "1", "3", "DIR"], ["DIR", "--lr", "1", "3"], ["--lr", "1", "3", "-b", "8", "DIR"]):
        assert (parsed(*words).lr, parsed(*words).folder) == ([1.0, 3.0], "DIR")
    assert parsed("--lr=2", "DIR").lr == [2.0]
    for words, message in (
        (["--lr", "1", "1.0", folders], "--lr has 1 more than once"),
        (["--lr", "1", "0", folders], "--lr must be above 0, not 0.0"),
        (["--lr", "1", "nan", folders], "--lr must be above 0, not nan"),
        (["--lr", "1", "x", folders], "'x' is no number"),
        (["--lr", folders], "argument --lr: no number"),
    ):
        code, _, errors = cli(main_lincls.main, *SMALL, *words)
        assert code == 2 and message in errors, errors
