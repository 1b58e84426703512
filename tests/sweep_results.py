"""Results of a sweep as moco.shortcuts records them, of random numbers, and what a test makes of them."""

import itertools
import random

import numpy as np
from scipy import stats

EPSILONS, TEMPERATURES, SEEDS = (0, 0.05, 0.5), (0.07, 0.2), (0, 1, 2)
FACTORS = ("shape", "texture", "color")
PLACES = list(itertools.product(TEMPERATURES, EPSILONS))


def made(kind="trifeature", recipes=("crops", "v2"), bits=(0,), temperatures=TEMPERATURES, shared=False):
    """Results of a sweep, in the order of their end, which is any. shared: with a second reading, of bits."""
    rng = random.Random(0)

    def readout():
        values = {factor: rng.uniform(20, 90) for factor in FACTORS}
        return {name: {"accuracy": v, "chance": 10.0, "converged": True} for name, v in values.items()}

    found = [
        {"name": f"untrained_bits{b}_seed{s}", "trained": False, "seed": s, "bits": b, "readout": readout()}
        for s, b in itertools.product(SEEDS, bits)
    ]
    for s, b, recipe, T, epsilon in itertools.product(SEEDS, bits, recipes, temperatures, EPSILONS):
        place = {"seed": s, "bits": b, "recipe": recipe, "T": T, "epsilon": epsilon}
        losses = {"info_nce": rng.uniform(1, 3)}
        found.append({"name": f"{recipe}_T{T}_eps{epsilon}_bits{b}_seed{s}", "trained": True, **place,
                      "readout": readout(), "losses": losses})  # fmt: skip
    rng.shuffle(found)
    for result in found if shared else ():
        if result["bits"]:
            result["readout_shared_bits"] = readout()
    return [{"kind": kind, **result} for result in found]


def of(results, **place):
    """The runs of a setting by seed, as the tests find them."""
    mine = [r for r in results if all(r.get(name) == value for name, value in place.items())]
    return sorted(mine, key=lambda result: result["seed"])


def second_reading(results):
    """The results as they were with the second reading alone."""
    return [
        {k: v for k, v in result.items() if k != "readout_shared_bits"}
        | {"readout": result.get("readout_shared_bits", result["readout"])}
        for result in results
    ]


def scores(runs, factor):
    values = [[run["readout"][f]["accuracy"] for f in FACTORS] for run in runs]
    return np.array([min(v) if factor == "worst" else v[FACTORS.index(factor)] for v in values])


def half(values):
    return stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))


def diverged(results, **place):
    """The same results, in which the runs of a place diverged."""
    found = []
    for result in results:
        if result["trained"] and all(result[name] == value for name, value in place.items()):
            result = {k: v for k, v in result.items() if k not in ("readout", "losses")}
            result |= {"diverged": True, "reason": "the loss of epoch 3 became nan or infinite"}
        found.append(result)
    return found
