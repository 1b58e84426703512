"""A progress line with the remaining time, and durations and sizes in words."""

import sys
import time

from moco.errors import printable


def duration(seconds):
    """Seconds in words: '9 s', '4 min 05 s', '2 h 03 min', '3 d 04 h'."""
    seconds = int(seconds + 0.5)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600:02d} h"


def in_words(count):
    """A number of bytes in words: '75.3 KB', '308 MB', '25.3 GB'."""
    size, unit = next((pair for pair in ((1e9, "GB"), (1e6, "MB")) if count >= pair[0]), (1e3, "KB"))
    return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:.0f} {unit}"


class Progress:
    """Shows on standard error how many of `total` items are finished and the remaining time.

    On a terminal the line is rewritten twice a second; elsewhere (a log file) a line is added every ten
    seconds. A context manager: the line is ended on the way out, also after an exception.
    """

    def __init__(self, label, total, unit="", stream=None):
        self.label, self.total, self.unit = printable(label), total, unit
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.finished = 0
        self.start = self.shown = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._show()
        if self.terminal:
            self.stream.write("\n")
            self.stream.flush()

    def update(self, count=1):
        """Add `count` finished items."""
        self.finished += count
        now = time.monotonic()
        if now - self.shown >= (0.5 if self.terminal else 10):
            self.shown = now
            self._show()

    def _show(self):
        elapsed = time.monotonic() - self.start
        text = f"{self.label}: {self.finished}/{self.total} {self.unit}".rstrip()
        if self.finished >= self.total:
            text += f" in {duration(elapsed)}"
        elif self.finished:
            text += f", {duration(elapsed / self.finished * (self.total - self.finished))} left"
        self.stream.write(f"\r{text:<79.79}" if self.terminal else text + "\n")
        self.stream.flush()
