"""Saving is stopped at every event of its files, as ckpt-chaos finds, stops and judges them."""

import itertools
import os

import pytest
import torch
from ckpt_chaos.inject import arm
from ckpt_chaos.invariants import ResumeOutcome, classify
from forked_program import forked

from moco.run_folder import RunFolder

EPOCHS = 3
CRASHED = 137  # exit code of ckpt-chaos' kill


class Ours:
    """A run's folder as the program keeps it."""

    def __init__(self, folder):
        self.folder = RunFolder(folder)

    def newest(self):
        return self.folder.newest_good(print)[1]

    def save(self, checkpoint):
        self.folder.save(checkpoint)
        self.folder.tidy()


class InPlace:
    """Control: torch.save over the only file."""

    def __init__(self, folder):
        self.path = folder / "checkpoint.pth.tar"

    def newest(self):
        return torch.load(self.path, weights_only=True) if self.path.exists() else {}

    def save(self, checkpoint):
        torch.save(checkpoint, self.path)


def train(place, kind):
    """Go on from the newest checkpoint of the folder to the last epoch; (epoch it went on from, weights)."""
    run = kind(place)
    checkpoint = run.newest()
    began = epoch = checkpoint.get("epoch", 0)
    weights = next(iter(checkpoint.get("state_dict", {"x": torch.zeros(2000)}).values()))
    for epoch in range(began + 1, EPOCHS + 1):
        weights = weights * 1.5 + torch.arange(2000.0) * epoch
        run.save({"epoch": epoch, "step": 0, "state_dict": {"x": weights}})
    return began, weights


def armed(place, kind, at=None, mode="before"):
    """Train in a process that ends at the event of that number: (exit code, lines of the events' log)."""
    log = place.with_suffix(".log")

    def main():
        arm(str(place), at, mode, str(log), lazy_native=True, torn_python=True)
        train(place, kind)

    pid, output = forked(main, (1, 2))
    output.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), log.read_text().splitlines()


def newest_complete(place):
    """The epoch of the newest file under a final name that torch can read."""
    epochs = [0]
    for path in place.glob("checkpoint*"):
        try:
            epochs.append(torch.load(path, weights_only=True)["epoch"])
        except Exception:
            continue
    return max(epochs)


def verdict(place, kind, expected):
    complete = newest_complete(place)
    try:
        began, weights = train(place, kind)
    except Exception as error:
        return classify(ResumeOutcome(type(error).__name__, None, complete, None))
    difference = (weights - expected).abs().max().item()
    return classify(ResumeOutcome(None, began, complete, difference))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Ours, InPlace])
def test_every_crash_point(tmp_path, kind):
    places = (tmp_path / str(number) for number in itertools.count())

    def folder():
        place = next(places)
        place.mkdir()
        return place

    whole = folder()
    code, events = armed(whole, kind)
    assert code == 0 and sum("\ttorch.save\t" in event for event in events) == EPOCHS
    _, expected = train(folder(), kind)
    assert verdict(whole, kind, expected) == "PASS"

    verdicts = {}
    for number, event in enumerate(events, 1):
        for mode in ("before", "unsynced", *(["torn"] if event.endswith("\t1") else [])):
            place = folder()
            assert armed(place, kind, number, mode)[0] == CRASHED
            verdicts[number, mode] = verdict(place, kind, expected)
    if kind is Ours:
        assert len(events) >= 5 * EPOCHS and set(verdicts.values()) == {"PASS"}, verdicts
    else:
        assert "HARD_FAIL" in verdicts.values()
