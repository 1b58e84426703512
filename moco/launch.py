"""Starting a program in one or many processes.

There is one way into training whatever the start: the variables that torchrun sets (RANK, WORLD_SIZE,
LOCAL_RANK, LOCAL_WORLD_SIZE) say who a process is. A spawned process gets them from its parent; without
them the world is one process.
"""

import contextlib
import os
import signal
import socket

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from moco.cores import available_cores
from moco.distributed import Process, check_agreement, everybodys
from moco.errors import UserError
from moco.meeting import code_hash, enter_group, peer_loss
from moco.watch import PREEMPTED, SIGNALS, end_without, nothing_to_save
from moco.workers import worker_errors

RENDEZVOUS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")


def launch(worker, arguments, *, nodes=-1, node_rank=-1, url=None, backend=None, spawn=False, gpu=None):
    """Call `worker(process, *arguments)` in every process that belongs to this start of the program.

    nodes, node_rank, url, backend, spawn, gpu: --world-size, --rank, --dist-url, --dist-backend,
    --multiprocessing-distributed and --gpu. `worker` must be importable by name. Raises UserError.
    """
    _check_backend(backend)
    _check_gpu(gpu)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if spawn or nodes != -1 or node_rank != -1 or url not in (None, "env://") or gpu is not None:
            raise UserError(
                "torchrun starts the processes and tells them where they meet: leave out "
                "--multiprocessing-distributed, --world-size, --rank, --dist-url and --gpu"
            )
        end_without(os.getppid())
        return _run(worker, arguments, "env://", backend, None)
    if url == "env://":
        nodes, node_rank = _from_environment(nodes, node_rank)
    nodes = max(nodes, 1)
    if not spawn and nodes == 1:
        return _run(worker, arguments, None, backend, gpu)
    if gpu is not None and spawn:
        raise UserError(
            "--gpu names one GPU and --multiprocessing-distributed uses them all; leave one of them out"
        )
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
    ranks = [
        {"RANK": first + i, "WORLD_SIZE": nodes * local, "LOCAL_RANK": i, "LOCAL_WORLD_SIZE": local}
        for i in range(local)
    ]
    if not spawn or local == 1:
        if not spawn:  # a launcher of the user's own may have said which GPU this process has
            ranks[0].update(
                {name: os.environ[name] for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if name in os.environ}
            )
        os.environ.update({name: str(value) for name, value in ranks[0].items()})
        return _run(worker, arguments, url, backend, gpu)
    return _spawn(worker, arguments, url, backend, ranks)


def _run(worker, arguments, url, backend, gpu):
    try:
        process = _join(url, backend, gpu)  # where no handler of ours would run while it waits for others
        with nothing_to_save(), worker_errors():  # a data worker's death can surface anywhere in the program
            worker(process, *arguments)
    except RuntimeError as error:
        if dist.is_initialized() and (lost := peer_loss(error)):
            raise UserError(lost) from error
        raise
    finally:
        if dist.is_initialized():
            # The worker's DDP objects are gone by now: gloo can hang when the group goes before them.
            dist.destroy_process_group()


def _join(url, backend, gpu):
    """Enter the process group at `url` (None: stay alone) and find this process's device."""
    has_gpu = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0)) if url else 0
    index = gpu if gpu is not None else local_rank
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
        return Process.alone(device)
    missing = [name for name in RENDEZVOUS_VARIABLES if url == "env://" and name not in os.environ]
    if missing:
        raise UserError(
            f"--dist-url env:// needs the variables {', '.join(missing)}; set them or use torchrun"
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = backend or ("nccl" if has_gpu else "gloo")
    enter_group(url, rank, world_size, backend)
    check_agreement({"torch": torch.__version__, "code": code_hash()})
    sharing = everybodys(socket.gethostname()).count(socket.gethostname())
    if device.type == "cpu":
        torch.set_num_threads(max(1, available_cores() // sharing))
    return Process(rank, world_size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), sharing, device)


def _spawn(worker, arguments, url, backend, ranks):
    messages = torch.multiprocessing.get_context("spawn").SimpleQueue()
    context = torch.multiprocessing.spawn(
        _spawned, (worker, arguments, url, backend, ranks, messages), len(ranks), join=False
    )
    try:
        with _signals_passed_on(context.pids()):
            while not context.join():
                pass
    except (
        torch.multiprocessing.ProcessExitedException,
        torch.multiprocessing.ProcessRaisedException,
    ) as error:
        if not messages.empty():
            raise UserError(messages.get()) from error
        if isinstance(error, ProcessRaisedException):
            raise
        if error.exit_code == PREEMPTED:
            raise SystemExit(PREEMPTED) from None
        raise UserError(f"process {error.error_index} died ({error}); the others were ended") from error


@contextlib.contextmanager
def _signals_passed_on(pids):
    """The processes decide what a signal to their parent means."""

    def pass_on(number, _):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _spawned(index, worker, arguments, url, backend, ranks, messages):
    os.environ.update({name: str(value) for name, value in ranks[index].items()})
    end_without(torch.multiprocessing.parent_process().pid)
    try:
        _run(worker, arguments, url, backend, None)
    except UserError as error:
        messages.put(error.sentence)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _from_environment(nodes, node_rank):
    """The number of nodes and this node's place from WORLD_SIZE and RANK, as upstream reads them with env://."""
    for name, value in (("WORLD_SIZE", nodes), ("RANK", node_rank)):
        if value == -1 and name not in os.environ:
            raise UserError(
                f"--dist-url env:// needs the variable {name}; set it, give the flag, or use torchrun"
            )
    return (
        _number("WORLD_SIZE") if nodes == -1 else nodes,
        _number("RANK") if node_rank == -1 else node_rank,
    )


def _number(name):
    try:
        return int(os.environ[name])
    except ValueError:
        raise UserError(f"the variable {name} must be a whole number, not {os.environ[name]!r}") from None


def _check_backend(backend):
    known = ("nccl", "gloo", "mpi", "ucc", "xccl")
    if backend is not None and backend not in known:
        raise UserError(f"--dist-backend {backend} is not known; choose gloo or nccl, or leave it out")
    if backend == "nccl" and not torch.cuda.is_available():
        raise UserError("--dist-backend nccl needs a GPU and there is none; use gloo, or leave the flag out")


def _check_gpu(gpu):
    if gpu is not None and not 0 <= gpu < torch.cuda.device_count():
        raise UserError(f"--gpu {gpu}: this machine has {torch.cuda.device_count()} GPUs, numbered from 0")


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
