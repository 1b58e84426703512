"""Durations and sizes in words, and the line of progress."""

import io
import re

import pytest

from moco.progress import Progress, duration, in_words


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.6, "1 min 00 s"), (245, "4 min 05 s"), (7400, "2 h 03 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_sizes():
    assert [in_words(n) for n in (75_300, 308e6, 25.3e9, 2e12)] == ["75.3 KB", "308 MB", "25.3 GB", "2000 GB"]


def test_progress_in_a_log_file_and_on_a_terminal():
    log, terminal = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    for stream in (log, terminal):
        with Progress("reading\n", 3, "images", stream) as progress:
            progress.update(3)
    assert re.fullmatch(r"reading\\n: 3/3 images in 0 s\n", log.getvalue())
    assert re.fullmatch(r"\rreading\\n: 3/3 images in 0 s *\n", terminal.getvalue())
