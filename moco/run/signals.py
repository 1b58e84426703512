"""Stopping a run between two steps, on a signal that any of its ranks received."""

import contextlib
import os
import signal
import time

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the run was stopped and can be continued
SIGNALS = tuple(  # not every system has all of them
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
)
SAME = (
    1.0  # seconds within which a signal that arrives twice, from the terminal and from a parent, counts once
)


def heard():
    """SIGNALS without SIGHUP where nohup has it ignored."""
    hangup = getattr(signal, "SIGHUP", None)
    return [number for number in SIGNALS if number != hangup or signal.getsignal(number) != signal.SIG_IGN]


class StopRequest:
    """Remembers the first of SIGNALS while the block runs; a second one ends the process at once.

    rank: a moco.run.launch.Rank. `name`: of the signal, such as "SIGTERM", or None. Main thread only.
    """

    def __init__(self, rank):
        self.rank, self.name = rank, None

    def __enter__(self):
        self._before = {number: signal.signal(number, self._handle) for number in heard()}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _handle(self, number, _):
        if self.name is None:
            self.name, self._time = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._time > SAME:
            os._exit(128 + number)

    def requested(self):
        """Whether any rank received a signal, the same answer on all (collective: ask once per step)."""
        return self.rank.any(self.name is not None)

    def exit(self, stopped, advice):
        """Print what was `stopped`, by which signal, and `advice` on rank 0; exit ranks with EXIT_CODE."""
        self.rank.print(f"{stopped} ({self.name or 'a signal to another rank'});")
        self.rank.print(f"   {advice}")
        self.rank.barrier()  # a rank that leaves early would end the others
        raise SystemExit(EXIT_CODE)


@contextlib.contextmanager
def exit_on_signal():
    """While the block runs outside a StopRequest, SIGTERM, SIGUSR1 and SIGHUP exit with EXIT_CODE."""

    def leave(*_):
        raise SystemExit(EXIT_CODE)

    before = {number: signal.signal(number, leave) for number in heard() if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
