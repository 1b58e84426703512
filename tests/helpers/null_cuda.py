"""main_moco.py on null CUDA: torch's whole host side runs as with GPUs, which compute nothing.

As a script, alone or under torchrun, this is main_moco.py with `patch` in every rank. It needs `environment`,
with the library that `build` makes of null_cuda/*.c.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve()
TORCH = Path(torch.__file__).parent
HEADERS = TORCH.parent / "triton" / "backends" / "nvidia" / "include"
SOURCES = [HERE.parent / "null_cuda" / name for name in ("cuda.c", "nccl.c")]
IMPORTERS = ("c10_cuda", "torch_cuda", "torch_python", "torch_cuda_linalg", "caffe2_nvrtc")
STUBBED = re.compile("(__cuda|cu[A-Z]|cuda[A-Z]|cublas|cudnn|nccl)")
# Without cuBLAS's heuristics, which would be asked for an algorithm, and without torch's kernels in Triton.
SPARED = {"DISABLE_ADDMM_CUDA_LT": "1", "TORCH_DISABLE_NATIVE_JIT": "1"}


def missing():
    """Why null CUDA cannot be built here, or None."""
    if torch.version.cuda is None or not (TORCH / "lib" / "libtorch_cuda.so").exists():
        return "torch is not built for CUDA"
    if not HEADERS.is_dir():
        return "there is no Triton, which has CUDA's headers"
    return next((f"there is no {tool}" for tool in ("gcc", "nm") if shutil.which(tool) is None), None)


def build(folder):
    """Make the library in `folder` and return its path: it has every function of CUDA, cuBLAS, cuDNN and NCCL
    that this torch imports. What the sources do not define does nothing and returns 0.
    """
    libraries = [TORCH / "lib" / f"lib{name}.so" for name in IMPORTERS]
    imported = subprocess.run(["nm", "-Du", *libraries], capture_output=True, text=True, check=True).stdout
    imported += re.sub(r"\b(cu[A-Z]\w+)", r" U \1", (HEADERS.parent / "driver.c").read_text())  # Triton's
    names = sorted({name for name in re.findall(r" U (\w+)", imported) if STUBBED.match(name)})
    stubs = folder / "stubs.c"
    stubs.write_text("".join(f"__attribute__((weak)) int {name}() {{ return 0; }}\n" for name in names))
    major, minor, patch = torch.cuda.nccl.version()[:3]
    library = folder / "libcuda.so.1"  # by this name, the driver's, torch finds it loaded
    options = ["-w", "-O1", "-fPIC", "-shared", f"-Wl,-soname,{library.name}", "-I", HEADERS]
    options += [f"-DNCCL={10000 * major + 100 * minor + patch}", "-o", library]
    subprocess.run(["gcc", *options, *SOURCES, stubs, "-lpthread", "-lrt"], check=True)
    return library


def environment(library, gpus=1, **settings):
    """Variables under which a process has `gpus` GPUs. settings: variables that cuda.c or `patch` read."""
    settings = {name: str(value) for name, value in settings.items()}
    own = {"LD_PRELOAD": str(library), "TRITON_LIBCUDA_PATH": str(library.parent), "NULL_GPUS": str(gpus)}
    return own | SPARED | settings


def patch():
    """Have this process live with kernels that compute nothing.

    NULL_OOM: the rank that runs out of memory in its third step. NULL_DESTROY: a rank that fails destroys its
    process groups, as a negative control, instead of aborting them.
    """
    import tiny  # noqa: F401  (which makes `-a tiny` known)
    from started_runs import at_step

    from moco.errors import DivergedError
    from moco.run.log import Meters

    def check_finite(self, *place, real=Meters.check_finite):
        with contextlib.suppress(DivergedError):  # what nothing has computed may be anything
            real(self, *place)

    Meters.check_finite = check_finite
    torch.backends.cudnn.enabled = False  # which would choose an algorithm
    if "NULL_OOM" in os.environ:
        at_step(3, lambda: torch.empty(1 << 50, device="cuda"), rank=int(os.environ["NULL_OOM"]))
    if "NULL_DESTROY" in os.environ:
        dist.distributed_c10d._abort_process_group = dist.destroy_process_group


if __name__ in ("__main__", "__mp_main__"):  # the second in a spawned rank
    sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent.parent)]
    patch()
if __name__ == "__main__":
    import main_moco
    from moco.errors import run_program

    run_program(main_moco.main, "main_moco.py")
