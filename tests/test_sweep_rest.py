"""What a sweep says of the time that is left."""

import time

import pytest

from moco import sweep
from moco.sweep import Job


def job(tmp_path, trained, seconds, began=None):
    """A Job that took `seconds` so far and, with `began`, is at work since then."""
    return Job(
        {"trained": trained},
        [],
        tmp_path / "a",
        seconds=seconds,
        process=began and object(),
        began=began or 0.0,
    )


@pytest.mark.parametrize(
    "done, left, side_by_side, said",
    [
        ([("untrained", 9)], [], 1, "0 left"),
        (
            [("untrained", 9)],
            ["trained", "trained"],
            1,
            "2 left",
        ),  # a glimpse at untrained ones tells nothing
        ([("trained", 9)], ["untrained"], 1, "1 left"),
        ([("untrained", 10), ("untrained", 20)], ["untrained"], 1, "1 left, about 15 s"),
        ([("untrained", 10), ("trained", 100)], ["trained", "trained"], 1, "2 left, about 3 min 20 s"),
        ([("untrained", 10), ("trained", 100)], ["trained", "untrained"], 2, "2 left, about 55 s"),
    ],
)
def test_each_run_that_is_left_is_reckoned_by_those_like_it(tmp_path, done, left, side_by_side, said):
    done = [job(tmp_path, kind == "trained", {"pretrain": took - 4, "measure": 4}) for kind, took in done]
    left = [job(tmp_path, kind == "trained", {}) for kind in left]
    assert sweep._rest(done, left, side_by_side) == said


def test_what_runs_have_done_already_is_not_reckoned_again(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    done = [job(tmp_path, True, {"pretrain": 80, "measure": 20})]
    resumed = job(tmp_path, True, {"pretrain": 30}, began=950.0)  # 80 s of it are over
    longer = job(tmp_path, True, {}, began=100.0)  # takes longer than its like, and is never reckoned below 0
    assert sweep._rest(done, [resumed, longer], 1) == "2 left, about 20 s"
