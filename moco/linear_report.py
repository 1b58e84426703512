"""What a linear evaluation found: a table of its heads, the classes it confuses, and both for programs."""

import json
import textwrap
from collections import Counter

from moco.distributed import everybodys
from moco.errors import UserError
from moco.files import atomic_file

WIDTH = 25  # of a class name


def best_head(heads):
    """The head with the highest validation accuracy of any epoch, the first of several."""
    return max(heads, key=lambda head: head.best["acc1"])


def table(heads):
    """Lines of at most 80 characters, a row per moco.heads.Head: its last and its best epoch."""
    yield (
        f"{'--lr':<11} {'final Acc@1':>12} {'Acc@5':>8} {'best Acc@1':>12} {'Acc@5':>8} {'epoch':>6} "
        f"{'train loss':>12}"
    )
    for head in heads:
        last = head.history[-1] if head.history else {}
        final = f"{_number(last, 'acc1'):>12} {_number(last, 'acc5'):>8}"
        if head.diverged is not None:
            final = f"{f'diverged, epoch {head.diverged}':>21}"
        best = f"{_number(head.best, 'acc1'):>12} {_number(head.best, 'acc5'):>8}"
        epoch, loss = head.best.get("epoch", "-"), "nan or inf" if head.diverged is not None else None
        yield f"{head.lr:<11g} {final} {best} {epoch:>6} {loss or _number(last, 'loss', 4):>12}"


def accuracies(heads, reached, best):
    """The line after a validation, as upstream's, of head number `best`, and of several heads one with all.

    reached: (top-1, top-5) of each in percent.
    """
    yield " * Acc@1 {:.3f} Acc@5 {:.3f}".format(*reached[best])
    if len(heads) > 1:
        each = [
            f"{head.lr:g}: " + ("diverged" if head.diverged is not None else f"{acc1:.3f}")
            for head, (acc1, _) in zip(heads, reached, strict=True)
        ]
        said = f"of --lr {heads[best].lr:g}; Acc@1 of each --lr: {', '.join(each)}"
        yield from textwrap.wrap(said, 80, initial_indent="   ", subsequent_indent="   ")


def epoch_entry(heads, best, losses, reached, logs, shown):
    """An epoch for linear.jsonl: the entry of head number `best`, and those of all as `heads`.

    A head's: its --lr, learning rate, means of loss and accuracies (of this process) in training, and
    accuracies in validation; all but the first null in one that has diverged. losses, (top-1, top-5) in
    `reached`, StepLogs in `logs`: of each; shown: the log that kept the time.
    """
    entries = []
    for head, loss, (val_acc1, val_acc5), log in zip(heads, losses, reached, logs, strict=True):
        measured = {**head.rates, "loss": loss, "acc1": log.top1.mean, "acc5": log.top5.mean}
        measured |= {"val_acc1": val_acc1, "val_acc5": val_acc5}
        if head.diverged is not None:
            measured = dict.fromkeys(measured) | {"head": head.lr}
        entries.append({**measured, "diverged": head.diverged})
    return shown.means() | entries[best] | {"heads": entries}


def finish(path, heads, place, shared):
    """`write` the report of a run that stands at a Place (moco.linear_checkpoint); its `lines`.

    shared: entries of its checkpoints. Raises UserError.
    """
    names = shared["classes"]
    write(path, heads, names, place.confusion, seed=shared["seed"])
    return lines(heads, names, place.confusion, place.best_acc1, path)


def lines(heads, names, confusion, best_acc1, path):
    """What is printed at the end: the table, the worst classes of the best head, and its accuracy.

    confusion: of confusion_of, or None when no image was ever classified right; path: where `write` wrote it.
    """
    yield from table(heads)
    yield f"all of it is in {path}"
    best = best_head(heads)
    if confusion is not None:
        of_head = f" at --lr {best.lr:g}" if len(heads) > 1 else ""
        yield f"the worst of {len(names)} classes{of_head}, after epoch {best.best['epoch']}:"
        yield from worst_classes(confusion, names)
    if len(heads) > 1:
        yield f"--lr {best.lr:g} is the best of {len(heads)} compared on the validation split itself,"
        yield "as users of the published program do by hand: say so beside the number"
    yield f"best Acc@1 {best_acc1:.3f} (chance {100 / len(names):.3f})"


def confusion_of(targets, predictions):
    """How often images of one class were taken for another, as sorted [class, taken for, count] with counts
    above 0, over all processes; the classes (N,) int64 are those of this process's images.
    """
    own = Counter(zip(targets.tolist(), predictions.tolist(), strict=True))
    together = sum(everybodys(own), Counter())
    return [[*pair, count] for pair, count in sorted(together.items())]


def worst_classes(confusion, names, most=10):
    """The classes that are least often right: lines of at most 80 characters, the worst first.

    confusion: of confusion_of; names: of the classes. Of classes that are wrong equally often, and of those
    that one is taken for equally often, the first comes first.
    """
    images, right, wrong = Counter(), Counter(), {}
    for true, taken, count in confusion:
        images[true] += count
        if true == taken:
            right[true] = count
        else:
            wrong.setdefault(true, Counter())[taken] = count
    worst = sorted(wrong, key=lambda true: (right[true] / images[true], true))[:most]
    if not worst:
        yield f"all {images.total()} validation images are classified right"
        return
    yield f"{'class':<{WIDTH}} {'images':>8} {'right %':>8}  taken for (share)"
    for true in worst:
        taken, count = min(wrong[true].items(), key=lambda item: (-item[1], item[0]))
        share = f"({100 * count / images[true]:.1f} %)"
        yield (
            f"{_short(names[true]):<{WIDTH}} {images[true]:>8} {100 * right[true] / images[true]:>8.1f}  "
            f"{_short(names[taken])} {share}"
        )


def write(path, heads, names, confusion, **more):
    """Write all of it to `path` as JSON: heads with their epochs, the best of them, the classes and their
    confusion (of the best head in its best epoch), and `more`. Raises UserError.
    """
    best = best_head(heads)
    report = {
        "best": {"lr": best.lr, **best.best},
        "heads": [{"lr": head.lr, "diverged": head.diverged, "epochs": head.history} for head in heads],
        "classes": list(names),
        "confusion": confusion,
        **more,
    }
    try:
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(report, sort_keys=True, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}); free space or choose another --output-dir"
        ) from error


def _number(entry, name, digits=3):
    value = entry.get(name, -1)
    return "-" if value < 0 else f"{value:.{digits}f}"


def _short(name):
    return name if len(name) <= WIDTH else name[: WIDTH - 2] + ".."
