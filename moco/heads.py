"""Linear classifiers on the same frozen features, one per learning rate, in a single pass over the data.

The backbone runs once per batch for all of them. Each head has its own weights, all from the same draw, its
own SGD and, in fp16, its own scale of the loss. The gradient of the sum of their losses is for each head that
of its own loss, so each goes the way that it would go alone, also beside one whose loss overflows.
"""

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import nn

from moco.checkpoint import continue_from
from moco.distributed import sum_over_processes
from moco.errors import UserError
from moco.execution import start_momentum
from moco.meters import StepLog


class Layers(nn.Module):
    """Takes the place of a network's last layer: features (N, d) to a list of `count` logits (N, classes).

    Every one starts as a copy of `layer`.
    """

    def __init__(self, layer, count):
        super().__init__()
        self.each = nn.ModuleList(copy.deepcopy(layer) for _ in range(count))

    def forward(self, features):
        return [layer(features) for layer in self.each]


@dataclass
class Head:
    """A classifier, how it is trained, and how well it did so far.

    history: a dict per validated epoch: its number `epoch`, the mean training `loss`, and `acc1` and `acc5`
    on the validation set in percent. diverged: the epoch in which its loss was no finite number, or None.
    """

    lr: float
    layer: nn.Linear
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    history: list = field(default_factory=list)
    diverged: int | None = None

    @property
    def best(self):
        """The entry of history with the highest acc1, the first of several; without one acc1 is -1."""
        return max(self.history, key=lambda entry: entry["acc1"], default={"acc1": -1.0})

    def state_dict(self, epoch):
        """Plain values and tensors, from which the head goes on with `epoch`."""
        scaler = {"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}
        return {
            "lr": self.lr,
            "epoch": epoch,
            "state_dict": self.layer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **scaler,
            "history": [dict(entry) for entry in self.history],
            "diverged": self.diverged,
        }


def freeze_all_but_last(network):
    """Freeze a network but for its last layer `fc`, which starts from N(0, 0.01) and 0 as published."""
    network.requires_grad_(False)
    network.fc.weight.data.normal_(mean=0.0, std=0.01)
    network.fc.bias.data.zero_()
    network.fc.requires_grad_(True)


def check_frozen(model, frozen):
    """Raise RuntimeError when a tensor of the backbone is not what it was before training (`frozen`)."""
    state = model.state_dict()
    moved = [name for name, tensor in frozen.items() if not torch.equal(state[name], tensor)]
    if moved:
        raise RuntimeError(f"training the classifier changed frozen tensors: {', '.join(moved[:3])}")


def make_heads(layers, lrs, momentum, weight_decay, new_scaler):
    """A Head for each of the Layers and learning rates. new_scaler: makes a GradScaler."""
    heads = []
    for layer, lr in zip(layers.each, lrs, strict=True):
        sgd = torch.optim.SGD(layer.parameters(), lr, momentum, weight_decay=weight_decay, fused=True)
        start_momentum(sgd)
        heads.append(Head(lr, layer, sgd, new_scaler()))
    return heads


def train_step(heads, losses):
    """A step of every head, given the list of their losses (0-dim. tensors)."""
    for head in heads:
        head.optimizer.zero_grad()
    sum(head.scaler.scale(loss) for head, loss in zip(heads, losses, strict=True)).backward()
    for head in heads:
        head.scaler.step(head.optimizer)
        head.scaler.update()


def leader(heads):
    """The head with the best acc1 of an epoch so far among those that have not diverged, if there is one."""
    return max(heads, key=lambda head: (head.diverged is None, head.best["acc1"]))


def step_logs(title, loader, heads, print_freq):
    """A StepLog of a pass over the loader for each head, and the one of them that prints: the leader's."""
    shown = heads.index(leader(heads))
    logs = [StepLog(title, loader, print_freq if i == shown else 0) for i in range(len(heads))]
    return logs, logs[shown]


def mean_losses(logs, device):
    """The mean loss in each of the logs over all processes, which have as many images each (floats)."""
    counts = torch.tensor([log.loss.count for log in logs], dtype=torch.float64, device=device)
    sums = torch.stack([torch.stack([log.loss.total_tensor(device) for log in logs]), counts])
    total, count = sum_over_processes(sums)
    return (total / count).tolist()


def mean_accuracies(logs, device):
    """(top-1, top-5) in percent in each of the logs over the images of all processes (floats)."""
    counts = [[float(log.top1.total), float(log.top5.total), log.top1.count] for log in logs]
    sums = sum_over_processes(torch.tensor(counts, dtype=torch.float64).to(device))
    return [(top1 / count, top5 / count) for top1, top5, count in sums.tolist()]


def record(heads, epoch, losses, reached):
    """Add an epoch to the history of the heads that have not diverged."""
    for head, loss, (acc1, acc5) in zip(heads, losses, reached, strict=True):
        if head.diverged is None:
            head.history.append({"epoch": epoch, "loss": loss, "acc1": acc1, "acc5": acc5})


def any_finite(heads, losses):
    """0 if the loss of a head that has not diverged is finite, else infinite (0-dim. tensors)."""
    going_on = [loss for head, loss in zip(heads, losses, strict=True) if head.diverged is None]
    return torch.where(torch.isfinite(torch.stack(going_on)).any(), 0.0, math.inf)


def note_diverged(heads, losses, epoch, say):
    """Note and say which heads' losses of an epoch (numbers, of all processes) are not finite.

    Raises UserError when no head is left.
    """
    for head, loss in zip(heads, losses, strict=True):
        if head.diverged is None and not math.isfinite(loss):
            head.diverged, last, lr = epoch, loss, head.optimizer.param_groups[0]["lr"]
            if any(other.diverged is None for other in heads):
                say(f"--lr {head.lr:g} diverged: the loss of epoch {epoch} is {loss} at lr {lr:g}")
    if all(head.diverged is not None for head in heads):
        others = ", and every other --lr diverged before" if len(heads) > 1 else ""
        raise UserError(
            f"the loss of epoch {epoch} is {last} at lr {lr:g}{others}; start again with a lower --lr"
        )


def one_head(state_dict, index):
    """A network's tensors with those of head `index` as its last layer: the names of a network with one."""
    own = f"fc.each.{index}."
    return {
        name.replace(own, "fc."): tensor
        for name, tensor in state_dict.items()
        if own in name or "fc.each." not in name
    }


def checkpoint_of(heads, head, epoch, state_dict, shared):
    """A checkpoint of one of the heads, in upstream's format, and its --lr.

    epoch: the next one; state_dict: of the network with all heads; shared: entries that are any head's.
    """
    own = head.state_dict(epoch)
    names = [name for name in ("lr", "epoch", "optimizer", "scaler") if name in own]
    tensors = one_head(state_dict, heads.index(head))
    return {"epoch": epoch, "state_dict": tensors, **shared, **{name: own[name] for name in names}}


def restore(heads, checkpoint, path, epochs):
    """Put the heads where a checkpoint left them. Returns the next epoch, and of the best head in its best
    epoch so far the accuracy and the confusion (moco.linear_report), or None.

    A checkpoint without `heads`, as of upstream, has one. Raises UserError when it is of other learning rates
    than these, where there are several, or has nothing left to do of `epochs`.
    """
    saved = checkpoint.get("heads") or [_only_head(checkpoint)]
    before, here = [state.get("lr") for state in saved], [head.lr for head in heads]
    if max(len(before), len(here)) > 1 and before != here:
        raise UserError(
            f"{path} is of --lr {_words(before)}, not {_words(here)}: go on with the same values in the same "
            "order, or start anew without --resume"
        )
    for head, state in zip(heads, saved, strict=True):
        epoch = continue_from(state, path, head.layer, head.optimizer, epochs, head.scaler)
        head.history, head.diverged = list(state.get("history", [])), state.get("diverged")
    return epoch, float(checkpoint.get("best_acc1", 0.0)), checkpoint.get("confusion")


def _only_head(checkpoint):
    """What Head.state_dict gives, as far as a checkpoint of one head has it."""
    layer = {
        name.removeprefix("fc."): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith("fc.")
    }
    return {**checkpoint, "state_dict": layer}


def _words(lrs):
    return " ".join("one unknown value" if lr is None else f"{lr:g}" for lr in lrs)
