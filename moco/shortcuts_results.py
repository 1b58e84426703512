"""The runs of a sweep of moco.shortcuts by what they have in common, and differences paired by seed."""

import math

from moco.measure import NAMES, SHARED

WORST = "worst"  # the factor that a run reads worst
LOSS = "InfoNCE"
SETTING = ("recipe", "T", "bits", "epsilon")  # what runs of one row share; seeds differ


def factors_in(results):
    """The names of what was read, in order; none while all runs diverged."""
    return list(next((result["readout"] for result in results if "readout" in result), ()))


def columns_of(results):
    """What a table or figure shows of each run: the factors and, of several, the worst."""
    factors = factors_in(results)
    return [*factors, WORST] if len(factors) > 1 else factors


def score(result, factor):
    """Accuracy in percent of one factor, or of the one that the run reads worst."""
    if factor == WORST:
        return min(readout["accuracy"] for readout in result["readout"].values())
    return result["readout"][factor]["accuracy"]


def second_readings(results):
    """{name of a second reading: the same runs with it in place of the first}, of those that were made.

    Runs without bits have one reading, which is both; runs `without_reading` are left out.
    """
    names = [name for name in NAMES if any(name in result for result in results if result["trained"])]
    return {name: _with(results, name) for name in names}


def _with(results, name):
    left_out = without_reading(results, name)
    return [
        result | {"readout": result[name]} if name in result else result
        for result in results
        if result["name"] not in left_out
    ]


def without_reading(results, name):
    """Names of runs that lack a second reading, as sweeps of older code; of shared bits, runs with bits."""
    had = [r for r in results if "readout" in r and (r["bits"] or name != SHARED)]
    return [r["name"] for r in had if name not in r]


def rows(results):
    """{(recipe, T, bits, epsilon): its runs by seed}, sorted, of trained runs, diverged ones too."""
    found = {}
    for result in sorted(results, key=lambda result: result["seed"]):
        if result["trained"]:
            found.setdefault(tuple(result[name] for name in SETTING), {})[result["seed"]] = result
    return dict(sorted(found.items()))


def sound(runs):
    """Those of a row's runs that did not diverge, by seed."""
    return {seed: run for seed, run in runs.items() if not run.get("diverged")}


def untrained(results, bits=None):
    """The readouts without training, of a number of bits or of all."""
    return [r for r in results if not r["trained"] and "readout" in r and (bits is None or r["bits"] == bits)]


def loss_at_chance(results):
    """InfoNCE of an encoder that tells nothing apart, or None where runs do not say how many keys."""
    keys = {result["moco_k"] for result in results if "moco_k" in result}
    return math.log(1 + keys.pop()) if len(keys) == 1 else None


def differences(found, columns):
    """Each row of `rows` less that of epsilon 0: {row: {seed: {column: difference}}} of seeds in both."""
    pairs = {}
    for key, runs in found.items():
        base = sound(found.get((*key[:-1], 0.0), {}))
        mine = {seed: (run, base[seed]) for seed, run in sound(runs).items() if seed in base}
        if key[-1] != 0 and mine:
            pairs[key] = {
                seed: {c: value(run, c) - value(plain, c) for c in (LOSS, *columns)}
                for seed, (run, plain) in mine.items()
            }
    return pairs


def learned(found, results, columns):
    """What training with epsilon 0 changed, less the same seed's untrained encoder; as `differences`."""
    pairs = {}
    for key, runs in found.items():
        start = {run["seed"]: run for run in untrained(results, key[2])}
        mine = {seed: (run, start[seed]) for seed, run in sound(runs).items() if seed in start}
        if key[-1] == 0 and mine:
            pairs[key] = {
                seed: {c: score(run, c) - score(before, c) for c in columns}
                for seed, (run, before) in mine.items()
            }
    return pairs


def over_temperatures(pairs, places):
    """{row with T "all": {seed: differences}} of the seeds, if several, that have every T of `places`.

    places: {(recipe, T, bits)}. Runs of one seed at several T start from the same weights and see the same
    order, so they are one sample. Without the loss, which means something else at each T.
    """
    together = {}
    for recipe, bits, epsilon in sorted({(recipe, bits, epsilon) for recipe, _, bits, epsilon in pairs}):
        temperatures = [T for own, T, count in places if (own, count) == (recipe, bits)]
        of_each = [pairs.get((recipe, T, bits, epsilon), {}) for T in temperatures]
        seeds = sorted(set.intersection(*map(set, of_each)))
        if len(of_each) > 1 and len(seeds) > 1:
            means = {seed: _mean_of([mine[seed] for mine in of_each]) for seed in seeds}
            together[recipe, "all", bits, epsilon] = means
    return together


def _mean_of(differences):
    """Column by column, without the loss."""
    columns = [name for name in differences[0] if name != LOSS]
    return {name: sum(one[name] for one in differences) / len(differences) for name in columns}


def value(run, column):
    """What a table or figure holds of a run: the loss in nats, or a score."""
    return run["losses"]["info_nce"] if column == LOSS else score(run, column)


def number(value):
    """All its digits, so that no two are the same, and 0 as 0.0 is."""
    return repr(float(value)).removesuffix(".0")
