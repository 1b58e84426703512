"""The versions that a measurement or a run should be repeatable by."""

import platform

import numpy
import PIL
import torch
import torchvision


def versions():
    """Of Python and of each package that the programs need, by name."""
    modules = {"torch": torch, "torchvision": torchvision, "numpy": numpy, "pillow": PIL}
    return {"python": platform.python_version()} | {
        name: str(module.__version__) for name, module in modules.items()
    }
