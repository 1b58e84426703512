"""Memory that processes share without giving it a name, and how much memory is free.

It is a memory file (Linux's memfd_create): no path leads to it, so nothing can be left behind in /dev/shm,
also when every process is killed with -9, and the kernel frees it with the last process that has it open.
Nor does the size of /dev/shm limit it, which is 64 MB in most containers; what does is the memory of the
machine and of the control group. Named memory in /dev/shm has neither property, and pages shared by fork
alone do not reach workers that are started by spawn or forkserver, or another rank.
"""

import mmap
import os
import resource
import sys
from multiprocessing.reduction import DupFd

import numpy as np

from moco.cgroups import CGROUP, groups


class SharedMemory:
    """`size` bytes of shared memory as `array`, uint8 (size,), all 0 at first. Raises OSError.

    A child process has it by fork, or as an argument of a process that is spawned; a process that is not a
    child opens it with `attach`. Pages take memory when they are first written.
    """

    def __init__(self, size):
        if not hasattr(os, "memfd_create"):
            raise OSError("this system has no memory files (memfd_create)")
        self._map(os.memfd_create("moco"), size, new=True)

    @classmethod
    def attach(cls, address, size):
        """The memory whose `address` a process of the same user on this machine gave. Raises OSError."""
        memory = cls.__new__(cls)
        memory._map(os.open("/proc/{}/fd/{}".format(*address), os.O_RDWR), size)
        return memory

    @property
    def address(self):
        """What `attach` needs in another process, while this one keeps the memory."""
        return os.getpid(), self._descriptor

    def _map(self, descriptor, size, new=False):
        self._descriptor, self.size = descriptor, size
        if new:
            os.ftruncate(descriptor, size)
        self.array = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)

    def __del__(self):
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def __getstate__(self):
        return DupFd(self._descriptor), self.size  # works only while a process is being started

    def __setstate__(self, state):
        self._map(state[0].detach(), state[1])


def free_memory(cgroup=CGROUP, own=None):
    """Bytes that this process can still take: what the machine has and what its control groups allow.

    own: the text of /proc/self/cgroup, which names the control groups. Files that the kernel keeps in
    memory and would give up count as free.
    """
    if not os.path.exists("/proc/meminfo"):  # not Linux: what is free is not known
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with open("/proc/meminfo") as file:
        known = dict(line.split(":") for line in file)
    free = int(known["MemAvailable"].split()[0]) * 1024
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }
    for group, version in groups("memory", cgroup, own):
        free = min(free, _left_in(group, *names[version], otherwise=free))
    return max(free, 0)


def peak_megabytes(device):
    """The most memory that this process has had, in 10^6 bytes: of its GPU by torch, else of the machine."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _left_in(group, limit, used, reclaimable, otherwise):
    try:
        limit, used = (int((group / name).read_text()) for name in (limit, used))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - used + int(stat.get(reclaimable, 0))
    except (OSError, ValueError):  # no such file, or the limit is "max"
        return otherwise


def in_words(count):
    """Bytes as a person says them: '75.3 KB', '308 MB', '25.3 GB'."""
    size, unit = next((pair for pair in ((1e9, "GB"), (1e6, "MB")) if count >= pair[0]), (1e3, "KB"))
    return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:.0f} {unit}"
