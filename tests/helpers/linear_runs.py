"""Linear evaluations of the encoder `-a tiny` in processes of their own, signaled where a test wants it."""

import contextlib
import io
import os
import signal

import torch
from command_lines import SMALL

import main_lincls
from moco import options
from moco.errors import UserError
from moco.evaluate import linear
from moco.run.launch import Rank

WORDS = [*SMALL, "-a", "tiny", "--epochs", "3", "--schedule", "1", "2", "--wd", "0.01"]


def evaluated(rank, world, words, stop=None):
    """Run linear evaluation in this process: (exit code or message, what it printed).

    It gets a SIGTERM within call number stop[1], from 1, of linear.accuracies on rank stop[0]: there is one
    in each step of training and of validation.
    """
    calls, real, output = [0], linear.accuracies, io.StringIO()

    def counted(*inputs):
        calls[0] += 1
        if stop == (rank, calls[0]):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*inputs)

    linear.accuracies = counted
    try:
        with contextlib.redirect_stdout(output):
            args = options.linear_evaluation(list(map(str, words)))
            main_lincls.evaluate(Rank(rank, world, rank, world, world, torch.device("cpu")), args)
    except SystemExit as end:
        return end.code, output.getvalue()
    except UserError as error:
        return f"{error.exit_code}: {error}", output.getvalue()
    finally:
        linear.accuracies = real
    return 0, output.getvalue()


def run(run_ranks, world, folders, out, *words, stop=None):
    """The exit codes and rank 0's output of a run that writes to the folder `out`."""
    out.mkdir(exist_ok=True)
    ends = run_ranks(world, evaluated, [*WORDS, folders, "--output-dir", out, *words], stop)
    return [code for code, _ in ends], ends[0][1]


def load(out, name="checkpoint.pth.tar"):
    return torch.load(out / name, weights_only=True)


def same(one, other):
    """Whether two checkpoints, or parts of them, hold equal tensors and values under equal names."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
