"""Runs in parallel: recorded, stopped and continued; a run that fails is reported and is no result."""

import os
import subprocess
import sys
import time

import pytest

from moco.errors import UserError
from moco.run.launch import Rank
from moco.run.signals import StopRequest
from moco.shortcuts import sweep
from moco.shortcuts.sweep import Job, opened, read_results, run_jobs

MEASURE = "open('{folder}/measured.json', 'w').write('{{\"readout\": 7}}'); print('measured')"
TRAIN = "open('{folder}/checkpoint_0000.pth.tar', 'w'); print('trained')"
DIVERGE = "import sys; print('main_moco.py: error: the loss is nan', file=sys.stderr); sys.exit(3)"


def job(out, name, *lines, seed=0):
    """A Job of lines of Python, `{folder}` in which is the run's folder."""
    folder = out / "runs" / name
    return Job({"seed": seed}, folder, [["-c", line.format(folder=folder)] for line in lines])


def work(out, jobs, parallel=2, keep=False, devices=("",)):
    """(failures, the signal that stopped it) of jobs in the folder `out`."""
    environments = [os.environ | {"PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": name} for name in devices]
    with opened(out, {}), StopRequest(Rank.alone()) as stop:
        return run_jobs(out, jobs, parallel, environments, stop, keep), stop.name


def names(out):
    return [result["name"] for result in read_results(out)]


@pytest.mark.parametrize("keep", [False, True])
def test_runs_are_recorded_with_what_identifies_them(tmp_path, capsys, keep):
    jobs = [job(tmp_path, f"run{seed}", TRAIN, MEASURE, seed=seed) for seed in range(3)]
    assert work(tmp_path, jobs, keep=keep) == ([], None)
    results = sorted(read_results(tmp_path), key=lambda result: result["seed"])
    assert results == [{"name": f"run{seed}", "seed": seed, "readout": 7} for seed in range(3)]
    for seed in range(3):
        folder = tmp_path / "runs" / f"run{seed}"
        assert (folder / "log.txt").read_text() == "trained\nmeasured\n"
        assert (folder / "checkpoint_0000.pth.tar").exists() == keep
    assert capsys.readouterr().out.count(" finished; ") == 3


def test_runs_are_spread_over_the_devices(tmp_path):
    look = (
        "import json, os, time; time.sleep(0.3); "
        "json.dump({{'device': os.environ['CUDA_VISIBLE_DEVICES']}}, open('{folder}/measured.json', 'w'))"
    )
    work(tmp_path, [job(tmp_path, f"run{n}", look) for n in range(4)], 4, devices=("2", "GPU-5"))
    found = {result["name"]: result["device"] for result in read_results(tmp_path)}
    assert found == {"run0": "2", "run1": "GPU-5", "run2": "2", "run3": "GPU-5"}


@pytest.mark.parametrize("parallel", [1, 3])
def test_as_many_run_at_once_as_were_asked_for(tmp_path, parallel):
    look = (
        "import glob, os, time; mine = f'{folder}.runs'; open(mine, 'w'); time.sleep(0.2);"
        "here = glob.glob('{folder}/../*.runs'); time.sleep(0.2); os.unlink(mine);"
        "open('{folder}/measured.json', 'w').write('{{\"at_once\": %d}}' % len(here))"
    )
    work(tmp_path, [job(tmp_path, f"run{n}", look) for n in range(4)], parallel)
    counts = [result["at_once"] for result in read_results(tmp_path)]
    assert len(counts) == 4 and max(counts) <= parallel and (max(counts) > 1) == (parallel > 1)


def test_a_run_that_crashes_is_reported_and_the_others_continue(tmp_path, capsys):
    crash = "print('one line'); raise RuntimeError('no such luck')"
    jobs = [job(tmp_path, "bad", crash, MEASURE), job(tmp_path, "good", TRAIN, MEASURE)]
    jobs.append(job(tmp_path, "killed", "import os; print('x', flush=True); os.kill(os.getpid(), 9)"))
    failures, stopped = work(tmp_path, jobs, parallel=1)
    log = tmp_path / "runs" / "bad" / "log.txt"
    assert failures[0] == f"error: bad ended with exit code 1: RuntimeError: no such luck (see {log})"
    assert failures[1].startswith("error: killed ended with exit code -9: x (see") and stopped is None
    output = capsys.readouterr().out
    assert all(failure in output for failure in failures) and names(tmp_path) == ["good"]
    assert work(tmp_path, [job(tmp_path, "bad", TRAIN, MEASURE)]) == ([], None)  # tried again
    assert names(tmp_path) == ["good", "bad"]


def test_a_run_that_diverges_is_a_result_by_its_exit_code(tmp_path, capsys):
    failures, _ = work(tmp_path, [job(tmp_path, "wild", f"{TRAIN}; {DIVERGE}", MEASURE)])
    expected = {"name": "wild", "seed": 0, "diverged": True, "reason": "the loss is nan"}
    assert failures == [] and read_results(tmp_path) == [expected]
    assert "wild diverged: main_moco.py: error: the loss is nan; 0 left" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "wild" / "checkpoint_0000.pth.tar").exists()
    said = DIVERGE.replace("sys.exit(3)", "sys.exit(1)")  # negative control: the words alone are none
    failures, _ = work(tmp_path, [job(tmp_path, "said", said)])
    assert failures and names(tmp_path) == ["wild"]


STOPPING = """
import os, pathlib, signal, sys, time
checkpoint = pathlib.Path('{folder}/checkpoint_0000.pth.tar')
if checkpoint.exists():
    sys.exit(print('continued'))
def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as in training a second signal would end it
    time.sleep(0.5)
    checkpoint.write_text('')
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
os.kill(os.getppid(), signal.SIGUSR1)
time.sleep(60)
"""


def test_a_sweep_that_is_stopped_continues_where_it_was(tmp_path, capsys):
    start = time.monotonic()
    jobs = [job(tmp_path, name, STOPPING, MEASURE) for name in ("a", "b")]
    assert work(tmp_path, jobs, parallel=1) == ([], "SIGUSR1")
    assert time.monotonic() - start < 30 and read_results(tmp_path) == []
    assert os.listdir(tmp_path / "runs") == ["a"]  # the other was not started
    assert "finished" not in capsys.readouterr().out
    assert work(tmp_path, [jobs[0], job(tmp_path, "b", TRAIN, MEASURE)]) == ([], None)
    assert set(names(tmp_path)) == {"a", "b"}
    assert (tmp_path / "runs" / "a" / "log.txt").read_text() == "continued\nmeasured\n"


def test_a_stop_between_the_commands_of_a_run_does_not_start_the_next(tmp_path):
    last = (
        "import os, signal, time; signal.signal(15, signal.SIG_IGN); os.kill(os.getppid(), 10); time.sleep(1)"
    )
    assert work(tmp_path, [job(tmp_path, "a", last, MEASURE)]) == ([], "SIGUSR1")
    assert read_results(tmp_path) == [] and not (tmp_path / "runs" / "a" / "measured.json").exists()


def test_an_error_of_the_sweep_itself_leaves_no_run_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sweep, "add_result", full)
    long = "import os, time; open('{folder}/pid', 'w').write(str(os.getpid())); time.sleep(60)"
    wait = "import pathlib, time\nwhile not pathlib.Path('{folder}/../long/pid').exists(): time.sleep(0.05)\n"
    start = time.monotonic()
    jobs = [job(tmp_path, "long", long, MEASURE), job(tmp_path, "short", wait + MEASURE)]
    with pytest.raises(UserError, match=r"cannot write to --out .* \(No space left on device\); make room"):
        work(tmp_path, jobs)
    pid = int((tmp_path / "runs" / "long" / "pid").read_text())
    assert time.monotonic() - start < 30  # it was ended, and not waited for
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_one_sweep_at_a_time_works_in_a_folder(tmp_path):
    code = "import sys; from moco.shortcuts.sweep import opened\n"
    code += "with opened(sys.argv[1], {}): print(1, flush=True); input()"
    words = [sys.executable, "-c", code, tmp_path / "out"]
    refused = pytest.raises(UserError, match="another sweep is running in .*out; wait for it")
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with refused, opened(tmp_path / "out", {}):
            pass
        other.kill()
    with opened(tmp_path / "out", {}):
        pass


def test_a_folder_that_holds_no_sweep_or_another_one_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no sweep"), opened(tmp_path, {}):
        pass
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(UserError, match="cannot write to --out"), opened(tmp_path / "thesis.tex", {}):
        pass
    for _ in range(2):
        with opened(tmp_path / "out", {"lr": 0.03, "data": None}):
            pass
    for other in ({"lr": 0.1, "data": None}, {"lr": 0.03, "data": "x"}, {"lr": 0.03, "data": None, "b": 1}):
        refused = pytest.raises(UserError, match=r"holds a sweep with (lr 0.03, not 0.1|data None|b None)")
        with refused, opened(tmp_path / "out", other):
            pass


@pytest.mark.parametrize("name", ["sweep.json", "results.jsonl"])
def test_a_damaged_file_is_named(tmp_path, name):
    assert work(tmp_path, [job(tmp_path, "a", MEASURE)]) == ([], None)
    whole = (tmp_path / name).read_text()
    (tmp_path / name).write_text(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{name} is damaged .*: restore it, or choose another --out"):
        work(tmp_path, [job(tmp_path, "b", MEASURE)])
    assert (tmp_path / name).read_text() == whole[: len(whole) // 2]
