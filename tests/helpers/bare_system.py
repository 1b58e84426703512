"""Run a program as on a system without what only Unix has, or only Linux.

    python bare_system.py windows|macos PROGRAM WORD ...

PROGRAM: a file, or the module of `python -m`. What torch and multiprocessing have imported before keeps the
whole system, as theirs is made for it.
"""

import multiprocessing.popen_spawn_posix  # noqa: F401
import multiprocessing.resource_tracker  # noqa: F401
import os
import runpy
import signal
import subprocess  # noqa: F401
import sys
import types

import torch  # noqa: F401
import torchvision  # noqa: F401

LINUX = ["memfd_create", "sched_getaffinity"]
UNIX = ["fork", "forkpty", "setsid", "killpg", "getuid"]
SIGNALS = ["SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGALRM", "pthread_sigmask", "sigtimedwait", "pause"]
MODULES = ["fcntl", "resource", "pwd", "grp", "termios"]

if __name__ == "__main__":
    _, which, program, *words = sys.argv
    for name in LINUX + (UNIX if which == "windows" else []):
        delattr(os, name)
    if which == "windows":
        sys.modules["signal"] = types.ModuleType("signal")
        known = {name: value for name, value in vars(signal).items() if name not in SIGNALS}
        sys.modules["signal"].__dict__.update(known)
        sys.modules.update(dict.fromkeys(MODULES))
    else:
        sys.platform = "darwin"
    sys.argv = [program, *words]
    sys.path.insert(0, os.getcwd())
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
