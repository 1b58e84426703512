"""Whole runs on a CUDA device that is none: tensors of two devices never meet, the numbers are the CPU's, and
the host waits for the device only where it must.
"""

import os
import re
import signal
from functools import partial

import pytest
import torch
import torch.distributed as dist
from command_lines import SMALL, TINY, losses_of
from fake_cuda import fake_cuda
from run_files import content
from started_runs import SPAWN, Forked, at_step, run, send

import main_lincls
import main_moco
from moco.data import device

MOCO = [*TINY, "--bn-splits", "2"]
LINEAR = [*SMALL, "-a", "tiny", "--epochs", "2", "--lr", "1", "3"]
THIS = "tests/programs/test_cuda.py"
EXACT = ["--device-aug", "exact"]  # on the CPU what CUDA does by default
SAME_PIXELS = "equal to the CPU's on generated views"  # else something was refused when that was tried

# The places (file, function) where the host waits for the device.
START = {
    *(("main_moco.py", "pretrain"), ("main_lincls.py", "evaluate")),  # models go to the device
    ("moco/evaluate/knn.py", "__init__"),
    *(("moco/data/device.py", name) for name in ("difference", "_normalized_bytes", "_hues_below")),
}
PRINTED = {("moco/run/log.py", name) for name in ("check_finite", "mean", "line", "_plain")}  # steps
EPOCH = {  # with its checkpoint
    *(("moco/run/log.py", "state_dict"), ("moco/run/checkpoint.py", "_copied")),
    *(("moco/run/checkpoint.py", "save"), ("moco/data/ring.py", "_unpin")),
    *(("moco/evaluate/knn.py", name) for name in ("_measure", "_borrow_weights")),
    ("moco/evaluate/features.py", "rankme"),
    *(("moco/evaluate/linear.py", name) for name in ("check_frozen", "mean_losses", "score")),
}
# Before a slot of the ring is written to again: by then its copy has ended, as it was the one of three steps
# ago.
STEP = {("moco/data/ring.py", "_tasks")}


@pytest.fixture(autouse=True)
def no_tables_of_other_tests():
    """Tables that the augmentation has made on a device of that name."""

    def clear():
        for value in vars(device).values():
            getattr(value, "cache_clear", lambda: None)()

    clear()
    yield
    clear()


@pytest.fixture
def on_gpu(cli):
    """`on_gpu(main, *words)`: what was seen of a run in which nothing was refused, and what it printed."""

    def run_program(main, *words):
        with fake_cuda() as gpu:
            code, output, errors = cli(main, *words)
        assert code == 0 and "note: " not in errors, errors
        assert gpu.refused == gpu.overwritten == []
        return gpu, output

    return run_program


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    """The last checkpoint of a pre-training on the CPU."""
    out = tmp_path_factory.mktemp("trained")
    run(*TINY, folders, "--output-dir", out)
    return out / "checkpoint_0001.pth.tar"


def results(output):
    """What a run printed of losses and accuracies, without times."""
    steps = re.findall(r"^(?:Epoch|Test).*?\t(Loss.*)$", output, re.MULTILINE)
    assert steps
    return steps + re.findall(r"^ \* (.*?)(?: \(.* s\))?$", output, re.MULTILINE)


@pytest.mark.parametrize(
    "more",
    [["--knn", "1"], ["--cache", "decoded", "-j", "2"], ["--device-aug", "off"], ["--random-bits", "2"]],
)
def test_pretraining_gives_the_cpus_numbers(on_gpu, cli, folders, tmp_path, more):
    words = [*MOCO, *more, folders, "--output-dir"]
    _, output = on_gpu(main_moco.main, *words, tmp_path / "gpu")
    assert "1 process(es) on cuda" in output and (SAME_PIXELS in output) == ("off" not in more)
    code, of_cpu, _ = cli(main_moco.main, *EXACT, *words, tmp_path / "cpu")
    assert code == 0 and results(output) == results(of_cpu)
    assert content(tmp_path / "gpu") == content(tmp_path / "cpu")


@pytest.mark.parametrize("more", [[], ["--cache", "decoded", "-j", "2"]])
def test_linear_evaluation_gives_the_cpus_numbers_also_when_it_is_continued(
    on_gpu, cli, folders, tmp_path, trained, more
):
    words = [*LINEAR, *more, "--pretrained", trained, folders, "--output-dir"]
    _, first = on_gpu(main_lincls.main, *words, tmp_path / "gpu", "--epochs", "1")
    _, second = on_gpu(main_lincls.main, *words, tmp_path / "gpu", "--resume", "auto")
    assert SAME_PIXELS in first and "process(es) on cuda" in second
    code, of_cpu, _ = cli(main_lincls.main, *EXACT, *words, tmp_path / "cpu")
    assert code == 0 and sorted(results(first) + results(second)) == sorted(results(of_cpu))
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        assert content(tmp_path / "gpu", name) == content(tmp_path / "cpu", name)
    best = ["--evaluate", "--resume", tmp_path / "gpu" / "model_best.pth.tar"]
    _, validated = on_gpu(main_lincls.main, *LINEAR, *best, folders, "--output-dir", tmp_path)
    assert "Acc@1" in validated


@pytest.mark.parametrize("more", [[], ["--fast"], ["--amp", "fp16"]])
def test_a_stopped_run_continues_to_the_same_bits(on_gpu, cli, folders, tmp_path, monkeypatch, more):
    words = [*MOCO, *more, folders, "--output-dir"]
    _, whole = on_gpu(main_moco.main, *words, tmp_path / "whole")
    monkeypatch.setattr(main_moco, "rank_accuracy", main_moco.rank_accuracy)  # to be what it was at the end
    at_step(5, send(signal.SIGUSR1))
    with fake_cuda() as gpu:
        code, first, _ = cli(main_moco.main, *words, tmp_path / "parts")
    assert code == 75 and gpu.refused == []
    _, second = on_gpu(main_moco.main, *words, tmp_path / "parts", "--resume", "auto")
    assert losses_of(first) + losses_of(second) == losses_of(whole) and len(losses_of(second)) == 1
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


@pytest.mark.parametrize("more", [["--amp", "bf16"], ["--amp", "fp16", "--channels-last"]])
def test_low_precision_gives_nearly_the_cpus_losses(on_gpu, cli, folders, tmp_path, more):
    words = [*MOCO, folders, "--output-dir"]
    _, output = on_gpu(main_moco.main, *more, *words, tmp_path / "gpu")
    _, of_cpu, _ = cli(main_moco.main, *EXACT, *words, tmp_path / "cpu")
    losses, float32 = ([float(loss) for loss in losses_of(text)] for text in (output, of_cpu))
    assert losses == pytest.approx(float32, rel=0.02) and losses != float32 and len(losses) == 6


# Waits of the host.


def places(events):
    return {(event.file, event.function) for event in events}


def of_more_steps(on_gpu, main, words, out):
    """The waits and copies by place of six more steps, none of which is printed."""
    (few, _), (many, _) = (
        on_gpu(main, *words, "--print-freq", "1000", "--output-dir", out / size, "--batch-size", size)
        for size in ("8", "4")
    )
    return many.waits - few.waits, many.copies - few.copies


@pytest.mark.parametrize(
    ("more", "copies"),
    [
        ([], 5),  # pixels, targets, parameters of the augmentation, and the shuffled order with its inverse
        (["--amp", "bf16", "--cache", "decoded"], 5),
        (["--fast"], 5),
        (["--device-aug", "off"], 4),
        (["--random-bits", "2"], 6),
    ],
)
def test_a_step_of_pretraining_that_is_not_printed_waits_for_nothing(on_gpu, folders, tmp_path, more, copies):
    waits, pinned = of_more_steps(on_gpu, main_moco.main, [*MOCO, *more, folders], tmp_path)
    assert places(waits) == STEP and sum(pinned.values()) == 6 * copies


def test_in_fp16_it_waits_for_the_scaler_alone(on_gpu, folders, tmp_path):
    waits, _ = of_more_steps(on_gpu, main_moco.main, [*MOCO, "--amp", "fp16", folders], tmp_path)
    assert places(waits) == STEP | {("main_moco.py", "train_one_epoch")} and len(waits) == 2


@pytest.mark.parametrize("more", [[], ["--amp", "bf16", "--device-aug", "off"]])
def test_a_step_of_linear_evaluation_that_is_not_printed_waits_for_nothing(
    on_gpu, folders, tmp_path, trained, more
):
    words = [*LINEAR, *more, "--pretrained", trained, folders]
    waits, pinned = of_more_steps(on_gpu, main_lincls.main, words, tmp_path)
    waits = places(waits) - {("moco/run/checkpoint.py", "save")}  # more often when accuracy rises more often
    assert waits == STEP and sum(pinned.values()) >= 6 * (2 if more else 3)


def waiting(ranks):
    bool((ranks > 1).any())
    ranks[ranks > 1]  # noqa: B018
    ranks.to("cpu")
    torch.tensor([3], device=ranks.device)
    torch.ones(3).to(ranks.device)
    torch.ones(3).to(ranks.device, non_blocking=True)
    torch.cuda.synchronize()


def test_waits_in_a_step_are_noticed(on_gpu, folders, tmp_path, monkeypatch):
    real = main_moco.rank_accuracy
    monkeypatch.setattr(main_moco, "rank_accuracy", lambda ranks: (waiting(ranks), real(ranks))[1])
    waits, _ = of_more_steps(on_gpu, main_moco.main, [*MOCO, folders], tmp_path)
    assert places(waits) == STEP | {(THIS, "waiting")}
    first = waiting.__code__.co_firstlineno + 1
    assert {event.line for event in waits if event.file == THIS} == set(range(first, first + 7))
    assert {count for event, count in waits.items() if event.file == THIS} == {6}


def unexpected(on_gpu, main, words, out):
    """Places outside of the lists above, by when the host waits there: (in a printed step, elsewhere)."""

    def waits(*more):
        return on_gpu(main, *words, "--overwrite", "--output-dir", out, *more)[0].waits

    few, printed, longer = waits("-p", "1000"), waits("-p", "1"), waits("-p", "1000", "--epochs", "3")
    assert places(printed - few) and places(longer - few)
    in_epochs = places(longer - few) - (PRINTED | EPOCH | STEP)
    return places(printed - few) - PRINTED, in_epochs | places(few) - (START | PRINTED | EPOCH | STEP)


def test_the_host_waits_at_the_start_in_printed_steps_and_after_epochs(
    on_gpu, folders, tmp_path, monkeypatch
):
    words = [*MOCO, "--knn", "1", folders]
    assert unexpected(on_gpu, main_moco.main, words, tmp_path) == (set(), set())

    def in_printed_steps(q, k, mean_key):
        bool(q.isfinite().all())
        return {}

    def in_epochs(optimizer, epoch, args):
        torch.cuda.synchronize()

    monkeypatch.setattr(main_moco, "similarities", in_printed_steps)
    monkeypatch.setattr(main_moco, "set_learning_rate", in_epochs)
    noticed = {(THIS, "in_printed_steps")}, {(THIS, "in_printed_steps"), (THIS, "in_epochs")}
    assert unexpected(on_gpu, main_moco.main, words, tmp_path) == noticed


def test_so_does_linear_evaluation(on_gpu, folders, tmp_path, trained):
    words = [*LINEAR, "--pretrained", trained, folders]
    assert unexpected(on_gpu, main_lincls.main, words, tmp_path) == (set(), set())


def test_a_step_on_tensors_of_two_devices_ends_a_run(on_gpu, folders, tmp_path, monkeypatch):
    """Negative control."""
    monkeypatch.setattr(main_moco, "rank_accuracy", lambda ranks: [ranks + torch.ones(len(ranks))])
    with pytest.raises(RuntimeError, match="fake CUDA: add of tensors of both devices"):
        on_gpu(main_moco.main, *MOCO, folders, "--output-dir", tmp_path)


# Two ranks, whose default group takes tensors of the device alone, as NCCL's.


def two_ranks(*words, main=main_moco.main, prepare=lambda: None):
    """(exit code, output) of a run of two ranks, each with a device of its own."""

    def start():
        torch.multiprocessing.spawn = partial(torch.multiprocessing.start_processes, start_method="fork")
        prepare()
        with fake_cuda(devices=2):
            main()

    with Forked(*SPAWN, *words, main=start) as program:
        return program.end(60), program.output


@pytest.mark.parametrize("more", [["--knn", "1"], ["--cache", "decoded", "--amp", "bf16", "-j", "2"]])
def test_nccl_gets_tensors_of_the_device_alone_in_pretraining(folders, tmp_path, more):
    words = [*MOCO, *more, folders, "--output-dir"]
    code, output = two_ranks(*words, tmp_path / "gpu")
    assert code == 0 and SAME_PIXELS in output, output
    if "--amp" not in more:
        assert results(output) == results(run(*words, tmp_path / "cpu", *EXACT, world=2))
        assert content(tmp_path / "gpu") == content(tmp_path / "cpu")


def test_nccl_gets_tensors_of_the_device_alone_in_linear_evaluation(folders, tmp_path, trained):
    words = [*LINEAR, "--pretrained", trained, folders, "--output-dir", tmp_path]
    code, output = two_ranks(*words, main=main_lincls.main)
    assert code == 0 and SAME_PIXELS in output and "best Acc@1" in output, output


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_reduced_tensor_of_the_cpu_is_refused(folders, tmp_path, device):
    """Negative control."""

    def prepare():
        at_step(2, lambda: dist.all_reduce(torch.ones(1, device=device)))

    code, output = two_ranks(*MOCO, folders, "--output-dir", tmp_path, prepare=prepare)
    assert code == (device == "cpu") and ("NCCL gets a tensor of the CPU" in output) == (device == "cpu")


# What the stand-in refuses and sees.

MIXES = [
    lambda here, there: here + there,
    lambda here, there: here @ there,
    lambda here, there: torch.cat([here, there]),
    lambda here, there: torch.where(here > 0, here, there),
    lambda here, there: here.index_copy_(0, there.long(), here * 1),
    lambda here, there: torch.nn.functional.linear(there[None], here[None]),
    lambda here, there: torch._foreach_add_([here], [there]),
    lambda here, there: (here.clone().requires_grad_() * here).backward(there),
]


@pytest.mark.parametrize("mix", MIXES)
def test_operations_on_tensors_of_two_devices_are_refused(mix):
    with fake_cuda() as gpu:
        here, there = torch.ones(3, device="cuda"), torch.ones(3)
        mix(here, here.clone())
        mix(there, there.clone())
        assert gpu.refused == []
        with pytest.raises(RuntimeError, match="of tensors of both devices"):
            mix(here, there)
        with pytest.raises(RuntimeError, match="of tensors of both devices"):
            mix(there, here)
    assert len(gpu.refused) == 2 and {event.file for event in gpu.refused} == {THIS}


def test_numbers_and_what_is_moved_may_meet_tensors_of_the_device():
    with fake_cuda():
        here, there = torch.ones(3, device="cuda:0"), torch.ones(3)
        made = [
            here * 2 + torch.tensor(1.0),
            torch.zeros_like(here),
            here.new_zeros(3),
            there.to(here),
            there.cuda(),
        ]
        made += [torch.rand(3, device=here.device), torch.full((3,), 1, device=torch.device("cuda"))]
        assert all(tensor.device == torch.device("cuda", 0) and tensor.is_cuda for tensor in made)
        sums = [torch.stack(made).sum().cpu(), torch.empty_like(here, device="cpu"), there + here.cpu()]
        assert not any(tensor.is_cuda for tensor in sums)
        with pytest.raises(RuntimeError, match="as an array"):
            here.numpy()
    assert not torch.cuda.is_available() or torch.ones(3, device="cuda").is_cuda  # all is as it was


def test_a_backward_pass_stays_on_the_device():
    class Halves(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 0.5, x * 0.5

        @staticmethod
        def backward(ctx, used, unused):
            assert used.is_cuda and unused.is_cuda  # which autograd has made
            return torch.ones(3, device=used.device) * (used + unused)

    with fake_cuda() as gpu:
        x = torch.ones(3, device="cuda", requires_grad=True)
        Halves.apply(x)[0].sum().backward()
        assert x.grad.is_cuda
    assert gpu.refused == [] and gpu.waits == {}


@pytest.mark.parametrize(
    ("what", "function"),
    [
        ("_local_scalar_dense", lambda here: here[0].item()),
        ("_local_scalar_dense", lambda here: bool(here.sum() > 0)),
        ("_local_scalar_dense", lambda here: f"{here[0]:.1f}"),
        ("tolist", lambda here: here.tolist()),
        ("nonzero", lambda here: here.nonzero()),
        ("equal", lambda here: torch.equal(here, here)),
        ("_unique2", lambda here: here.unique()),
        ("bincount", lambda here: torch.bincount(here.long())),
        ("boolean mask", lambda here: here[here > 0]),
        ("index of the CPU", lambda here: here[torch.tensor([0])]),
        ("copy to the host, blocking", lambda here: here.cpu()),
        ("copy to the host, blocking", lambda here: torch.empty(3).copy_(here)),
        ("copy to the host, not pinned", lambda here: torch.empty(3).copy_(here, non_blocking=True)),
        ("copy to the device, blocking", lambda here: here.copy_(torch.ones(3).pin_memory())),
        ("copy to the device, not pinned", lambda here: torch.ones(3).cuda(non_blocking=True)),
        ("copy to the device, blocking", lambda here: torch.tensor([1.0], device="cuda")),
        ("torch.save", lambda here: torch.save({"a": [here]}, os.devnull)),
        ("synchronize", lambda here: torch.cuda.synchronize()),
        ("synchronize", lambda here: torch.cuda.current_stream().record_event().synchronize()),
    ],
)
def test_a_wait_is_seen(what, function):
    with fake_cuda() as gpu:
        function(torch.ones(3, device="cuda"))
    assert [(event[:2], count) for event, count in gpu.waits.items()] == [((what, THIS), 1)]


def test_copies_that_need_no_wait_are_seen():
    with fake_cuda() as gpu:
        here = torch.ones(3).pin_memory().to("cuda", non_blocking=True)
        here.to("cpu", non_blocking=True)
        torch.empty(3, pin_memory=True).copy_(here, non_blocking=True)
    assert gpu.waits == {} and sum(gpu.copies.values()) == 3


@pytest.mark.parametrize("late", [True, False])
def test_a_copy_in_another_stream_is_to_be_waited_for(late):
    with fake_cuda() as gpu:
        source, stream = torch.ones(3).pin_memory(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            copy = source.to("cuda", non_blocking=True)
            event = stream.record_event()
        if late:
            with pytest.raises(RuntimeError, match="before the stream waits"):
                copy + 1
        torch.cuda.current_stream().wait_event(event)
        copy + 1
        if not late:
            event.synchronize()
        source.zero_()
    assert len(gpu.overwritten) == len(gpu.refused) == late
