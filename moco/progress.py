"""One line of progress with the time that is left, for tools that work through many items."""

import sys
import time


def duration(seconds):
    """Seconds as a person says them: '9 s', '4 min 05 s', '2 h 03 min'."""
    seconds = int(seconds + 0.5)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Progress:
    """Counts items up to `total` and shows how many are done and how long the rest will take, on standard
    error.

    On a terminal the line is rewritten twice a second; elsewhere (a log file) a line is added every ten
    seconds. `unit` names what is counted; `scale` divides the counts when they are shown (1e6 for bytes
    shown as MB). Use it as a context manager: the line is ended on the way out, also after an exception.
    """

    def __init__(self, label, total, unit="", scale=1, stream=None):
        self.label, self.total, self.unit, self.scale = label, total, unit, scale
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.done = self.resumed = 0
        self.start = self.shown = time.monotonic()
        self.line_open = False

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._show()
        if self.line_open:
            self.stream.write("\n")
            self.stream.flush()

    def skip(self, count):
        """Count items that were there already; they do not enter the estimate of the time left."""
        self.done += count
        self.resumed += count

    def update(self, count=1):
        """Count items that were just done."""
        self.done += count
        now = time.monotonic()
        if now - self.shown >= (0.5 if self.terminal else 10):
            self.shown = now
            self._show()

    def _show(self):
        elapsed = time.monotonic() - self.start
        fresh = self.done - self.resumed
        number = f"{self.done / self.scale:.0f}" + (f"/{self.total / self.scale:.0f}" if self.total else "")
        text = f"{self.label}: {number} {self.unit}".rstrip()
        if self.total and self.done >= self.total:
            text += f" in {duration(elapsed)}"
        elif self.total and fresh:
            text += f", {duration(elapsed / fresh * (self.total - self.done))} left"
        if self.terminal:
            self.stream.write(f"\r{text:<79.79}")
            self.line_open = True
        else:
            self.stream.write(text + "\n")
        self.stream.flush()
