"""Runs side by side: recorded, stopped and continued; what fails is told and never stands for a result."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from started_runs import alive, all_end

from moco import sweep
from moco.errors import UserError
from moco.meeting import code_hash
from moco.sweep import Job, add_result, locked, read_results, run_jobs, settle
from moco.watch import Signals

MEASURE = "open('{folder}/measured.json', 'w').write('{{\"readout\": 7}}'); print('measured')"
LEAVE = "open('{folder}/checkpoint_0000.pth.tar', 'w'); print('trained')"


def job(out, name, *codes, seed=0):
    """A Job of Python lines, `{folder}` in which is the run's folder."""
    folder = out / "runs" / name
    whats = ["pretrain", "measure"][-len(codes) :]
    commands = [(w, ["-c", code.format(folder=folder)]) for w, code in zip(whats, codes, strict=True)]
    return Job({"seed": seed, "trained": True}, commands, folder)


def work(out, jobs, side_by_side=2, keep=False):
    """(failures, the signal that stopped it) of jobs in the folder `out`."""
    with locked(out) as lock, Signals() as signals:
        settle(out, {})
        return run_jobs(out, jobs, side_by_side, dict(os.environ), lock, signals, keep), signals.name


@pytest.mark.parametrize("keep", [False, True])
def test_runs_are_recorded_with_what_identifies_them(tmp_path, capsys, keep):
    jobs = [job(tmp_path, f"run{seed}", LEAVE, MEASURE, seed=seed) for seed in range(3)]
    assert work(tmp_path, jobs, keep=keep) == ([], None)
    results = sorted(read_results(tmp_path), key=lambda result: result["seed"])
    for seed, result in enumerate(results):
        seconds = result.pop("seconds")
        expected = {"name": f"run{seed}", "seed": seed, "trained": True, "readout": 7, "code": code_hash()}
        assert result == expected
        assert set(seconds) == {"pretrain", "measure"} and all(0 < s < 20 for s in seconds.values())
        folder = tmp_path / "runs" / f"run{seed}"
        assert (folder / "log.txt").read_text() == "trained\nmeasured\n"
        assert (folder / "checkpoint_0000.pth.tar").exists() == keep
    assert len(results) == 3 and capsys.readouterr().out.count(": done; ") == 3
    assert all(list(json.loads(line)) for line in (tmp_path / "results.jsonl").read_text().splitlines())


@pytest.mark.parametrize("side_by_side", [1, 3])
def test_as_many_run_at_once_as_were_asked_for(tmp_path, side_by_side):
    look = (
        "import os, time; open('{folder}/../'+str(os.getpid())+'.at_work', 'w'); time.sleep(0.15);"
        "here = [n for n in os.listdir('{folder}/..') if n.endswith('.at_work')]; time.sleep(0.15);"
        "os.unlink('{folder}/../'+str(os.getpid())+'.at_work');"
        "open('{folder}/measured.json', 'w').write('{{\"at_once\": %d}}' % len(here))"
    )
    work(tmp_path, [job(tmp_path, f"run{n}", look) for n in range(4)], side_by_side)
    counts = [result["at_once"] for result in read_results(tmp_path)]
    assert len(counts) == 4 and max(counts) <= side_by_side and (max(counts) > 1) == (side_by_side > 1)


def test_a_run_that_crashes_is_told_and_the_others_go_on(tmp_path, capsys):
    crash = "print('one line'); raise RuntimeError('no such luck')"
    jobs = [job(tmp_path, "bad", crash, MEASURE), job(tmp_path, "good", LEAVE, MEASURE)]
    jobs.append(job(tmp_path, "killed", "import os; print('x', flush=True); os.kill(os.getpid(), 9)"))
    failures, stopped = work(tmp_path, jobs, side_by_side=1)
    log = tmp_path / "runs" / "bad" / "log.txt"
    assert failures[0] == f"error: bad ended with 1: RuntimeError: no such luck (see {log})"
    assert failures[1].startswith("error: killed ended with -9: x (see") and stopped is None
    assert [result["name"] for result in read_results(tmp_path)] == ["good"]
    output = capsys.readouterr().out
    assert all(failure in output for failure in failures) and "good: done; 1 left" in output
    assert work(tmp_path, [job(tmp_path, "bad", LEAVE, MEASURE)]) == ([], None)  # tried again
    assert [result["name"] for result in read_results(tmp_path)] == ["good", "bad"]


SENTENCE = f"the loss of epoch 3 {sweep.DIVERGED} in step 2 or just before, at lr 9"
DIVERGE = f"print('main_moco.py: error: {SENTENCE}', file=sys.stderr); sys.exit(2)"


def test_a_run_that_diverges_is_a_result(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # with which the order of its lines would be sure
    code = f"{LEAVE}; import sys; print('Epoch: [3]'); {DIVERGE}"
    failures, _ = work(tmp_path, [job(tmp_path, "wild", code, MEASURE)])
    (result,) = read_results(tmp_path)
    assert failures == [] and result["diverged"] is True and result["reason"] == SENTENCE
    assert "readout" not in result
    assert capsys.readouterr().out.startswith(f"wild: diverged: {SENTENCE}; 0 left")
    log = tmp_path / "runs" / "wild" / "log.txt"
    assert log.read_text().splitlines() == ["trained", "Epoch: [3]", f"main_moco.py: error: {SENTENCE}"]
    assert not (tmp_path / "runs" / "wild" / "checkpoint_0000.pth.tar").exists()


def test_a_sentence_of_an_earlier_attempt_or_of_a_killed_run_is_no_result(tmp_path):
    folder = tmp_path / "runs" / "again"
    for code, reason in (
        ("import os; os.kill(os.getpid(), 9)", "again ended with -9: it said nothing"),  # of an earlier one
        (f"import os, sys; print('{SENTENCE}', flush=True); os.kill(os.getpid(), 9)", "again ended with -9"),
        ("import sys; sys.exit(2)", "again ended with 2: it said nothing"),
    ):
        with locked(tmp_path):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "log.txt").write_text(f"error: {SENTENCE}\n")
            settle(tmp_path, {})
        failures, _ = work(tmp_path, [job(tmp_path, "again", code)])
        assert failures[0].startswith(f"error: {reason}") and read_results(tmp_path) == []


STOPPING = """
import os, pathlib, signal, sys, time
checkpoint = pathlib.Path('{folder}/checkpoint_0000.pth.tar')
if checkpoint.exists():
    sys.exit(print('went on'))
def stop(*_):
    checkpoint.write_text('')
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
time.sleep(0.3)
os.kill(os.getppid(), signal.SIGUSR1)
time.sleep(60)
"""


def test_a_sweep_that_is_stopped_goes_on_where_it_was(tmp_path, capsys):
    def jobs():
        return [job(tmp_path, name, STOPPING, MEASURE) for name in ("a", "b", "c")]

    start = time.monotonic()
    assert work(tmp_path, jobs(), side_by_side=1) == ([], "SIGUSR1")
    assert time.monotonic() - start < 30 and read_results(tmp_path) == []
    assert os.listdir(tmp_path / "runs") == ["a"]  # the others were not begun
    spent = json.loads((tmp_path / "runs" / "a" / "seconds.json").read_text())["pretrain"]
    assert spent >= 0.3 and "done" not in capsys.readouterr().out
    for name in ("b", "c"):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "checkpoint_0000.pth.tar").write_text("")
    assert work(tmp_path, jobs()) == ([], None)
    results = {result["name"]: result for result in read_results(tmp_path)}
    assert set(results) == {"a", "b", "c"} and results["a"]["seconds"]["pretrain"] > spent
    assert (tmp_path / "runs" / "a" / "log.txt").read_text() == "went on\nmeasured\n"


def test_a_stop_between_the_commands_of_a_run_does_not_begin_the_next(tmp_path):
    last = "import os, signal; signal.signal(15, signal.SIG_IGN); os.kill(os.getppid(), 10)"
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
    with pytest.raises(UserError, match=r"cannot write to .*\(No space left on device.*same command goes on"):
        work(tmp_path, jobs)
    pid = int((tmp_path / "runs" / "long" / "pid").read_text())
    assert not alive([pid]) and time.monotonic() - start < 30  # it was ended, and not waited for


def test_one_sweep_at_a_time_works_in_a_folder(tmp_path):
    with locked(tmp_path / "out") as lock:
        with (
            pytest.raises(UserError, match="a sweep is at work in .*out; wait for it"),
            locked(tmp_path / "out"),
        ):
            pass
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[lock.fileno()]
        )
    try:  # the run of a sweep that was killed goes on in the folder
        with pytest.raises(UserError, match="a sweep is at work"), locked(tmp_path / "out"):
            pass
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert all_end([child.pid], 1)
    with locked(tmp_path / "out"):
        pass


def test_a_folder_that_is_no_sweep_or_another_one_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no sweep"), locked(tmp_path):
        pass
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(UserError, match="cannot write to --out"), locked(tmp_path / "thesis.tex"):
        pass
    out = tmp_path / "out"
    with locked(out):
        (out / ".sweep.json.x.tmp").write_text("")  # of a sweep that was killed at its start
    with locked(out):
        settle(out, {"lr": 0.03, "factors": None})
    with locked(out):
        settle(out, {"lr": 0.03, "factors": None})
        for other in ({"lr": 0.1, "factors": None}, {"lr": 0.03, "factors": ["shape"]}, {"lr": 0.03, "b": 1}):
            with pytest.raises(UserError, match=r"holds a sweep with (lr 0.03, not 0.1|factors None|b None)"):
                settle(out, other)
        with pytest.raises(UserError, match="with factors None, not 1; lr 0.03, not 3: give it the same"):
            settle(out, {"lr": 3, "factors": 1})
        for damaged in ("[1]", "{"):
            (out / "sweep.json").write_text(damaged)
            with pytest.raises(UserError, match="sweep.json cannot be read"):
                settle(out, {})


def test_results_are_added_whole(tmp_path, monkeypatch):
    assert read_results(tmp_path) == []
    add_result(tmp_path, {"name": "a"})
    monkeypatch.setattr(sweep.os, "fsync", lambda *_: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):
        add_result(tmp_path, {"name": "b"})
    monkeypatch.undo()
    assert read_results(tmp_path) == [{"name": "a"}] and os.listdir(tmp_path) == ["results.jsonl"]
    add_result(tmp_path, {"name": "b"})
    assert read_results(tmp_path) == [{"name": "a"}, {"name": "b"}]
    for damaged in ('{"na', "3", "{}", "[]"):
        (tmp_path / "results.jsonl").write_text(f'{{"name": "a"}}\n{damaged}')
        with pytest.raises(UserError, match=r"line 2 of .*results.jsonl is damaged .*remove it, and its run"):
            read_results(tmp_path)


def test_a_run_that_other_code_began_says_so(tmp_path):
    (tmp_path / "out").mkdir()
    first, second = "import sys; sys.exit(1)", MEASURE
    work(tmp_path / "out", [job(tmp_path / "out", "a", first)])
    (tmp_path / "out" / "runs" / "a" / "code.txt").write_text("0123456789ab")
    work(tmp_path / "out", [job(tmp_path / "out", "a", second)])
    assert read_results(tmp_path / "out")[0]["code"] == f"0123456789ab {code_hash()}"


def test_a_reader_of_the_lines_who_leaves_is_no_full_disk(tmp_path, monkeypatch):
    def gone(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sweep, "print", gone, raising=False)
    with pytest.raises(BrokenPipeError):
        work(tmp_path, [job(tmp_path, "a", MEASURE)])
