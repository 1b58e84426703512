"""Many small runs in parallel: started, recorded, stopped and continued.

Finished runs are lines of OUT/results.jsonl, what they have in common is in OUT/sweep.json, and each works in
a folder of its own, OUT/runs/NAME.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from moco.errors import DivergedError, UserError
from moco.files import atomic_file, locked

SETTINGS, RESULTS, LOCK, LOG, MEASURED = "sweep.json", "results.jsonl", ".lock", "log.txt", "measured.json"


@dataclass(frozen=True)
class Job:
    """One run: what identifies it in the results, its folder, and its commands, the words after `python`. The
    last command leaves MEASURED in the folder.
    """

    run: dict
    folder: Path
    commands: list

    @property
    def name(self):
        return self.folder.name


@contextlib.contextmanager
def opened(out, settings):
    """Hold the folder `out`, made if missing, for a sweep with these settings, while the block runs.

    UserError when another sweep holds it, it is of other settings, or it holds anything but a sweep: then
    nothing is written.
    """
    out, path = Path(out), Path(out) / SETTINGS
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not path.is_file() and any(name != LOCK for name in os.listdir(out)):
            raise UserError(f"{out} is not empty and holds no sweep (no {SETTINGS}); choose another --out")
        with locked(out / LOCK, f"a sweep is at work in {out}; wait for it, or stop it"):
            if not path.is_file():
                with atomic_file(path) as temporary:
                    temporary.write_text(json.dumps(settings, indent=1) + "\n")
            _check_same(path, settings)
            yield
    except BrokenPipeError:  # the reader of our output has gone
        raise
    except OSError as error:
        raise UserError(f"cannot write to --out {out} ({error.strerror}); make room there") from error


def _check_same(path, settings):
    try:
        before = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); choose another --out") from error
    differ = [
        f"{name} {before.get(name)}, not {settings.get(name)}"
        for name in sorted(before.keys() | settings.keys())
        if before.get(name) != settings.get(name)
    ]
    if differ:
        raise UserError(
            f"{path.parent} holds a sweep with {'; '.join(differ)}: give it the same settings, or choose "
            "another --out"
        )


def read_results(out):
    """The finished runs of a sweep: dicts, in the order of their end."""
    path, results = Path(out) / RESULTS, []
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
    lines = [json.dumps(line) + "\n" for line in [*read_results(out), result]]
    with atomic_file(Path(out) / RESULTS) as temporary:
        temporary.write_text("".join(lines))


def run_jobs(out, jobs, parallel, environment, stop, keep_checkpoints=False):
    """Carry out Jobs, `parallel` at a time, and record each that finishes or diverges (exit code 3) in `out`.
    Returns sentences on those that failed.

    environment: variables of the commands; stop: a moco.run.signals.StopRequest. When a stop is requested no
    other command starts, those at work get SIGTERM, and all have ended when this returns. UserError when a
    command calls its use wrong (exit code 2), which it is for all.
    """
    active, ending = set(), threading.Event()

    def carry_out(job):
        """(exit code, last line) of the job's last command."""
        job.folder.mkdir(parents=True, exist_ok=True)
        for words in job.commands:
            with open(job.folder / LOG, "a+b") as log:
                begin = log.seek(0, os.SEEK_END)
                process = subprocess.Popen(
                    [sys.executable, *words],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
                active.add(process)
                if ending.is_set():
                    process.terminate()
                code = process.wait()
                active.discard(process)
                log.seek(begin)
                said = log.read().decode(errors="replace").split("\n")
            if code or ending.is_set():
                break
        return code, next((line for line in reversed(said) if line.strip()), "no output")

    def end():
        ending.set()
        for future in futures:
            future.cancel()
        for process in list(active):
            process.terminate()

    failures = []
    with ThreadPoolExecutor(parallel) as pool:
        futures = {pool.submit(carry_out, job): job for job in jobs}
        waiting = set(futures)
        try:
            while waiting:
                finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                if stop.requested() and not ending.is_set():
                    end()
                for future in finished:
                    if future.cancelled():
                        continue
                    job, (code, line) = futures[future], future.result()
                    log = job.folder / LOG
                    if code in (0, DivergedError.exit_code):
                        if not _record(out, job, code, line, keep_checkpoints):
                            continue
                        outcome = "diverged: " + line if code else "finished"
                        print(f"{job.name} {outcome}; {len(waiting)} left", flush=True)
                    elif ending.is_set():
                        continue
                    elif code == UserError.exit_code:
                        raise UserError(f"{job.name} ended with: {line} (see {log})")
                    else:
                        failures.append(f"error: {job.name} ended with exit code {code}: {line} (see {log})")
                        print(failures[-1], flush=True)
        except BaseException:
            end()
            raise
    return failures


def _record(out, job, code, line, keep_checkpoints):
    """Write a result, of a job that has one; a job can be stopped between its commands."""
    if code:
        found = {"diverged": True, "reason": line.split("error: ")[-1]}
    elif (job.folder / MEASURED).is_file():
        found = json.loads((job.folder / MEASURED).read_text())
    else:
        return False
    add_result(out, {"name": job.name, **job.run, **found})
    for path in () if keep_checkpoints else job.folder.glob("checkpoint_*"):
        path.unlink()
    return True
