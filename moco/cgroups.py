"""The control groups (cgroups) of this process, in which a container or a scheduler says what it may use."""

from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def groups(controller, cgroup=CGROUP, own=None):
    """(folder, version) of each group that limits this process in "cpu" or "memory", from its own outwards.

    Each group's limit holds for all inside it. own: the text of /proc/self/cgroup, which names them.
    """
    try:
        text = Path("/proc/self/cgroup").read_text() if own is None else own
    except OSError:  # not Linux
        return
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, version = cgroup, 2
        elif controller in controllers.split(","):
            top, version = cgroup / controller, 1
        else:
            continue
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):
            yield group, version
            if group == top:
                break
