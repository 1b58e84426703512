"""Checkpoint files: written whole, read without running code, found again, refused for other models."""

import ctypes
import errno
import itertools
import os
import pickle
import random
import re
import signal
import threading
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from forked_program import forked
from run_files import damage
from tiny import TinyEncoder
from torch import nn

import main_moco
from moco import files
from moco.builder import MoCo
from moco.errors import UserError
from moco.lock import LOCK
from moco.run.backbone import encoder_state
from moco.run.checkpoint import (
    Checkpoints,
    LinearCheckpoints,
    check_arch,
    check_compatible,
    load_strictly,
    read,
    restore,
    save,
)
from moco.run.launch import Rank

OFF = torch.amp.GradScaler("cpu", enabled=False)
NAME = "checkpoint_0000.pth.tar"


def upstream_layout(mlp=True):
    torch.manual_seed(0)
    model = MoCo(TinyEncoder, 4, 8, mlp=mlp)
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    return {"epoch": 200, "arch": "tiny", "state_dict": state, "optimizer": sgd.state_dict()}, model


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("mlp", [True, False])
@pytest.mark.parametrize("prefix", ["module.", "", "module._orig_mod."])
def test_upstream_files_are_read(tmp_path, zipped, mlp, prefix):
    checkpoint, model = upstream_layout(mlp)
    checkpoint["state_dict"] = {
        name.replace("module.", prefix, 1): tensor for name, tensor in checkpoint["state_dict"].items()
    }
    path = tmp_path / NAME
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    loaded = read(path)
    assert loaded["epoch"] == 200
    fresh = MoCo(TinyEncoder, 4, 8, mlp=mlp)
    assert not equal(fresh.state_dict(), model.state_dict())  # negative control
    load_strictly(fresh, loaded["state_dict"], path)
    assert equal(fresh.state_dict(), model.state_dict())
    backbone, _ = encoder_state(loaded, path, TinyEncoder(4), "tiny")
    assert sorted(backbone) == sorted(name for name in TinyEncoder(4).state_dict() if name[:3] != "fc.")
    assert torch.equal(backbone["conv.weight"], model.encoder_q.conv.weight)


def test_our_files_load_by_upstreams_rule(tmp_path):
    """How MoCo's linear evaluation takes the encoder out of a checkpoint, written out."""
    checkpoint, model = upstream_layout()
    save(checkpoint, tmp_path / NAME)
    assert os.listdir(tmp_path) == [NAME]
    taken = {}
    for name, tensor in torch.load(tmp_path / NAME, weights_only=True)["state_dict"].items():
        if name.startswith("module.encoder_q") and not name.startswith("module.encoder_q.fc"):
            taken[name[len("module.encoder_q.") :]] = tensor
    fresh = TinyEncoder(10)
    message = fresh.load_state_dict(taken, strict=False)
    assert set(message.missing_keys) == {"fc.weight", "fc.bias"} and not message.unexpected_keys
    assert torch.equal(fresh.conv.weight, model.encoder_q.conv.weight)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(folders, tmp_path, cli, zipped):
    path, sprung = tmp_path / "trap.pth.tar", tmp_path / "sprung"
    torch.save({**upstream_layout()[0], "extra": Trap(sprung)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="could run code; refused"):
        read(path)
    words = ["-a", "tiny", "--image-size", "16", folders, "--output-dir", tmp_path, "--resume", path]
    code, output, errors = cli(main_moco.main, *words)
    assert code == 2 and errors.count("\n") == 1 and "could run code; refused" in errors and output == ""
    assert not sprung.exists()
    torch.load(path, weights_only=False)  # the trap is a real one
    assert sprung.exists()


def peak_of(read, path):
    """Megabytes by which the memory of a process grows at most while it reads the file, and what was said."""

    def peak():
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    def main():
        ctypes.CDLL(None).malloc_trim(0)  # what earlier tests left free is not there to be used unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on: proc(5)
        before = peak()
        try:
            read(path)
        except UserError as error:
            print(error)
        print(peak() - before)

    pid, output = forked(main, (1, 2))
    *said, megabytes = output.read().splitlines()
    assert os.waitpid(pid, 0)[1] == 0
    return float(megabytes), "\n".join(said)


def test_a_small_file_that_would_unpack_to_a_large_one_takes_no_memory(tmp_path):
    plain, bomb = tmp_path / "plain", tmp_path / "bomb.pth.tar"
    with torch.serialization.skip_data():  # 64 MiB, of which nothing is written
        torch.save({"state_dict": {"x": torch.empty(1 << 24)}}, plain)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target,
    ):
        for name in source.namelist():
            target.writestr(name, bytes(1 << 26) if name.endswith("data/0") else source.read(name))
    assert bomb.stat().st_size < 1_000_000
    megabytes, said = peak_of(read, bomb)
    assert "zip bomb" in said and megabytes < 20
    megabytes, _ = peak_of(lambda path: torch.load(path, weights_only=True), bomb)
    assert megabytes > 60  # negative control: torch unpacks it


@pytest.mark.parametrize("entry", ["state_dict", "optimizer"])
def test_a_tensor_that_says_it_is_larger_than_its_file_is_refused(tmp_path, entry):
    """One number that stands for 10^12 of them."""
    checkpoint, model = upstream_layout()
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sum(p.sum() for p in model.parameters() if p.requires_grad).backward()
    sgd.step()
    checkpoint["optimizer"] = sgd.state_dict()
    save(checkpoint, tmp_path / NAME)
    assert restore(read(tmp_path / NAME), "x", model, sgd, OFF, 201) == (200, 0)  # negative control
    huge = torch.zeros(1, dtype=torch.float64).expand(10**12)
    if entry == "state_dict":
        checkpoint[entry]["module.queue"] = huge
    else:
        checkpoint[entry]["state"][0]["momentum_buffer"] = huge
    torch.save(checkpoint, tmp_path / NAME)
    said = {"state_dict": "does not fit this model", "optimizer": "the optimizer state in"}[entry]
    with pytest.raises(UserError, match=said):
        restore(read(tmp_path / NAME), "x", model, sgd, OFF, 201)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>Quota exceeded</html>", "is a web page"),
        (b"just text", "not a checkpoint"),
        (pickle.dumps([1, 2], protocol=2), "is a pickle, but not of torch.save"),
        (torch.zeros(1), "holds no state_dict, .*: it has a Tensor$"),
        ({0: torch.zeros(1)}, "holds no state_dict, .*: it has 0$"),
        ({"state_dict": {"x": 1}, "epoch": 3}, "holds no state_dict, .*: it has state_dict, epoch$"),
        ({"a": {"models": [{"x": torch.zeros(1)}] * 2}}, "but its a.models is a list of 2: write the one"),
        ([{"x": torch.zeros(1)}], "but it is a list of 1: write the one"),
        ({"state_dict": {}}, "holds no state_dict"),
        (nn.Linear(1, 1), "could run code"),
        ("TorchScript", "is a TorchScript program"),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_what_is_no_checkpoint_is_said(tmp_path, content, message):
    path = tmp_path / "file.pth.tar"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "TorchScript":
        torch.jit.script(nn.Identity()).save(path)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=message) as error:
        read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert "safe_globals" not in str(error.value)  # torch's advice, which is for programmers


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint at"):
        read(tmp_path / "missing")
    with pytest.raises(UserError, match="cannot write the checkpoint .* choose another --output-dir"):
        save({}, tmp_path / "missing" / NAME)


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_truncated_file_is_said(tmp_path, keep):
    path = tmp_path / NAME
    save(upstream_layout()[0], path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(UserError, match="damaged"):
        read(path)


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path):
    path, chance = tmp_path / NAME, random.Random(0)
    torch.manual_seed(0)
    checkpoint = {"state_dict": {"x": torch.randn(40, 40), "y": torch.randn(20)}, "epoch": 200, "lr": 0.25}
    save(checkpoint, path)
    whole, loaded = path.read_bytes(), read(path)

    def same(other):
        return equal(other["state_dict"], loaded["state_dict"]) and (other["epoch"], other["lr"]) == (
            200,
            0.25,
        )

    found, unnoticed_by_torch = 0, 0
    for bit in chance.sample(range(8 * len(whole)), 400):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            assert same(read(path)), f"bit {bit}"
        except UserError:
            found += 1
        try:
            unnoticed_by_torch += not same(torch.load(path, weights_only=True))
        except Exception:
            continue
    assert found > 250 and unnoticed_by_torch > 200  # negative control


def test_other_models_are_told_apart(tmp_path):
    path = tmp_path / NAME
    save(upstream_layout()[0], path)
    loaded = read(path)
    for other, message in (
        (MoCo(TinyEncoder, 4, 16, mlp=True), r"shapes differ: queue is \(4, 8\) there and \(4, 16\) here"),
        (MoCo(TinyEncoder, 4, 8), "missing: encoder_k.fc.bias.*unexpected: encoder_k.fc.0.bias"),
        (MoCo(TinyEncoder, 6, 8, mlp=True), "shapes differ: .*encoder_q.fc.2.weight is"),
    ):
        with pytest.raises(UserError, match=f"does not fit this model .*{message}"):
            load_strictly(other, loaded["state_dict"], path)
    with pytest.raises(UserError, match="is of -a tiny, not of -a resnet50"):
        check_arch(loaded, "resnet50", path)
    with pytest.raises(UserError, match="does not fit tiny, of whose backbone it holds no tensor"):
        encoder_state({"state_dict": {"fc.weight": torch.zeros(1)}}, path, TinyEncoder(4), "tiny")
    bits = {name: t.repeat(1, 2, 1, 1) if t.ndim == 4 else t for name, t in loaded["state_dict"].items()}
    for settings, message in (({"random_bits": 3}, "--random-bits"), ({}, r"is \(8, 6, 3, 3\) there")):
        checkpoint = {**loaded, "state_dict": bits, "settings": settings}
        with pytest.raises(UserError, match=message):
            encoder_state(checkpoint, path, TinyEncoder(4), "tiny")


def test_what_cannot_be_continued_is_said():
    checkpoint, model = upstream_layout()
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for change in ({"epoch": "a"}, {"step": 1.5}, {"optimizer": None}):
        with pytest.raises(UserError, match="x has no optimizer state"):
            restore({**checkpoint, **change}, "x", model, sgd, OFF, 201)
    checkpoint["state_dict"] = model.state_dict()
    with pytest.raises(UserError, match="has finished 200 epochs; raise --epochs"):
        restore(checkpoint, "x", model, sgd, OFF, 200)
    for broken in ({}, {"state": {}, "param_groups": [{"params": [0], "lr": 1}]}, {"param_groups": 5}):
        with pytest.raises(UserError, match="the optimizer state in x is of another model"):
            restore({**checkpoint, "optimizer": broken}, "x", model, sgd, OFF, 201)
    data, alone = {"images": 30, "global_batch": 8}, Rank.alone()
    check_compatible({"step": 3}, "x", data, {"seed": 0}, alone)
    with pytest.raises(UserError, match="x is not of this program: 4 steps of an epoch of 3 are finished"):
        check_compatible({"step": 4}, "x", data, {"seed": 0}, alone)


def test_momentum_follows_its_weights_into_another_memory_format():
    """A checkpoint of one format is continued in the other with the same step."""
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
        restore(checkpoint, "x", other, sgd, OFF, 2)
        other(torch.ones(2, 4, 8, 8)).sum().backward()
        sgd.step()
        results.append(other.weight.detach().clone())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-6)
    assert (results[0] - checkpoint["state_dict"]["weight"]).abs().max() > 0.1


def test_a_scaler_continues_where_it_was():
    model, scaler = nn.Linear(2, 1), torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    scaler.step(sgd), scaler.update()
    checkpoint = {"epoch": 1, "optimizer": sgd.state_dict(), "state_dict": model.state_dict()}
    checkpoint["scaler"] = scaler.state_dict()
    fresh = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert restore(checkpoint, "x", model, sgd, fresh, 2) == (1, 0) and fresh.get_scale() == 16.0
    assert restore(checkpoint, "x", model, sgd, OFF, 2) == (1, 0) and OFF.state_dict() == {}


def saved(folder, *places, keep=1, save_freq=0, after=lambda: None):
    """Checkpoints(folder) that has saved a small model after each place (finished epochs, steps)."""
    model = nn.ModuleDict({"encoder_q": nn.Linear(2, 1)})
    checkpoints = Checkpoints(folder, Rank.alone(), keep, save_freq)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    for epoch, step in places:
        checkpoints.save(model, sgd, OFF, epoch=epoch, step=step)
        checkpoints.wait()
        after()
    return checkpoints


def test_files_that_stay(tmp_path):
    others, names = {"checkpoint.pth.tar", "checkpoint_1.txt", "log.jsonl"}, []
    for name in others:
        (tmp_path / name).write_text("")
    places = [place for epoch in range(8) for place in ((epoch, 5), (epoch + 1, 0))]
    checkpoints = saved(
        tmp_path, *places, keep=2, save_freq=3, after=lambda: names.append(set(os.listdir(tmp_path)) - others)
    )
    assert {"checkpoint_0006.pth.tar", "checkpoint_0005.pth.tar", "checkpoint_0007_000005.pth.tar"} < names[
        -2
    ]
    assert {"checkpoint_0007.pth.tar", "checkpoint_0006.pth.tar"} < names[-1]
    assert all(f"checkpoint_{epoch:04d}_000005.pth.tar" not in names[-1] for epoch in range(7))
    checkpoints.finish()
    left = set(os.listdir(tmp_path)) - others
    assert left == {f"checkpoint_{epoch:04d}.pth.tar" for epoch in (2, 5, 6, 7)}
    assert checkpoints.newest_first()[0].name == "checkpoint_0007.pth.tar"
    (tmp_path / ".checkpoint_0008.pth.tar.half.tmp").write_text("")  # of a killed run
    assert checkpoints.load("auto")[0] == str(tmp_path / "checkpoint_0007.pth.tar")
    assert not list(tmp_path.glob(".checkpoint*"))


def test_training_continues_while_a_file_is_written_and_does_not_change_it(tmp_path, monkeypatch):
    begun, changed = threading.Event(), threading.Event()

    def late(*arguments, real=torch.save):
        begun.set()
        assert changed.wait(10)
        real(*arguments)

    monkeypatch.setattr(torch, "save", late)
    model = nn.ModuleDict({"encoder_q": nn.Linear(2, 1)})
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model["encoder_q"](torch.ones(1, 2)).sum().backward()
    sgd.step()
    weight = model["encoder_q"].weight.detach().clone()
    momentum = sgd.state[model["encoder_q"].weight]["momentum_buffer"].clone()
    checkpoints = Checkpoints(tmp_path, Rank.alone())
    path = checkpoints.save(model, sgd, OFF, epoch=1, step=0)
    assert begun.wait(10) and not path.exists()
    sgd.step()
    changed.set()
    checkpoints.wait()
    found = read(path)
    assert torch.equal(found["state_dict"]["encoder_q.weight"], weight)
    assert torch.equal(found["optimizer"]["state"][0]["momentum_buffer"], momentum)
    assert not torch.equal(model["encoder_q"].weight, weight)  # the control: the step did change them


@pytest.mark.parametrize("asked", ["save", "wait"])
def test_a_file_that_could_not_be_written_is_said_by_what_comes_next(tmp_path, asked):
    folder = tmp_path / "folder"
    folder.mkdir()
    checkpoints = saved(folder, (1, 0))
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    model = nn.ModuleDict({"encoder_q": nn.Linear(2, 1)})
    now = partial(checkpoints.save, model, torch.optim.SGD(model.parameters(), 0.1), OFF)
    now(epoch=2, step=0)
    with pytest.raises(UserError, match="cannot write the checkpoint .*checkpoint_0001.*No such file"):
        now(epoch=3, step=0) if asked == "save" else checkpoints.wait()


def test_files_of_linear_evaluation(tmp_path):
    checkpoints = LinearCheckpoints(tmp_path, Rank.alone())
    state = {"state_dict": {"module.x": torch.zeros(2)}}
    assert checkpoints.load("auto") == (None, {})
    checkpoints.save({**state, "epoch": 1}, best={**state, "epoch": 1})
    checkpoints.save({**state, "epoch": 2})
    assert [read(path)["epoch"] for path in checkpoints.newest_first()] == [2, 1]
    damage(checkpoints.newest, "truncated")
    source, checkpoint = checkpoints.load("auto")
    assert source == str(checkpoints.previous) and checkpoint["epoch"] == 1
    with pytest.raises(UserError, match="has checkpoints of another run, such as checkpoint"):
        checkpoints.load("")
    assert len(set(os.listdir(tmp_path)) - {LOCK}) == 3
    assert checkpoints.load("", overwrite=True) == (None, {}) and os.listdir(tmp_path) == [LOCK]


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_then_its_name_is(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def flushed(descriptor):
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", flushed)
    monkeypatch.setattr(files.os, "replace", lambda *names: events.append("name") or replace(*names))
    save({"state_dict": {"x": torch.ones(2)}}, tmp_path / NAME)
    assert events == ["file", "name", "folder"]


UNABLE = ("EINVAL", "ENOTSUP", "ENOSYS", "EBADF", "EACCES", "EPERM", "EISDIR", "ENOTTY")  # by mounts


@pytest.mark.parametrize(
    ("number", "fine"),
    [*((getattr(errno, name), True) for name in UNABLE), (errno.EIO, False), (errno.ENOSPC, False)],
)
def test_a_folder_that_cannot_be_flushed_does_not_matter_but_a_failing_disk_does(
    tmp_path, monkeypatch, number, fine
):
    flushed, real = [], os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            flushed.append(descriptor)
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    if fine:
        save({"state_dict": {"x": torch.ones(2)}}, tmp_path / NAME)
        assert read(tmp_path / NAME)["state_dict"]["x"].tolist() == [1, 1]
    else:
        with pytest.raises(UserError, match=os.strerror(number)):
            save({}, tmp_path / NAME)
    assert len(flushed) == 1


@pytest.mark.parametrize("call", ["open", "chmod"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ENOTSUP, errno.EISDIR])
def test_a_folder_that_cannot_be_opened_and_files_without_modes_do_not_matter(
    tmp_path, monkeypatch, call, number
):
    real, refused = getattr(os, call), []

    def refuse(path, *words, **names):
        if call == "chmod" or (not isinstance(path, int) and os.path.isdir(path)):
            refused.append(path)
            raise OSError(number, os.strerror(number), path)
        return real(path, *words, **names)

    monkeypatch.setattr(files.os, call, refuse)
    save({"state_dict": {"x": torch.ones(2)}}, tmp_path / NAME)
    monkeypatch.undo()
    assert len(refused) == 1 and os.listdir(tmp_path) == [NAME]
    assert read(tmp_path / NAME)["state_dict"]["x"].tolist() == [1, 1]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_file_that_the_disk_has_lost_is_an_error(tmp_path, monkeypatch, number):
    save({"state_dict": {"x": torch.ones(2)}}, tmp_path / NAME)

    def fsync(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(UserError, match=f"{os.strerror(number)}.*the ones before it are intact"):
        save({}, tmp_path / NAME)
    assert os.listdir(tmp_path) == [NAME] and read(tmp_path / NAME)["state_dict"]["x"].tolist() == [1, 1]


def test_kill_9_at_random_moments_of_saving_leaves_every_file_whole(tmp_path):
    """Twenty processes that do nothing but save are killed; some of them in the middle of a file."""

    def save_for_ever(folder):
        checkpoints, state = Checkpoints(folder, Rank.alone(), keep=2), {"x": torch.zeros(1_000_000)}
        model, sgd = nn.Module(), torch.optim.SGD([torch.zeros(1)], 0.1)
        model.register_buffer("x", state["x"])
        for epoch in itertools.count(1):
            model.x += 1
            checkpoints.save(model, sgd, OFF, epoch=epoch, step=0)

    chance, unfinished = random.Random(0), 0
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        pid, output = forked(lambda folder=folder: save_for_ever(folder))
        while not list(folder.glob("checkpoint*")):
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), output.read()
        signal.sigtimedwait([], chance.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        names = os.listdir(folder)
        unfinished += any(name.endswith(".tmp") for name in names)
        whole = [read(folder / name) for name in names if name.startswith("checkpoint")]
        assert whole and all((state["state_dict"]["x"] == state["epoch"]).all() for state in whole)
    assert unfinished >= 1  # a kill did hit a save
