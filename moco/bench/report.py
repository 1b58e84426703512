"""Rounds in turns, medians and quartiles, the machine, and tables: shared by the measurements.

A report is a dict that JSON can hold: "about", what was measured and where, and "tables", {title: {row:
{column: number, text or spread}}}.
"""

import math
import os
import platform
import time

import numpy as np
import torch

from moco.progress import Progress
from moco.run.log import machine
from moco.run.resources import available_cores


def in_turns(turns, rounds, label):
    """Call each of `turns`, {name: function of the round's number}, in each round. Returns {name: array of
    what it returned, by round}.

    Each round begins with another one, so that a machine that gets slower or faster affects all. A round
    before the first warms up and does not count.
    """
    names = list(turns)
    taken = {name: [] for name in names}
    with Progress(label, rounds + 1, "rounds") as progress:
        for number in range(rounds + 1):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                taken[name].append(turns[name](number))
            progress.update()
    return {name: np.array(values[1:]) for name, values in taken.items()}


def timed(work, device):
    """Seconds of `work()`, including the device's."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def spread(values):
    """Median and quartiles of the rounds, four digits each."""
    low, median, high = (float(f"{value:.4g}") for value in np.percentile(values, (25, 50, 75)))
    return {"median": median, "low": low, "high": high}


def about(device, **setting):
    """The machine, how busy it was, the versions (moco.run.log.machine), and the setting: a dict."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), cpu)
    load = round(os.getloadavg()[0], 1)
    return {"cpu": cpu, "cores": available_cores(), "load": load, **machine(device), "setting": setting}


def text(report):
    """A report for a person: a few lines about it, and its tables, in Markdown."""
    parts = []
    if about := report.get("about"):
        setting = ", ".join(f"{name} {value}" for name, value in about["setting"].items())
        where = "{cpu}, {cores} cores, load {load}; device {device}; torch {versions[torch]}".format(**about)
        parts.append(f"{where}\n{setting}\nmedians [quartiles] of rounds in turns")
    for title, rows in report["tables"].items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        lines = [[name, *(_cell(row.get(column)) for column in columns)] for name, row in rows.items()]
        widths = [max(map(len, column)) for column in zip([title, *columns], *lines, strict=True)]
        ruler = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        parts.append(
            "\n".join(
                f"| {' | '.join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])} |"
                for name, *cells in ([title, *columns], ruler, *lines)
            )
        )
    return "\n\n".join(parts)


def _cell(value):
    """A spread as "82.1 [80.0, 84.2]", a number with three digits or more, None as "-"."""
    if isinstance(value, dict):
        digits = _digits(value["median"])
        return "{median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]".format(**value, digits=digits)
    if isinstance(value, float):
        return f"{value:,.{_digits(value)}f}"
    return "-" if value is None else str(value)


def _digits(value):
    return max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
