"""The checkpoint of a linear evaluation: upstream's entries for one of its heads, and what all of them need
to go on from any step.
"""

from dataclasses import dataclass

from moco.checkpoint import continue_from
from moco.errors import UserError
from moco.heads import leader


@dataclass
class Place:
    """Where a run stands: `step` steps of `epoch` are done, and if that is all of them, not its validation.

    best_acc1, confusion (moco.linear_report): of the best head in its best epoch so far; None: there is none.
    logs: within an epoch, of every process, by rank, the state_dict of each head's StepLog.
    """

    epoch: int = 0
    step: int = 0
    best_acc1: float = 0.0
    confusion: list | None = None
    logs: tuple | list = ()


def checkpoint_of(heads, head, place, state_dict, shared):
    """A checkpoint of one of the heads, in upstream's format, and its --lr.

    state_dict: of the network with all heads; shared: entries that are any head's.
    """
    own = head.state_dict(place.epoch)
    names = [name for name in ("lr", "epoch", "optimizer", "scaler") if name in own]
    entries = {
        "step": place.step,
        "best_acc1": place.best_acc1,
        **shared,
        **{name: own[name] for name in names},
    }
    return {"epoch": place.epoch, "state_dict": one_head(state_dict, heads.index(head)), **entries}


def checkpoint_of_all(heads, place, state_dict, shared):
    """The same of the leader, with what all heads need besides to go on from `place`."""
    return {
        **checkpoint_of(heads, leader(heads), place, state_dict, shared),
        "heads": [head.state_dict(place.epoch) for head in heads],
        "confusion": place.confusion,
        "logs": list(place.logs),
    }


def one_head(state_dict, index):
    """A network's tensors with those of head `index` as its last layer: the names of a network with one."""
    own = f"fc.each.{index}."
    return {
        name.replace(own, "fc."): tensor
        for name, tensor in state_dict.items()
        if own in name or "fc.each." not in name
    }


def restore(heads, checkpoint, path, epochs):
    """Put the heads where a checkpoint left them. Returns the Place.

    A checkpoint without `heads`, as of upstream, has one. Raises UserError when it is of other learning rates
    than these, where there are several, or has nothing left to do of `epochs`.
    """
    saved = checkpoint.get("heads") or [_only_head(checkpoint)]
    if not all(isinstance(state, dict) and _is_history(state.get("history", [])) for state in saved):
        raise UserError(f"{path} is no checkpoint of this program: its entry heads holds other things")
    before, here = [state.get("lr") for state in saved], [head.lr for head in heads]
    if max(len(before), len(here)) > 1 and before != here:
        raise UserError(
            f"{path} is of --lr {_words(before)}, not {_words(here)}: go on with the same values in the same "
            "order, or start anew without --resume"
        )
    for head, state in zip(heads, saved, strict=True):
        epoch = continue_from(state, path, head.layer, head.optimizer, epochs, head.scaler)
        head.history, head.diverged = list(state.get("history", [])), state.get("diverged")
    reached = float(checkpoint.get("best_acc1", 0.0)), checkpoint.get("confusion")
    return Place(epoch, checkpoint.get("step", 0), *reached, checkpoint.get("logs", ()))


def _only_head(checkpoint):
    """What Head.state_dict gives, as far as a checkpoint of one head has it."""
    layer = {
        name.removeprefix("fc."): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith("fc.")
    }
    return {**checkpoint, "state_dict": layer}


def _is_history(value):
    """Whether it is what moco.heads.record makes: numbers of some epochs."""
    names = {"epoch", "loss", "acc1", "acc5"}
    return isinstance(value, list) and all(
        isinstance(entry, dict) and entry.keys() == names
        and all(isinstance(number, (int, float)) for number in entry.values())
        for entry in value
    )  # fmt: skip


def _words(lrs):
    return " ".join("one unknown value" if lr is None else f"{lr:g}" for lr in lrs)
