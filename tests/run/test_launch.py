"""Processes: who they are, what they send each other, how they meet, and how they leave when one fails."""

import os
import re
import time
import warnings
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from forked_program import forked
from spawned_ranks import leave_sum
from torch.nn.parallel import DistributedDataParallel

from moco.errors import UserError
from moco.run import launch as module
from moco.run.launch import Rank, code_hash, failure_of, launch


def test_a_process_of_its_own_is_a_world_of_one(capsys):
    rank, network = Rank.alone(), torch.nn.Linear(2, 1)
    assert rank.is_first and rank.world_size == 1 and rank.device.type == "cpu"
    assert rank.broadcast("x") == "x" and rank.all_gather("x") == ["x"]
    assert rank.all_reduce(torch.tensor(3.0)) == 3 and rank.wrap(network) is network
    assert rank.any(True) and not rank.any(False)
    rank.barrier()
    rank.check_same({"a": 1})
    rank.print("said")
    assert capsys.readouterr().out == "said\n"


def exchanged(number, world):
    rank = Rank(number, world, number, world, world, torch.device("cpu"))
    same = {"seed": 3, "moco_k": (20, 24)[number]}
    try:
        rank.check_same(same)
    except UserError as error:
        refused = str(error)
    rank.check_same({"seed": 3})
    total = rank.all_reduce(torch.tensor(number + 1.0)).item()
    wrapped = rank.wrap(torch.nn.Linear(2, 1))
    gathered = rank.broadcast(number), rank.all_gather(number), total, rank.any(number == 1), rank.any(False)
    return gathered, isinstance(wrapped, DistributedDataParallel), refused


def test_ranks_send_each_other_values(run_ranks):
    for gathered, wrapped, refused in run_ranks(2, exchanged):
        assert gathered == (0, [0, 1], 3.0, True, False) and wrapped
        assert refused.startswith(
            "the processes were started differently: moco_k is 20 on rank 0 and 24 on rank 1"
        )


def one_is_slow(number, world, folder):
    """What becomes of values that rank 0 sends late, with a patient group beside the default and without."""
    dist.barrier()
    dist.destroy_process_group()
    store = dist.FileStore(f"{folder}/store", world)
    impatience = timedelta(seconds=0.6)
    dist.init_process_group("gloo", store=store, rank=number, world_size=world, timeout=impatience)
    found = []
    for patient in (dist.new_group(timeout=timedelta(seconds=60)), None):
        rank = Rank(number, world, number, world, world, torch.device("cpu"), patient)
        try:
            for send in (rank.broadcast, lambda _: rank.all_reduce(torch.ones(())).item()):  # noqa: B023
                time.sleep(1 if rank.is_first else 0)
                found.append(send("sent"))
        except RuntimeError as error:
            found.append(str(failure_of(error)[0]))
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/end", rank=number, world_size=world)
    return found


def test_ranks_wait_for_a_slow_one_longer_than_the_default_group_does(run_ranks, tmp_path):
    _, (*late, too_late) = run_ranks(2, one_is_slow, tmp_path)
    assert late == ["sent", 2]
    assert too_late.startswith("another process of the run does not answer")  # negative control


def gradients_of_a_1x1_kernel(number, world):
    """(warnings of a backward pass as compilation makes it, the gradient): of wrap, and without its hook."""
    found = []
    for wrap in (
        Rank(number, world, number, world, world, torch.device("cpu")).wrap,
        DistributedDataParallel,
    ):
        torch.manual_seed(0)
        layer = torch.nn.Conv2d(4, 6, 1)
        layer.weight.register_hook(lambda gradient: gradient.as_strided(gradient.shape, (4, 1, 4, 4)))
        wrapped = wrap(layer)
        outputs = wrapped(torch.randn(2, 4, 3, 3))
        with warnings.catch_warnings(record=True) as caught:
            outputs.square().sum().backward()
        found.append(([str(warning.message) for warning in caught], layer.weight.grad.tolist()))
    return found


def test_gradients_of_1x1_kernels_are_not_warned_about(run_ranks):
    for (silent, gradient), (warned, expected) in run_ranks(2, gradients_of_a_1x1_kernel):
        assert silent == [] and gradient == expected
        assert "strides" in warned[0]  # negative control


def test_loader_workers_are_those_of_the_node(monkeypatch):
    monkeypatch.setattr(module, "available_cores", lambda: 12)
    rank = Rank(5, 8, 1, 4, 4, torch.device("cpu"))
    assert [rank.loader_workers(given) for given in (None, 0, 1, 8, 9)] == [3, 0, 1, 2, 3]


@pytest.mark.parametrize("failing", [0, 1, None])
def test_a_parent_starts_a_process_for_each_gpu_and_raises_what_one_raises(tmp_path, monkeypatch, failing):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    start = partial(torch.multiprocessing.start_processes, start_method="fork")  # spawning takes seconds
    monkeypatch.setattr(torch.multiprocessing, "spawn", start)
    call = partial(launch, leave_sum, (tmp_path, failing), spawn=True, nodes=1, node_rank=0)
    if failing is None:
        call()
    else:
        with pytest.raises(UserError, match=f"^rank {failing} cannot go on$"):
            call()
    assert [(tmp_path / name).read_text() for name in "01"] == ["2 3.0", "2 3.0"]


def with_one_gpu(number, world, uuids, folder, port):
    """The device of a rank that sees one GPU, or why it is refused."""
    dist.barrier()  # neither leaves while the other is still entering
    dist.destroy_process_group()
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=uuids[number])
    os.environ.update(LOCAL_RANK=str(number), LOCAL_WORLD_SIZE=str(world))
    found = []
    try:
        url = f"tcp://127.0.0.1:{port}"
        launch(
            lambda rank, _: found.append(str(rank.device)),
            None,
            nodes=world,
            node_rank=number,
            url=url,
            backend="gloo",
        )
    except UserError as error:
        found.append(str(error))
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/end", rank=number, world_size=world)
    return found


@pytest.mark.parametrize("shared", [False, True])
def test_a_launcher_may_show_each_process_one_gpu_but_no_two_the_same(run_ranks, tmp_path, free_port, shared):
    uuids = ["aa-0", "aa-0" if shared else "bb-1"]
    refused = "ranks 0 and 1 have the same GPU (aa-0); start one process per GPU"
    expected = [refused if shared else "cuda:0"]
    assert run_ranks(2, with_one_gpu, uuids, tmp_path, free_port) == [expected] * 2


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
@pytest.mark.parametrize(
    "ends",
    [None, UserError("wrong"), ValueError("unexpected"), SystemExit(75), KeyboardInterrupt()],
    ids=repr,
)
def test_how_a_rank_leaves_its_group(monkeypatch, backend, ends):
    """NCCL's destroy waits for the other ranks: after what ends this one alone, the group is aborted."""
    calls, reports = [], []

    def worker(rank, args):
        if ends:
            raise ends

    monkeypatch.setattr(module, "_join", lambda *_: Rank.alone())
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroy"))
    abort = lambda: calls.append(f"abort after {len(reports)} reports")  # noqa: E731
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", abort)
    if ends is None:
        module._run(worker, None, "url", None, None, reports.append)
    else:
        with pytest.raises(type(ends)) as error:
            module._run(worker, None, "url", None, None, reports.append)
        assert error.value is ends
    is_error = isinstance(ends, Exception)
    if ends and backend == "nccl":
        assert calls == [f"abort after {int(is_error)} reports"]
    else:
        assert calls == [] if is_error else ["destroy"]
    if is_error:
        failure, is_consequence, text = reports[0]
        assert failure is (ends if isinstance(ends, UserError) else None) and not is_consequence
        assert f"Error: {ends}" in text and "Traceback" in text
    else:
        assert reports == []


def test_failures_of_others_and_of_workers_become_sentences():
    place = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] "
    more = ". This is typically caused by a remote worker hanging or bugs in the application."
    for reason in (
        "Read error [10.77.0.2]:9445: Connection timed out",
        "Read error [::1]:1: No route to host",
    ):
        failure, is_consequence = failure_of(RuntimeError(place + reason + more))
        assert str(failure).startswith(f"another process of the run does not answer ({reason}); ")
        assert is_consequence
    failure, is_consequence = failure_of(RuntimeError("Application timeout caused pair closure"))
    assert "not answer (Application timeout caused" in str(failure) and is_consequence
    failure, is_consequence = failure_of(
        RuntimeError(place + "Connection closed by peer [127.0.0.1]:42" + more)
    )
    assert str(failure) == "another process of the run ended; its message says why" and is_consequence
    assert failure_of(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == (None, False)
    own = UserError("own")
    assert failure_of(own) == (own, False)


def test_a_gpu_without_enough_memory_becomes_a_sentence():
    of_torch = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB of which "
        "1.05 GiB is free. Including non-PyTorch memory, this process has 78.12 GiB memory in use."
    )
    for error, known in (
        (
            torch.OutOfMemoryError(of_torch),
            "GPU 0 has 79.18 GiB, 1.05 GiB free, and 2.00 GiB more were needed",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"), "CUDA error: CUBLAS_.*"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "CUDA error: out of memory"),
    ):
        failure, is_consequence = failure_of(error)
        advice = "lower --batch-size, use --amp or --fast, or end other programs on the GPU .nvidia-smi lists"
        assert re.match(rf"the GPU's memory does not hold a step \({known}\); {advice}", str(failure))
        assert not is_consequence
    assert failure_of(MemoryError("out of memory")) == (None, False)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_meets_nobody_says_so_and_gives_up(rank, free_port, monkeypatch, capsys):
    monkeypatch.setattr(module, "TIMEOUT", 1.0)
    monkeypatch.setattr(module, "SILENCE", 0.2)
    url = f"tcp://127.0.0.1:{free_port}"
    with pytest.raises(UserError, match=f"^rank {rank} could not meet the others at {url} .* check address"):
        module._meet(url, rank, 2, 1, "gloo")
    assert f"rank {rank} of 2 is waiting for the others at {url}\n" in capsys.readouterr().err


def in_one_store(rank, world, folder, attempts):
    """What a rank finds that was left in the store by the attempt before, by attempt."""
    dist.destroy_process_group()
    found, store = [], dist.FileStore(f"{folder}/kept", world)
    module.dist.rendezvous = lambda *_, **__: iter([(store, rank, world)])
    for attempt in range(attempts):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
        module._meet("env://", rank, world, world, "gloo")
        kept = dist.distributed_c10d._get_default_store()
        found.append(kept.check(["left behind"]))
        dist.barrier()
        kept.set("left behind", "x")
        dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/end", rank=rank, world_size=world)
    return found


def test_an_attempt_finds_nothing_of_the_one_before_in_torchruns_store(run_ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "unused")
    monkeypatch.setenv("MASTER_PORT", "0")
    assert run_ranks(2, in_one_store, tmp_path, 3) == [[False] * 3] * 2


def test_a_child_whose_parent_has_ended_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_run", lambda *_, **__: (tmp_path / "ran").touch())

    def main():
        for parent in (1, os.getppid()):
            module._spawned(0, None, None, "url", None, [{}], None, parent)
            print((tmp_path / "ran").exists())

    pid, output = forked(main, (1, 2))
    assert output.read() == "False\nTrue\n" and os.waitpid(pid, 0)[1] == 0


def test_the_hash_of_the_code_sees_every_module_and_program(tmp_path):
    (tmp_path / "moco" / "run").mkdir(parents=True)
    found = []
    for name in ("moco/a.py", "moco/run/b.py", "main_x.py", "moco/run/b.py", "README.md"):
        with open(tmp_path / name, "a") as file:
            file.write("1\n")
        found.append(code_hash(tmp_path / "moco"))
    assert len(set(found)) == 4 and found[-1] == found[-2]
    assert code_hash() == code_hash() != found[0] and re.fullmatch("[0-9a-f]{12}", code_hash())
