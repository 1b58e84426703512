"""Linear classifiers (probes) on the same frozen features, one per learning rate, trained in a single pass.

The backbone runs once per batch for all of them. The probes are independent: from the sum of the losses each
gets the gradient of its own loss, and each is a parameter group of its own in one SGD.
"""

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from moco import trifeature
from moco.data.folders import image_folder, labeled_folders, use_numbers_of_train
from moco.errors import DivergedError, UserError, first_line, printable
from moco.files import atomic_file
from moco.losses import accuracy
from moco.run.checkpoint import load_strictly, published_names


class Probes(nn.Module):
    """Features (N x d) to a list of the logits (N x classes) of each probe.

    Each of the `count` starts as a copy of the network's `classifier`, whose name there is `head`.
    """

    def __init__(self, classifier, count, head="fc"):
        super().__init__()
        self.head = head
        self.each = nn.ModuleList(copy.deepcopy(classifier).requires_grad_() for _ in range(count))

    def forward(self, features):
        return [probe(features) for probe in self.each]


def sgd(probes, lrs, momentum, weight_decay):
    """One SGD for all Probes, with a parameter group for the learning rate of each."""
    groups = [
        {"params": list(probe.parameters()), "lr": lr} for probe, lr in zip(probes.each, lrs, strict=True)
    ]
    return torch.optim.SGD(groups, momentum=momentum, weight_decay=weight_decay, fused=True)


def check_frozen(network, before):
    """Raise RuntimeError when a tensor of `network` differs from the state_dict `before`."""
    moved = [name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])]
    if moved:
        raise RuntimeError(f"training the classifier changed frozen tensors: {', '.join(moved[:3])}")


def mean_loss(output, targets):
    """The cross-entropy of a probe's logits, N x classes: a scalar, 0 of no images."""
    return F.cross_entropy(output, targets, reduction="mean" if len(targets) else "sum")


def accuracies(outputs, targets):
    """[top-1, top-5] of P probes' logits, a list of N x classes, in percent: (P,) each, 0 of no images."""
    if not len(targets):
        return [torch.zeros(len(outputs), device=targets.device)] * 2
    each = [accuracy(output, targets) for output in outputs]
    return [torch.stack(of_k) for of_k in zip(*each, strict=True)]


def mean_losses(meters, rank, images):
    """The mean loss of each probe over an epoch's `images` of all ranks together: floats."""
    total, _ = meters.sums["Loss"]
    return (rank.all_reduce(total.double()) / images).tolist()


def score(targets, top, classes, rank):
    """([(top-1, top-5) of each of P probes in percent], confusion counts), over the images of all ranks.

    targets: N, int64; top: P x N x min(5, classes), the classes with the largest logits, the largest first.
    confusion: P x classes x classes, int64 on the CPU; [p, i, j] counts images of class i classified as j.
    """
    hits = top == targets[:, None]
    pairs = targets * classes + top[:, :, 0]  # P x N
    confusion = torch.stack([torch.bincount(row, minlength=classes**2) for row in pairs])
    confusion = rank.all_reduce(confusion).cpu().view(-1, classes, classes)
    correct = rank.all_reduce(torch.stack([hits[:, :, 0].sum(dim=1), hits.any(dim=2).sum(dim=1)], dim=1))
    images = confusion[0].sum().item()
    return [(100 * top1 / images, 100 * top5 / images) for top1, top5 in correct.tolist()], confusion


class Results:
    """What each learning rate reached after each epoch, and which is the best.

    history: for each of `lrs` a list of dicts per epoch: its number `epoch`, the mean training `loss`, `acc1`
    and `acc5` on the validation images in percent. diverged: for each the epoch whose loss was not finite, or
    None. best_acc1: the highest acc1 so far; confusion: of that classifier in that epoch, as lists [class,
    classified as, count] with counts above 0.
    """

    def __init__(self, lrs, classes):
        self.lrs, self.classes = lrs, classes
        self.history, self.diverged = [[] for _ in lrs], [None] * len(lrs)
        self.best_acc1, self.confusion = -1.0, None

    @property
    def best(self):
        """(probe, its entry of history) with the highest acc1, the earliest of equals; (0, {}) of none."""
        entries = [(i, entry) for i, history in enumerate(self.history) for entry in history]
        return max(entries, key=lambda it: (it[1]["acc1"], -it[1]["epoch"], -it[0]), default=(0, {}))

    @property
    def leader(self):
        """The probe with the best acc1 so far among those that have not diverged."""
        acc1 = [max((entry["acc1"] for entry in history), default=-1.0) for history in self.history]
        return max(range(len(self.lrs)), key=lambda i: (self.diverged[i] is None, acc1[i]))

    def check_finite(self, epoch, losses):
        """Lines about the probes whose mean loss of the epoch is not finite; they count no more from here on.

        losses: floats over all ranks. Raises DivergedError when no probe is left.
        """
        lines = []
        for i, loss in enumerate(losses):
            if self.diverged[i] is None and not math.isfinite(loss):
                self.diverged[i] = epoch
                lines.append(f"--lr {self.lrs[i]:g} diverged: its loss in epoch {epoch} is {loss}")
        if None not in self.diverged:
            raise DivergedError(f"{lines[-1]}, and no other --lr is left; start again with a lower --lr")
        return lines

    def add(self, epoch, losses, accuracies, confusion):
        """Add an epoch: losses (floats) and what `score` returned. Returns (the epoch's best probe, whether
        it is better than all before).
        """
        for i, (loss, (acc1, acc5)) in enumerate(zip(losses, accuracies, strict=True)):
            if self.diverged[i] is None:
                self.history[i].append({"epoch": epoch, "loss": loss, "acc1": acc1, "acc5": acc5})
        i = max(range(len(self.lrs)), key=lambda i: (self.diverged[i] is None, accuracies[i][0]))
        improved = accuracies[i][0] > self.best_acc1
        if improved:
            self.best_acc1 = accuracies[i][0]
            pairs = confusion[i].nonzero()
            counts = confusion[i][pairs[:, 0], pairs[:, 1]]
            self.confusion = torch.cat([pairs, counts[:, None]], dim=1).tolist()
        return i, improved

    def accuracy_line(self, accuracies, i):
        """The console's line after a validation: upstream's of probe i, and of several a second with all."""
        line = " * Acc@1 {:.3f} Acc@5 {:.3f}".format(*accuracies[i])
        if len(self.lrs) == 1:
            return line
        each = [
            f"{lr:g}: " + (f"{acc1:.3f}" if diverged is None else "diverged")
            for lr, diverged, (acc1, _) in zip(self.lrs, self.diverged, accuracies, strict=True)
        ]
        return f"{line}\n   of --lr {self.lrs[i]:g}; Acc@1 of each --lr: {', '.join(each)}"

    def log_entries(self, best, meters, optimizer):
        """An epoch for linear.jsonl: what it found of the probe `best`, and of all as `heads`.

        Of each its --lr, learning rate, mean loss, accuracies in training (this rank's) and in validation;
        all but the first are null when it has diverged.
        """
        entries = []
        for i, (acc1, acc5) in enumerate(zip(meters.mean("Acc@1"), meters.mean("Acc@5"), strict=True)):
            entry = dict.fromkeys(("lr", "loss", "acc1", "acc5", "val_acc1", "val_acc5"))
            if self.diverged[i] is None:
                last, lr = self.history[i][-1], optimizer.param_groups[i]["lr"]
                entry = {"lr": lr, "loss": last["loss"], "acc1": acc1, "acc5": acc5}
                entry |= {"val_acc1": last["acc1"], "val_acc5": last["acc5"]}
            entries.append({"head": self.lrs[i], **entry, "diverged": self.diverged[i]})
        return entries[best] | {"heads": entries}

    def table(self):
        """The console's lines at the end: a row for each --lr, and the best accuracy."""
        lines = [
            f"{'--lr':<11} {'final Acc@1':>12} {'Acc@5':>8} {'best Acc@1':>12} {'Acc@5':>8} {'epoch':>6} "
            f"{'train loss':>12}"
        ]
        for lr, history, diverged in zip(self.lrs, self.history, self.diverged, strict=True):
            last = history[-1] if history else {}
            best = max(history, key=lambda entry: entry["acc1"], default={})
            final, loss = f"{_number(last, 'acc1'):>12} {_number(last, 'acc5'):>8}", _number(last, "loss", 4)
            if diverged is not None:
                final, loss = f"{f'diverged, epoch {diverged}':>21}", "not finite"
            best = f"{_number(best, 'acc1'):>12} {_number(best, 'acc5'):>8} {best.get('epoch', '-'):>6}"
            lines.append(f"{lr:<11g} {final} {best} {loss:>12}")
        if len(self.lrs) > 1:
            best = f"--lr {self.lrs[self.best[0]]:g} is the best of {len(self.lrs)}"
            lines.append(f"{best} on the validation images: say so beside the number")
        lines.append(f"best Acc@1 {self.best_acc1:.3f} (chance {100 / len(self.classes):.3f})")
        return "\n".join(lines)

    def write(self, path, seed):
        """Write all of it to `path` as JSON. Raises UserError when it cannot be written."""
        i, best = self.best
        heads = [
            {"lr": lr, "diverged": diverged, "epochs": history}
            for lr, diverged, history in zip(self.lrs, self.diverged, self.history, strict=True)
        ]
        report = {"best": {"lr": self.lrs[i], **best}, "heads": heads, "confusion": self.confusion}
        report |= {"classes": list(map(printable, self.classes)), "seed": seed}
        try:
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps(report, sort_keys=True, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {path} ({error.strerror}); free space or choose another --output-dir"
            ) from error


def checkpoint_of(i, network, probes, optimizer, results):
    """Entries of a checkpoint in upstream's format, as if probe i were the classifier of the network.

    `epoch` and `arch`, which upstream has too, are the caller's.
    """
    last_layer = {
        f"module.{probes.head}.{name}": tensor for name, tensor in probes.each[i].state_dict().items()
    }
    return {
        "state_dict": published_names(network) | last_layer,
        "best_acc1": results.best_acc1,
        "optimizer": _optimizer_of(optimizer, i),
        "lr": results.lrs[i],
    }


def checkpoint_of_all(network, probes, optimizer, results):
    """The same of the leader, with the further entries from which `restore` continues all probes."""
    heads = [
        {
            "lr": lr,
            "state_dict": probes.each[i].state_dict(),
            "optimizer": _optimizer_of(optimizer, i),
            "history": results.history[i],
            "diverged": results.diverged[i],
        }
        for i, lr in enumerate(results.lrs)
    ]
    leader = checkpoint_of(results.leader, network, probes, optimizer, results)
    return leader | {"heads": heads, "confusion": results.confusion}


def restore(checkpoint, path, probes, optimizer, results, epochs):
    """Put probes, optimizer and results where a checkpoint left them. Returns the epoch to continue with.

    checkpoint: what moco.run.checkpoint.read gives for `path`. One without `heads`, as of upstream, has one
    probe. Raises UserError when it has other learning rates than `results`, where there are several, or has
    finished all `epochs`.
    """
    if checkpoint.get("step"):
        raise UserError(
            f"{path} was saved within an epoch, and linear evaluation continues from the end of one: use "
            "--resume checkpoint_previous.pth.tar, or start a new run in another --output-dir"
        )
    if not isinstance(checkpoint.get("epoch"), int) or "optimizer" not in checkpoint:
        raise UserError(f"{path} has no optimizer state, so no run can continue from it")
    try:
        saved = checkpoint.get("heads") or [checkpoint | {"state_dict": _last_layer(checkpoint, probes.head)}]
        before, here = _in_words([head.get("lr") for head in saved]), _in_words(results.lrs)
        if max(len(saved), len(results.lrs)) > 1 and before != here:
            raise UserError(
                f"{path} is of --lr {before}, not {here}: continue with the same values in the same order, "
                "or start a new run without --resume"
            )
        for i, head in enumerate(saved):
            load_strictly(probes.each[i], head["state_dict"], path)
            for number, parameter in enumerate(probes.each[i].parameters()):
                momentum = head["optimizer"]["state"].get(number, {}).get("momentum_buffer")
                if momentum is not None:
                    buffer = torch.empty_like(parameter).copy_(momentum)
                    optimizer.state[parameter]["momentum_buffer"] = buffer
            results.history[i] = list(head.get("history", []))
            results.diverged[i] = head.get("diverged")
        results.best_acc1 = float(checkpoint.get("best_acc1", -1.0))
        results.confusion = checkpoint.get("confusion")
        results.best, results.leader  # noqa: B018, the history has all that they need
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not a checkpoint of linear evaluation ({first_line(error)})") from error
    if checkpoint["epoch"] >= epochs:
        raise UserError(f"{path} has finished {checkpoint['epoch']} epochs; raise --epochs to continue")
    return checkpoint["epoch"]


def check_classes(checkpoint, path, classes, head="fc"):
    """Raise UserError when the classifier of a checkpoint has other classes than the list of names `classes`.

    head: the name of the classifier. One that does not name its classes, as of upstream, passes when they
    are as many.
    """
    before, outputs = _class_names(checkpoint, path), _outputs(checkpoint, head)
    if before is None and outputs not in (0, len(classes)):
        raise UserError(
            f"{path} has {outputs} classes, which it does not name, the data set has {len(classes)}; give "
            "the data of that run, or start a new run without --resume"
        )
    if before not in (None, classes):
        differ = [pair for pair in zip(before, classes, strict=False) if pair[0] != pair[1]]
        first = f" (first difference: {differ[0][0]} there, {differ[0][1]} here)" if differ else ""
        raise UserError(
            f"{path} has {len(before)} classes, the data set has {len(classes)} others{first}; give the "
            "folder and --target of that run, or start a new run without --resume"
        )


def labeled_validation(folder, factor, checkpoint, path, head="fc"):
    """(val, class names): the ImageFolder val/ of `folder` with the numbers of a checkpoint's classes.

    val/ may lack classes, and train/ is not needed. factor: as in moco.data.folders.labeled_folders;
    checkpoint: what moco.run.checkpoint.read gives for `path`; head: the name of its classifier. If it does
    not name its classes, as of upstream, they are the sub-folders of train/ or, without it, of val/ if these
    are as many. Raises UserError.
    """
    val, advice = image_folder(folder, "val"), "give the folder and --target of that run"
    names, outputs = _class_names(checkpoint, path), _outputs(checkpoint, head)
    if factor is not None:
        val.target_transform = [trifeature.factor_of(name, factor) for name in val.classes].__getitem__
        names = list(trifeature.FACTORS[factor])
    elif names is not None:
        if unknown := sorted(set(val.classes) - set(names)):
            raise UserError(
                f"class {unknown[0]} is in {val.root} but not one of the {len(names)} "
                f"of {path} ({len(unknown)} such); remove it from val/, or {advice}"
            )
        numbers = {name: number for number, name in enumerate(names)}
        use_numbers_of_train(SimpleNamespace(classes=names, class_to_idx=numbers), val, advice)
    elif (Path(folder) / "train").is_dir():
        _, val, names = labeled_folders(folder)
    elif outputs in (0, len(val.classes)):  # 0: no classifier, which is said when it is loaded
        names = val.classes
    else:
        raise UserError(
            f"{path} does not name its {outputs} classes, and {val.root} has "
            f"{len(val.classes)}: add train/, whose folders say which they are, or the other classes to val/"
        )
    if outputs not in (0, len(names)):
        raise UserError(f"{path} has {outputs} classes, the data set has {len(names)} others; {advice}")
    return val, names


def _class_names(checkpoint, path):
    names = checkpoint.get("classes")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{path} is not a checkpoint of this program: its entry classes is no list of names")
    return names


def _outputs(checkpoint, head):
    """How many classes the classifier of a checkpoint has, 0 when there is none."""
    bias = checkpoint.get("state_dict", {}).get(f"{head}.bias")
    return 0 if bias is None else bias.numel()


def _optimizer_of(optimizer, i):
    """The state_dict of an SGD of parameter group i alone."""
    group = optimizer.param_groups[i]
    state = {n: dict(optimizer.state[p]) for n, p in enumerate(group["params"]) if p in optimizer.state}
    return {"state": state, "param_groups": [{**group, "params": list(range(len(group["params"])))}]}


def _last_layer(checkpoint, head):
    state, start = checkpoint["state_dict"], f"{head}."
    return {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}


def _in_words(lrs):
    return " ".join("one unknown value" if lr is None else f"{lr:g}" for lr in lrs)


def _number(entry, name, digits=3):
    return f"{entry[name]:.{digits}f}" if name in entry else "-"
