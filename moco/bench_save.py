"""What saving a checkpoint costs, against writing the same tensors in place without any promise."""

import tempfile
import time

import torch

from moco.bench_report import in_turns, machine, spread
from moco.builder import MoCo
from moco.encoders import base_encoder
from moco.errors import UserError
from moco.execution import start_momentum
from moco.run_folder import RunFolder
from moco.versions import versions

NAMES = {
    "goes_on": "saved as a run does, until its next step",
    "on_disk": "the same, until it is on the disk",
    "in_place": "torch.save over the file",
}


def measure(arch="resnet18", K=65536, rounds=11, folder=None):
    """Time RunFolder.save and torch.save of a run's state on the CPU, in turns. Returns plain values.

    arch, K: of a MoCo with --mlp and keys of 128; folder: on the disk to write to, the system's place for
    temporary files if None; what is written there is removed. Raises UserError.
    """
    if rounds < 1:
        raise UserError(f"--rounds must be at least 1, not {rounds}")
    state = run_state(arch, K)
    try:
        with tempfile.TemporaryDirectory(prefix="moco-bench-", dir=folder) as place:
            run, epochs, sizes = RunFolder(place), iter(range(1, 10**9)), []

            def turn(name):
                checkpoint = {**state, "epoch": next(epochs)}
                start = time.perf_counter()
                if name == "in_place":
                    torch.save(checkpoint, f"{place}/in_place.pth.tar")
                else:
                    path = run.save(checkpoint)
                if name == "on_disk":
                    run.wait()
                seconds = time.perf_counter() - start
                if name != "in_place":
                    run.wait()
                    sizes.append(path.stat().st_size)
                return seconds

            for name in NAMES:
                turn(name)  # from the second on there is an older file, as in a run
            seconds = in_turns(NAMES, rounds, turn, lambda: None)
    except OSError as error:
        raise UserError(f"cannot write to {folder or 'the temporary folder'} ({error})") from error
    return {
        "hardware": machine(torch.device("cpu")),
        "versions": versions(),
        "setting": {"arch": arch, "K": K, "rounds": rounds, "folder": folder},
        "megabytes": round(sizes[-1] / 1e6, 1),
        "seconds": {name: spread(values) for name, values in seconds.items()},
    }


def run_state(arch, K):
    """A checkpoint of a run that has just started, as main_moco.py saves it."""
    model = MoCo(base_encoder(arch), 128, K, mlp=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, 0.9)
    start_momentum(optimizer)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    return {"epoch": 1, "arch": arch, "state_dict": state, "optimizer": optimizer.state_dict(), "step": 0}


def table(report):
    """The report as text of at most 80 columns."""
    hardware = report["hardware"]
    lines = [
        f"{hardware['cpu']}, {hardware['cores']} cores, load {hardware['load_average']}"[:80],
        "{arch} with --mlp, a queue of {K}: {} MB; {rounds} rounds in turns".format(
            report["megabytes"], **report["setting"]
        ),
        "",
        f"{'':56}{'seconds [and quartiles]':>24}",
    ]
    for name, text in NAMES.items():
        value = "{median:.3f} [{low:.3f}, {high:.3f}]".format(**report["seconds"][name])
        lines.append(f"{text:56}{value:>24}")
    limit = 100 * report["seconds"]["goes_on"]["median"]
    lines += ["", f"A run stands still for under 1 % of every epoch longer than {limit:.0f} s."]
    return "\n".join(lines)
