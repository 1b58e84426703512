"""Linear evaluations of a tiny encoder in processes of their own, told to stop where a test wants it."""

import contextlib
import io
import os
import signal
import sys

import pytest
import torch
from command_lines import SMALL
from tiny import TinyEncoder

import main_lincls
from moco.distributed import Process
from moco.errors import UserError
from moco.linear_options import check

CPU = torch.device("cpu")
WORDS = [*SMALL, "--epochs", "3", "--schedule", "1", "2", "--wd", "0.01"]


@pytest.fixture(autouse=True)
def tiny_encoder(monkeypatch):
    monkeypatch.setattr(main_lincls, "base_encoder", lambda arch: TinyEncoder)


def evaluated(rank, world, words, folder, stop=None):
    """Run linear evaluation in this process: (how it ended, what it printed). It gets a signal within the
    call number `stop[1]` of `accuracy` on rank `stop[0]`.
    """
    sys.argv = ["main_lincls.py", *map(str, words), str(folder)]
    calls, real, said = [0], main_lincls.accuracy, io.StringIO()

    def counted(*inputs):
        calls[0] += 1
        if stop == (rank, calls[0]):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*inputs)

    main_lincls.accuracy = counted
    try:
        with contextlib.redirect_stdout(said):
            args = main_lincls.parse_args()
            check(args)
            main_lincls.evaluate_features(Process(rank, world, rank, world, world, CPU), args, folder)
    except SystemExit as end:
        return end.code, said.getvalue()
    except UserError as error:
        return str(error), said.getvalue()
    finally:
        main_lincls.accuracy = real
    return 0, said.getvalue()


def run(run_ranks, world, folders, out, *words, stop=None):
    """The exit codes and rank 0's output of a run that writes to the folder `out`."""
    out.mkdir(exist_ok=True)
    ends = run_ranks(world, evaluated, [*WORDS, "--output-dir", out, *words], folders, stop)
    return [code for code, _ in ends], ends[0][1]


def load(out, name="checkpoint.pth.tar"):
    return torch.load(out / name, weights_only=True)
