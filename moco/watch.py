"""What can end a run between two steps: a signal, and a loss that is no number; agreed on by all processes.

A process that stopped alone would leave the others waiting in the next step's collectives. So every step each
process tells the others what it has seen, in a message of two numbers that travels while the next step
computes, and all of them read the same answer at the same step.
"""

import contextlib
import os
import signal
import threading
import time

import torch
import torch.distributed as dist

from moco.distributed import from_first

PREEMPTED = 75  # exit code of a run that was told to stop and can go on: EX_TEMPFAIL of sysexits.h
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE = 30.0  # seconds in which a process without a parent saves
SAME = 1.0  # seconds in which a signal that comes twice, from the terminal and from a parent, counts once


class Signals:
    """Remembers the first of SIGNALS while the block runs; a second one ends the process at once.

    `name` of the first, such as "SIGTERM", or None. For the main thread.
    """

    name = None

    def __enter__(self):
        self.name, self._when = None, 0.0
        self._before = {number: signal.signal(number, self._heard) for number in SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _heard(self, number, _):
        now = time.monotonic()
        if self.name is None:
            self.name, self._when = signal.Signals(number).name, now
        elif now - self._when > SAME:
            os._exit(128 + number)


@contextlib.contextmanager
def nothing_to_save():
    """While the block runs and no Signals are heard, SIGTERM and SIGUSR1 end it at once, as what can go on.

    SIGINT does as ever, by KeyboardInterrupt.
    """

    def leave(number, _):
        raise SystemExit(PREEMPTED)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_without(parent):
    """Tell this process to stop, by SIGTERM, when the process `parent`, which started it, is gone; end it
    when it has not stopped in GRACE seconds.

    By itself torch has the system send SIGINT then, to spawned processes alone, and they ignore it where the
    parent does, as all that a script starts in the background does.
    """

    def look():
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=look, daemon=True).start()


class Watch:
    """Tells each step whether the run is to stop, alike on all processes.

    signals: a Signals. The answers come a step later than what they are about: on one process and on a CPU by
    no more than that, on a GPU by as many steps as the program is ahead of it, because nothing waits for it.
    """

    def __init__(self, signals, process):
        self.signals, self.process = signals, process
        self._group = dist.new_group(backend="gloo") if process.world_size > 1 else None
        self._asked = None  # the message under way and its handle
        self._flags = []  # (event, flag on the host) of losses that a GPU is still computing
        self._bad = False

    def step(self, loss):
        """Look at a step's loss (0-dim. tensor). Returns (told to stop, a loss was not finite) so far."""
        self._look(torch.isfinite(loss.detach()))
        return self._answer()

    def last(self):
        """The same after the last step, with nothing left under way; waits for the device."""
        while self._flags:
            event, flag = self._flags.pop(0)
            event.synchronize()
            self._bad |= not bool(flag)
        seen = self._answer()
        if self._asked is not None:
            message, handle = self._asked
            handle.wait()
            self._asked, seen = None, message.bool().tolist()
        return seen

    def leave(self, where, kept):
        """End the program on all processes, as one was told to: the first says where, and what is kept."""
        self.last()
        name = self.signals.name or "a signal to another process"
        self.process.say(f"stopped {where}, as {name} said: {kept}")
        from_first(None)  # all wait for the line: who leaves first may take the others along
        raise SystemExit(PREEMPTED)

    def _look(self, finite):
        if finite.device.type == "cuda":
            flag = torch.empty((), dtype=torch.bool, pin_memory=True)
            flag.copy_(finite, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._flags.append((event, flag))
            while self._flags and self._flags[0][0].query():
                self._bad |= not bool(self._flags.pop(0)[1])
        else:
            self._bad |= not bool(finite)

    def _answer(self):
        seen = torch.tensor([self.signals.name is not None, self._bad], dtype=torch.int32)
        if self._group is None:
            return seen.bool().tolist()
        answer = [False, False]
        if self._asked is not None:
            message, handle = self._asked
            handle.wait()
            answer = message.bool().tolist()
        self._asked = seen, dist.all_reduce(seen, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return answer
