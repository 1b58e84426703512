"""Linear evaluation that is killed while it saves goes on exactly."""

import os
import signal
import sys

import pytest
import torch
from command_lines import SMALL
from forked_program import forked

import main_lincls
from moco import files

EPOCHS = 3


def words(folders, out):
    more = ["-a", "shufflenet_v2_x0_5", "--lr", "1", "--schedule", "2", "--epochs", EPOCHS]
    return [*map(str, [*SMALL, *more, "--output-dir", out, "--resume", "auto", folders])]


def at_call(module, name, number, act):
    """Have act(), with the call's arguments, called before call `number`, from 1, of module.name."""
    real, calls = getattr(module, name), [0]

    def counted(*arguments, **options):
        calls[0] += 1
        if calls[0] == number:
            act(*arguments)
        return real(*arguments, **options)

    setattr(module, name, counted)


def struck(prepare, folders, out):
    """Run in a forked process after prepare(): (how it ended, what it said)."""

    def main():
        prepare()
        sys.argv = ["program", *words(folders, out)]
        main_lincls.main()

    pid, output = forked(main, (1, 2))
    said = output.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def same(one, other):
    """Whether the newest checkpoints of two folders hold the same values."""
    one, other = (torch.load(place / "checkpoint.pth.tar", weights_only=True) for place in (one, other))
    weights, momentum = ([c["state_dict"], c["optimizer"]["state"][0]] for c in (one, other))
    equal = all(torch.equal(a[name], b[name]) for a, b in zip(weights, momentum, strict=True) for name in a)
    plain = ("epoch", "arch", "best_acc1", "seed")
    return equal and all(one[name] == other[name] for name in plain)


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """The folder of an evaluation that never stopped."""
    out = tmp_path_factory.mktemp("whole")
    code, said = struck(lambda: None, folders, out)
    assert code == 0, said
    return out


SECOND_SAVE = 3  # the number of the second epoch's first file: the first epoch's are two, as it is the best


@pytest.mark.parametrize("fault", ["kill -9 in the file", "kill -9 before its name"])
def test_it_goes_on_exactly_after_the_last_whole_epoch(folders, tmp_path, cli, whole, fault):
    def tell(number):
        return lambda *_: os.kill(os.getpid(), number)

    def half(checkpoint, path, save=torch.save):
        save(checkpoint, path)
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def prepare():
        if fault == "kill -9 in the file":
            at_call(main_lincls.torch, "save", SECOND_SAVE, half)
        else:
            at_call(files.os, "replace", SECOND_SAVE, tell(signal.SIGKILL))

    code, said = struck(prepare, folders, tmp_path)
    assert "Epoch: [1][0/3]" in said
    assert code == -signal.SIGKILL and any(".tmp" in name for name in os.listdir(tmp_path))
    assert torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)["epoch"] == 1
    assert not same(tmp_path, whole)  # negative control

    code, output, errors = cli(main_lincls.main, *words(folders, tmp_path))
    assert (code, errors) == (0, "") and f"--resume auto: {tmp_path / 'checkpoint.pth.tar'}" in output
    assert "Epoch: [1][0/3]" in output and "Epoch: [0]" not in output
    assert same(tmp_path, whole)


def test_the_results_of_another_evaluation_are_set_aside(folders, tmp_path, cli):
    fresh = [word for word in words(folders, tmp_path) if word not in ("--resume", "auto")]
    names = ["checkpoint.pth.tar", "linear.json", "model_best.pth.tar"]
    assert cli(main_lincls.main, *fresh)[0] == 0
    before = {name: (tmp_path / name).read_bytes() for name in names}
    code, output, _ = cli(main_lincls.main, *fresh, "--seed", "4")
    assert code == 0 and f"note: 3 file(s) of another run in {tmp_path} are set aside" in output
    assert sorted(os.listdir(tmp_path)) == sorted([*names, *(f"{name}.before" for name in names)])
    for name in names:
        assert (tmp_path / f"{name}.before").read_bytes() == before[name] != (tmp_path / name).read_bytes()
