"""Precision, layout and compilation: what they change, what they must not, and where they are refused."""

import itertools
from functools import cache

import pytest
import torch
from command_lines import MOCO, SMALL
from torch import nn

import main_lincls
import main_moco
from moco import losses
from moco.builder import MoCo
from moco.checkpoint import continue_from
from moco.distributed import Process, wrap
from moco.encoders import check_bf16_on_cpu
from moco.errors import UserError
from moco.execution import Execution, execution_of, start_momentum
from moco.seeds import shuffle_order

CPU = torch.device("cpu")


class TwoLayers(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, num_classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


@cache
def curve(splits=4, order_seed=0, init_scale=None, steps=100, **flags):
    """The losses of steps of IFM on noisy prototypes, and the model afterwards."""
    execution = Execution(CPU, **flags)
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale) if init_scale else execution.scaler
    torch.manual_seed(0)
    model = MoCo(TwoLayers, 32, 256, 0.99, 0.2, mlp=True, epsilon=0.1, bn_splits=splits).train()
    execution.prepare(model.encoder_q, model.encoder_k)
    sgd = torch.optim.SGD(model.parameters(), 0.03, 0.9, weight_decay=1e-4, fused=True)
    start_momentum(sgd)
    generator, found = torch.Generator().manual_seed(1), []
    prototypes = torch.randn(64, 3, 16, 16, generator=generator)
    for step in range(steps):
        chosen = prototypes[torch.randint(64, (32,), generator=generator)]
        views = (chosen + 0.5 * torch.randn(chosen.shape, generator=generator) for _ in range(2))
        with execution.autocast():
            loss, *_ = model(
                *views, weights=losses.weights("ifm", 1.0), order=shuffle_order(order_seed, 0, step, 32)
            )
        sgd.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(sgd)
        scaler.update()
        found.append(loss.item())
    return torch.tensor(found), model


def deviation(steps=100, **changes):
    """Mean and largest relative deviation from the loss curve of float32, in its first steps."""
    expected = curve()[0]
    difference = ((curve(**changes)[0] - expected).abs() / expected)[:steps]
    return difference.mean().item(), difference.max().item()


SLOW = pytest.mark.slow  # compiles
COMPILED = pytest.param({"compile": True}, marks=SLOW)
FAST_ON_CUDA = {"amp": "bf16", "channels_last": True, "compile": True}
FAST = pytest.param(FAST_ON_CUDA, marks=SLOW)


@pytest.mark.parametrize("flags", [{"channels_last": True}, COMPILED], ids=str)
def test_layout_and_compilation_keep_the_loss_curve(flags):
    assert deviation(50, **flags)[1] < 1e-5  # later the roundings of some versions of torch have grown


@pytest.mark.parametrize("flags", [{"amp": "bf16"}, {"amp": "fp16"}, FAST], ids=str)
def test_half_precision_follows_the_loss_curve(flags):
    mean, largest = deviation(**flags)
    assert 0 < mean < 0.006 and largest < 0.05


@pytest.mark.parametrize("changes", [{"splits": 2}, {"splits": 1}, {"order_seed": 1}], ids=str)
def test_the_bands_tell_another_training_apart(changes):
    mean, largest = deviation(**changes)
    assert mean > 0.01 and largest > 0.05


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=SLOW)])
def test_what_is_kept_is_float32_under_the_same_names(monkeypatch, backend):
    compiled = []

    def traced(function, **options):
        compiled.append(function)
        return real(function, backend=backend, **options)

    real = torch.compile
    monkeypatch.setattr(torch, "compile", traced)  # "eager" traces as usual and generates no code
    plain, fast = (curve.__wrapped__(steps=2, **flags)[1].state_dict() for flags in ({}, FAST_ON_CUDA))
    assert len(compiled) == 2
    assert plain.keys() == fast.keys()
    assert all(fast[name].dtype == plain[name].dtype for name in plain)
    assert fast["encoder_q.conv2.weight"].is_contiguous(memory_format=torch.channels_last)


def test_what_fast_means_depends_on_the_device():
    assert str(execution_of(CPU, None, None, None, False)) == "execution: float32"
    assert execution_of(CPU, None, None, None, True).channels_last
    assert not execution_of(CPU, None, None, None, True, bn_splits=8).channels_last
    assert not execution_of(CPU, None, False, None, True).channels_last
    assert execution_of(CPU, "bf16", None, None, True).amp == "bf16"


def test_fast_on_cuda_is_all_of_it(monkeypatch):
    monkeypatch.setattr(Execution, "check", lambda self: None)
    execution = execution_of(torch.device("cuda"), None, None, None, True, bn_splits=8)
    assert (execution.amp, execution.channels_last, execution.compile) == ("bf16", True, True)
    assert str(execution) == "execution: encoders in bf16, channels_last, compiled encoders"
    plain = execution_of(torch.device("cuda"), None, None, None, False)
    assert str(plain) == "execution: convolutions in TF32, matrix products in float32 (torch's settings)"


def test_a_scaler_goes_on_where_it_was():
    model, execution = nn.Linear(2, 1), Execution(CPU)
    execution.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    execution.scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    execution.scaler.step(sgd), execution.scaler.update()
    checkpoint = {
        "epoch": 1, "optimizer": sgd.state_dict(), "state_dict": model.state_dict(),
        "scaler": execution.scaler.state_dict(),
    }  # fmt: skip
    fresh = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert continue_from(checkpoint, "x", model, sgd, 2, fresh) == 1
    assert fresh.get_scale() == 16.0
    off = torch.amp.GradScaler("cpu", enabled=False)
    assert continue_from(checkpoint, "x", model, sgd, 2, off) == 1 and off.state_dict() == {}


def test_what_cannot_be_had_is_refused(monkeypatch, cli, folders):
    code, _, errors = cli(main_moco.main, *MOCO, "--amp", "fp16", folders)
    assert code == 2 and "fp16 needs a GPU" in errors and errors.count("\n") == 1

    def no_compiler(function):
        raise RuntimeError("no g++ here\nand a long trace")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(UserError, match=r"--compile does not work here \(no g\+\+ here\); .* --no-compile"):
        execution_of(CPU, None, None, True, False)


def test_bf16_on_a_cpu_is_refused_where_its_gradients_are_wrong(cli, folders):
    code, _, errors = cli(main_moco.main, *MOCO, "--amp", "bf16", folders)
    assert code == 2 and "--image-size 16 leaves a strided convolution of resnet18 a map of 1 x 1" in errors
    for arch in ("resnet18", "shufflenet_v2_x0_5", "regnet_y_400mf"):
        check_bf16_on_cpu(arch, 17)
        with pytest.raises(UserError, match="wrong gradients"):
            check_bf16_on_cpu(arch, 16)


def test_fp16_survives_a_first_step_that_overflows():
    losses, model = curve(amp="fp16", init_scale=2.0**26)
    assert losses.isfinite().all()
    mean = ((losses - curve()[0]).abs() / curve()[0]).mean()
    assert 0 < mean < 0.05
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_momentum_follows_its_weights_into_another_layout():
    """A checkpoint of one layout goes on in the other with the same step."""
    results = []
    for layout, fused in itertools.product((torch.contiguous_format, torch.channels_last), (True, False)):
        torch.manual_seed(0)
        model = nn.Conv2d(4, 6, 3)
        sgd = torch.optim.SGD(model.parameters(), 0.1, 0.9)
        model(torch.randn(2, 4, 8, 8)).square().sum().backward()
        sgd.step()
        checkpoint = {"epoch": 1, "optimizer": sgd.state_dict(), "state_dict": model.state_dict()}
        other = nn.Conv2d(4, 6, 3).to(memory_format=layout)
        sgd = torch.optim.SGD(other.parameters(), 0.1, 0.9, fused=fused)
        continue_from(checkpoint, "x", other, sgd, 2)
        other(torch.ones(2, 4, 8, 8)).sum().backward()
        sgd.step()
        results.append(other.weight.detach().clone())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-6)
    assert (results[0] - checkpoint["state_dict"]["weight"]).abs().max() > 0.1


def test_programs_say_what_they_do_and_take_each_others_checkpoints(folders, tmp_path, cli):
    tiny = ["-a", "tiny"]
    words = [*MOCO, *tiny, "--method", "ifm", "--output-dir", tmp_path, folders]
    fast = ["--fast", "--amp", "bf16"]
    code, output, errors = cli(main_moco.main, *words, "--epochs", "1", *fast)
    assert code == 0, errors
    assert "execution: encoders in bf16, channels_last\n--fast turns on: --channels-last\n" in output
    code, output, errors = cli(main_moco.main, *words, "--epochs", "2", "--resume", "auto")
    assert code == 0, errors
    assert "note: amp was bf16" in output and "execution: float32\n" in output and "--fast" not in output
    path = tmp_path / "checkpoint_0001.pth.tar"
    words = [
        *SMALL,
        *tiny,
        "--lr",
        "1",
        "--epochs",
        "1",
        "--output-dir",
        tmp_path,
        folders,
        "--pretrained",
        path,
    ]
    code, output, errors = cli(main_lincls.main, *words, "--fast")
    assert code == 0, errors
    assert "--fast turns on: --channels-last\n" in output and "Acc@1" in output
    assert cli(main_lincls.main, *words, "--amp", "fp16")[0] == 2


def distributed_losses(rank, world, flags):
    """The losses of five steps of one of several processes under DistributedDataParallel."""
    execution = Execution(CPU, **flags)
    torch.manual_seed(0)
    model = MoCo(TwoLayers, 16, 64, 0.99, 0.2, mlp=True, epsilon=0.1, bn_splits=2).train()
    execution.prepare(model.encoder_q, model.encoder_k)
    wrapped = wrap(model, Process(rank, world, rank, world, world, CPU), ("queue", "queue_ptr"))
    sgd, found = torch.optim.SGD(wrapped.parameters(), 0.03, 0.9, fused=True), []
    for step in range(5):
        generator = torch.Generator().manual_seed(10 * step + rank)
        views = [torch.randn(8, 3, 16, 16, generator=generator) for _ in range(2)]
        order = shuffle_order(0, 0, step, 8 * world)
        loss, *_ = wrapped(*views, weights=losses.weights("ifm", 1.0), order=order)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        found.append(loss.item())
    return found


@SLOW
def test_compiled_encoders_work_under_ddp(run_ranks):
    plain, compiled = (run_ranks(2, distributed_losses, flags) for flags in ({}, {"compile": True}))
    for ours, theirs in zip(compiled, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert plain[0] != pytest.approx(plain[1], rel=1e-3)  # negative control: the ranks have other images
