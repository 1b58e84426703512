"""How many processor cores this process may use, which in a container is often fewer than the machine has."""

import math
import os

from moco.cgroups import CGROUP, groups


def available_cores(cgroup=CGROUP, own=None):
    """Cores that the scheduler lets this process run on and that its control groups pay for; at least 1.

    own: the text of /proc/self/cgroup, which names the groups.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group, version in groups("cpu", cgroup, own):
        cores = min(cores, _quota(group, version))
    return max(1, math.floor(cores))


def _quota(group, version):
    """The limit of one control group in cores, or infinity."""
    try:
        if version == 2:
            quota, period = (group / "cpu.max").read_text().split()[:2]
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # no such file, or the quota is "max"
        return math.inf
