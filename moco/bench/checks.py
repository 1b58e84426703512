"""What must hold on a device before it is measured, each compared with another way to compute it.

A check returns two texts: what it compared, and what differs, None if nothing does.
"""

import contextlib
import math
import tempfile
from pathlib import Path

import torch

from moco.batchnorm import SplitBatchNorm2d
from moco.data.device import normalize
from moco.data.pil import photometric
from moco.errors import first_line
from moco.loader import IMAGENET_STD
from moco.progress import Progress
from moco.run.checkpoint import published_names, read, restore, save

TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 2e-2}  # times the largest value of a tensor


def measure(checks):
    """{name: {"verdict": "passed" or "FAILED", "compared": text, "differs": text or None}} of {name: function
    without arguments that makes the check}. One that raises has failed.
    """
    found = {}
    with Progress("checks", len(checks)) as progress:
        for name, check in checks.items():
            try:
                compared, differs = check()
            except Exception as error:  # whatever a compiler or a driver raises, the measurements follow
                compared, differs = "", f"{type(error).__name__}: {first_line(error)}"
            verdict = "FAILED" if differs else "passed"
            found[name] = {"verdict": verdict, "compared": compared, "differs": differs}
            progress.update()
    return found


def pixels(augment, batch):
    """The views of a Batch (moco.data.ring) by `augment`, a DeviceAugment, and by PIL, bit for bit."""
    views, records = torch.cat(augment(batch)).cpu(), batch.records.reshape(-1)
    values, wrong, largest = 0, 0, 0.0
    for view, pixels, record in zip(views, batch.pixels.flatten(0, 1).cpu(), records, strict=True):
        expected = normalize(photometric(pixels, record, augment.recipe.gray_first))
        count = int((view != expected).sum())
        values, wrong = values + count, wrong + bool(count)
        largest = max(largest, float((view - expected).abs().max()) * 255 * IMAGENET_STD[0])  # in levels
    faults = [str(augment)] if "uncompiled" in str(augment) else []
    if wrong:
        faults.append(f"{values} values in {wrong} views differ, by up to {largest:.3g} levels")
    return f"{len(views)} views of {views.shape[-1]} px against PIL's", "; ".join(faults) or None


def resume(training, steps=3):
    """A run that goes on from its checkpoint, and one that never stopped, bit for bit.

    training: a function that starts a run, which is a moco.bench.training.Training.
    """
    with deterministic(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint.pth.tar")
        unbroken, resumed = training(), training()
        unbroken(steps)
        state = {"state_dict": published_names(unbroken.model), "optimizer": unbroken.optimizer.state_dict()}
        save({"epoch": 0, "step": steps, **state}, path)
        unbroken(steps)
        restore(read(path), path, resumed.model, resumed.optimizer, torch.amp.GradScaler(enabled=False), 1)
        resumed(steps)
        one, other = tensors(unbroken), tensors(resumed)
    wrong = [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
    differs = f"{len(wrong)} tensors differ, the first is {wrong[0]}" if wrong else None
    return f"{len(one)} tensors after {steps} + {steps} steps against those after {2 * steps}", differs


def tensors(training):
    """The tensors of a model and its momentum, by name."""
    momentum = {
        f"momentum of {name}": training.optimizer.state[parameter]["momentum_buffer"]
        for name, parameter in training.model.named_parameters()
        if parameter in training.optimizer.state
    }
    return training.model.state_dict() | momentum


@contextlib.contextmanager
def deterministic():
    """Let torch choose algorithms that give the same bits each time, where there are such.

    cuBLAS also needs CUBLAS_WORKSPACE_CONFIG, before it starts.
    """
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def batchnorm(splits, device):
    """BatchNorm over groups on a device, by eager kernels and compiled, against eager in float64 on the CPU:
    outputs, gradients and running statistics. On a CPU it is traced as for a compiler, and none is needed.
    """
    faults = []
    for name_of_dtype, tolerance in TOLERANCE.items():
        dtype = getattr(torch, name_of_dtype)
        expected = batchnorm_tensors(splits, torch.device("cpu"), torch.float64, dtype)
        for form in ("eager", "compiled"):
            found = batchnorm_tensors(splits, device, dtype, dtype, form == "compiled")
            differences = {
                name: float((tensor.cpu() - expected[name]).abs().max() / expected[name].abs().max())
                for name, tensor in found.items()
            }
            worst = max(differences, key=lambda name: (math.isnan(differences[name]), differences[name]))
            if not differences[worst] <= tolerance:  # also when it is nan
                faults.append(f"{form}, {name_of_dtype}: {worst} by {differences[worst]:.2g}")
    limits = ", ".join(f"{name} {tolerance:g}" for name, tolerance in TOLERANCE.items())
    compared = f"eager and compiled against the CPU's, {splits} groups, within {limits}"
    return compared, "; ".join(faults) or None


def batchnorm_tensors(splits, device, dtype, rounded_to, compiled=False):
    """{name: tensor} after one pass forward and backward in `dtype`, of values that are rounded before."""
    torch.manual_seed(0)
    layer = SplitBatchNorm2d(32, splits=splits)
    torch.nn.init.uniform_(layer.weight, 0.5, 2)
    torch.nn.init.normal_(layer.bias)
    layer.to(device, torch.promote_types(dtype, torch.float32))  # as under autocast
    x, grad = (torch.randn(4 * splits, 32, 14, 14).to(rounded_to).to(device, dtype) for _ in range(2))
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    if compiled:
        layer.compile(fullgraph=True, backend="inductor" if x.is_cuda else "eager")
    y = layer(x)
    y.backward(grad)
    return {
        "output": y.detach(),
        "gradient of x": x.grad,
        "gradient of the weight": layer.weight.grad,
        "gradient of the bias": layer.bias.grad,
        "running mean": layer.running_mean,
        "running variance": layer.running_var,
    }
