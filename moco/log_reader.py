"""Reading log.jsonl of a run's folder, or linear.jsonl of a linear evaluation: one JSON object a line, of the
kinds "start", "step" and "epoch".

The file is appended to by every start of a run, and may end anywhere: what a reader wants is the course that
led to the run's present state, each step of it once.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from moco.errors import UserError
from moco.pictures import shortened

NAME, LINEAR_NAME = NAMES = "log.jsonl", "linear.jsonl"
LONGEST = 45  # letters of a run's name: two such names fill a row of moco.plot's legend


@dataclass
class RunLog:
    """What a log says, as it says it.

    starts: the newest new start and those that went on from it. steps: the printed steps, by (epoch, step);
    epochs: the finished epochs. In both each line is a dict of the log's names and values, with `at`
    besides: how many epochs of training had been done when it was measured, for the means over an epoch the
    middle of it.
    """

    path: Path
    starts: list = field(default_factory=list)
    steps: list = field(default_factory=list)
    epochs: list = field(default_factory=list)

    @property
    def linear(self):
        """Whether the run is a linear evaluation."""
        named = any(start.get("program") == "main_lincls.py" for start in self.starts)
        return named or any("val_acc1" in entry for entry in self.epochs)

    @property
    def chances(self):
        """The different losses at chance that its starts name, in the order of their first time."""
        named = [start.get("chance") for start in self.starts]
        return list(dict.fromkeys(chance for chance in named if _is_number(chance)))


def read_log(path, note=None):
    """The RunLog of a run folder or of its log file.

    Of a repeated (epoch, step) the newest line counts. A start makes all earlier lines from its place on
    void: with epoch 0 and step 0 the whole earlier run, otherwise what was lost between its checkpoint and
    its end. Lines that are cut off are left out. note: called with a sentence about them; without it they
    are told on standard error. Raises UserError when there is no log, or one without a step or an epoch.
    """
    path = _log_file(Path(path))
    starts, steps, epochs, cut = [], {}, {}, []
    for number, line in _lines(path):
        entry = _entry(line)
        if entry is None:
            cut.append(number)
            entry = _entry(line[max(line.rfind(b'{"kind"'), 0) :])  # a start behind what was cut off
        if entry is None:
            continue
        kind, epoch, step = entry["kind"], entry["epoch"], entry.get("step", 0)
        if kind == "step":
            steps[epoch, step] = entry | {"at": starts[-1].get("steps") if starts else None}
        elif kind == "epoch":
            epochs[epoch] = entry | {"at": epoch + 0.5}
        else:
            steps = {place: old for place, old in steps.items() if place < (epoch, step)}
            epochs = {place: old for place, old in epochs.items() if place < epoch}
            starts = [*(starts if (epoch, step) > (0, 0) else []), entry]
    if cut:
        (note or _tell)(_about(cut, number, path))
    if not (steps or epochs):
        raise UserError(f"{path} holds no step and no epoch yet; look again when the run has printed some")
    _place(steps)
    by_place = [[lines[place] for place in sorted(lines)] for lines in (steps, epochs)]
    return RunLog(path, starts, *by_place)


def by_head(log, name):
    """(RunLog, name) for each classifier of a linear evaluation with several; of another log, it and `name`.

    They have no steps: the lines of those are of one at a time, the best so far.
    """
    lines = {}
    for entry in log.epochs:
        for own in entry["heads"] if isinstance(entry.get("heads"), list) else ():
            if isinstance(own, dict) and _is_number(own.get("head")):
                lines.setdefault(own["head"], []).append(entry | own)
    if len(lines) < 2:
        return [(log, name)]
    return [(RunLog(log.path, log.starts, [], epochs), f"{name} --lr {lr:g}") for lr, epochs in lines.items()]


def run_names(paths):
    """A short name for each log file, no two alike: that of its folder, with those above it if need be."""
    parts = []
    for path in map(Path, paths):
        place = path.resolve()
        parts.append(place.parent.parts if place.name in NAMES else (*place.parent.parts, place.stem))
    names, depth = [own[-1] for own in parts], 1
    while len(set(names)) < len(set(parts)):
        depth += 1
        names = [
            "/".join(own[-depth:]) if names.count(name) > 1 else name
            for own, name in zip(parts, names, strict=True)
        ]
    short = [shortened(name, LONGEST) for name in names]
    if len(set(short)) < len(set(names)):  # they differ in the middle
        skip = max(len(os.path.commonprefix(names)) - LONGEST // 3, 0)
        short = ["…" + name[skip : skip + LONGEST - 2] + "…" for name in names]
    if len(set(short)) < len(short):
        short = [f"{place}: {name}" for place, name in enumerate(short, 1)]
    return short


def _log_file(path):
    if os.path.isdir(path):
        for name in NAMES:
            if (path / name).is_file():
                return path / name
        below = sorted({other.parent.name for name in NAMES for other in path.glob(f"*/{name}")})
        hint = f"name a run in it, such as {path / below[0]}" if below else "is it the --output-dir of a run?"
        raise UserError(f"the folder {path} has no {NAME}; {hint}")
    if not os.path.isfile(path):  # unlike Path.is_file, it answers also for too long a name
        raise UserError(f"there is no run folder and no log {path}")
    return path


def _lines(path):
    """(number from 1, bytes) of the lines that are not blank."""
    try:
        with open(path, "rb") as file:
            if (first := file.read(64).lstrip()) and not first.startswith(b"{"):
                raise UserError(f"{path} is no log: it does not consist of JSON objects, one a line")
            file.seek(0)
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from error


def _entry(line):
    """The dict of a line, or None where it is not whole or not of a log."""
    try:
        entry = json.loads(line)
    except ValueError:  # also of bytes that are no UTF-8
        return None
    places = {"start": ("epoch", "step"), "step": ("epoch", "step"), "epoch": ("epoch",)}
    if not isinstance(entry, dict) or entry.get("kind") not in places:
        return None
    counts = [entry.get(name) for name in places[entry["kind"]]]
    return entry if all(type(count) is int and count >= 0 for count in counts) else None


def _place(steps):
    """Replace `at`, how many steps an epoch has by the start before the line, by the place in epochs."""
    most = max((step + 1 for _, step in steps), default=1)
    for (epoch, step), entry in steps.items():
        said = entry["at"]
        entry["at"] = epoch + step / (max(said, step + 1) if type(said) is int else most)


def _about(cut, last, path):
    if cut == [last]:
        return f"{path} is cut off in line {last}: read up to there"
    many = f"line {cut[0]} is" if len(cut) == 1 else f"{len(cut)} lines, the first of them {cut[0]}, are"
    return f"{path}: {many} cut off or damaged and left out"


def _tell(sentence):
    print(f"note: {sentence}", file=sys.stderr)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)
