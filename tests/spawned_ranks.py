"""What spawned processes do in a test. They import this module alone: torchvision would take them seconds."""

import torch
import torch.distributed as dist

from moco.distributed import sum_over_processes
from moco.errors import UserError


def leave_sum(process, folder, failing):
    """A worker of launch that writes the number of ranks and a sum over them to the file `folder`/rank; then
    the rank `failing` raises.
    """
    total = sum_over_processes(torch.tensor(process.rank + 1.0))
    (folder / str(process.rank)).write_text(f"{process.world_size} {total.item()}")
    dist.barrier()
    if process.rank == failing:
        raise UserError(f"rank {failing} cannot go on")
