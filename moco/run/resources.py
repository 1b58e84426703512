"""What this process may use of the machine: cores, and the memory that it has used."""

import math
import os
import sys
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # not a Unix
    resource = None

CGROUP = Path("/sys/fs/cgroup")  # of a container or a scheduler, version 2


def available_cores(cgroup=CGROUP):
    """Cores that the scheduler's affinity and the cgroup's cpu.max leave to this process, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        cores = min(cores, math.floor(int(quota) / int(period)))
    except (OSError, ValueError):  # no such file, or the quota is "max"
        pass
    return max(1, cores)


def peak_megabytes(device):
    """The peak memory of this process in 10^6 bytes: on its GPU by torch's allocator, else resident. None
    where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
