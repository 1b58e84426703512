"""Locks: one holder at a time, with and without flock, on this machine and others."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import signal
import threading
from pathlib import Path

import pytest
from forked_program import forked

from moco import lock
from moco.errors import UserError
from moco.files import atomic_folder
from moco.lock import Holder, Lock, lock_beside, locked


def test_a_lock_is_held_by_one_and_goes_with_its_process(tmp_path):
    def holder():
        with locked(tmp_path / "file", "taken"):
            print("held", flush=True)
            signal.pause()

    pid, output = forked(holder, (1,))
    assert output.readline() == "held\n"
    with pytest.raises(UserError, match="taken"), locked(tmp_path / "file", "taken"):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with locked(tmp_path / "file", "taken"):
        pass


WITHOUT = [None, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF, "no fcntl"]  # flock, by mounts


@contextlib.contextmanager
def held(path):
    """A process that holds a Lock on `path`: its number."""

    def holder():
        with Lock(path):
            print("held", flush=True)
            signal.pause()

    pid, output = forked(holder, (1,))
    try:
        assert output.readline() == "held\n"
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it is dead, and still in the list of processes


def refusal(holder):
    return f"refused: {holder.process}, {holder.program}"


@pytest.mark.parametrize("number", WITHOUT, ids=str)
def test_a_living_process_keeps_others_out_and_a_dead_one_does_not(tmp_path, monkeypatch, number, capsys):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    if number == "no fcntl":
        monkeypatch.setattr(lock, "fcntl", None)
    elif number:
        monkeypatch.setattr(fcntl, "flock", flock)
    path = tmp_path / ".lock"
    with held(path) as pid:
        before = path.read_bytes()
        with pytest.raises(UserError, match=rf"refused: process {pid}, program since \d{{4}}-"):
            Lock(path, refusal)
        assert path.read_bytes() == before
    with Lock(path, refusal), Lock(path, refusal):  # twice in a process, as in tests of programs
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == [] and capsys.readouterr().err == ""
    os.waitpid(pid, 0)


@pytest.mark.parametrize("hidden", ["/proc/self/ns/pid", "/proc"])
def test_a_process_that_cannot_be_looked_for_counts_while_it_gives_signs_of_life(
    tmp_path, monkeypatch, hidden, capsys
):
    """In another container of this machine, and on Windows, which has no /proc; neither with flock."""
    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "SILENCE", 0.5)
    monkeypatch.setattr(lock, "BEAT", 0.05)
    path, read_text = tmp_path / ".lock", Path.read_text
    if hidden == "/proc":
        elsewhere = lambda p: Path("/none") if p.is_relative_to("/proc") else p  # noqa: E731
        monkeypatch.setattr(Path, "read_text", lambda p, *a, **k: read_text(elsewhere(p), *a, **k))
    with held(path) as pid:
        if hidden != "/proc":
            monkeypatch.setattr(os, "readlink", lambda _: "pid:[of another container]")
        with pytest.raises(UserError, match=f"refused: process {pid}"):
            Lock(path, refusal)
    with Lock(path, refusal):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == [] and capsys.readouterr().err.count("for a sign of life of") == 2
    os.waitpid(pid, 0)


def test_without_a_refusal_a_lock_is_waited_for(tmp_path):
    path, obtained = tmp_path / ".lock", threading.Event()

    def wait():
        with Lock(path):
            obtained.set()

    with held(path) as pid:
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not obtained.wait(0.3)
    assert obtained.wait(5)
    waiting.join()
    os.waitpid(pid, 0)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("flock", ["free", "kept by the server", "none"])
@pytest.mark.parametrize("lives", [False, True])
def test_a_process_of_another_machine_counts_while_it_gives_signs_of_life(
    tmp_path, monkeypatch, flock, lives, capsys
):
    path = tmp_path / ".lock"
    path.write_text(
        json.dumps(
            dataclasses.asdict(dataclasses.replace(Holder.this(), machine="another", host="node7", pid=4711))
        )
    )
    monkeypatch.setattr(lock, "SILENCE", 0.3)
    monkeypatch.setattr(lock, "BEAT", 0.05)
    if flock == "none":
        monkeypatch.setattr(lock, "fcntl", None)
    end = threading.Event()

    def renew():
        while not end.wait(0.05):
            os.utime(path)

    with contextlib.ExitStack() as stack:
        if flock == "kept by the server":
            stack.enter_context(locked(path))
        if lives:
            renewing = threading.Thread(target=renew)
            renewing.start()
            stack.callback(lambda: (end.set(), renewing.join()))
            with pytest.raises(UserError, match="refused: process 4711 on node7, "):
                Lock(path, refusal)
            assert json.loads(path.read_text())["pid"] == 4711
        else:
            with Lock(path, refusal):
                assert json.loads(path.read_text())["pid"] == os.getpid()
            assert os.listdir(tmp_path) == []
    assert "for a sign of life of process 4711 on node7" in capsys.readouterr().err


def test_a_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    path = tmp_path / ".lock"
    with Lock(path):
        os.utime(path, (0, 0))
        times = threading.Event()
        assert any(os.stat(path).st_mtime > 1 or times.wait(0.02) for _ in range(100))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 3}', '{"other": 3}', "\0" * 9000])
def test_a_lock_file_with_anything_in_it_that_nobody_holds_is_taken(tmp_path, monkeypatch, content):
    monkeypatch.setattr(lock, "SILENCE", 0.05)
    path = tmp_path / ".lock"
    path.write_text(content)
    with Lock(path, refusal):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_folder_that_another_process_makes_is_refused_at_once(tmp_path):
    path = tmp_path / "a"
    with held(lock_beside(path)) as pid:
        before = os.listdir(tmp_path)
        with (
            pytest.raises(UserError, match=f"process {pid} is making {path} .*: wait for it, or name"),
            atomic_folder(path),
        ):
            pass
        assert os.listdir(tmp_path) == before
    os.waitpid(pid, 0)
    with atomic_folder(path) as temporary:
        (temporary / "x").touch()
    assert os.listdir(tmp_path) == ["a"]


def test_a_signal_while_a_lock_is_taken_leaves_no_file(tmp_path, monkeypatch):
    write = os.write

    def write_and_leave(*arguments):
        write(*arguments)
        raise SystemExit(75)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write_and_leave)
        with contextlib.suppress(SystemExit):
            Lock(tmp_path / "lock")
    assert os.listdir(tmp_path) == []
    with Lock(tmp_path / "lock"):  # control: it is there while it is held
        assert os.listdir(tmp_path) == ["lock"]
