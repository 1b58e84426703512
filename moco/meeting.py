"""Where the processes of a run find each other, at its start and after one of them died."""

import contextlib
import hashlib
import os
import re
import sys
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from moco.errors import UserError, first_line

PATIENCE = 900.0  # seconds until a process that meets nobody gives up, as an agent of torchrun does
SILENCE = 20.0  # seconds of waiting before it says so


def enter_group(url, rank, world_size, backend):
    """Meet the others at `url` (tcp://HOST:PORT or env://) and start torch's process group.

    Raises UserError.
    """
    place = "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ) if url == "env://" else url
    try:
        with _said_after(SILENCE, f"rank {rank} of {world_size} is waiting for the others at {place}"):
            store, *_ = next(dist.rendezvous(url, rank, world_size, timeout=timedelta(seconds=PATIENCE)))
            store = dist.PrefixStore(agreed_start(store, rank, world_size, PATIENCE), store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    except (RuntimeError, ValueError) as error:
        raise UserError(_no_meeting(place, rank, error)) from error


def agreed_start(store, rank, world_size, patience):
    """A name of this start of the run that all its ranks agree on and that no earlier start had.

    torchrun can keep its store when it starts the processes again, with what the dead left there, and its
    TORCHELASTIC_RESTART_COUNT is one agent's own: a node that came back counts from 0. Therefore rank 0
    numbers the start and the others sign it, each with a word that nobody used before; the start counts for
    those whose words rank 0 repeats. Raises RuntimeError after `patience` seconds, or when the store is gone.
    """
    end, word = time.monotonic() + patience, uuid.uuid4().hex
    start = store.add("starts", 1) if rank == 0 else 0
    signatures = [f"start {{}} rank {other}" for other in range(1, world_size)]
    while time.monotonic() < end:
        if rank == 0:
            keys = [key.format(start) for key in signatures]
            if not keys or store.check(keys):
                store.set(f"start {start}", " ".join(store.get(key).decode() for key in keys))
                return f"start {start}"
        else:
            if (newest := store.add("starts", 0)) != start:
                start = newest
                store.set(signatures[rank - 1].format(start), word)
            if store.check([f"start {start}"]) and word in store.get(f"start {start}").decode():
                return f"start {start}"
        time.sleep(0.05)
    raise RuntimeError(f"not all {world_size} processes came within {patience:.0f} s")


def code_hash(folder=Path(__file__).parent):
    """The start of a SHA-256 of the package in `folder` and of the programs beside it."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.py"), *folder.parent.glob("main_*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def _said_after(seconds, line):
    timer = threading.Timer(seconds, print, (line,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def peer_loss(error):
    """What to tell the user when the RuntimeError `error` says that another process is gone, or None."""
    text = str(error)
    if re.search("Connection (closed|reset) by peer", text):
        return "another process of the run ended; its message says why"
    # What gloo says of a wait that took too long, and of every later one.
    found = re.search(
        r"(?:gloo/transport/\S+\] |(?=Application timeout))(.*?)(?:\. This is|$)", text, re.DOTALL
    )
    if found:
        return (
            f"another process of the run does not answer ({found[1]}); its node, or the network between, has "
            "failed"
        )
    return None


def _no_meeting(place, rank, error):
    text = str(error)
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return f"the port of {place} is in use; name another one in --dist-url (torchrun: --master-port)"
    return (
        f"rank {rank} could not meet the others at {place} ({first_line(error)}); check address, port and "
        "world size"
    )
