"""How many batches of a RingLoader arrive wrong on null CUDA, whose copies may be late: prints "0 of 120"."""

import sys

import torch

from moco.data.ring import RingLoader


def fill(slot, position, key):
    slot.pixels[:, position] = key % 251
    slot.targets[position] = key


def main(workers, size, count=60):
    loader = RingLoader(fill, 2, size, 8, workers, "cuda")
    wrong = 0
    for _ in range(2):
        kept = []
        for batch in loader.epoch(range(first, first + size) for first in range(0, count * size, size)):
            kept.append((batch.pixels.clone(), batch.targets.clone()))  # late too, and the batch is let go
        for number, (pixels, targets) in enumerate(kept):
            keys = torch.arange(number * size, (number + 1) * size)
            expected = (keys % 251).view(-1, 1, 1, 1).to(torch.uint8)
            wrong += not (torch.equal(targets.cpu(), keys) and (pixels.cpu() == expected).all())
    loader.close()
    print(wrong, "of", 2 * count)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
