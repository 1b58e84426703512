"""Stop requests: which signals are heard and when, and that all ranks get the same answer."""

import os
import signal
import time

import pytest
import torch.distributed as dist
from forked_program import forked

from moco.run.launch import Rank
from moco.run.signals import EXIT_CODE, SAME, SIGNALS, StopRequest, exit_on_signal


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_signals_are_heard_inside_alone(number, capsys):
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopRequest(Rank.alone()) as stop:
        assert not stop.requested() and stop.name is None
        os.kill(os.getpid(), number)
        assert stop.requested() and stop.name == number.name
        with pytest.raises(SystemExit) as end:
            stop.exit("stopped", "do this")
    assert end.value.code == EXIT_CODE
    assert capsys.readouterr().out == f"stopped ({number.name});\n   do this\n"
    assert [signal.getsignal(each) for each in SIGNALS] == before


def told_to_stop(rank, world, at):
    """(step in which this rank hears of the signal of rank `at` in step 2, questions, exit code, name)."""
    sent, real = [], dist.all_reduce
    dist.all_reduce = lambda *arguments, **options: sent.append(1) or real(*arguments, **options)
    with StopRequest(Rank(rank, world, rank, world, world, "cpu")) as stop:
        for step in range(5):
            if (rank, step) == (at, 2):
                os.kill(os.getpid(), signal.SIGUSR1)
            if stop.requested():
                break
        try:
            stop.exit("stopped", "do this")
        except SystemExit as end:
            return step, len(sent), end.code, stop.name


@pytest.mark.parametrize("at", [0, 1, None])
def test_all_ranks_get_the_same_answer_by_one_question_a_step(run_ranks, at):
    ends = run_ranks(2, told_to_stop, at)
    steps = 2 if at is not None else 4
    names = ["SIGUSR1" if rank == at else None for rank in range(2)]
    assert ends == [(steps, steps + 2, EXIT_CODE, name) for name in names]  # with the barrier of exit


def test_a_second_signal_ends_at_once():
    def main():
        with StopRequest(Rank.alone()) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # by a terminal and by a parent: counts once
            print(stop.name)
            time.sleep(SAME + 0.2)
            os.kill(os.getpid(), signal.SIGINT)
            print("still here")

    pid, output = forked(main, (1, 2))
    assert output.read() == "SIGTERM\n"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_outside_of_a_stop_request_there_is_nothing_to_save(number):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end, exit_on_signal():
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert end.value.code == EXIT_CODE and signal.getsignal(number) == before
