"""Turns, times and memory of training steps, and the tables of `moco.bench step` and `train`."""

import contextlib
import json
import tempfile
import textwrap
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from moco.bench_report import machine
from moco.versions import versions

RUN = 126_689 * 200  # images of 200 epochs of ImageNet-100
NAMES = {
    "published": "published, float32",
    "published_tf32": "published, TF32",
    "faithful": "faithful, float32",
    "faithful_tf32": "faithful, TF32",
    "channels_last": "+ channels_last",
    "bf16": "+ bf16",
    "compile": "+ compile",
    "fast": "--fast, IFM",
    "fast_v2": "--fast, MoCo-v2",
    "fast_unsplit": "--fast, --bn-splits 1",
    "ceiling": "ceiling: encoders alone",
}


class Row:
    """Something that is measured, after its first step, whose loss is `first_loss` (None: it has none)."""

    def __init__(self, device, tf32, execution, build):
        self.device, self.tf32, self.execution = device, tf32, execution
        before = _allocated(device)
        with _tf32_set(tf32, device):
            self.run = build()
            self.first_loss = self.run(1)
        self.own_bytes = _allocated(device) - before  # weights, gradients, momentum

    def turn(self, steps):
        """(seconds of so many steps, peak bytes of all that is its own or None on a CPU)."""
        with _tf32_set(self.tf32, self.device):
            if self.device.type != "cuda":
                return timed(lambda: self.run(steps), self.device), None
            torch.cuda.empty_cache()  # blocks in the sizes of other rows
            self.run(1)
            seconds = []
            peak = peak_bytes(
                lambda: seconds.append(timed(lambda: self.run(steps), self.device)), self.device
            )
            return seconds[0], self.own_bytes + peak


def timed(work, device):
    """Seconds until the device has done it."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _allocated(device):
    """Bytes of tensors on a GPU; 0 on a CPU, where torch does not count them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_bytes(work, device):
    """How many bytes torch's allocator holds at most for `work` besides those before it."""
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = _allocated(device)
        work()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory(prefix="moco-bench-") as place:
        path = Path(place, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]  # negative when memory is given back
        most = max(most, now)
    return most


@contextlib.contextmanager
def _tf32_set(on, device):
    """Within the block convolutions and products of float32 use TF32 or do not; None: as it was."""
    if on is None or device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = on
    torch.set_float32_matmul_precision("high" if on else "highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def hours(images_per_s):
    """How long 200 epochs of ImageNet-100 take."""
    return round(RUN / float(images_per_s) / 3600, 2)


def described(s):
    """A Setting and where it was measured."""
    sizes = {name: getattr(s, name) for name in ("arch", "batch_size", "size", "moco_k", "bn_splits")}
    return {**sizes, "device": s.device.type, "hardware": machine(s.device), "versions": versions()}


def step_tables(report):
    """The report of moco.bench_step as text."""
    parts = [_head(report)]
    if "rows" in report:
        parts += [_rows(report), _notes(report)]
    if "loss" in report:
        parts.append(_loss(report["loss"]))
    return "\n\n".join("\n".join(part) for part in parts)


def train_table(report):
    """The report of moco.bench_train as text."""
    return "\n\n".join("\n".join(part) for part in (_head(report), _end_to_end(report)))


def _head(report):
    hardware = report["hardware"]
    yield from textwrap.wrap(
        f"{hardware['gpu'] or hardware['cpu']}, {hardware['cores']} cores, load {hardware['load_average']}",
        80,
    )
    yield "Python {python}, torch {torch}, torchvision {torchvision}".format(**report["versions"])
    yield "{arch}, {size} px, batch {batch_size}, K {moco_k}, {bn_splits} BatchNorm group(s)".format(**report)
    yield f"medians [and quartiles] of {report['rounds']} rounds, {report['steps']} steps a turn"


def _rows(report):
    on_cuda = report["device"] == "cuda"
    yield f"{'Step, resident noise':24}{'images/s':>22}{'ceiling':>9}{'faithful':>9}{'publ.':>8}" + (
        f"{'GB':>6}" if on_cuda else ""
    )
    for name, row in report["rows"].items():
        ratios = (row["to_ceiling"], row["to_faithful"], row["to_published"])
        ceiling, faithful, published = ("-" if r is None else f"{r['median']:.2f}" for r in ratios)
        line = f"{NAMES[name]:24}{_range(row['images_per_s']):>22}{ceiling:>9}{faithful:>9}{published:>8}"
        yield line + (f"{row['peak_bytes'] / 1e9:>6.1f}" if on_cuda else "")
    if not on_cuda:
        yield "(peak memory is not measured on a CPU)"


def _notes(report):
    rows = report["rows"]
    how = {}  # rows that are carried out alike show how much is noise
    for name, row in rows.items():
        how.setdefault(row["execution"], []).append(NAMES[name])
    for execution, names in how.items():
        yield from _wrapped(f"{execution}: {'; '.join(names)}")
    for key, text in (
        ("ifm_to_v2", "rate of IFM to that of MoCo-v2, both --fast"),
        ("split_to_unsplit", "rate with BatchNorm groups to that without, both --fast"),
    ):
        if report[key]:
            yield f"{text}: {_range(report[key], 3)}"
    if report["hours_200_epochs"]:
        yield f"200 epochs of 126,689 images at the rate of --fast: {report['hours_200_epochs']:.2f} hours"
    for name, reason in report["left_out"].items():
        yield from _wrapped(f"left out, {NAMES[name]}: {reason}")


def _loss(report):
    yield f"{'Losses, gradient, accuracy: N {batch_size}, K {moco_k}'.format(**report):50}{'ms':>21}{'MB':>8}"
    for name, text in (("two_cross_entropies", "two cross-entropies"), ("contrast", "moco.contrast")):
        row = report[name]
        yield f"{text:50}{_range(row['ms']):>21}{row['peak_bytes'] / 1e6:>8.1f}"
    yield f"{'ratio':50}{_range(report['time_ratio'], 3):>21}{report['memory_ratio']:>8.3f}"


def _end_to_end(report):
    files = report["files"]
    source = report["images"]["folder"] or "photographs made for it"
    yield f"{'--fast, epochs of ' + str(report['steps']) + ' steps':54}{'images/s':>26}"
    yield f"{'from JPEG files, with the start of the epoch':54}{_range(files['images_per_s']):>26}"
    yield f"{'on resident noise':54}{_range(report['resident']['images_per_s']):>26}"
    yield f"{'ratio':54}{_range(files['to_resident'], 3):>26}"
    yield f"{'percent of the time waited for data':54}{_range(files['waited_percent'], 1):>26}"
    yield f"{'seconds to the first batch':54}{_range(files['first_batch_s'], 2):>26}"
    if report["hours_200_epochs"]:
        yield f"{'hours for 200 epochs of 126,689 images':54}{report['hours_200_epochs']:>26.2f}"
    yield ""
    yield from _wrapped(f"{report['images']['distinct']} different images: {source}")
    for line in (report["loader"], report["photometric"], report["execution"]):
        yield from _wrapped(line)


def _wrapped(text):
    return textwrap.wrap(text, 80, subsequent_indent="  ")


def _range(row, digits=None):
    digits = (0 if row["median"] >= 200 else 1) if digits is None else digits
    return "{median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]".format(**row, digits=digits)


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
