"""Running means that stay on the device until they are printed, and the console lines that show them."""

import time

import torch

from moco.progress import duration


class Meter:
    """The newest value and the mean of a quantity. Tensors are added without waiting for the device."""

    def __init__(self, name, spec):
        self.name, self.spec = name, spec
        self.newest = self.total = 0.0
        self.count = 0

    def update(self, value, n=1):
        """Add the mean `value` (number or 0-dimensional tensor) of n items."""
        self.newest = value.detach() if isinstance(value, torch.Tensor) else value
        self.total = self.total + self.newest * n
        self.count += n

    @property
    def mean(self):
        """The mean of all items as a float (this waits for the device)."""
        return float(self.total) / max(self.count, 1)

    def total_tensor(self, device):
        """The sum of all items, 0-dimensional float64, to be added up over processes."""
        return torch.as_tensor(self.total, dtype=torch.float64, device=device).clone()

    def __str__(self):
        return f"{self.name} {float(self.newest):{self.spec}} ({self.mean:{self.spec}})"


class StepLog:
    """Time, waiting for data, loss and accuracies of the steps of one pass over a loader, shown as
    upstream shows them.

    `for batch in log.steps(): ...; log.update(loss, accuracy(logits, labels), N)` prints `Epoch:
    [0][ 10/247]`, the meters, the rate and the time left, separated by tabs, every `print_freq` steps (0:
    never). `due` says while a step is under way whether it will be.
    """

    def __init__(self, head, loader, print_freq, first=0, processes=1, write=lambda kind, **numbers: None):
        """first: the step that the loader's next batch belongs to, after those of an earlier start;
        processes: how many take as large a batch in each step; write: called with "step" and the numbers
        of a step that is printed.
        """
        self.head, self.loader, self.print_freq, self.first = head, loader, print_freq, first
        self.processes, self.write = processes, write
        self.due, self._stopped, self._noted, self._meters = False, False, {}, {}
        self.seconds, self.waiting = Meter("Time", "6.3f"), Meter("Data", "6.3f")
        self.loss = Meter("Loss", ".4e")
        self.top1, self.top5 = Meter("Acc@1", "6.2f"), Meter("Acc@5", "6.2f")

    def steps(self):
        """The loader's batches; the time until each is there is metered."""
        self.step_began = time.perf_counter()
        self._start = self._shown = self._so_far()
        for step, batch in enumerate(self.loader, self.first):
            self.waiting.update(time.perf_counter() - self.step_began)
            self.due = self.print_freq > 0 and step % self.print_freq == 0
            yield batch
            self.seconds.update(time.perf_counter() - self.step_began)
            self.step_began = time.perf_counter()
            if self.due:
                self._show(step)
            if self._stopped:
                return

    def stop(self):
        """Make the step that is being done the last of steps()."""
        self._stopped = True

    def update(self, loss, accuracies, n):
        """Meter the mean loss and top-1 and top-5 accuracies (0-dim. tensors) of n items."""
        for meter, value in zip((self.loss, self.top1, self.top5), (loss, *accuracies), strict=True):
            meter.update(value, n)

    def note(self, measured, **standing):
        """What else is to be written of a step that is `due`: numbers or 0-dim. tensors by name, of which
        those `measured` have a mean over the pass.
        """
        self._noted = {**measured, **standing}
        for name, value in measured.items():
            self._meters.setdefault(name, Meter(name, "g")).update(value)

    def means(self):
        """The pass as numbers to be written: its seconds, and means of the rest, for what was noted over the
        steps that were due. Time and rate are those of this start, None when it had no step.
        """
        steps = self.seconds.count
        times = dict.fromkeys(("seconds", "data_seconds", "images_per_s"))
        if steps:
            own = self.seconds.total, self.waiting.total / steps, self._since(self._start)["images_per_s"]
            times = dict(zip(times, own, strict=True))
        return {
            "loss": self.loss.mean,
            "acc1": self.top1.mean,
            "acc5": self.top5.mean,
            **{name: meter.mean for name, meter in self._meters.items()},
            **times,
        }

    def state_dict(self):
        """The sums of loss and accuracies, for a start that goes on in the middle of the pass."""
        return _sums(self.loss, self.top1, self.top5)

    def noted(self):
        """The same of what was measured, which depends on how often is printed."""
        return _sums(*self._meters.values())

    def load_state_dict(self, state, device):
        """Go on from the sums of state_dict() and, where they are there, of noted()."""
        own = {meter.name: meter for meter in (self.loss, self.top1, self.top5)}
        for name, (total, count) in state.items():
            meter = own.get(name) or self._meters.setdefault(name, Meter(name, "g"))
            meter.total, meter.count = total.to(device), count

    def _show(self, step):
        times = self._since(self._shown)
        self._shown = self._so_far()
        width = len(str(len(self.loader)))
        left = duration(self.seconds.mean * (len(self.loader) - step - 1))
        meters = map(str, (self.seconds, self.waiting, self.loss, self.top1, self.top5))
        place, rate = (
            f"{self.head}[{step:{width}d}/{len(self.loader)}]",
            f"{times['images_per_s']:.0f} images/s",
        )
        print("\t".join([place, *meters, rate, f"{left} left"]), flush=True)
        newest = {"loss": self.loss.newest, "acc1": self.top1.newest, "acc5": self.top5.newest}
        self.write("step", step=step, **newest, **times, **self._noted)

    def _so_far(self):
        return self.seconds.count, self.seconds.total, self.waiting.total, self.loss.count

    def _since(self, before):
        """Means per step, and images per second in all processes, since _so_far() was `before`."""
        steps, seconds, waiting, images = (a - b for a, b in zip(self._so_far(), before, strict=True))
        return {
            "seconds": seconds / max(steps, 1),
            "data_seconds": waiting / max(steps, 1),
            "images_per_s": images * self.processes / max(seconds, 1e-9),
        }


def _sums(*meters):
    return {meter.name: (torch.as_tensor(meter.total).cpu(), meter.count) for meter in meters}


def epoch_line(epoch, means, chance, seconds, epochs_left):
    """What the console says after an epoch, in two lines. means: of StepLog, with lr and queue_fill;
    seconds: of an epoch so far, with all that belongs to it.
    """
    left = duration(seconds * epochs_left)
    return (
        f"epoch {epoch}: loss {means['loss']:.4f} (chance {chance:.4f}), lr {means['lr']:.3g}, "
        f"queue {means['queue_fill']:.0%} full,\n"
        f"   {means['images_per_s']:.0f} images/s, {duration(seconds)} an epoch, {left} left"
    )


def top_classes(logits, most=5):
    """The numbers of the largest logits (N x classes) of each row, the largest first: int64 N x min(most,
    classes).
    """
    return logits.topk(min(most, logits.shape[1]), dim=1).indices


@torch.no_grad()
def accuracy(logits, labels, topk=(1, 5)):
    """Percentages of the N rows whose label (N, int64) is among the k largest logits (N x classes),
    0-dim. tensors.

    With fewer classes than k every row counts as right.
    """
    hits = top_classes(logits, max(topk)) == labels[:, None]  # N x k
    return [hits[:, :k].any(dim=1).float().mean() * 100 for k in topk]


@torch.no_grad()
def rank_accuracy(ranks, topk=(1, 5)):
    """Percentages of N ranks (int64: how many logits are larger than the label's) below each k, 0-dim."""
    return [(ranks < k).float().mean() * 100 for k in topk]
