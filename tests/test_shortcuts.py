"""python -m moco.shortcuts: what it starts, what it refuses before anything is written, how it ends."""

import json

import pytest
import torch

from moco import shortcuts, trifeature
from moco.errors import UserError
from moco.factors import SETTINGS
from moco.meeting import code_hash
from moco.pretrain_options import check
from moco.pretrain_options import parse_args as pretraining_args
from moco.sweep import DIVERGED, Job, add_result, locked, read_results, settle

SMALL = [
    *("-a", "shufflenet_v2_x0_5", "--image-size", "16", "--epochs", "1", "-b", "8", "--moco-k", "16"),
    *("--bn-splits", "2", "--device", "cpu", "--jobs", "2"),
]
LISTS = ["--epsilon", "0.1", "--seeds", "5"]


@pytest.mark.slow
def test_a_small_sweep_from_its_command_to_its_figure(folders, tmp_path, cli):
    out = tmp_path / "sweep"
    words = ["randbit", *SMALL, *LISTS, "--bits", "2", "--data", folders, "--out", out]
    code, output, errors = cli(shortcuts.main, *words)
    assert (code, errors) == (0, ""), output
    assert output.startswith("2 runs, 0 of them done; 2 side by side on cpu\n")
    results = {result["name"]: result for result in read_results(out)}
    assert set(results) == {"untrained_bits2_seed5", "v2_T0.2_eps0.1_bits2_seed5"}
    shared = {
        "kind": "randbit", "seed": 5, "bits": 2, "arch": "shufflenet_v2_x0_5", "image_size": 16, "epochs": 1,
        "batch_size": 8, "lr": 0.03, "moco_k": 16, "moco_m": 0.99, "bn_splits": 2, "alpha": 1.0,
        "method": "ifm", "renders": None, "factors": None, "device": "cpu", "images": 24,
        "data": str(folders),
    }  # fmt: skip
    for result in results.values():
        assert {name: result.get(name) for name in shared} == shared and result["code"] == code_hash()
        assert result["versions"]["torch"] == torch.__version__
        readout = result["readout"]["class"]
        assert readout["chance"] == pytest.approx(100 / 3) and readout["converged"]
        assert round(readout["accuracy"] * 9 / 100, 6) in range(10)  # of 9 images
    untrained, trained = results.values() if "un" in list(results)[0] else reversed(results.values())
    assert not untrained["trained"] and "losses" not in untrained and set(untrained["seconds"]) == {"measure"}
    assert untrained["command"][1:5] == ["-m", "moco.measure", str(folders), f"{out}/runs/"
                                         "untrained_bits2_seed5/measured.json"]  # fmt: skip
    assert (trained["recipe"], trained["T"], trained["epsilon"]) == ("v2", 0.2, 0.1)
    assert set(trained["seconds"]) == {"pretrain", "measure"} and 0 < trained["losses"]["info_nce"] < 10
    assert trained["losses"]["training"] > 0

    start, *command = trained["command"]  # one can give it oneself
    args = pretraining_args(command[1:])
    check(args)
    assert (start, command[0], args.folder, args.seed) == ("python", "main_moco.py", str(folders), 5)
    assert (args.epsilon, args.alpha, args.method, args.random_bits) == (0.1, 1.0, "ifm", 2)
    assert args.mlp and args.cos and args.aug_plus and args.output_dir == str(out / "runs" / trained["name"])
    table = (out / "table.md").read_text()
    assert f"| v2 | 0.2 | 2 | 0.1 | 1 | {trained['losses']['info_nce']:.3f} |" in table and table in output
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.rglob("*.pth.tar")) and not list(out.rglob("*.tmp"))

    before = (out / "results.jsonl").read_bytes()
    code, again, _ = cli(shortcuts.main, *words)
    assert code == 0 and again.startswith("2 runs, 2 of them done") and table in again
    code, _, errors = cli(shortcuts.main, *words, "--epochs", "2")
    assert code == 2 and "holds a sweep with epochs 1, not 2" in errors and errors.count("\n") == 1
    assert (out / "results.jsonl").read_bytes() == before


MEASURED = "MEASURED"  # in a line of Python: what leaves a measurement


def sweep_of(monkeypatch, codes):
    """Have each run of a sweep be a line of Python, by a word in its name; others measure something."""
    real = shortcuts._job

    def job(*arguments):
        made = real(*arguments)
        readout = {"class": {"accuracy": 50.0, "chance": 10.0, "converged": True, "weight_decay": 0.1}}
        found = json.dumps({"readout": readout, "losses": {"info_nce": 2.0}})
        measured = f"open({str(made.folder / 'measured.json')!r}, 'w').write({found!r})"
        code = next((line for word, line in codes.items() if word in made.name), MEASURED)
        code = code.replace(MEASURED, measured)
        return Job(made.run, [("measure", ["-c", code])], made.folder)

    monkeypatch.setattr(shortcuts, "_job", job)


def test_how_a_sweep_ends(folders, tmp_path, cli, monkeypatch):
    out = tmp_path / "sweep"
    words = ["randbit", *SMALL, "--bits", "0", "--seeds", "0", "1", "--data", folders, "--out", out]
    wild = f"import sys; print('error: the loss {DIVERGED}'); sys.exit(2)"
    codes = {"eps0.1_bits0_seed0": wild, "eps0_bits0_seed1": "raise RuntimeError('no such luck')"}
    sweep_of(monkeypatch, codes)
    code, output, _ = cli(shortcuts.main, *words)
    assert code == 1 and output.endswith("runs that failed: 1; the same command tries them again\n")
    assert "error: v2_T0.2_eps0_bits0_seed1 ended with 1: RuntimeError: no such luck (see " in output
    assert len(read_results(out)) == 5 and "| v2 | 0.2 | 0.1 | 1, 1 diverged |" in output
    assert f"v2_T0.2_eps0.1_bits0_seed0 diverged: the loss {DIVERGED}\n" in output

    stop = "import os, time; os.kill(os.getppid(), 15); time.sleep(60)"
    monkeypatch.undo()
    sweep_of(monkeypatch, {"seed1": stop})
    code, output, _ = cli(shortcuts.main, *words)
    assert code == 75 and output.endswith("stopped by SIGTERM; the same command goes on\n")
    assert output.startswith("6 runs, 5 of them done") and len(read_results(out)) == 5
    monkeypatch.undo()
    sweep_of(monkeypatch, {"seed1": f"import os; {MEASURED}; os.kill(os.getppid(), 15)"})
    code, output, _ = cli(shortcuts.main, *words)  # stopped when nothing is left to do
    assert code == 0 and "stopped" not in output and len(read_results(out)) == 6
    monkeypatch.undo()
    sweep_of(monkeypatch, {})
    code, output, _ = cli(shortcuts.main, *words, "--seeds", "0", "1", "2")  # also with more values
    assert code == 0 and output.startswith("9 runs, 6 of them done") and len(read_results(out)) == 9


def test_runs_are_named_by_all_digits_of_what_differs(folders, tmp_path, cli, monkeypatch):
    sweep_of(monkeypatch, {})
    words = ["randbit", *SMALL, "--bits", "0", "--seeds", "0", "--data", folders, "--out", tmp_path / "s"]
    words += ["--epsilon", "-0.0", "0", "0.0", "1e-7", "0.12345678", "0.12345679", "--moco-t", "0.2", ".20"]
    code, output, _ = cli(shortcuts.main, *words)
    names = {result["name"] for result in read_results(tmp_path / "s")}
    trained = [f"v2_T0.2_eps{e}_bits0_seed0" for e in ("0", "1e-07", "0.12345678", "0.12345679")]
    assert code == 0 and output.startswith("5 runs") and names == {"untrained_bits0_seed0", *trained}


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("trifeature", ["--factors", "shape", "colour"], "no factor 'colour' to read; choose of shape, text"),
        ("trifeature", ["--factors", "class"], "no factor 'class' to read"),
        ("trifeature", ["--hide", "colour"], "--hide colour: there is no such factor; choose one of"),
        ("trifeature", ["--recipe", "v3"], "there is no recipe 'v3'; choose of v2, crops"),
        ("trifeature", ["--epsilon", "0.1", "-0.1"], "--epsilon must be 0 or more, not -0.1"),
        ("trifeature", ["--epsilon", "nan"], "--epsilon must be 0 or more, not nan"),
        ("trifeature", ["--epsilon", "inf"], "--epsilon must be 0 or more, not inf"),
        ("trifeature", ["--moco-t", "0"], "--moco-t must be above 0, not 0"),
        ("trifeature", ["--seeds", "-1"], "--seeds must be between 0"),
        ("trifeature", ["--alpha", "-1"], "--alpha must be 0 or more"),
        ("trifeature", ["--epsilon"], "--epsilon needs at least one value"),
        ("trifeature", ["--moco-t"], "--moco-t needs at least one value"),
        ("trifeature", ["--seeds"], "--seeds needs at least one value"),
        ("trifeature", ["--recipe"], "--recipe needs at least one value"),
        ("trifeature", ["--factors"], "--factors needs at least one value"),
        ("randbit", ["--bits"], "--bits needs at least one value"),
        ("randbit", ["--bits", "64"], "--bits must be between 0 and 63, not 64"),
        ("randbit", ["--data", "nowhere"], "there is no folder nowhere"),
        ("randbit", ["--data", "FOLDERS", "-b", "32"], "has 24 images, fewer than a step's 32; lower -b"),
        (
            "randbit",
            ["--data", "FOLDERS", "--factors", "shape"],
            "no factor 'shape' to read; choose of class",
        ),
        ("trifeature", ["-b", "10", "--bn-splits", "4"], "batch of 10 has no --bn-splits 4 equal groups"),
        ("trifeature", ["--image-size", "600"], "--image-size 600 is more than Trifeature's 512"),
        ("trifeature", ["--image-size", "4"], "--image-size must be at least 8 pixels, not 4"),
        (
            "trifeature",
            ["--epsilon", "0", "--alpha", "2"],
            "--method and --alpha have no effect at --epsilon 0",
        ),
        ("trifeature", ["--epsilon", "0", "--method", "ifm"], "--method and --alpha have no effect at"),
        ("trifeature", ["-a", "resnet19"], "torchvision has no classification model 'resnet19'"),
        ("trifeature", ["--jobs", "0"], "--jobs must be at least 1, not 0"),
        ("trifeature", ["--renders", "0"], "--renders must be at least 1, not 0"),
        ("trifeature", ["--method", "ifm_only", "--alpha", "1"], "--alpha has no effect with --method ifm_o"),
        ("randbit", ["--data", "FOLDERS", "--renders", "2"], "--renders draws Trifeature, and --data takes"),
        ("trifeature", ["--epochs", "0"], "--epochs must be at least 1, not 0"),
    ],
)
def test_wrong_use_is_one_sentence_and_nothing_is_written(folders, tmp_path, cli, kind, words, message):
    words = [folders if word == "FOLDERS" else word for word in words]
    code, output, errors = cli(shortcuts.main, kind, *SMALL, *words, "--out", tmp_path / "out")
    assert (code, output) == (2, "") and message in errors and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_used_are_refused(folders, tmp_path, cli):
    words = ["randbit", *SMALL, *LISTS, "--data", folders, "--out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    code, _, errors = cli(shortcuts.main, *words, tmp_path / "mine")
    assert code == 2 and "is not empty and holds no sweep" in errors
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    with locked(tmp_path / "busy"):
        settle(tmp_path / "busy", {})
        add_result(tmp_path / "busy", {"name": "x"})
        code, output, errors = cli(shortcuts.main, *words, tmp_path / "busy")
    assert (code, output) == (2, "") and "a sweep is at work in" in errors
    if not torch.cuda.is_available():
        code, _, errors = cli(shortcuts.main, *words, tmp_path / "new", "--device", "cuda")
        assert code == 2 and "there is no GPU here" in errors and not (tmp_path / "new").exists()


def test_what_the_runs_would_warn_of_is_told_once(folders, tmp_path, cli, monkeypatch):
    sweep_of(monkeypatch, {})
    words = ["randbit", *SMALL, "--moco-k", "32", "--bits", "0", "--data", folders, "--out", tmp_path / "out"]
    code, output, _ = cli(shortcuts.main, *words)
    warning = "warning: a queue of 32 keys holds every one of 24 images more than once,\n"
    assert code == 0 and output.startswith(warning) and output.count("warning") == 1


def test_the_same_data_and_factors_in_other_words_are_the_same_sweep(folders, tmp_path, cli, monkeypatch):
    sweep_of(monkeypatch, {})
    monkeypatch.chdir(folders.parent)
    words = ["randbit", *SMALL, *LISTS, "--bits", "0", "--out", tmp_path / "out", "--data"]
    assert cli(shortcuts.main, *words, folders.name)[0] == 0
    code, output, errors = cli(shortcuts.main, *words, folders, "--factors", "class")
    assert (code, errors) == (0, "") and output.startswith("2 runs, 2 of them done")
    monkeypatch.setattr(shortcuts, "_images_of", lambda *_: 23)
    code, _, errors = cli(shortcuts.main, *words, folders)
    assert code == 2 and "holds a sweep with images 24, not 23" in errors


def test_trifeature_of_other_settings_is_not_taken_for_the_sweeps(tmp_path, monkeypatch):
    trifeature.generate(tmp_path / "data", 16, 1, progress=False)
    shortcuts._draw(tmp_path / "data", 16, 1)
    for size, renders, version in ((18, 1, 1), (16, 2, 1), (16, 1, 2)):
        monkeypatch.setattr(trifeature, "VERSION", version)
        with pytest.raises(UserError, match=r"data was drawn with .*, not .*; choose another --out"):
            shortcuts._draw(tmp_path / "data", size, renders)
    (tmp_path / "data" / SETTINGS).unlink()
    with pytest.raises(UserError, match="is no Trifeature set .*choose another --out"):
        shortcuts._draw(tmp_path / "data", 16, 1)


def test_both_experiments_explain_themselves_in_80_columns(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for kind in ("trifeature", "randbit"):
        code, output, _ = cli(shortcuts.main, kind, "--help")
        assert code == 0 and max(map(len, output.splitlines())) < 80
        for flag in (
            "--epsilon",
            "--moco-t",
            "--seeds",
            "--recipe",
            "--out",
            "--device",
            "--keep-checkpoints",
        ):
            assert f"\n  {flag} " in output
        assert ("--bits" in output) == ("--data" in output) == (kind == "randbit")
