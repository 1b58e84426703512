"""The measurement of saving: it saves what a run saves, on the disk it is told, and leaves nothing there."""

import json
import os

from moco import bench, bench_save
from moco.run_folder import RunFolder


def test_the_report_is_one_object_about_the_folder_it_is_given(tmp_path, cli, monkeypatch):
    saved = []

    def save(folder, checkpoint, real=RunFolder.save):
        saved.append((folder.path.parent, checkpoint.keys()))
        return real(folder, checkpoint)

    monkeypatch.setattr(RunFolder, "save", save)
    words = ["save", tmp_path, "-a", "shufflenet_v2_x0_5", "--moco-k", "8", "--rounds", "2"]
    code, output, errors = cli(bench.main, *words, "--json")
    assert (code, errors) == (0, "")
    report = json.loads(output)
    keys = {"epoch", "arch", "state_dict", "optimizer", "step"}
    assert saved == [(tmp_path, keys)] * 6  # in turns, after one of each
    for values in report["seconds"].values():
        assert 0 < values["low"] <= values["median"] <= values["high"] < 60
    assert report["megabytes"] > 4
    assert os.listdir(tmp_path) == []
    text = bench_save.table(report)
    assert max(map(len, text.splitlines())) <= 80 and "torch.save over the file" in text


def test_wrong_use_is_a_sentence(tmp_path, cli):
    for words, message in (
        (["--rounds", "0"], "--rounds must be at least 1"),
        ([tmp_path / "none"], "cannot write to"),
        (["-a", "resnet5O"], "did you mean resnet50"),
    ):
        code, output, errors = cli(bench.main, "save", *words)
        assert (code, output) == (2, "") and message in errors and errors.count("\n") == 1
