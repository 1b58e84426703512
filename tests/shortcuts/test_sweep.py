"""Runs in parallel: recorded, stopped and continued; what fails is told and never stands for a result."""

import os
import subprocess
import sys
import time

import pytest

from moco.errors import UserError
from moco.run.launch import Rank
from moco.run.signals import StopRequest
from moco.shortcuts import sweep
from moco.shortcuts.sweep import Job, add_result, opened, read_results, run_jobs

MEASURE = "open('{folder}/measured.json', 'w').write('{{\"readout\": 7}}'); print('measured')"
LEAVE = "open('{folder}/checkpoint_0000.pth.tar', 'w'); print('trained')"
DIVERGE = "import sys; print('main_moco.py: error: the loss is nan', file=sys.stderr); sys.exit(3)"


def job(out, name, *lines, seed=0):
    """A Job of lines of Python, `{folder}` in which is the run's folder."""
    folder = out / "runs" / name
    return Job({"seed": seed}, folder, [["-c", line.format(folder=folder)] for line in lines])


def work(out, jobs, parallel=2, keep=False):
    """(failures, the signal that stopped it) of jobs in the folder `out`."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with opened(out, {}), StopRequest(Rank.alone()) as stop:
        return run_jobs(out, jobs, parallel, environment, stop, keep), stop.name


@pytest.mark.parametrize("keep", [False, True])
def test_runs_are_recorded_with_what_identifies_them(tmp_path, capsys, keep):
    jobs = [job(tmp_path, f"run{seed}", LEAVE, MEASURE, seed=seed) for seed in range(3)]
    assert work(tmp_path, jobs, keep=keep) == ([], None)
    results = sorted(read_results(tmp_path), key=lambda result: result["seed"])
    assert results == [{"name": f"run{seed}", "seed": seed, "readout": 7} for seed in range(3)]
    for seed in range(3):
        folder = tmp_path / "runs" / f"run{seed}"
        assert (folder / "log.txt").read_text() == "trained\nmeasured\n"
        assert (folder / "checkpoint_0000.pth.tar").exists() == keep
    assert capsys.readouterr().out.count(" finished; ") == 3


@pytest.mark.parametrize("parallel", [1, 3])
def test_as_many_run_at_once_as_were_asked_for(tmp_path, parallel):
    look = (
        "import os, time; open('{folder}/../'+str(os.getpid())+'.at_work', 'w'); time.sleep(0.15);"
        "here = [n for n in os.listdir('{folder}/..') if n.endswith('.at_work')]; time.sleep(0.15);"
        "os.unlink('{folder}/../'+str(os.getpid())+'.at_work');"
        "open('{folder}/measured.json', 'w').write('{{\"at_once\": %d}}' % len(here))"
    )
    work(tmp_path, [job(tmp_path, f"run{n}", look) for n in range(4)], parallel)
    counts = [result["at_once"] for result in read_results(tmp_path)]
    assert len(counts) == 4 and max(counts) <= parallel and (max(counts) > 1) == (parallel > 1)


def test_a_run_that_crashes_is_told_and_the_others_go_on(tmp_path, capsys):
    crash = "print('one line'); raise RuntimeError('no such luck')"
    jobs = [job(tmp_path, "bad", crash, MEASURE), job(tmp_path, "good", LEAVE, MEASURE)]
    jobs.append(job(tmp_path, "killed", "import os; print('x', flush=True); os.kill(os.getpid(), 9)"))
    failures, stopped = work(tmp_path, jobs, parallel=1)
    log = tmp_path / "runs" / "bad" / "log.txt"
    assert failures[0] == f"error: bad ended with exit code 1: RuntimeError: no such luck (see {log})"
    assert failures[1].startswith("error: killed ended with exit code -9: x (see") and stopped is None
    assert [result["name"] for result in read_results(tmp_path)] == ["good"]
    output = capsys.readouterr().out
    assert all(failure in output for failure in failures) and "good finished; 1 left" in output
    assert work(tmp_path, [job(tmp_path, "bad", LEAVE, MEASURE)]) == ([], None)  # tried again
    assert [result["name"] for result in read_results(tmp_path)] == ["good", "bad"]


def test_a_run_that_diverges_is_a_result_by_its_exit_code(tmp_path, capsys):
    failures, _ = work(tmp_path, [job(tmp_path, "wild", f"{LEAVE}; {DIVERGE}", MEASURE)])
    (result,) = read_results(tmp_path)
    assert failures == [] and result["diverged"] is True and result["reason"] == "the loss is nan"
    assert (
        "readout" not in result and "wild diverged: main_moco.py: error: the loss" in capsys.readouterr().out
    )
    assert not (tmp_path / "runs" / "wild" / "checkpoint_0000.pth.tar").exists()
    said = DIVERGE.replace("sys.exit(3)", "sys.exit(1)")  # negative control: the words alone are none
    failures, _ = work(tmp_path, [job(tmp_path, "said", said)])
    assert failures and len(read_results(tmp_path)) == 1


def test_wrong_use_in_one_run_is_wrong_in_all_and_ends_the_sweep(tmp_path):
    wrong = "import sys; print('main_moco.py: error: --lr must be above 0', file=sys.stderr); sys.exit(2)"
    long = "import time; time.sleep(60)"
    start = time.monotonic()
    jobs = [job(tmp_path, "long", long), job(tmp_path, "wrong", wrong), job(tmp_path, "other", long)]
    with pytest.raises(UserError, match=r"wrong ended with: main_moco.py: error: --lr must be above 0 \(see"):
        work(tmp_path, jobs)
    assert time.monotonic() - start < 30 and not (tmp_path / "runs" / "other" / "measured.json").exists()


STOPPING = """
import os, pathlib, signal, sys, time
checkpoint = pathlib.Path('{folder}/checkpoint_0000.pth.tar')
if checkpoint.exists():
    sys.exit(print('went on'))
def stop(*_):
    checkpoint.write_text('')
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
os.kill(os.getppid(), signal.SIGUSR1)
time.sleep(60)
"""


def test_a_sweep_that_is_stopped_goes_on_where_it_was(tmp_path, capsys):
    def jobs():
        return [job(tmp_path, name, STOPPING, MEASURE) for name in ("a", "b", "c")]

    start = time.monotonic()
    assert work(tmp_path, jobs(), parallel=1) == ([], "SIGUSR1")
    assert time.monotonic() - start < 30 and read_results(tmp_path) == []
    assert os.listdir(tmp_path / "runs") == ["a"]  # the others were not begun
    assert "finished" not in capsys.readouterr().out
    for name in ("b", "c"):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "checkpoint_0000.pth.tar").write_text("")
    assert work(tmp_path, jobs()) == ([], None)
    assert {result["name"] for result in read_results(tmp_path)} == {"a", "b", "c"}
    assert (tmp_path / "runs" / "a" / "log.txt").read_text() == "went on\nmeasured\n"


def test_a_stop_between_the_commands_of_a_run_does_not_begin_the_next(tmp_path):
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


def test_a_reader_of_the_lines_who_leaves_is_no_full_disk(tmp_path, monkeypatch):
    def gone(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sweep, "print", gone, raising=False)
    with pytest.raises(BrokenPipeError):
        work(tmp_path, [job(tmp_path, "a", MEASURE)])


def test_one_sweep_at_a_time_works_in_a_folder(tmp_path):
    code = "import sys; from moco.shortcuts.sweep import opened\n"
    code += "with opened(sys.argv[1], {}): print(1, flush=True); input()"
    words = [sys.executable, "-c", code, tmp_path / "out"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, **pipes) as other:
        other.stdout.readline()
        with (
            pytest.raises(UserError, match="a sweep is at work in .*out; wait for it"),
            opened(tmp_path / "out", {}),
        ):
            pass
        other.kill()
    with opened(tmp_path / "out", {}):
        pass


def test_a_folder_that_is_no_sweep_or_another_one_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no sweep"), opened(tmp_path, {}):
        pass
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(UserError, match="cannot write to --out"), opened(tmp_path / "thesis.tex", {}):
        pass
    out = tmp_path / "out"
    for _ in range(2):
        with opened(out, {"lr": 0.03, "data": None}):
            pass
    for other in ({"lr": 0.1, "data": None}, {"lr": 0.03, "data": "x"}, {"lr": 0.03, "data": None, "b": 1}):
        with (
            pytest.raises(UserError, match=r"holds a sweep with (lr 0.03, not 0.1|data None|b None)"),
            opened(out, other),
        ):
            pass
    for damaged in ("[1]", "{"):
        (out / "sweep.json").write_text(damaged)
        with pytest.raises(UserError, match="sweep.json cannot be read"), opened(out, {}):
            pass


def test_results_are_added_whole(tmp_path, monkeypatch):
    assert read_results(tmp_path) == []
    add_result(tmp_path, {"name": "a"})
    monkeypatch.setattr("moco.files.os.fsync", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        add_result(tmp_path, {"name": "b"})
    monkeypatch.undo()
    assert read_results(tmp_path) == [{"name": "a"}] and os.listdir(tmp_path) == ["results.jsonl"]
    add_result(tmp_path, {"name": "b"})
    assert read_results(tmp_path) == [{"name": "a"}, {"name": "b"}]
    for damaged in ('{"na', "3", "{}", "[]"):
        (tmp_path / "results.jsonl").write_text(f'{{"name": "a"}}\n{damaged}')
        with pytest.raises(UserError, match=r"line 2 of .*results.jsonl is damaged .*remove it, and its run"):
            read_results(tmp_path)
