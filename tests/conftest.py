"""Run functions in several processes that talk over gloo, forked so that torch is imported only once."""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import traceback

import pytest

os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # read at import; a pool's threads do not survive a fork

import torch
import torch.distributed as dist
from command_lines import MOCO
from made_folders import make_folders
from tiny import TinyEncoder  # noqa: F401  (which makes `-a tiny` known)

from moco.errors import run_program

torch.set_num_threads(1)  # two cores: the ranks of a test are its parallelism

# Fake tensors, also those of compilation, make a machine without a GPU seem to have one, for which the next
# backward pass starts threads; in forks of that process a backward pass then raises.
torch._C._ensureCUDADeviceGuardSet = lambda: None

# A shell starts background commands with Ctrl-C ignored, which their children inherit; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _rank_main(function, rank, world, folder, arguments, results):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        results.put((rank, True, function(rank, world, *arguments)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))


@pytest.fixture
def run_ranks():
    """`run_ranks(world, function, *arguments)`: the results of function(rank, world, *arguments), by rank."""

    def run(world, function, *arguments, timeout=120):
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            ranks = [
                context.Process(target=_rank_main, args=(function, r, world, folder, arguments, results))
                for r in range(world)
            ]
            gathered = {}
            try:
                for process in ranks:
                    process.start()
                for _ in ranks:
                    if not results._reader.poll(timeout):
                        break
                    rank, fine, value = results.get()
                    assert fine, f"rank {rank}:\n{value}"
                    gathered[rank] = value
                for process in ranks:
                    process.join(10)
            finally:
                for process in ranks:
                    if process.is_alive():
                        process.kill()
        assert len(gathered) == world, "a rank did not answer in time"
        return [gathered[r] for r in range(world)]

    return run


@pytest.fixture
def free_port():
    """A TCP port on 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A small data set that nobody may change: 3 classes of 8 training and 3 validation images, 40 x 30."""
    root = tmp_path_factory.mktemp("images")
    make_folders(root)
    return root


@pytest.fixture
def cli(capsys, monkeypatch):
    """`cli(main, *words)`: run a program's main() with a command line; (exit code, output, errors)."""

    def run(main, *words):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
        code = 0
        try:
            run_program(main)
        except SystemExit as end:
            code = end.code
        output, errors = capsys.readouterr()
        return code, output, errors

    return run


@pytest.fixture(scope="session")
def pretrained(folders, tmp_path_factory):
    """Output and folder of a finished IFM pre-training run of two epochs in one process."""
    out = tmp_path_factory.mktemp("run")
    words = [
        *MOCO,
        "--epochs",
        "2",
        "--method",
        "ifm",
        "--bn-splits",
        "2",
        "--keep",
        "2",
        "--output-dir",
        str(out),
        str(folders),
    ]
    from started_runs import Forked  # here, because it imports the program

    with Forked(*words) as run:
        assert run.end(120) == 0, run.output
    return run.output, out
