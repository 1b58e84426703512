"""Linear classifiers in one pass: each is what it would be alone, which is the published protocol."""

import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_lines import losses_of
from fake_cuda import fake_cuda
from linear_runs import WORDS, evaluated, load, run, same
from made_folders import make_folders
from tiny import TinyEncoder
from torch import nn

import main_lincls
from moco import trifeature
from moco.data import loader as loader_module
from moco.data.augment import linear_train
from moco.data.device import normalize
from moco.data.folders import labeled_folders
from moco.data.loader import TrainLoader
from moco.errors import DivergedError, UserError
from moco.evaluate import linear
from moco.run.launch import Rank
from moco.trifeature import FACTORS

LRS = ["1", "3", "10", "30"]
LAST_LAYER = ("module.fc.weight", "module.fc.bias")


def literal(rank, world, folder, lr, **loading):
    """The published protocol with one classifier, as upstream writes it: last layer, momentum, and the mean
    loss of the last epoch.
    """
    who = Rank(rank, world, rank, world, world, torch.device("cpu"))
    images, _, _ = labeled_folders(folder)
    loading = {"batch_size": 8 // world, "rank": rank, "world_size": world} | loading
    loader = TrainLoader(images, linear_train(), size=16, seed=3, views=1, **loading)
    torch.manual_seed(3)
    model = TinyEncoder(num_classes=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in ("fc.weight", "fc.bias")
    model.fc.weight.data.normal_(mean=0.0, std=0.01)
    model.fc.bias.data.zero_()
    ddp = who.wrap(model).eval()
    sgd = torch.optim.SGD(model.fc.parameters(), lr, momentum=0.9, weight_decay=0.01, fused=True)
    for epoch in range(3):
        sgd.param_groups[0]["lr"] = lr * 0.1 if epoch == 1 else lr * 0.1 * 0.1 if epoch == 2 else lr
        total = 0.0
        for batch in loader.epoch(epoch):
            output = ddp(normalize(batch.pixels[0]))
            sgd.zero_grad()
            loss = F.cross_entropy(output, batch.targets)
            loss.backward()
            sgd.step()
            total += loss.item() * len(output)
    momentum = [sgd.state[parameter]["momentum_buffer"].numpy() for parameter in model.fc.parameters()]
    return [tensor.numpy() for tensor in model.state_dict().values()], momentum, total / len(images)


def is_checkpoint_of(found, expected):
    """Whether a checkpoint has the weights and the momentum that `literal` gave, to the bit."""
    momentum = [state["momentum_buffer"] for state in found["optimizer"]["state"].values()]
    pairs = zip((*found["state_dict"].values(), *momentum), (*expected[0], *expected[1]), strict=True)
    return all(np.array_equal(one.numpy(), other) for one, other in pairs)


@pytest.mark.parametrize("world", [1, 2])
def test_one_value_is_the_published_protocol_to_the_bit(run_ranks, folders, tmp_path, world):
    assert run(run_ranks, world, folders, tmp_path, "--lr", "2")[0] == [0] * world
    ours = load(tmp_path)
    assert is_checkpoint_of(ours, run_ranks(world, literal, folders, 2.0)[0])
    assert not is_checkpoint_of(ours, run_ranks(world, literal, folders, 2.0001)[0])  # negative control
    assert {"epoch", "arch", "best_acc1", "seed"} < ours.keys() and ours["epoch"] == 3
    assert list(ours["state_dict"])[-2:] == list(LAST_LAYER)
    assert ours["optimizer"]["param_groups"][0]["params"] == [0, 1]


def test_classes_have_the_numbers_of_train(tmp_path, cli):
    make_folders(tmp_path)
    words = [*WORDS, tmp_path, "--output-dir", tmp_path, "--epochs", "1", "--schedule", "--lr", "1"]
    shutil.rmtree(tmp_path / "val" / "ant")
    assert cli(main_lincls.main, *words)[0] == 0
    report = json.loads((tmp_path / "linear.json").read_text())
    assert report["classes"] == ["ant", "bee", "cat"]
    assert {true for true, _, _ in report["confusion"]} == {1, 2}
    shutil.copytree(tmp_path / "val" / "bee", tmp_path / "val" / "dog")
    code, output, errors = cli(main_lincls.main, *words, "--overwrite")
    assert code == 2 and f"class dog is in {tmp_path / 'val'} but not in train/" in errors
    assert "Epoch" not in output


# Images that do not fill a batch.


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A data set of 21 training images."""
    root = tmp_path_factory.mktemp("uneven")
    make_folders(root, train=7)
    return root


def mean_losses(out):
    [head] = json.loads((out / "linear.json").read_text())["heads"]
    return [entry["loss"] for entry in head["epochs"]]


@pytest.mark.parametrize(("size", "steps"), [(8, 3), (10, 3), (256, 1)])
def test_every_image_is_trained_on_as_the_published_protocol_does(run_ranks, uneven, tmp_path, size, steps):
    codes, output = run(run_ranks, 1, uneven, tmp_path, "--lr", "2", "-b", size)
    assert codes == [0] and output.count("Epoch: [2]") == steps and f"Epoch: [2][0/{steps}]" in output
    expected = literal(0, 1, uneven, 2.0, batch_size=size, drop_last=False)
    assert is_checkpoint_of(load(tmp_path), expected)
    assert mean_losses(tmp_path)[-1] == pytest.approx(expected[2], rel=1e-6)
    if size < 21:  # negative control
        assert not is_checkpoint_of(load(tmp_path), literal(0, 1, uneven, 2.0, batch_size=size))


@pytest.mark.parametrize(("world", "size"), [(2, 8), (2, 10), (4, 12), (4, 20), (2, 256)])
def test_processes_find_what_one_process_finds(run_ranks, uneven, tmp_path, monkeypatch, world, size):
    """The last step has 5 images in 3 and 2; 1 in 1 and 0; 9 in 3, 2, 2 and 2; 1 in 1, 0, 0 and 0; or all."""

    def found(world, name):
        codes, _ = run(run_ranks, world, uneven, tmp_path / name, "--lr", "2", "-b", size)
        assert codes == [0] * world
        return last_layer(load(tmp_path / name)), mean_losses(tmp_path / name)

    alone, shared = found(1, "alone"), found(world, "shared")
    assert torch.allclose(shared[0], alone[0], rtol=1e-4, atol=1e-5)
    assert shared[1] == pytest.approx(alone[1], rel=1e-4)
    # negative control: the mean over ranks of the means of their images
    monkeypatch.setattr(TrainLoader, "images_in", lambda self, step: self.global_batch)
    assert not torch.allclose(found(world, "unweighted")[0], alone[0], rtol=1e-3, atol=1e-4)


def test_ranks_without_any_image(run_ranks, tmp_path):
    make_folders(tmp_path / "few", ("ant", "bee"), train=1, val=1)
    words = [tmp_path / "few", "--output-dir", tmp_path, "--lr", "2", "-b", "4"]
    assert [code for code, _ in run_ranks(4, evaluated, [*WORDS, *words])] == [0] * 4
    report = json.loads((tmp_path / "linear.json").read_text())
    assert sum(count for *_, count in report["confusion"]) == 2
    last = json.loads((tmp_path / "linear.jsonl").read_text().splitlines()[-1])
    assert last["loss"] == mean_losses(tmp_path)[-1] > 0


@pytest.mark.parametrize("pads", [True, False])
def test_on_cuda_nothing_is_compiled_again_for_the_last_step(cli, uneven, tmp_path, monkeypatch, pads):
    real, shapes = loader_module.RingLoader, {"augmentation": set(), "encoder": set()}

    def without(*arguments, pad=False):
        return real(*arguments)

    def recording(function, **_):
        def compiled(recipe, normalized, hues_below, pixels, parameters):
            shapes["augmentation"].add(pixels.shape)
            return function(recipe, normalized, hues_below, pixels, parameters)

        return compiled

    def features_of(backbone, images, args, real=main_lincls.features_of):
        shapes["encoder"].add(images.shape)
        return real(backbone, images, args)

    words = [*WORDS, uneven, "--lr", "2", "-b", "9", "-p", "9"]  # 21 and 9 images
    with fake_cuda() as gpu:
        monkeypatch.setattr(torch, "compile", recording)
        monkeypatch.setattr(main_lincls, "features_of", features_of)
        if not pads:  # negative control
            monkeypatch.setattr(loader_module, "RingLoader", without)
        code, output, errors = cli(main_lincls.main, *words, "--output-dir", tmp_path / "gpu")
        monkeypatch.undo()
    assert code == 0 and gpu.refused == gpu.overwritten == [], errors
    assert [len(of_part) for of_part in shapes.values()] == ([1, 1] if pads else [2, 2])
    waits = {event.function for event in gpu.waits if event.file in ("main_lincls.py", "moco/data/ring.py")}
    assert waits == {"evaluate", "_tasks", "_unpin"}  # at the start, before a slot is used again, at the end

    exact = ["--device-aug", "exact"]
    code, _, errors = cli(main_lincls.main, *words, *exact, "--output-dir", tmp_path / "cpu")
    assert code == 0, errors
    assert torch.allclose(last_layer(load(tmp_path / "gpu")), last_layer(load(tmp_path / "cpu")), rtol=1e-5)


def last_layer(checkpoint, head=None):
    if head is not None:
        return torch.cat([t.flatten() for t in checkpoint["heads"][head]["state_dict"].values()])
    return torch.cat([checkpoint["state_dict"][name].flatten() for name in LAST_LAYER])


@pytest.mark.parametrize("world", [1, 2])
def test_probes_are_what_separate_runs_find(run_ranks, folders, tmp_path, world):
    codes, output = run(run_ranks, world, folders, tmp_path / "all", "--lr", *LRS)
    assert codes == [0] * world
    together = load(tmp_path / "all")
    alone = []
    for i, lr in enumerate(LRS):
        assert run(run_ranks, world, folders, tmp_path / lr, "--lr", lr)[0] == [0] * world
        alone.append(load(tmp_path / lr))
        assert same(
            together["heads"][i], alone[-1]["heads"][0]
        )  # weights, momentum and accuracies, to the bit
    for i in range(4):  # negative control: it tells the learning rates apart
        for j in range(i):
            assert (last_layer(together, i) - last_layer(alone[j])).abs().max() > 1e-3

    # the best of them is kept as upstream keeps one
    best = max(alone, key=lambda checkpoint: checkpoint["best_acc1"])
    assert together["best_acc1"] == best["best_acc1"]
    kept = load(tmp_path / "all", "model_best.pth.tar")
    expected = load(tmp_path / f"{best['lr']:g}", "model_best.pth.tar")
    assert "heads" not in kept and kept.keys() == expected.keys()
    assert all(same(kept[name], expected[name]) for name in kept.keys() - {"settings"})
    assert torch.equal(last_layer(together), last_layer(together, LRS.index(f"{best['lr']:g}")))
    printed = [float(x) for x in re.findall(r"^ \* Acc@1 (\S+) Acc@5 \S+$", output, re.MULTILINE)]
    assert len(printed) == 3 and max(printed) == pytest.approx(best["best_acc1"], abs=1e-3)


@pytest.mark.parametrize("world", [1, 2])
def test_one_that_diverges_leaves_the_others_alone(run_ranks, folders, tmp_path, world):
    codes, output = run(run_ranks, world, folders, tmp_path / "all", "--lr", "1", "1e38", "3")
    assert codes == [0] * world
    assert re.search(r"^--lr 1e\+38 diverged: its loss in epoch 0 is (nan|inf)$", output, re.M)
    assert output.count(" diverged: ") == 1 and output.count("1e+38: diverged") == 3
    assert run(run_ranks, world, folders, tmp_path / "two", "--lr", "1", "3")[0] == [0] * world
    together, two = load(tmp_path / "all"), load(tmp_path / "two")
    assert not last_layer(together, 1).isfinite().all() and together["heads"][1]["diverged"] == 0
    assert same([together["heads"][0], together["heads"][2]], two["heads"])
    report = json.loads((tmp_path / "all" / "linear.json").read_text())
    assert [head["diverged"] for head in report["heads"]] == [None, 0, None]
    assert report["best"]["acc1"] == together["best_acc1"]

    codes, output = run(run_ranks, world, folders, tmp_path / "none", "--lr", "1e38", "2e38")
    assert len(set(codes)) == 1 and codes[0].startswith("3: --lr 2e+38 diverged")
    assert codes[0].endswith("no other --lr is left; start again with a lower --lr")
    assert os.listdir(tmp_path / "none") == ["linear.jsonl"]


def results_of(*histories, diverged=None):
    results = linear.Results([10.0**i for i in range(len(histories))], ["a", "b"])
    for i, history in enumerate(histories):
        entries = [
            {"epoch": e, "loss": 123.456 / (e + 1), "acc1": a, "acc5": 99.5} for e, a in enumerate(history)
        ]
        results.history[i] = entries
    results.diverged = diverged or results.diverged
    results.best_acc1 = max(sum(map(list, histories), []), default=-1.0)
    return results


def test_the_table_shows_final_and_best_and_fits():
    results = results_of([50.0, 70.0, 60.0], [70.0], [10.0], [], diverged=[None, None, 1, 0])
    header, *rows = results.table().splitlines()
    assert all(len(row) == len(header) <= 80 for row in rows[:4]) and max(map(len, rows)) <= 80
    assert rows[0].split() == ["1", "60.000", "99.500", "70.000", "99.500", "1", "41.1520"]
    assert rows[2].split() == ["100", "diverged,", "epoch", "1", "10.000", "99.500", "0", "not", "finite"]
    assert rows[3].split() == ["1000", "diverged,", "epoch", "0", "-", "-", "-", "not", "finite"]
    assert results.best == (1, results.history[1][0])  # the earliest of equals
    assert results.leader == 0  # of equals the first probe
    assert rows[-2].startswith("--lr 10 is the best of 4") and rows[-1] == "best Acc@1 70.000 (chance 50.000)"
    assert "is the best of" not in results_of([50.0]).table()
    assert results_of([80.0], [50.0], diverged=[1, None]).leader == 1


def scores(rank, world):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(7, (50,), generator=generator)
    logits = torch.rand(2, 50, 7, generator=generator)
    share = slice(rank, None, world)
    who = Rank(rank, world, rank, world, world, torch.device("cpu"))
    accuracies, confusion = linear.score(targets[share], logits.topk(5).indices[:, share], 7, who)
    return accuracies, confusion.tolist(), targets.tolist(), logits.tolist()


def test_the_score_counts_each_image_once_over_all_ranks(run_ranks):
    for world in (1, 2):
        everyone = run_ranks(world, scores)
        accuracies, confusion, targets, logits = everyone[0]
        assert all(other == everyone[0] for other in everyone)
        for p in range(2):
            order = [sorted(range(7), key=lambda c: -row[c]) for row in logits[p]]  # noqa: B023
            counts = np.zeros((7, 7), int)
            np.add.at(counts, (targets, [classes[0] for classes in order]), 1)
            assert confusion[p] == counts.tolist()
            top5 = sum(target in classes[:5] for target, classes in zip(targets, order, strict=True))
            assert accuracies[p] == pytest.approx((100 * counts.trace() / 50, 100 * top5 / 50))


def test_confusion_is_that_of_the_best_classifier_in_its_best_epoch():
    results = linear.Results([1.0, 2.0], ["a", "b"])
    counts = torch.tensor([[[1, 1], [0, 2]], [[2, 0], [0, 2]]])
    assert results.add(0, [1.0, 1.0], [(75.0, 100.0), (100.0, 100.0)], counts) == (1, True)
    assert results.confusion == [[0, 0, 2], [1, 1, 2]]
    assert results.add(1, [1.0, 1.0], [(100.0, 100.0), (75.0, 100.0)], counts.flip(0)) == (0, False)
    assert results.confusion == [[0, 0, 2], [1, 1, 2]] and results.best[0] == 1
    assert results.check_finite(2, [1.0, math.nan]) == ["--lr 2 diverged: its loss in epoch 2 is nan"]
    assert results.add(2, [1.0, math.nan], [(50.0, 100.0), (100.0, 100.0)], counts) == (0, False)
    assert len(results.history[1]) == 2
    with pytest.raises(DivergedError, match="--lr 1 diverged: its loss in epoch 3 is inf, and no other"):
        results.check_finite(3, [math.inf, math.nan])


def test_a_frozen_tensor_that_moves_is_found():
    network = nn.BatchNorm2d(3)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    linear.check_frozen(network.eval(), before)
    network.train()(torch.randn(2, 3, 4, 4))
    with pytest.raises(RuntimeError, match="changed frozen tensors: running_mean, running_var"):
        linear.check_frozen(network, before)


def test_factors_of_trifeature_are_named_and_each_image_counted_once(tmp_path, cli):
    trifeature.generate(tmp_path / "trifeature", 16, 1)
    words = [*WORDS, tmp_path / "trifeature", "--output-dir", tmp_path, "--epochs", "1", "-b", "200"]
    code, output, errors = cli(main_lincls.main, *words, "-p", "100", "--target", "color", "--lr", "1", "3")
    assert code == 0, errors
    text = (tmp_path / "linear.json").read_text()
    report = json.loads(text)
    assert report["classes"] == list(FACTORS["color"]) and report["seed"] == 3
    counted = np.zeros((10, 10), int)
    for true, predicted, count in report["confusion"]:
        counted[true, predicted] = count
    assert counted.sum(1).tolist() == [20] * 10
    best = report["best"]
    assert counted.trace() / 2 == pytest.approx(best["acc1"])
    assert best["acc1"] == max(entry["acc1"] for one in report["heads"] for entry in one["epochs"])
    assert [one["lr"] for one in report["heads"]] == [1.0, 3.0]
    assert output.splitlines()[-1] == f"best Acc@1 {best['acc1']:.3f} (chance 10.000)"
    assert text == json.dumps(report, sort_keys=True) + "\n"


def test_the_log_says_what_the_console_and_the_report_say(folders, tmp_path, cli):
    (tmp_path / "log.jsonl").write_text("of the pre-training\n")
    words = [*WORDS, folders, "-p", "2", "--epochs", "2", "--schedule", "1", "--output-dir", tmp_path]
    code, output, errors = cli(main_lincls.main, *words, "--lr", "1", "1e38", "3")
    assert code == 0, errors
    assert (tmp_path / "log.jsonl").read_text() == "of the pre-training\n"
    start, *others = map(json.loads, (tmp_path / "linear.jsonl").read_text().splitlines())
    expected = {"images": 24, "validation_images": 9, "steps": 3, "processes": 1, "global_batch": 8}
    assert (expected | {"epoch": 0, "step": 0, "chance": math.log(3)}).items() <= start.items()
    assert start["settings"]["lr"] == [1.0, 1e38, 3.0] and start["settings"]["target"] is None

    steps = [entry for entry in others if entry["kind"] == "step"]
    assert [(entry["epoch"], entry["step"]) for entry in steps] == [(0, 0), (0, 2), (1, 0), (1, 2)]
    assert [f"{entry['loss']:.4e}" for entry in steps] == losses_of(output)
    assert [entry["lr"] for entry in steps] == [entry["head"] / 10 ** entry["epoch"] for entry in steps]

    epochs = [entry for entry in others if entry["kind"] == "epoch"]
    report = json.loads((tmp_path / "linear.json").read_text())
    printed = re.findall(r"^ \* Acc@1 (\S+) Acc@5 (\S+)$", output, re.M)
    for number, (entry, (acc1, acc5)) in enumerate(zip(epochs, printed, strict=True)):
        assert (f"{entry['val_acc1']:.3f}", f"{entry['val_acc5']:.3f}") == (acc1, acc5)
        assert [own["head"] for own in entry["heads"]] == start["settings"]["lr"]
        assert [own["diverged"] for own in entry["heads"]] == [None, 0, None]
        for own, head in zip(entry["heads"], report["heads"], strict=True):
            if head["diverged"] is None:
                assert own["lr"] == pytest.approx(own["head"] / 10**number)
                written = {name: head["epochs"][number][name] for name in ("loss", "acc1", "acc5")}
                assert written == {"loss": own["loss"], "acc1": own["val_acc1"], "acc5": own["val_acc5"]}
                assert 0 <= own["acc1"] <= own["acc5"] <= 100
            else:
                assert own["loss"] is own["val_acc1"] is own["acc1"] is own["lr"] is None
        best = next(own for own in entry["heads"] if own["head"] == entry["head"])
        assert best.items() <= entry.items()


def test_a_report_that_cannot_be_written_is_said(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*linear.json .*choose another --output-dir"):
        results_of([50.0]).write(tmp_path / "missing" / "linear.json", 0)
