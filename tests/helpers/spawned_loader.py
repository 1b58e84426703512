"""A process that is spawned, starts data workers, and ends in some way while its loader lives."""

import time

from moco.data.ring import RingLoader

kept = []


def fill_at_leisure(slot, position, key):
    time.sleep(0.01)


def load_and_end(rank, endings):
    """endings[rank]: "raise" (a ValueError) or "exit" (with 75)."""
    kept.append(RingLoader(fill_at_leisure, 2, 20, 4, workers=2))
    kept.append(kept[0].epoch([[0] * 20] * 1000))
    next(kept[1])
    if endings[rank] == "exit":
        raise SystemExit(75)
    raise ValueError("as intended")
