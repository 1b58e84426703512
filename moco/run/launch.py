"""The processes of a run: how they start, who each one is, and what they send each other.

Every start comes down to the variables that torchrun and others set (RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE): a spawned process gets them from its parent. Without them a process is a world of one.
Nothing outside this module and moco.shuffle asks whether a run is distributed.
"""

import contextlib
import ctypes
import hashlib
import math
import multiprocessing.connection
import os
import platform
import re
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from moco.errors import UserError, escape_output, first_line, say
from moco.run.resources import available_cores
from moco.run.signals import EXIT_CODE, SIGNALS, exit_on_signal, heard

TIMEOUT = 900.0  # seconds until a process that meets nobody gives up
SILENCE = 20.0  # seconds of waiting before it says so
# How long ranks wait for one that is busy, with a cache or a slow disk. That a rank has ended is noticed at
# once, by gloo's connections.
PATIENCE = timedelta(hours=2)
GRACE = 5.0  # seconds that ranks get to end by themselves after one of them failed
PACKAGE = Path(__file__).resolve().parent.parent
MEETING = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what processes need that meet by env://
LAUNCHERS = {  # the variables in which each says which process this is, of how many, and which of its machine
    "the environment": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH, Intel MPI
}


@dataclass(frozen=True)
class Rank:
    """Who this process is, and what it sends the others.

    host_processes: how many of the run's processes share this machine; cpu_group: a group over gloo for all
    that is not on the device, as NCCL ends a run in which one rank keeps the others waiting for ten minutes
    (None: the default group, when that is gloo's).
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host_processes: int
    device: torch.device
    cpu_group: "dist.ProcessGroup | None" = None

    @classmethod
    def alone(cls, device="cpu"):
        """The only process of a run."""
        return cls(0, 1, 0, 1, 1, torch.device(device))

    @property
    def is_first(self):
        return self.rank == 0

    @property
    def cores(self):
        """This process's share of the machine's cores."""
        return max(1, available_cores() // self.host_processes)

    def loader_workers(self, workers):
        """Loader workers of this process for --workers of the node; None: one for each of its cores."""
        return self.cores if workers is None else math.ceil(workers / self.local_world_size)

    def print(self, *lines):
        """Print each of the lines on rank 0 (moco.errors.say)."""
        for line in lines if self.is_first else ():
            say(line)

    def broadcast(self, value):
        """Rank 0's value of something picklable."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]

    def all_gather(self, value):
        """Every rank's value of something picklable, a list by rank."""
        values = [value]
        if self.world_size > 1:
            values *= self.world_size
            dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def any(self, flag):
        """Whether `flag` is true on any rank. No device is waited for."""
        if self.world_size == 1:
            return flag
        found = torch.tensor(flag, dtype=torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.cpu_group)
        return bool(found)

    def all_reduce(self, tensor):
        """The sum of `tensor` over all ranks; the tensor itself is changed and returned."""
        if self.world_size > 1:
            if self.cpu_group is not None:
                self.barrier()  # so that no device waits for a rank that is slow or has failed
            dist.all_reduce(tensor)
        return tensor

    def barrier(self):
        """Wait for all ranks, not for their devices."""
        self.any(False)

    def check_same(self, settings):
        """Raise UserError on all ranks when the dict `settings` is not equal on all of them."""
        everyone = self.all_gather(settings)
        for rank, theirs in enumerate(everyone):
            for name, value in theirs.items():
                if value != everyone[0][name]:
                    raise UserError(
                        f"the processes were started differently: {name} is {everyone[0][name]} on rank 0 "
                        f"and {value} on rank {rank}; give all nodes the same flags and code"
                    )

    def wrap(self, model, identical=()):
        """DistributedDataParallel of `model` on this rank's device; in a world of one the model itself.

        identical: names of buffers that all ranks compute alike, which need not be sent from rank 0 before
        each forward pass as BatchNorm's are.
        """
        if self.world_size == 1:
            return model
        for weight in model.parameters():
            if weight.requires_grad and weight.shape[2:] == (1, 1):
                weight.register_hook(partial(_with_strides, weight.stride()))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(identical))
        self.barrier()  # compilation may have taken others longer than NCCL waits
        return DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)


def _with_strides(strides, gradient):
    """The gradient of a 1x1 kernel with the weight's strides, if they differ in dimensions of size 1 only.

    There they mean nothing, but DistributedDataParallel warns, as in a compiled backward pass, which chooses
    those of channels_last.
    """
    return gradient.as_strided(gradient.shape, strides) if gradient.stride()[:2] == strides[:2] else gradient


def launch(
    worker, args, *, nodes=-1, node_rank=-1, url=None, backend=None, spawn=False, gpu=None, local_rank=None
):
    """Call `worker(rank, args)` in every process that belongs to this start of the program.

    nodes, node_rank, url, backend, spawn, gpu, local_rank: --world-size, --rank, --dist-url, --dist-backend,
    --multiprocessing-distributed, --gpu and --local-rank. `worker` must be importable by name. Raises
    UserError.
    """
    _check_devices(backend, gpu)
    _set_local_rank(local_rank)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if spawn or nodes != -1 or node_rank != -1 or url not in (None, "env://") or gpu is not None:
            raise UserError(
                "torchrun starts the processes and tells them where they meet: leave out "
                "--multiprocessing-distributed, --world-size, --rank, --dist-url and --gpu"
            )
        _stop_with_parent()
        return _run(worker, args, "env://", backend, None)
    if nodes == node_rank == -1 and not (spawn and url == "env://") and _is_one_of_several(spawn, url):
        return _run(worker, args, url or "env://", backend, gpu)
    if url == "env://":
        nodes = _whole_number("WORLD_SIZE") if nodes == -1 else nodes
        node_rank = _whole_number("RANK") if node_rank == -1 else node_rank
    nodes = max(nodes, 1)
    if not spawn and nodes == 1:
        return _run(worker, args, None, backend, gpu)
    if gpu is not None and spawn:
        raise UserError("--gpu names one GPU, --multiprocessing-distributed uses all; leave one of them out")
    if not (0 <= node_rank < nodes or (nodes == 1 and node_rank == -1)):
        raise UserError(
            f"--world-size {nodes} needs --rank between 0 and {nodes - 1} on each node, not {node_rank}"
        )
    if nodes > 1 and url is None:
        raise UserError(
            "several nodes need --dist-url tcp://HOST:PORT with the address of the node of --rank 0"
        )
    url = url or f"tcp://127.0.0.1:{_free_port()}"
    local = max(torch.cuda.device_count(), 1) if spawn else 1
    first = max(node_rank, 0) * local
    variables = [
        {"RANK": first + i, "WORLD_SIZE": nodes * local, "LOCAL_RANK": i, "LOCAL_WORLD_SIZE": local}
        for i in range(local)
    ]
    if local > 1:
        return _spawn(worker, args, url, backend, variables)
    if not spawn:  # a launcher of the user's own may have said which GPU this process has
        given = {name: os.environ[name] for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if name in os.environ}
        variables[0].update(given)
    os.environ.update({name: str(value) for name, value in variables[0].items()})
    return _run(worker, args, url, backend, gpu)


def code_hash(package=PACKAGE):
    """The start of a SHA-256 of all modules in the folder `package` and of the scripts beside it."""
    digest = hashlib.sha256()
    for path in sorted([*package.rglob("*.py"), *package.parent.glob("main_*.py")]):
        digest.update(str(path.relative_to(package.parent)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def failure_of(error):
    """(UserError to report or None, whether it is the consequence of another process's failure).

    error: an exception that ended this process's part of the run. None: unexpected, show its traceback.
    """
    text = str(error)
    if isinstance(error, UserError):
        return error, False
    if isinstance(error, RuntimeError) and re.search("out of memory|STATUS_ALLOC_FAILED", text):
        found = re.search(r"allocate (.*?)\. (GPU \d+) has .* of (.*?) of which (.*?) is free", text)
        memory = "{1} has {2}, {3} free, and {0} more were needed".format(*found.groups()) if found else ""
        return UserError(
            f"the GPU's memory does not hold a step ({memory or first_line(error)}); lower --batch-size, use "
            "--amp or --fast, or end other programs on the GPU (nvidia-smi lists them)"
        ), False
    if re.search("Connection (closed|reset) by peer|ncclRemoteError", text):
        return UserError("another process of the run ended; its message says why"), True
    # gloo, after a wait that took too long
    if found := re.search(
        r"(?:gloo/transport/\S+\] |(?=Application timeout))(.*?)(?:\. This is|$)", text, re.DOTALL
    ):
        return UserError(
            f"another process of the run does not answer ({found[1]}); its node, or the network between, has "
            "failed"
        ), True
    return None, False


def _run(worker, args, url, backend, gpu, report=None):
    """Call the worker as one rank of the group at `url` (None: a world of one), then leave the group.

    report: called with (UserError or None, is a consequence, traceback) before the group is left.
    """
    try:
        rank = _join(url, backend, gpu)  # before our handlers: a signal during the meeting ends the process
        with exit_on_signal():
            worker(rank, args)
    except Exception as error:
        failure, is_consequence = failure_of(error)
        if report:
            report((failure, is_consequence, traceback.format_exc()))
        _leave(error, is_consequence)
        if failure in (None, error):
            raise
        raise failure from error
    except (SystemExit, KeyboardInterrupt) as stop:
        _leave(stop)
        raise
    _leave()


def _leave(error=None, is_consequence=False):
    """Leave the process group. error: what ends this rank, perhaps while the others go on."""
    if not dist.is_initialized():
        return
    if error and dist.get_backend() == "nccl":
        if not is_consequence:
            _wait_for_device(GRACE)
        dist.distributed_c10d._abort_process_group()  # destroying would wait for the other ranks
    elif not isinstance(error, Exception):
        if error:  # DistributedDataParallel, which frames of the traceback hold, goes before its group
            traceback.clear_frames(error.__traceback__)
        dist.destroy_process_group()


def _wait_for_device(seconds):
    """Let the device finish what the others' devices take part in: they would wait for it for ever."""
    with contextlib.suppress(Exception):  # the device itself may have failed
        queued, deadline = torch.cuda.current_stream().record_event(), time.monotonic() + seconds
        while not queued.query() and time.monotonic() < deadline:
            time.sleep(0.01)


def _join(url, backend, gpu):
    """Enter the process group at `url` (None: a world of one); this process's Rank."""
    has_gpu = torch.cuda.is_available()
    local_rank = _whole_number("LOCAL_RANK", 0) if url else 0
    index = gpu if gpu is not None else local_rank
    if gpu is None and torch.cuda.device_count() == 1:
        index = 0  # a launcher may show each process its own GPU alone
    if has_gpu and index >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU of its own (of {torch.cuda.device_count()}); "
            "start one process per GPU"
        )
    device = torch.device("cuda", index) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if url is None:
        torch.set_num_threads(min(torch.get_num_threads(), available_cores()))
        return Rank.alone(device)
    missing = [name for name in MEETING if name not in os.environ]
    if url == "env://" and missing:
        raise UserError(
            f"--dist-url env:// needs the variables {', '.join(missing)}; set them or use torchrun"
        )
    rank, world_size = _whole_number("RANK"), _whole_number("WORLD_SIZE")
    if not 0 <= rank < world_size:
        raise UserError(
            f"the variable RANK must be between 0 and {world_size - 1}, as WORLD_SIZE says, not {rank}"
        )
    local_world_size = _whole_number("LOCAL_WORLD_SIZE", 0)  # 0: not said
    _meet(url, rank, world_size, local_world_size, backend or ("nccl" if has_gpu else "gloo"))
    cpu_group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=PATIENCE)
    found = Rank(rank, world_size, local_rank, local_world_size, 1, device, cpu_group)
    found.check_same({"torch": torch.__version__, "code": code_hash()})
    if has_gpu:
        _check_own_gpu(found)
    here = found.all_gather(socket.gethostname()).count(socket.gethostname())
    found = replace(found, host_processes=here, local_world_size=local_world_size or here)
    if device.type == "cpu":
        torch.set_num_threads(found.cores)
    return found


def _check_own_gpu(rank):
    """Raise UserError on all ranks when two of them have the same GPU, however each process numbers them."""
    gpus = rank.all_gather(str(torch.cuda.get_device_properties(rank.device).uuid))
    for gpu in gpus:
        if gpus.count(gpu) > 1:
            ranks = " and ".join(str(number) for number, other in enumerate(gpus) if other == gpu)
            raise UserError(f"ranks {ranks} have the same GPU ({gpu}); start one process per GPU")


def _meet(url, rank, world_size, local_world_size, backend):
    """Make the default process group, which device tensors go over."""
    place = "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ) if url == "env://" else url
    try:
        with _said_after(SILENCE, f"rank {rank} of {world_size} is waiting for the others at {place}"):
            store, *_ = next(dist.rendezvous(url, rank, world_size, timeout=timedelta(seconds=TIMEOUT)))
            if world_size == local_world_size:
                # torchrun keeps its store when it restarts the ranks, with what the dead ones left there
                store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            patience = PATIENCE if backend == "gloo" else None  # None: the backend's default
            dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=world_size)
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise UserError(
                f"the port of {place} is in use; name another one in --dist-url (torchrun: --master-port)"
            ) from error
        raise UserError(
            f"rank {rank} could not meet the others at {place} ({first_line(error)}); check address, port "
            "and world size"
        ) from error


@contextlib.contextmanager
def _said_after(seconds, line):
    timer = threading.Timer(seconds, say, (line, sys.stderr))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _spawn(worker, args, url, backend, variables):
    if not hasattr(signal, "pthread_sigmask"):  # not a Unix
        raise UserError(
            f"--multiprocessing-distributed does not run on {platform.system()}; leave it out for one "
            "process, or use Linux (on Windows: WSL 2)"
        )
    failures = torch.multiprocessing.get_context("spawn").SimpleQueue()
    arguments = (worker, args, url, backend, variables, failures, os.getpid())
    # Ranks start with signals blocked, until they can report what a signal does to them.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    passed_on = []
    try:
        context = torch.multiprocessing.spawn(_spawned, arguments, len(variables), join=False)
        with _signals_passed_on(context.pids(), passed_on):
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            while context.sentinels:
                ended = multiprocessing.connection.wait(context.sentinels)
                first = [context.sentinels[sentinel] for sentinel in ended]
                context.join(grace_period=GRACE)
    except torch.multiprocessing.ProcessExitedException as error:
        reports = {}
        while not failures.empty():
            index, report = failures.get()
            reports[index] = report
        silent = [index for index in first if context.processes[index].exitcode and index not in reports]
        # what one rank says of another's end comes last, also when the other said nothing
        failure, is_consequence, text = min(
            reports.values(), key=lambda report: report[1], default=(None, True, "")
        )
        if is_consequence and silent:
            code = context.processes[silent[0]].exitcode
            if -code in passed_on:  # before the rank had anything to save
                code = 130 if -code == signal.SIGINT else EXIT_CODE
            if code in (EXIT_CODE, 130):
                raise SystemExit(code) from None
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise UserError(f"rank {silent[0]} died ({how}); the others were ended") from error
        if failure:
            raise failure from None
        print(text, file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def _spawned(index, worker, args, url, backend, variables, failures, parent):
    os.environ.update({name: str(value) for name, value in variables[index].items()})
    escape_output()
    _stop_with_parent()
    if os.getppid() != parent:  # it has ended already
        return
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        _run(worker, args, url, backend, None, report=lambda report: failures.put((index, report)))
    except UserError as error:
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception:
        raise SystemExit(1) from None  # reported


@contextlib.contextmanager
def _signals_passed_on(pids, passed_on):
    """Send signals to the ranks `pids`, which decide what they mean; the list passed_on gets the numbers."""

    def pass_on(number, _):
        passed_on.append(number)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    before = {number: signal.signal(number, pass_on) for number in heard()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_with_parent():
    """Have the kernel send SIGTERM, on which a run saves and stops, when this process's parent dies."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # Linux only
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _set_local_rank(flag):
    """Set the variable LOCAL_RANK, unless it is set, to --local-rank or to what a launcher says."""
    given = os.environ.get("LOCAL_RANK")
    if flag is not None and given not in (None, str(flag)):
        raise UserError(f"--local-rank is {flag} and the variable LOCAL_RANK is {given}; leave the flag out")
    said = [os.environ[local] for *_, local in LAUNCHERS.values() if local in os.environ]
    if flag is not None or said:
        os.environ["LOCAL_RANK"] = said[0] if flag is None else str(flag)


def _is_one_of_several(spawn, url):
    """Whether a launcher that is not torchrun has started several processes, of which this is one.

    Raises UserError when it has, and does not say where they meet, or the flag `spawn` would start more.
    """
    meeting = MEETING if url in (None, "env://") else ("RANK", "WORLD_SIZE")
    for who, (rank, world_size, _) in LAUNCHERS.items():
        if _whole_number(world_size, 1) == 1:
            continue
        if rank not in os.environ:
            if who != "the environment" or "MASTER_ADDR" not in os.environ:  # as in a shell of Slurm's salloc
                continue
            raise UserError(
                "WORLD_SIZE and MASTER_ADDR are set, but not RANK: set it to this process's number, from 0"
            )
        which = f"{who} says that this is process {_whole_number(rank)} of {_whole_number(world_size)}"
        host, alone = "HOST being that of process 0", "for a run of this process alone add --world-size 1"
        if spawn:
            raise UserError(
                f"{which}: if each of them is a node, add --world-size ${world_size} --rank ${rank} "
                f"--dist-url tcp://HOST:29500, {host}; if each has a GPU, leave out "
                f"--multiprocessing-distributed; {alone}"
            )
        if all(name in os.environ for name in meeting):
            return True
        variables = {"RANK": f"${rank}", "WORLD_SIZE": f"${world_size}"}
        variables |= {"MASTER_ADDR": "HOST", "MASTER_PORT": "29500"} if meeting is MEETING else {}
        line = " ".join(f"{name}={value}" for name, value in variables.items() if name not in os.environ)
        of_host = f", {host}" * (meeting is MEETING)
        raise UserError(
            f"{which}, but not all that they need to meet: let each `export {line}` before it starts the "
            f"program{of_host}; {alone}"
        )
    return False


def _whole_number(name, default=None):
    """The whole number in the variable `name`, or the default where it is not set."""
    if name not in os.environ:
        if default is not None:
            return default
        raise UserError(
            f"--dist-url env:// needs the variable {name}; set it, give the flag, or use torchrun"
        )
    try:
        return int(os.environ[name])
    except ValueError:
        raise UserError(f"the variable {name} must be a whole number, not {os.environ[name]!r}") from None


def _check_devices(backend, gpu):
    if backend is not None and backend not in ("nccl", "gloo", "mpi", "ucc", "xccl"):
        raise UserError(f"--dist-backend {backend} is not known; choose gloo or nccl, or leave it out")
    if backend == "nccl" and not torch.cuda.is_available():
        raise UserError("--dist-backend nccl needs a GPU and there is none; use gloo, or leave the flag out")
    if gpu is not None and not 0 <= gpu < torch.cuda.device_count():
        raise UserError(f"--gpu {gpu}: this machine has {torch.cuda.device_count()} GPUs, numbered from 0")


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
