"""python -m moco.shortcuts randbit: what it starts, what it refuses before it writes, how it ends."""

import json

import pytest
import torch

from moco import options
from moco.shortcuts import __main__ as shortcuts
from moco.shortcuts.sweep import Job, read_results
from moco.trifeature import FACTORS

SMALL = "--image-size 16 --epochs 1 --bn-splits 2 --device cpu --jobs 2"
LISTS = ["--bits", "2", "--moco-t", "0.1", "--epsilon", "0.5", "--seeds", "5"]


@pytest.fixture
def sweep(tmp_path, cli):
    """`sweep(*words)`: (exit code, output, errors) of a small sweep in tmp_path/sweep."""
    return lambda *words: cli(shortcuts.main, "randbit", *SMALL.split(), "--out", tmp_path / "sweep", *words)


@pytest.mark.slow
def test_a_small_sweep_from_its_command_to_its_figures(tmp_path, sweep):
    out, methods = tmp_path / "sweep", ["--method", "infonce", "ifm", "match_ifm"]
    code, output, errors = sweep(*LISTS, *methods)
    assert (code, errors) == (0, ""), output
    assert output.startswith("4 runs (0 finished), 2 in parallel on cpu\n")
    results = {result["name"]: result for result in read_results(out)}
    place = "T0.1_K1024_bits2"
    ends = ["infonce", "ifm_eps0.5", "match_ifm_eps0.5"]
    assert set(results) == {"untrained_bits2_seed5", *(f"{place}_{end}_seed5" for end in ends)}
    for result in results.values():
        assert (result["seed"], result["bits"]) == (5, 2)
        assert result["versions"]["torch"] == torch.__version__ and result["device"] == "cpu"
        assert list(result["readout"]) == ["own", "shared", "redrawn"]
        assert all(each["converged"] for factors in result["readout"].values() for each in factors.values())
    plain, trained, control = (results[f"{place}_{end}_seed5"] for end in ends)
    assert [trained[name] for name in ("T", "K", "bits_per", "method", "epsilon")] == [
        0.1,
        1024,
        "image",
        "ifm",
        0.5,
    ]
    assert trained["left"] == pytest.approx(trained["L_shortcut"] - trained["L_all"]) and trained["left"] > 5
    assert trained["loss"]["mismatched"] > trained["loss"]["matched"] + 1
    assert trained["course"]["ifm_weight"][-1] > 1 and "ifm_weight" not in plain["course"]
    assert len(control["course"]["ifm_factor"]) == 1
    log = (out / "runs" / trained["name"] / "log.jsonl").read_text().splitlines()
    assert trained["loss"]["training"] == pytest.approx(json.loads(log[-1])["info_nce"], rel=1e-4)

    start, program, *command = control["command"]  # one can give it oneself
    args = options.pretraining(command)
    assert (start, program, args.folder, args.seed) == ("python", "main_moco.py", str(out / "data"), 5)
    assert (args.epsilon, args.alpha, args.method, args.match_ifm) == (0.5, 1.0, "ifm", True)
    assert (args.random_bits, args.moco_k, args.moco_t) == (2, 1024, 0.1)
    table = (out / "table.md").read_text()
    assert table in output and "| 0.1 | 1024 | 2 | ifm | 0.5 | 1 | its control |" in table
    for name in ("figure.png", "course.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert not list(out.rglob("*.pth.tar")) and not list(out.rglob("*.tmp"))

    before = (out / "results.jsonl").read_bytes()
    code, again, _ = sweep(*LISTS, *methods)
    assert code == 0 and again.startswith("4 runs (4 finished)") and table in again
    code, _, errors = sweep(*LISTS, "--epochs", "2")
    assert code == 2 and "holds a sweep with epochs 1, not 2" in errors and errors.count("\n") == 1
    assert (out / "results.jsonl").read_bytes() == before


MEASURED = "MEASURED"  # in a line of Python: what leaves a measurement


@pytest.fixture
def line_for_runs(monkeypatch):
    """`line_for_runs({word: line})`: each run of a sweep is a line of Python, by a word in its name; others
    measure something.
    """
    real = shortcuts.job_of
    monkeypatch.setattr(shortcuts.trifeature, "generate", lambda *_: None)  # nobody looks at the images

    def set_lines(lines):
        def job(*arguments):
            made = real(*arguments)
            readout = {"own": {factor: {"accuracy": 50.0, "converged": True} for factor in FACTORS}}
            loss = {"training": 2.0, "matched": 2.0, "mismatched": 4.0}
            course = {"info_nce": [2.0], "ifm_factor": [1.5], "ifm_weight": [1.6]}
            found = json.dumps({"readout": readout, "loss": loss, "course": course})
            measured = f"open({str(made.folder / 'measured.json')!r}, 'w').write({found!r})"
            line = next((line for word, line in lines.items() if word in made.name), MEASURED)
            return Job(made.run, made.folder, [["-c", line.replace(MEASURED, measured)]])

        monkeypatch.setattr(shortcuts, "job_of", job)

    return set_lines


def test_how_a_sweep_ends(tmp_path, sweep, line_for_runs):
    words, out = ["--bits", "0", "--moco-t", "0.07", "0.1", "--seeds", "0", "1"], tmp_path / "sweep"
    line_for_runs({"T0.1_K1024_bits0_infonce_seed1": "raise RuntimeError('no such luck')"})
    code, output, _ = sweep(*words)
    assert code == 1 and output.endswith("runs that failed: 1; the same command tries them again\n")
    assert len(read_results(out)) == 5
    line_for_runs({"seed1": "import os, time; os.kill(os.getppid(), 15); time.sleep(60)"})
    code, output, _ = sweep(*words)
    assert code == 75 and output.endswith("stopped by SIGTERM; continue with the same command\n")
    assert output.startswith("6 runs (5 finished)") and len(read_results(out)) == 5
    line_for_runs({"seed1": f"import os; {MEASURED}; os.kill(os.getppid(), 15)"})
    code, output, _ = sweep(*words)  # stopped when nothing is left to do
    assert code == 0 and "stopped" not in output and len(read_results(out)) == 6
    line_for_runs({})
    code, output, _ = sweep(*words, "--seeds", "0", "1", "2")  # also with more values
    assert code == 0 and output.startswith("9 runs (6 finished)") and len(read_results(out)) == 9


def test_runs_are_every_combination_named_by_all_digits(tmp_path, sweep, line_for_runs):
    line_for_runs({})
    words = ["--bits", "0", "3", "--seeds", "0", "--moco-t", "0.2", ".20", "--bits-per", "image", "view"]
    words += ["--moco-k", "64", "--method", "infonce", "ifm_only", "match_ifm_only"]
    code, output, _ = sweep(*words, "--epsilon", "1e-7", "0.12345678")
    results = {result["name"]: result for result in read_results(tmp_path / "sweep")}
    losses = [f"{m}_eps{e}" for m in ("ifm_only", "match_ifm_only") for e in ("1e-07", "0.12345678")]
    places = [
        f"T0.2_K64_{bits}_{loss}"
        for bits in ("bits0", "bits3", "bits3_per_view")
        for loss in ["infonce", *losses]
    ]
    assert set(results) == {f"{place}_seed0" for place in ["untrained_bits0", "untrained_bits3", *places]}
    assert code == 0 and output.startswith("17 runs")
    for name, result in results.items():
        args = options.pretraining(result["command"][2:]) if result["trained"] else None
        assert args is None or args.method == ("ifm_only" if "ifm" in name else None)
        assert args is None or args.match_ifm == ("match" in name) and args.crops_only
        assert args is None or args.bits_per == ("view" if "view" in name else "image")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "ifm", "--epsilon", "0.1", "-0.1"], "--epsilon: must be at least 0"),
        (["--seeds", "-1"], "--seed: must be"),
        (["--moco-t", "0"], "--moco-t: must be"),
        (["--moco-t", "-0.001"], "--moco-t: must be"),
        (["--moco-k", "-1"], "--moco-k: must be"),
        (["--bits", "-2000"], "--random-bits: must be between 0 and 63, not -2000"),
        (["--epsilon", "0.1", "0.5"], "--epsilon has no effect on InfoNCE: give a --method too"),
        (["--method", "simclr"], "--method: invalid choice: 'simclr'"),
        (["--bits-per", "batch"], "--bits-per: invalid choice: 'batch'"),
        (["--bits"], "argument --bits: expected at least one argument"),
        (["--bits", "64"], "--random-bits: must be between 0 and 63, not 64"),
        (["--epsilom", "0.1"], "--epsilom"),
        (["--jobs", "0"], "--jobs must be at least 1, not 0"),
        (["--seed", "7"], "--seed is set for each run by the sweep itself: give --seeds"),
        (["--match-ifm"], "itself: give --method match_ifm"),
        (["--alpha=2"], "--alpha is set for each run by the sweep itself: leave it out"),
        (["--workers", "4"], "--workers is set for each run"),
        (["-j4"], "-j is set for each run"),
        (["--start-epoch", "1"], "--start-epoch is set for each run"),
        (["--dataset_root", "ROOT"], "--dataset_root is set for each run"),
        (["--schedule", "1"], "--schedule is set for each run by the sweep itself: leave it out"),
        (["--pretrained", "ifm-eps0.1"], "--pretrained is set for each run"),
        (["--image-size", "4"], "--image-size"),
        (["-a", "resnet19"], "torchvision has no classification model 'resnet19'"),
    ],
)
def test_wrong_use_is_a_sentence_and_nothing_is_written(tmp_path, sweep, words, message):
    code, output, errors = sweep(*words)
    assert (code, output) == (2, "") and message in errors
    assert not (tmp_path / "sweep").exists()


def test_the_devices_are_those_that_are_visible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert shortcuts.device_names("cpu") == [""]
    assert shortcuts.device_names("cuda") == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-6")
    assert shortcuts.device_names("cuda") == ["4", "GPU-6"]
