"""The files of a run: what could not be written is said, and nothing that was set aside is replaced."""

import os
import time

import pytest
import torch

from moco.errors import UserError
from moco.files import set_aside
from moco.run_folder import RunFolder


def test_a_file_that_could_not_be_written_is_said_though_something_else_ends_the_run(tmp_path, capsys):
    for folder, said in ((tmp_path, ""), (tmp_path / "gone", "warning: cannot write the checkpoint")):
        with pytest.raises(ZeroDivisionError), RunFolder(folder) as output:
            output.save({"epoch": 1, "step": 0, "state_dict": {"x": torch.zeros(3)}})
            raise ZeroDivisionError
        errors = capsys.readouterr().err
        assert errors.startswith(said) and errors.count("\n") == (folder != tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint_0000.pth.tar"]


def test_the_end_that_a_lost_file_brings_saves_what_there_is(tmp_path):
    folder, checkpoint = tmp_path / "run", {"step": 0, "state_dict": {"x": torch.zeros(3)}}
    output = RunFolder(folder)
    output.save({"epoch": 1, **checkpoint})
    with pytest.raises(UserError, match=r"checkpoint_0000\.pth\.tar"):
        output.wait()
    output.save({"epoch": 2, **checkpoint})
    while not output._under_way.done():
        time.sleep(0.01)
    folder.mkdir()
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*checkpoint_0001\.pth\.tar"):
        output.save({"epoch": 3, **checkpoint})
    assert os.listdir(folder) == ["checkpoint_0002.pth.tar"]


def test_what_was_set_aside_is_never_replaced(tmp_path):
    for content in "abc":
        (tmp_path / "x").write_text(content)
        set_aside([tmp_path / "x"], print)
    names = ["x.before", "x.before2", "x.before3"]
    assert sorted(os.listdir(tmp_path)) == names and [(tmp_path / n).read_text() for n in names] == [*"abc"]
