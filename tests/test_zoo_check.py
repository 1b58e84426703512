"""What is taken for a released model: a sound and whole checkpoint of a MoCo with a ResNet-50."""

import ctypes
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from fake_web import fake_web, file_on_disk, whole
from zoo_files import empty_cache, names, released_checkpoints  # noqa: F401 (fixtures)

from moco import zoo
from moco.errors import UserError


class Attack:
    """Unpickling it with everything allowed creates the file `trace`."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_only_a_moco_resnet50_gets_the_name(checkpoints, cache, tmp_path):
    def written(data):
        path = tmp_path / "x"
        path.write_bytes(data) if isinstance(data, bytes) else torch.save(data, path)
        return path

    v2 = checkpoints["v2"].read_bytes()
    flipped = v2[:50_000_000] + bytes([v2[50_000_000] ^ 1]) + v2[50_000_001:]
    other = torchvision.models.resnet18().state_dict()
    pickle.loads(pickle.dumps(Attack(tmp_path / "trace")))
    (tmp_path / "trace").rmdir()  # so the attack works on a careless reader
    for reason, data in {
        "could run code": {"state_dict": Attack(tmp_path / "trace")},
        "checksum of .* is wrong": flipped,
        "damaged": v2[:-100],
        "ends before its tensors": checkpoints["v1"].read_bytes()[:60_000_000],
        "so it is not a checkpoint of MoCo": checkpoints["model"].state_dict(),
        "does not fit": {"state_dict": {f"module.encoder_q.{name}": t for name, t in other.items()}},
    }.items():
        with pytest.raises(UserError, match=reason):
            zoo.check(zoo.MODELS[0], written(data))
    zoo.check(zoo.MODELS[0], written(v2))

    with fake_web(file_on_disk(written({"state_dict": Attack(tmp_path / "trace")}))) as web:
        with pytest.raises(UserError, match="refused and removed .*could run code"):
            zoo.fetch("mocov2-in100", mirror=web.url)
        assert web.requests and names(cache) == [] and not (tmp_path / "trace").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
def test_checking_takes_little_memory(zipped, checkpoints, cache, tmp_path):
    large = torch.load(checkpoints["v2"], weights_only=True)
    torch.save(large, tmp_path / "small", _use_new_zipfile_serialization=zipped)
    large["optimizer"]["state"][0] = {"momentum_buffer": torch.ones(35_000_000)}
    torch.save(large, tmp_path / "large", _use_new_zipfile_serialization=zipped)
    assert (tmp_path / "large").stat().st_size > 230_000_000
    del large

    def growth(function, results):  # in MB, of a forked process's peak
        def peak():
            return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024

        function(tmp_path / "small")  # code that is read and modules that are imported: no part of a file
        ctypes.CDLL(None).malloc_trim(0)  # what earlier tests left free is not there to be used unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on: proc(5)
        before = peak()
        function(tmp_path / "large")
        results.put(peak() - before)

    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    for function in (lambda path: zoo.check(zoo.MODELS[0], path), Path.read_bytes):
        child = context.Process(target=growth, args=(function, results))
        child.start()
        child.join(30)
        assert child.exitcode == 0
    assert results.get() < 100 < 200 < results.get()
    (tmp_path / "large").unlink()


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file as those that were released: two encoders and the optimizer, in torch's older format."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=8)
    tensors = model.state_dict().items()
    state = {f"module.encoder_q.{name}": tensor for name, tensor in tensors}
    state |= {f"module.encoder_k.{name}": tensor.clone() for name, tensor in tensors}
    state["module.alias"] = state["module.encoder_q.conv1.weight"][:3]  # of a storage that is there already
    momenta = {i: {"momentum_buffer": torch.ones_like(p)} for i, p in enumerate(model.parameters())}
    optimizer = {"state": momenta, "param_groups": [{"lr": 0.1, "params": list(range(len(momenta)))}]}
    path = tmp_path_factory.mktemp("released") / "checkpoint"
    content = {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": optimizer}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    yield path
    path.unlink()


def test_a_file_of_the_older_format_is_whole_to_its_last_byte(released, cache, tmp_path):
    data = released.read_bytes()
    assert len(data) > 280_000_000
    zoo.check(zoo.MODELS[0], released)
    cut = tmp_path / "cut"
    for size in (len(data) // 2, len(data) * 99 // 100, len(data) - 1):
        cut.write_bytes(data[:size])
        with pytest.raises(UserError, match="ends before its tensors do"):
            zoo.check(zoo.MODELS[0], cut)
    with fake_web(whole(data[: len(data) // 2], length=False), file_on_disk(released)) as web:
        with pytest.raises(UserError, match="refused and removed .*ends before its tensors do"):
            zoo.fetch("mocov2-in100", mirror=web.url)
        assert names(cache) == []  # no record either, which would refuse the whole file
        path = zoo.fetch("mocov2-in100", mirror=web.url)
        assert names(cache) == [path.name, f"{path.name}.sha256"]
    cut.unlink()


@pytest.mark.parametrize("wrong", [b"0" * 64 + b"  mocov2-in100.pth.tar\n", b"", b"\xff"])
def test_a_wrong_record_is_named_and_can_be_deleted(wrong, checkpoints, cache):
    record = cache / "mocov2-in100.pth.tar.sha256"
    cache.mkdir(parents=True)
    record.write_bytes(wrong)
    with fake_web(file_on_disk(checkpoints["v2"])) as web:
        with pytest.raises(UserError, match=f"delete {record} and run the same command again"):
            zoo.fetch("mocov2-in100", mirror=web.url)
        assert names(cache) == [record.name]
        record.unlink()
        assert zoo.fetch("mocov2-in100", mirror=web.url).exists()


FOLDERS = """
import os, sys
from moco.zoo import cache_folder

def folders(ask):
    for home, caches in ((None, None), (None, "/x"), ("~/t", "/x"), ("", "/x"), (None, "")):
        for name, value in (("TORCH_HOME", home), ("XDG_CACHE_HOME", caches)):
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        yield str(ask())

ours = list(folders(cache_folder))
assert "torch" not in sys.modules
import torch
theirs = list(folders(lambda: torch.hub.get_dir() + "/checkpoints/moco"))
assert ours == theirs == list(folders(cache_folder)) and len(set(ours)) == 5, (ours, theirs)
torch.hub.set_dir("/elsewhere")
assert str(cache_folder()) == "/elsewhere/checkpoints/moco"
"""


def test_the_folder_is_torch_hubs_without_torch():
    run = subprocess.run([sys.executable, "-c", FOLDERS], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


MEASURED = """
import re, sys
from pathlib import Path
from moco import zoo

def peak():  # in MB
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

def measured(model, part):
    print(peak(), "torch" in sys.modules, part.stat().st_size)
    check(model, part)
    print(peak(), "torch" in sys.modules)

check, zoo.check = zoo.check, measured
zoo.fetch("mocov2-in100", mirror=sys.argv[1])
"""


def test_a_download_runs_without_torch(released, cache):
    with fake_web(file_on_disk(released)) as web:
        command = [sys.executable, "-c", MEASURED, web.url]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    downloaded, checked = run.stdout.splitlines()
    megabytes, *rest = downloaded.split()
    assert int(megabytes) < 100 and rest == ["False", str(released.stat().st_size)]
    assert checked.endswith(" True") and int(checked.split()[0]) > 100
