"""Small and read-only disks for tests, in a forked process that alone sees them."""

import contextlib
import ctypes
import os

import pytest
from forked_program import forked

NEW_MOUNTS, NEW_USERS = 0x00020000, 0x10000000  # CLONE_NEWNS, CLONE_NEWUSER of sched.h
READ_ONLY, REMOUNT, BIND = 1, 32, 4096  # MS_* of sys/mount.h
PRIVATE = 1 << 18 | 1 << 14  # with all that is mounted below
NOT_PERMITTED = 77  # exit code


def mount(path, size):
    """Mount a disk of `size` bytes in memory at the folder `path`. Raises OSError."""
    _call("mount", b"none", os.fsencode(path), b"tmpfs", 0, f"size={size}".encode())


def make_read_only(path):
    """Mount the folder `path` over itself, for reading. A file that is open there stays writable."""
    path = os.fsencode(path)
    _call("mount", path, path, None, BIND, None)
    _call("mount", path, path, None, BIND | REMOUNT | READ_ONLY, None)


def alone(body):
    """Call body() in a forked process whose mounts nobody else sees, as root; skip the test where the system
    does not permit it. An exception in it fails the test.
    """

    def main():
        try:
            _own_mounts()
        except OSError as error:
            print(error)
            os._exit(NOT_PERMITTED)
        body()

    pid, output = forked(main, (1, 2))
    said = output.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == NOT_PERMITTED:
        pytest.skip(f"no mounts of one's own here: {said}")
    assert code == 0, said


def _own_mounts():
    user, group = os.getuid(), os.getgid()
    try:
        _call("unshare", NEW_MOUNTS)
    except OSError:  # not root: as root of a user space of one's own
        _call("unshare", NEW_MOUNTS | NEW_USERS)
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with contextlib.suppress(FileNotFoundError), open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _call("mount", b"none", b"/", None, PRIVATE, None)


def _call(name, *arguments):
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
