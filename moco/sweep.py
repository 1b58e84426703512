"""Many small runs of main_moco.py side by side: started, measured, recorded, stopped and continued.

A run is a dict of what differs between runs; its name is that of its folder in OUT/runs. Finished runs are
lines of OUT/results.jsonl, and what they have in common is in OUT/sweep.json.
"""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from moco.errors import UserError
from moco.files import atomic_file
from moco.progress import duration

ROOT = Path(__file__).resolve().parent.parent
SETTINGS, RESULTS, LOCK, LOG, CODE = "sweep.json", "results.jsonl", ".lock", "log.txt", "code.txt"
DIVERGED = "became nan or infinite"  # of the sentence by which main_moco.py or moco.measure ends then,
BY_A_SENTENCE = 2  # with this exit code


@dataclass
class Job:
    """One run: what identifies it, and the commands that are left of it, each (what it is, words)."""

    run: dict
    commands: list
    folder: Path
    process: subprocess.Popen | None = None
    began: float = 0.0
    told: int = 0  # bytes of the log that are of earlier commands
    seconds: dict = field(default_factory=dict)
    outcome: str | None = None  # once it has a result

    @property
    def name(self):
        return self.folder.name


def settle(out, settings):
    """Note the settings of the sweep in the folder `out`, or check that it has the same. UserError."""
    path = Path(out) / SETTINGS
    if path.is_file():
        try:
            before = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}); choose another --out") from error
        names = sorted(before.keys() | settings.keys())
        differ = [
            f"{name} {before.get(name)}, not {settings.get(name)}"
            for name in names
            if before.get(name) != settings.get(name)
        ]
        if differ:
            raise UserError(
                f"{out} holds a sweep with {'; '.join(differ)}: give it the same settings, or choose "
                "another --out"
            )
        return
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n")


@contextlib.contextmanager
def locked(out):
    """Keep other sweeps out of the folder `out`, made if missing, and give a file that children inherit.

    The lock ends with the last process that has the file, so also when runs outlive a killed sweep. Raises
    UserError when it is taken, and before anything is written where `out` holds what is no sweep.
    """
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        names = os.listdir(out)  # a sweep that was killed at its start leaves hidden files of ours alone
        if SETTINGS not in names and not all(name.startswith((LOCK, f".{SETTINGS}")) for name in names):
            raise UserError(f"{out} is not empty and holds no sweep (no {SETTINGS}); choose another --out")
        lock = open(Path(out) / LOCK, "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"cannot write to --out {out} ({error.strerror}); choose another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"a sweep is at work in {out}; wait for it, or stop it") from error
        except OSError as error:  # a network disk without locks
            raise UserError(
                f"cannot lock {out} ({error.strerror}); choose a folder on another disk"
            ) from error
        yield lock


def read_results(out):
    """The finished runs of a sweep, dicts in the order of their end."""
    path = Path(out) / RESULTS
    results = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else (), start=1):
        try:
            results.append(json.loads(line))
            results[-1]["name"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"line {number} of {path} is damaged ({error}); remove it, and its run is repeated"
            ) from error
    return results


def add_result(out, result):
    """Append one line; the file is replaced as a whole, so it never ends in the middle of one."""
    results = [*read_results(out), result]
    with atomic_file(Path(out) / RESULTS) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in results))


def run_jobs(out, jobs, side_by_side, environment, lock, signals, keep=False):
    """Carry out Jobs, so many side by side, and record each. Returns sentences on those that failed.

    environment: variables of the children; signals: a moco.watch.Signals, by which all stops: whoever asks
    `signals.name` afterwards knows. keep: whether checkpoints stay after they were measured.
    """
    active = []
    try:
        return _run(out, list(jobs), active, side_by_side, environment, lock, signals, keep)
    except BrokenPipeError:  # the reader of our lines has gone
        raise
    except OSError as error:
        raise UserError(
            f"cannot write to {out} ({error.strerror}); make room, and the same command goes on"
        ) from error
    finally:  # nothing is left behind that nobody would measure
        for job in active:
            job.process.terminate()
        for job in active:
            job.process.wait()


def _run(out, waiting, active, side_by_side, environment, lock, signals, keep):
    failures, done, told = [], [], False
    while waiting or active:
        if signals.name and not told:
            told = True
            waiting.clear()
            for job in active:
                job.process.terminate()
        while waiting and len(active) < side_by_side:
            _begin(waiting[0], environment, lock)
            active.append(waiting.pop(0))
        time.sleep(0.1)
        for job in [job for job in active if job.process.poll() is not None]:
            failure, ended = _after(out, job, told or signals.name, keep)
            if failure:
                failures.append(failure)
                print(failure, flush=True)
            if ended:
                active.remove(job)
                if job.outcome:
                    done.append(job)
                    rest = "" if told else f"; {_rest(done, active + waiting, side_by_side)}"
                    print(f"{job.name}: {job.outcome}{rest}", flush=True)
            else:
                _begin(job, environment, lock)
    return failures


def _rest(done, left, side_by_side):
    """How many Jobs are `left` and, once one as long as each of them is `done`, how long they will take."""
    now = time.monotonic()
    took = {trained: [] for trained in (False, True)}  # an untrained encoder is but measured
    for job in done:
        took[job.run["trained"]].append(sum(job.seconds.values()))
    if not left or not all(took[job.run["trained"]] for job in left):
        return f"{len(left)} left"
    means = [fmean(took[job.run["trained"]]) for job in left]
    spent = [sum(job.seconds.values()) + (now - job.began if job.process else 0) for job in left]
    seconds = sum(max(mean - gone, 0) for mean, gone in zip(means, spent, strict=True)) / side_by_side
    return f"{len(left)} left, about {duration(seconds)}"


def _begin(job, environment, lock):
    """Start the next command of a job; what it prints goes to the run's log."""
    job.folder.mkdir(parents=True, exist_ok=True)
    job.seconds = job.seconds or _read_json(job.folder / "seconds.json")
    _note_code(job.folder)
    with open(job.folder / LOG, "a") as log:
        job.told = os.fstat(log.fileno()).st_size
        job.process = subprocess.Popen(
            [sys.executable, *job.commands[0][1]], cwd=ROOT, pass_fds=[lock.fileno()],
            env={**environment, "PYTHONUNBUFFERED": "1"},  # or lines would not be in the order of their time
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    job.began = time.monotonic()


def _after(out, job, stopping, keep):
    """What follows from the end of a job's command: (a sentence if it failed, whether the job is over)."""
    code, (what, _) = job.process.returncode, job.commands.pop(0)
    job.seconds[what] = round(job.seconds.get(what, 0.0) + time.monotonic() - job.began, 1)
    with atomic_file(job.folder / "seconds.json") as temporary:
        temporary.write_text(json.dumps(job.seconds))
    if code:
        said = (job.folder / LOG).read_bytes()[job.told :].decode(errors="replace").strip().splitlines()
        sentence = next((line for line in reversed(said) if DIVERGED in line), None)
        if sentence and code == BY_A_SENTENCE:
            reason = sentence.split("error: ")[-1]
            _record(out, job, f"diverged: {reason}", {"diverged": True, "reason": reason}, keep)
            return None, True
        if stopping:
            return None, True
        last = said[-1] if said else "it said nothing"
        return f"error: {job.name} ended with {code}: {last} (see {job.folder / LOG})", True
    if job.commands:
        return None, bool(stopping)
    _record(out, job, "done", json.loads((job.folder / "measured.json").read_text()), keep)
    return None, True


def _record(out, job, outcome, found, keep):
    code = (job.folder / CODE).read_text()
    add_result(out, {"name": job.name, **job.run, "seconds": job.seconds, "code": code, **found})
    job.outcome = outcome
    if not keep:
        for path in job.folder.glob("checkpoint_*"):
            path.unlink()


def _note_code(folder):
    """Note in a run's folder which code works on it, after any that did before: hashes, a blank between."""
    from moco.meeting import code_hash

    path, now = folder / CODE, code_hash()
    before = path.read_text().split() if path.is_file() else []
    if now not in before:
        with atomic_file(path) as temporary:
            temporary.write_text(" ".join([*before, now]))


def _read_json(path):
    return json.loads(path.read_text()) if path.is_file() else {}
