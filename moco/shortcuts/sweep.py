"""Many small runs in parallel: started, recorded, stopped and continued.

Finished runs are lines of OUT/results.jsonl, what they have in common is in OUT/sweep.json, and each works in
a folder of its own, OUT/runs/NAME.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from moco.errors import DivergedError, UserError, printable
from moco.files import atomic_file
from moco.lock import LOCK, Lock

SETTINGS, RESULTS, LOG, MEASURED = "sweep.json", "results.jsonl", "log.txt", "measured.json"


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
        with Lock(
            out / LOCK,
            lambda holder: (
                f"another sweep is running in {out}; wait for it, or stop it ({holder.process}, "
                f"{holder.program})"
            ),
        ):
            if not path.is_file():
                with atomic_file(path) as temporary:
                    temporary.write_text(json.dumps(settings, indent=1) + "\n")
            before = _parsed(path.read_text(), path)
            for name in sorted(before.keys() | settings.keys()):
                if before.get(name) != settings.get(name):
                    raise UserError(
                        f"{out} holds a sweep with {name} {before.get(name)}, not {settings.get(name)}: give "
                        "the same settings, or choose another --out"
                    )
            yield
    except BrokenPipeError:  # the reader of our output has gone
        raise
    except OSError as error:
        message = f"cannot write to --out {out} ({error.strerror}); make room, or choose another place"
        raise UserError(message) from error


def read_results(out):
    """The finished runs of a sweep: dicts, in the order of their end."""
    path = Path(out) / RESULTS
    return [_parsed(line, path) for line in path.read_text().splitlines()] if path.is_file() else []


def _parsed(text, path):
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or choose another --out") from error


def add_result(out, result):
    """Append one line; the file is replaced atomically, so it never ends in the middle of one."""
    lines = [json.dumps(line) + "\n" for line in [*read_results(out), result]]
    with atomic_file(Path(out) / RESULTS) as temporary:
        temporary.write_text("".join(lines))


def run_jobs(out, jobs, parallel, environments, stop, keep_checkpoints=False):
    """Carry out Jobs, `parallel` at a time, and record each that finishes or diverges (exit code 3) in `out`.
    Returns sentences on those that failed.

    environments: variables of the commands, one dict for each device; a command gets that of a device with
    the fewest commands. stop: a moco.run.signals.StopRequest. When a stop is requested no other command
    starts, those that run get SIGTERM, and all have ended when this returns.
    """
    waiting = [(job, job.commands) for job in jobs]
    running, failures, terminated = {}, [], False  # {process: (job, its further commands, device)}
    try:
        while running or (waiting and not stop.requested()):
            while waiting and len(running) < parallel and not stop.requested():
                job, (command, *further) = waiting.pop(0)
                used = [device for *_, device in running.values()]
                device = min(range(len(environments)), key=used.count)
                running[_start(job, command, environments[device])] = job, further, device
            # Once, as a second signal would end them without a checkpoint.
            if stop.requested() and not terminated:
                for process in running:
                    process.terminate()
                terminated = True
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                job, further, _ = running.pop(process)
                code, log = process.returncode, job.folder / LOG
                if code == 0 and further:
                    waiting.insert(0, (job, further))
                elif code in (0, DivergedError.exit_code):
                    _record(out, job, code, keep_checkpoints)
                    outcome = f"diverged: {_last_line(log)}" if code else "finished"
                    print(f"{job.name} {outcome}; {len(waiting) + len(running)} left", flush=True)
                elif not stop.requested():
                    end = f"ended with exit code {code}: {_last_line(log)}"
                    failures.append(f"error: {job.name} {end} (see {log})")
                    print(printable(failures[-1]), flush=True)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return failures


def _start(job, command, environment):
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / LOG, "ab") as log:
        return subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _last_line(log):
    lines = log.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "no output")


def _record(out, job, code, keep_checkpoints):
    if code:
        found = {"diverged": True, "reason": _last_line(job.folder / LOG).split("error: ")[-1]}
    else:
        found = json.loads((job.folder / MEASURED).read_text())
    add_result(out, {"name": job.name, **job.run, **found})
    for path in () if keep_checkpoints else job.folder.glob("checkpoint_*"):
        path.unlink()
