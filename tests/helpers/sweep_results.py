"""Results of a sweep as moco.shortcuts records them, of random numbers."""

import itertools
import random

SEEDS, TEMPERATURES, BITS = (0, 1, 2), (0.07, 0.2), (0, 4)
LOSSES = ((None, 0), ("ifm", 0.1), ("ifm_only", 0.1))
FACTORS = ("shape", "texture", "color")


def made():
    """Results of a sweep, in the order of their end, which is any."""
    rng = random.Random(0)

    def measured(bits):
        readings = ("readout", "readout_shared_bits") if bits else ("readout",)
        return {
            reading: {
                f: {"accuracy": rng.uniform(20, 90), "chance": 10.0, "converged": True} for f in FACTORS
            }
            for reading in readings
        }

    found = [
        {"name": f"untrained_{s}_{b}", "trained": False, "seed": s, "bits": b, **measured(b)}
        for s, b in itertools.product(SEEDS, BITS)
    ]
    for s, b, T, (method, epsilon) in itertools.product(SEEDS, BITS, TEMPERATURES, LOSSES):
        run = {"trained": True, "seed": s, "bits": b, "T": T, "method": method, "epsilon": epsilon}
        losses = {"info_nce": rng.uniform(1, 3)}
        found.append({"name": f"{s}_{b}_{T}_{method}", **run, **measured(b), "losses": losses})
    rng.shuffle(found)
    return found
