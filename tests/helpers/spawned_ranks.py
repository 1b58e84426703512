"""What ranks do in a test. Spawned ones import this module."""

import os

import tiny  # noqa: F401  (which makes `-a tiny` known)
import torch
from started_runs import at_step

import main_moco
from moco.errors import UserError

FAILING = "FAILING_RANKS"  # of `failing`: such as "01:unexpected"
ERRORS = {
    "unexpected": ValueError("as intended"),
    "no memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (a test)"),
}


def leave_sum(rank, args):
    """A worker of launch: (folder, failing). Writes the number of ranks and a sum over them to the file
    folder/RANK; then the rank `failing` raises.
    """
    folder, failing = args
    total = rank.all_reduce(torch.tensor(rank.rank + 1.0))
    (folder / str(rank.rank)).write_text(f"{rank.world_size} {total.item()}")
    rank.barrier()
    if rank.rank == failing:
        raise UserError(f"rank {failing} cannot go on")


def pretrain(rank, args, real=main_moco.pretrain):
    """As main_moco.pretrain, which is imported with `tiny` known."""
    return real(rank, args)


def failing(rank, args, real=main_moco.pretrain):
    """As main_moco.pretrain, but in its third step the ranks of the variable FAILING raise one of ERRORS."""
    ranks, error = os.environ[FAILING].split(":")

    def fail():
        raise ERRORS[error]

    if str(rank.rank) in ranks:
        at_step(3, fail)
    return real(rank, args)
