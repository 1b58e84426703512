"""Downloads in several processes: one that is stopped, two at once, and how much memory one takes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from fake_web import fake_web, file_on_disk, whole
from test_download import DATA, get, names, ranges

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_download_is_continued(tmp_path, number):
    with fake_web(whole(DATA, '"1"', pace=30)) as web:
        child = FORK.Process(target=get, args=(web, tmp_path), kwargs={"timeout": 20})
        child.start()
        part = tmp_path / "model.pth.part"
        wait_for(lambda: part.exists() and part.stat().st_size > 2_000_000)
        os.kill(child.pid, number)
        child.join(10)
        assert child.exitcode not in (0, None)
        assert names(tmp_path) == ["model.pth.part", "model.pth.part.json"]
        size = part.stat().st_size
        web.answers = [whole(DATA, '"1"')]
        assert get(web, tmp_path).read_bytes() == DATA
    assert ranges(web) == [None, f"bytes={size}-"]


def test_two_processes_share_one_download(tmp_path, capfd):
    with fake_web(whole(DATA, pace=0.5)) as web:
        first, second = (FORK.Process(target=get, args=(web, tmp_path)) for _ in range(2))
        first.start()
        wait_for((tmp_path / "model.pth.part").exists)
        second.start()
        for child in (first, second):
            child.join(10)
        assert [first.exitcode, second.exitcode] == [0, 0]
    assert len(web.requests) == 1 and "waiting for another process" in capfd.readouterr().err
    assert (tmp_path / "model.pth").read_bytes() == DATA and names(tmp_path) == ["model.pth"]


def test_the_second_process_goes_on_when_the_first_is_killed(tmp_path):
    with fake_web(whole(DATA, '"1"', pace=30), whole(DATA, '"1"')) as web:
        first, second = (
            FORK.Process(target=get, args=(web, tmp_path), kwargs={"timeout": 20}) for _ in range(2)
        )
        first.start()
        wait_for(lambda: web.requests)
        second.start()
        time.sleep(0.2)
        assert len(web.requests) == 1 and second.is_alive()
        first.kill()
        second.join(10)
        assert second.exitcode == 0 and len(web.requests) == 2
        first.join()
    assert (tmp_path / "model.pth").read_bytes() == DATA and names(tmp_path) == ["model.pth"]


MEASURED = """
import re, sys, time
from pathlib import Path
from moco.download import download

def peak():  # of this process since exec, in MB (ru_maxrss would count what the parent had at the fork)
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

before, start = peak(), time.monotonic()
download(sys.argv[1], sys.argv[2])
print(peak() - before, time.monotonic() - start)
"""


def test_a_large_file_takes_little_memory(tmp_path):
    size = 300_000_000
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(size)
    with fake_web(file_on_disk(tmp_path / "sparse")) as web:
        command = [sys.executable, "-c", MEASURED, f"{web.url}/x", str(tmp_path / "model.pth")]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    megabytes, seconds = map(float, result.stdout.split())
    assert (tmp_path / "model.pth").stat().st_size == size
    assert 0 < megabytes < 30 and seconds < 20  # about 2 MB; under 1 s where the disk keeps up
