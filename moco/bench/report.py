"""Rounds in turns, medians and quartiles, the machine, and tables: shared by the measurements.

A report is a dict that JSON can hold: "about", what was measured and where; "checks" (moco.bench.checks);
"tables", {title: {row: {column: number, text or spread}}}; and "notes", sentences. Only tables must be there.
"""

import math
import os
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
    found = {**machine(device), "cores": available_cores(), "load": round(os.getloadavg()[0], 1)}
    if device.type == "cuda":
        found["memory_gb"] = torch.cuda.get_device_properties(device).total_memory / 1e9
        found["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found | {"setting": setting}


def text(report):
    """A report for a person, in Markdown: a heading that names the device, where and how it was measured, the
    checks, the tables, and notes.
    """
    parts = []
    if about := report.get("about"):
        git, memory = about["git"], about.get("memory_gb")
        device = about["cpu"] if about["device"] == "cpu" else f"{about['device']}, {memory:.0f} GB"
        commit = f"commit {git['commit'][:7]}{', changed' * git['changed']}" if git else "no commit"
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        parts += [
            f"# {device}",
            f"- {about['time']}, `python -m moco.bench {' '.join(about['command'][1:])}`, {commit}\n"
            f"- {about['cpu']}, {about['cores']} cores, load {about['load']}\n"
            f"- {versions}\n"
            f"- {', '.join(f'{name} {value}' for name, value in about['setting'].items())}\n"
            "- medians [quartiles] of rounds in turns",
        ]
    parts.append("\n".join(_check_line(name, check) for name, check in report.get("checks", {}).items()))
    parts += [_table(title, rows) for title, rows in report["tables"].items()]
    parts.append("\n".join(f"- {note}" for note in report.get("notes", ())))
    return "\n\n".join(filter(None, parts))


def _check_line(name, check):
    fault = f": {check['differs']}" if check["differs"] else ""
    return f"- {check['verdict']}: {name} ({check['compared']}){fault}"


def _table(title, rows):
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[name, *(_cell(row.get(column)) for column in columns)] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip([title, *columns], *lines, strict=True)]
    ruler = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        f"| {' | '.join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])} |"
        for name, *cells in ([title, *columns], ruler, *lines)
    )


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
