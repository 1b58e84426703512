"""Command lines of small runs, and how tests start them."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = ["-a", "resnet18", "--image-size", "16", "-b", "8", "--workers", "0", "-p", "1", "--seed", "3"]
MOCO = [*SMALL, "--moco-k", "20", "--moco-dim", "8", "--mlp", "--moco-t", "0.2", "--aug-plus", "--cos"]
TINY = [*MOCO, "-a", "tiny", "--method", "ifm", "--epochs", "2", "--keep", "9"]  # in forks: only they know it


def losses_of(output):
    """The loss of every printed step, in the order of printing."""
    return re.findall(r"^Epoch.*?\tLoss (\S+) ", output, re.MULTILINE)


def program(*words, **variables):
    command = [sys.executable, *words] if words[0].endswith(".py") else list(words)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
