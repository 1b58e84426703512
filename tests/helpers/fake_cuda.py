"""A CUDA device that is none: what a program does with it is computed on the CPU, and is refused or recorded
where CUDA would refuse it or make the host wait.

with fake_cuda() as gpu:
    main()

Tensors stay tensors of the CPU. The storage of those that the program puts on the device carries a mark, so
that they and what is computed from them say `cuda:0`. Autograd, optimizers, autocast, GradScaler and
DistributedDataParallel are torch's own, and the numbers are the CPU's.

Not seen: time, memory, launches; whether CUDA has a kernel for a type; what is compiled (torch.compile
changes nothing) or captured; a host that reads what a non_blocking copy brings before that has ended; other
threads; waits inside of libraries; NCCL's order of operations. Streams run at once. A process has one device.
"""

import contextlib
import re
import sys
from collections import Counter, namedtuple
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.utils
from torch.distributed import distributed_c10d
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = f"{Path(__file__).resolve().parent.parent.parent}/"
OURS = re.compile(re.escape(ROOT) + r"(?!.*/site-packages/|tests/helpers/fake_cuda)")  # files of the program
COPIES = ("copy_", "_foreach_copy_")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
# The host needs the value or the shape of the result. The first is item().
WAITS = ("_local_scalar_dense", "_unique2", "bincount", "equal", "masked_select", "nonzero", "unique_dim")
DDP = torch.nn.parallel.distributed.__file__, torch.distributed.utils.__file__

Event = namedtuple("Event", "what file function line")  # the innermost line of the program, or of a test


class Gpu(TorchDispatchMode):
    """Sees all that is computed. Lists and Counters of Events:

    refused: operations on tensors of both devices; on a tensor before its copy in another stream was waited
        for; on tensors of the CPU in the default group if that is to be NCCL's (gloo stands in for it). They
        raise RuntimeError.
    waits: what makes the host wait for the device. copies: those that need no wait.
    overwritten: memory that changed before the host waited for an event behind a copy of it.
    """

    def __init__(self, pin_error):
        super().__init__()
        self.refused, self.waits, self.copies, self.overwritten = [], Counter(), Counter(), []
        self.device, self.pin_error = torch.device("cuda", 0), pin_error
        self.stream = self.default_stream = Stream(self, self.device)
        self.registered = {}  # sizes of pinned memory by address
        self.under_way = []  # (source, what it held, Event) of copies that the host has not waited for
        self.puts_here = False  # whether the function being called makes its tensors on the device

    def wait(self, what):
        self.waits[_event(what)] += 1

    def refuse(self, what):
        self.refused.append(_event(what))
        raise RuntimeError(f"fake CUDA: {what}")

    def copy(self, source, result, non_blocking):
        """Record a copy from one device to the other."""
        what = f"copy to the {'device' if on_device(result) else 'host'}"
        if not non_blocking:
            self.wait(f"{what}, blocking")
        elif not (self.is_pinned(source) or self.is_pinned(result)):
            self.wait(f"{what}, not pinned")
        else:
            self.copies[_event(what)] += 1
            if on_device(result):
                self.under_way.append((source, source.clone(), _event(what)))
                self.stream.copies.append((self.under_way[-1], result))
                _mark(result, "is_late", self.stream is not self.default_stream)

    def ended(self, copies):
        """The host knows that these have ended. Until now their sources may not have changed."""
        self.overwritten += [event for source, held, event in copies if not torch.equal(source, held)]
        self.under_way = [copy for copy in self.under_way if not any(copy is other for other in copies)]

    def is_pinned(self, tensor):
        address = tensor.data_ptr()
        inside = (start <= address < start + size for start, size in self.registered.items())
        return _has(tensor, "is_pinned_here") or any(inside)

    def cudaHostRegister(self, address, size, flags):  # of torch.cuda.cudart()
        if not self.pin_error:
            self.registered[address] = size
        return self.pin_error

    def cudaHostUnregister(self, address):
        del self.registered[address]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        with torch._C.DisableTorchFunction():
            tensors = [tensor for tensor in _tensors((args, kwargs)) if tensor.device.type != "meta"]
            here = [tensor for tensor in tensors if on_device(tensor)]
            if func.namespace == "c10d":
                self._check_group(args, here, tensors)
                return func(*args, **kwargs)
            if here:
                self._check(name, args, here, [] if name in COPIES else tensors)
            out = func(*args, **kwargs)
            if name in COPIES:
                non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
                for to, source in zip(_tensors(args[0]), _tensors(args[1]), strict=True):
                    if on_device(to) != on_device(source):
                        self.copy(source, to, non_blocking)
            elif here or (not tensors and (self.puts_here or _is_bucket(name))):
                _mark(out)
            return out

    def _check(self, name, args, here, tensors):
        if self.stream is self.default_stream and any(_has(tensor, "is_late") for tensor in here):
            self.refuse(f"{name} before the stream waits for the copy of its operand")
        indices = list(_tensors(args[1])) if name in INDEXED and on_device(args[0]) else []
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            self.wait("boolean mask")
        if not all(map(on_device, indices)):
            self.wait("index of the CPU")
        others = [tensor for tensor in tensors if tensor.dim() and not on_device(tensor)]
        if any(all(tensor is not index for index in indices) for tensor in others):
            self.refuse(f"{name} of tensors of both devices")
        if name in WAITS:
            self.wait(name)

    def _check_group(self, args, here, tensors):
        group = dist.ProcessGroup.unbox(next(arg for arg in args if isinstance(arg, torch.ScriptObject)))
        if dist.get_backend(group) == "nccl":
            if len(here) < len(tensors):
                self.refuse("NCCL gets a tensor of the CPU")
        elif here:
            self.wait("gloo gets a tensor of the device")


class Functions(TorchFunctionMode):
    """Sees Python's calls of torch: where a device is named or asked for, and what is not dispatched."""

    def __init__(self, gpu):
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name, first = dict(kwargs or {}), getattr(func, "__name__", ""), args[0] if args else None
        is_here = isinstance(first, torch.Tensor) and on_device(first)
        if is_here and name == "__get__":
            answers = {"device": self.gpu.device, "is_cuda": True, "is_cpu": False}
            return answers.get(func.__self__.__name__, func(*args))
        if name in ("to", "cuda", "cpu"):
            return self._to(name, *args, **kwargs)
        if name == "pin_memory":
            return _mark(first.clone(), "is_pinned_here")
        if is_here and name in ("numpy", "__array__"):
            self.gpu.refuse("a tensor of the device as an array")
        if is_here and name == "tolist":
            self.gpu.wait(name)
        pinned = kwargs.pop("pin_memory", False)
        if (device := kwargs.get("device")) is None or name == "_parse_to":
            out = self._call(any(map(on_device, _tensors((args, kwargs)))), func, args, kwargs)
        else:
            here = _is_cuda(device)
            out = _mark(self._call(here, func, args, kwargs | {"device": _real(device)}), on=here)
            if here and name == "tensor":
                self.gpu.wait("copy to the device, blocking")
        return _mark(out, "is_pinned_here") if pinned else out

    def _to(self, name, tensor, *args, copy=False, **kwargs):
        if name != "to":
            args = (name, *args[1:])
        elif args and isinstance(args[0], torch.Tensor):
            args = ("cuda" if on_device(args[0]) else args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        was, here = on_device(tensor), on_device(tensor) if device is None else _is_cuda(device)
        copy, dtype, layout = copy or was != here, dtype or tensor.dtype, layout or torch.preserve_format
        args = tensor, _real(device or tensor.device), dtype, non_blocking, copy
        out = self._call(was, torch.Tensor.to, args, {"memory_format": layout})
        if was != here:
            _mark(out, on=here)
            _mark(out, "is_pinned_here", was and non_blocking)  # torch allocates it so
            self.gpu.copy(tensor, out, non_blocking)
        return out

    def _call(self, here, func, args, kwargs):
        before, self.gpu.puts_here = self.gpu.puts_here, here
        try:
            return func(*args, **kwargs)
        finally:
            self.gpu.puts_here = before


class Stream:
    """torch.cuda.Stream, and as the copies in one up to a moment torch.cuda.Event."""

    def __init__(self, gpu, device=None):
        self.gpu, self.device, self.copies = gpu, device, []

    def record_event(self):
        event = Stream(self.gpu)
        event.copies, self.copies = self.copies, []
        return event

    def wait_event(self, event):
        for _, result in event.copies:
            _mark(result, "is_late", False)

    def synchronize(self):
        self.gpu.wait("synchronize")
        self.wait_event(self)
        self.gpu.ended([copy for copy, _ in self.copies])


@contextlib.contextmanager
def fake_cuda(devices=1, pin_error=0):
    """In the block, and in processes that are forked there, torch believes in CUDA. Gives the Gpu.

    devices: torch.cuda.device_count(). pin_error: what cudaHostRegister returns; not 0: nothing is pinned.
    """
    gpu, nccl = Gpu(pin_error), None  # the default group, if gloo stands in for NCCL there
    autocast, is_autocast_enabled = torch.autocast, torch.is_autocast_enabled
    get_autocast_dtype, save = torch.get_autocast_dtype, torch.save
    engine, init, backend_of = torch.autograd._engine_run_backward, dist.init_process_group, dist.get_backend
    device_of = distributed_c10d._get_object_coll_device

    def recorded_save(value, *arguments, **options):
        if any(map(on_device, _tensors(value))):
            gpu.wait("torch.save")
        save(value, *arguments, **options)

    def run_backward(*arguments, **options):
        with Functions(gpu):  # which is off in functions that it sees, such as backward()
            return engine(*arguments, **options)

    def init_process_group(backend=None, **options):
        nonlocal nccl
        is_nccl = backend in (None, "nccl")
        init("gloo" if is_nccl else backend, **options)
        nccl = dist.group.WORLD if is_nccl else None

    def get_backend(group=None):
        return "nccl" if nccl is not None and group in (None, nccl) else backend_of(group)

    def device_of_objects(group):  # that all_gather_object and the like send
        return "cuda" if get_backend(group) == "nccl" else device_of(group)

    of_cuda = {
        "is_available": lambda: True,
        "device_count": lambda: devices,
        "set_device": lambda device: setattr(gpu, "device", torch.device(device)),
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device: "fake GPU",
        "get_device_properties": lambda device: SimpleNamespace(uuid=torch.device(device).index),
        "is_bf16_supported": lambda including_emulation: True,
        "max_memory_allocated": lambda device: 0,
        "synchronize": lambda device=None: gpu.wait("synchronize"),
        "current_stream": lambda device=None: gpu.stream,
        "Stream": lambda device=None: Stream(gpu, device),
        "stream": lambda stream: patch.object(gpu, "stream", stream),
        "cudart": lambda: gpu,
    }
    of_torch = {
        "autocast": lambda device_type, *arguments, **options: autocast("cpu", *arguments, **options),
        "is_autocast_enabled": lambda device_type: is_autocast_enabled("cpu"),
        "get_autocast_dtype": lambda device_type: get_autocast_dtype("cpu"),
        "compile": lambda function, **_: function,
        "save": recorded_save,
    }
    of_c10d = {"_get_object_coll_device": device_of_objects, "_abort_process_group": lambda: None}
    with (
        patch.multiple(torch.cuda, **of_cuda),
        patch.multiple(torch, **of_torch),
        patch.multiple(torch.autograd, _engine_run_backward=run_backward),
        patch.multiple(torch.nn.Module, compile=lambda *_, **__: None),
        patch.multiple(torch.Tensor, record_stream=lambda *_: None),
        patch.multiple(dist, init_process_group=init_process_group, get_backend=get_backend),
        patch.multiple(distributed_c10d, **of_c10d),
        gpu,
        Functions(gpu),
    ):
        yield gpu
    gpu.ended(gpu.under_way)


def on_device(tensor):
    """Whether it says that it is on the device."""
    return _has(tensor, "is_on_device")


def _has(tensor, mark):
    return getattr(tensor.untyped_storage(), mark, False)


def _mark(value, mark="is_on_device", on=True):
    for tensor in _tensors(value):
        setattr(tensor.untyped_storage(), mark, on)
    return value


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _is_cuda(device):
    return torch.device(device).type == "cuda"


def _real(device):
    return "cpu" if _is_cuda(device) else device


def _event(what):
    frame = sys._getframe(1)
    while frame.f_back and not (OURS.match(frame.f_code.co_filename) and frame.f_code.co_name[0] != "<"):
        frame = frame.f_back  # also out of comprehensions
    return Event(what, frame.f_code.co_filename.removeprefix(ROOT), frame.f_code.co_name, frame.f_lineno)


def _is_bucket(name):
    """Whether it is DistributedDataParallel's C++ that makes a tensor; its zeros count on the host."""
    frame = sys._getframe(2)  # that called the C++ which calls __torch_dispatch__
    while "/torch/_" in frame.f_code.co_filename:  # such as _dynamo/, which wraps it
        frame = frame.f_back
    return name == "empty" and frame.f_code.co_filename in DDP
