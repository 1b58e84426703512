"""python -m moco.shortcuts randbit: what it starts, what it refuses before it writes, how it ends."""

import json

import pytest
import torch

from moco import options
from moco.shortcuts import __main__ as shortcuts
from moco.shortcuts.sweep import Job, read_results

SMALL = (
    "-a shufflenet_v2_x0_5 --image-size 16 --epochs 1 -b 8 --moco-k 16 --bn-splits 2 --device cpu --jobs 2"
)
LISTS = ["--bits", "2", "--epsilon", "0.1", "--seeds", "5"]


@pytest.fixture
def sweep(folders, tmp_path, cli):
    """`sweep(*words)`: (exit code, output, errors) of a small sweep on `folders` in tmp_path/sweep."""

    def run(*words):
        place = ["--data", folders, "--out", tmp_path / "sweep"]
        return cli(shortcuts.main, "randbit", *SMALL.split(), *place, *words)

    return run


@pytest.mark.slow
def test_a_small_sweep_from_its_command_to_its_figure(folders, tmp_path, sweep):
    out = tmp_path / "sweep"
    code, output, errors = sweep(*LISTS)
    assert (code, errors) == (0, ""), output
    assert output.startswith("2 runs (0 finished), 2 in parallel on cpu\n")
    results = {result["name"]: result for result in read_results(out)}
    assert set(results) == {"untrained_bits2_seed5", "T0.2_bits2_ifm_eps0.1_seed5"}
    for result in results.values():
        assert (result["seed"], result["bits"]) == (5, 2)
        assert result["versions"]["torch"] == torch.__version__ and result["device"] == "cpu"
        readouts = [result[reading]["class"] for reading in ("readout", "readout_shared_bits")]
        assert all(round(one["accuracy"] * 9 / 100, 6) in range(10) for one in readouts)  # of 9 images
    trained = results["T0.2_bits2_ifm_eps0.1_seed5"]
    assert [trained[name] for name in ("T", "method", "epsilon")] == [0.2, "ifm", 0.1]
    log = (out / "runs" / trained["name"] / "log.jsonl").read_text().splitlines()
    assert trained["losses"]["training"] == json.loads(log[-1])["loss"]

    start, program, *command = trained["command"]  # one can give it oneself
    args = options.pretraining(command)
    assert (start, program, args.folder, args.seed) == ("python", "main_moco.py", str(folders), 5)
    assert (args.epsilon, args.alpha, args.method, args.random_bits) == (0.1, 1.0, "ifm", 2)
    assert args.mlp and args.cos and args.output_dir == str(out / "runs" / trained["name"])
    table = (out / "table.md").read_text()
    assert f"| 0.2 | 2 | ifm | 0.1 | 1 | {trained['losses']['training']:.3f} |" in table and table in output
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.rglob("*.pth.tar")) and not list(out.rglob("*.tmp"))

    before = (out / "results.jsonl").read_bytes()
    code, again, _ = sweep(*LISTS)
    assert code == 0 and again.startswith("2 runs (2 finished)") and table in again
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

    def set_lines(lines):
        def job(*arguments):
            made = real(*arguments)
            readout = {"class": {"accuracy": 50.0, "chance": 10.0, "converged": True}}
            found = json.dumps({"readout": readout, "losses": {"training": 2.0}})
            measured = f"open({str(made.folder / 'measured.json')!r}, 'w').write({found!r})"
            line = next((line for word, line in lines.items() if word in made.name), MEASURED)
            return Job(made.run, made.folder, [["-c", line.replace(MEASURED, measured)]])

        monkeypatch.setattr(shortcuts, "job_of", job)

    return set_lines


def test_how_a_sweep_ends(tmp_path, sweep, line_for_runs):
    words, out = ["--bits", "0", "--seeds", "0", "1"], tmp_path / "sweep"
    line_for_runs({"infonce_seed1": "raise RuntimeError('no such luck')"})
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
    words = ["--bits", "0", "--seeds", "0", "--moco-t", "0.2", ".20", "--method", "ifm", "ifm_only"]
    code, output, _ = sweep(*words, "--epsilon", "-0.0", "0", "1e-7", "0.12345678")
    results = {result["name"]: result for result in read_results(tmp_path / "sweep")}
    losses = ["infonce"] + [f"{m}_eps{e}" for m in ("ifm", "ifm_only") for e in ("1e-07", "0.12345678")]
    assert set(results) == {"untrained_bits0_seed0", *(f"T0.2_bits0_{loss}_seed0" for loss in losses)}
    assert code == 0 and output.startswith("6 runs")
    assert all(("--method" in run["command"]) == bool(run.get("method")) for run in results.values())


def test_the_views_are_crops_unless_others_are_asked_for(folders):
    run = {"trained": True, "seed": 0, "bits": 0, "T": 0.2, "method": None, "epsilon": 0}
    for others, crops in (([], True), (["--aug-plus"], False)):
        args = options.pretraining(shortcuts.words_of(run, folders, "out", others))
        assert (args.crops_only, args.aug_plus) == (crops, not crops)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epsilon", "0.1", "-0.1"], "--epsilon: must be at least 0"),
        (["--seeds", "-1"], "--seed: must be"),
        (["--method", "simclr"], "--method: invalid choice: 'simclr'"),
        (["--bits"], "argument --bits: expected at least one argument"),
        (["--bits", "64"], "--random-bits: must be between 0 and 63, not 64"),
        (["--epsilom", "0.1"], "--epsilom"),
        (["--jobs", "0"], "--jobs must be at least 1, not 0"),
        (["--data", "nowhere"], "there is no folder nowhere"),
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
