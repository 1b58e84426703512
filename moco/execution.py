"""How a step is carried out where that departs from the published float32: precision, layout, compilation."""

from dataclasses import dataclass, field

import torch

from moco.encoders import check_bf16_on_cpu
from moco.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Execution:
    """amp: "bf16", "fp16" or None, what encoders compute in (their weights stay float32); channels_last: keep
    images and weights with interleaved channels; compile: compile the encoders. None departs from the
    mathematics: similarities, losses, the queue and the optimizer are float32 with all of them.
    scaler: a GradScaler of the loss, without which gradients vanish in fp16; it does nothing otherwise.
    """

    device: torch.device
    amp: str | None = None
    channels_last: bool = False
    compile: bool = False
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self):
        self.scaler = self.new_scaler()

    def new_scaler(self):
        """Another such scaler."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")

    def check(self):
        """Raise UserError when this device or this installation cannot do it."""
        if self.amp == "fp16" and self.device.type == "cpu":
            raise UserError("--amp fp16 needs a GPU: on a CPU use --amp bf16, or leave it out")
        if self.amp == "bf16" and self.device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
            name = torch.cuda.get_device_name(self.device)
            raise UserError(f"{name} has no bf16; use --amp fp16, or leave it out (with --fast: --amp fp16)")
        if self.compile:
            try:
                torch.compile(torch.sin)(torch.ones(2, device=self.device))
            except Exception as error:  # of a compiler, a linker, a driver, or their absence
                lines = [line for line in str(error).splitlines() if line.strip() and "raised:" not in line]
                reason = (lines or [type(error).__name__])[0][:160]
                raise UserError(
                    f"--compile does not work here ({reason}); it needs a C++ compiler on a CPU (apt install "
                    "g++) and Triton on a GPU; --no-compile goes without"
                ) from error

    def check_network(self, arch, image_size):
        """Raise UserError when it would train the network `arch` on images of this size wrongly."""
        if self.amp == "bf16" and self.device.type == "cpu":
            check_bf16_on_cpu(arch, image_size)

    def prepare(self, *encoders):
        """Change networks in place; the names, shapes and values of their tensors stay."""
        for encoder in encoders:
            if self.channels_last:
                encoder.to(memory_format=torch.channels_last)
            if self.compile:
                encoder.compile()

    def autocast(self):
        """The context of a forward pass."""
        return torch.autocast(self.device.type, DTYPES.get(self.amp), enabled=self.amp is not None)

    def __str__(self):
        chosen = [f"encoders in {self.amp}"] if self.amp else []
        chosen += ["channels_last"] * self.channels_last + ["compiled encoders"] * self.compile
        if self.amp is None and self.device.type == "cuda":
            convolutions = "TF32" if torch.backends.cudnn.allow_tf32 else "float32"
            products = "float32" if torch.get_float32_matmul_precision() == "highest" else "TF32"
            chosen.insert(
                0, f"convolutions in {convolutions}, matrix products in {products} (torch's settings)"
            )
        return "execution: " + (", ".join(chosen) or "float32")


def start_momentum(optimizer):
    """Give a fused SGD with momentum its buffers, all 0, which make the same first step.

    By itself it makes them in its first step, and leaves them unwritten when that one is skipped because fp16
    overflowed (torch/optim/sgd.py, _fused_sgd).
    """
    for group in optimizer.param_groups:
        for weight in group["params"] if group["momentum"] else ():
            if weight.requires_grad:
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)


def execution_of(device, amp, channels_last, compile, fast, bn_splits=1):
    """The Execution that flags ask for; None stands for a flag that was not given. Raises UserError.

    fast: what is fastest on this device for what was not given: on CUDA all of it, in bf16; on a CPU
    channels_last, but not with bn_splits, whose groups are slower to split in that layout unless compiled.
    """
    on_cuda = device.type == "cuda"
    execution = Execution(
        device,
        amp or ("bf16" if fast and on_cuda else None),
        (fast and (on_cuda or bn_splits == 1)) if channels_last is None else channels_last,
        (fast and on_cuda) if compile is None else compile,
    )
    execution.check()
    return execution
