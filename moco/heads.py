"""Linear classifiers on the same frozen features, one per learning rate, in a single pass over the data.

The backbone runs once per batch for all of them. Each head has its own weights, all from the same draw, its
own SGD and, in fp16, its own scale of the loss. The gradient of the sum of their losses is for each head that
of its own loss, so each goes the way that it would go alone, also beside one whose loss overflows.
"""

import copy
import math
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from moco.checkpoint import encoder_state, load_strictly
from moco.distributed import sum_over_processes
from moco.errors import UserError
from moco.execution import start_momentum
from moco.meters import StepLog
from moco.schedules import learning_rate, set_learning_rate


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

    @property
    def rates(self):
        """What tells it from others in a log: its --lr as `head`, and the learning rate of now."""
        return {"head": self.lr, "lr": self.optimizer.param_groups[0]["lr"]}

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


def freeze_all_but_last(network, checkpoint, source, resumed):
    """Freeze a network but for its last layer `fc`, which starts from N(0, 0.01) and 0 as published, and give
    it the features of a checkpoint, of linear evaluation with its `fc` when that is `resumed`.

    checkpoint: what read_checkpoint gave for the path `source` (None or "": there is none). Raises UserError.
    """
    network.requires_grad_(False)
    network.fc.weight.data.normal_(mean=0.0, std=0.01)
    network.fc.bias.data.zero_()
    network.fc.requires_grad_(True)
    if resumed:
        load_strictly(network, checkpoint["state_dict"], source)
    elif source:
        load_strictly(network, encoder_state(checkpoint, source), source, may_miss=("fc.weight", "fc.bias"))


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


def set_learning_rates(heads, epoch, epochs, schedule):
    """Give every head the learning rate of an epoch: its own, x0.1 per milestone of `schedule` passed."""
    for head in heads:
        set_learning_rate(head.optimizer, learning_rate(head.lr, epoch, epochs, milestones=schedule))


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


def step_logs(title, loader, heads, print_freq, *more):
    """A StepLog of a pass over the loader for each head, and the one of them that prints: the leader's.

    more: further arguments of StepLog.
    """
    shown = heads.index(leader(heads))
    logs = [StepLog(title, loader, print_freq if i == shown else 0, *more) for i in range(len(heads))]
    return logs, logs[shown]


def epoch_logs(heads, place, loader, print_freq, process, record):
    """The same of the training in an epoch, from a moco.linear_checkpoint.Place on; record: a RunLog."""
    write = partial(record.write, epoch=place.epoch, **leader(heads).rates)
    more = place.step, process.world_size, write
    logs, shown = step_logs(f"Epoch: [{place.epoch}]", loader, heads, print_freq, *more)
    if place.logs:
        for log, state in zip(logs, place.logs[process.rank], strict=True):
            log.load_state_dict(state, process.device)
    return logs, shown


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


def best_now(heads, reached):
    """The number of the head with the highest top-1 accuracy in `reached` that has not diverged."""
    return max(range(len(heads)), key=lambda i: (heads[i].diverged is None, reached[i][0]))


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
