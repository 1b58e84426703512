"""Who a process of a run is, and the little that the processes say to each other.

One process is a world of size 1: nothing outside this module and moco.launch asks whether a run is
distributed.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moco.cores import available_cores
from moco.errors import UserError


@dataclass(frozen=True)
class Process:
    """Who this process is. `host_processes`: how many of the run's processes share this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host_processes: int
    device: torch.device

    @classmethod
    def alone(cls, device):
        """The only process of a run."""
        return cls(0, 1, 0, 1, 1, device)

    @property
    def is_first(self):
        return self.rank == 0

    def say(self, line):
        """Print a line in the first process of the run."""
        if self.is_first:
            print(line)

    @property
    def cores(self):
        """This process's share of the machine's cores."""
        return max(1, available_cores() // self.host_processes)


def wrap(model, process, identical=()):
    """DistributedDataParallel in a world of several processes; either way the model is `.module` of the
    result.

    identical: names of buffers that all processes compute alike, which need not be sent from rank 0 to the
    others before each forward pass as BatchNorm's are.
    """
    if process.world_size == 1:
        return Alone(model)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(identical))
    return DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)


class Alone(nn.Module):
    """The wrapper of a model in a world of one: the names of its tensors start with `module.` as those of
    DDP do.
    """

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **options):
        return self.module(*inputs, **options)


def sum_over_processes(tensor):
    """The sum of a tensor over all processes, on its device; `tensor` itself is changed and returned."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def from_first(value):
    """Rank 0's value of something picklable, on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def everybodys(value):
    """The picklable `value` of every process of the run, by rank."""
    if not dist.is_initialized():
        return [value]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def check_agreement(settings):
    """Raise UserError on every rank when the dict `settings` is not equal on all of them."""
    everyone = everybodys(settings)
    for rank, theirs in enumerate(everyone):
        for name, value in theirs.items():
            if value != everyone[0][name]:
                raise UserError(
                    f"the processes were started differently: {name} is {everyone[0][name]} on rank 0 and "
                    f"{value} on rank {rank}; give all nodes the same flags and code"
                )
