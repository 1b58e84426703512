"""What the figure of a sweep of moco.shortcuts shows, for each way in which the encoders were read."""

from moco.measure import NAMES
from moco.shortcuts_results import (
    columns_of,
    differences,
    loss_at_chance,
    rows,
    score,
    second_readings,
    sound,
    untrained,
)

GAIN = "gain"  # of the last column over epsilon 0, paired by seed


def readings(results):
    """A Reading for each way in which the encoders were read."""
    found = [Reading(results)]
    for name, second in second_readings(results).items():
        if rows(second):
            found.append(Reading(second, NAMES[name], found[0].shown))
    return found


class Reading:
    """What there is to draw of one way of reading.

    runs: {(recipe, T, bits, epsilon): {seed: run}} of sound ones; columns: the factors and the worst of
    several; shown: these, and the gain of the last if there is one; recipes, temperatures, bits, epsilons,
    places (recipe, T): all that were tried, in order; tried, diverged: numbers of runs; how: the reading.
    """

    def __init__(self, results, how=None, shown=None):
        self.how = how
        found = rows(results)
        self.runs = {key: sound(runs) for key, runs in found.items()}
        self.tried, sound_ones = (sum(map(len, each.values())) for each in (found, self.runs))
        self.diverged = self.tried - sound_ones
        self.columns = columns_of(results)
        self.differences = differences(found, self.columns[-1:])
        self.untrained, self.chance = untrained(results), loss_at_chance(results)
        self.shown = shown or [*self.columns, *([GAIN] if self.differences else [])]
        self.places = list(dict.fromkeys(key[:2] for key in self.runs))
        self.recipes, self.temperatures, self.bits, self.epsilons = map(_once, zip(*self.runs, strict=True))

    def label(self, what):
        return f"gain of {self.columns[-1]}" if what == GAIN else f"{what}, %"

    def values(self, key, what):
        """Of each run of a setting, what a panel shows; none for the gain of epsilon 0."""
        if what == GAIN:
            return [found[self.columns[-1]] for found in self.differences.get(key, {}).values()]
        return [score(run, what) for run in self.runs[key].values()]

    def losses(self, key, what):
        """InfoNCE of the same runs."""
        seeds = self.differences.get(key, {}) if what == GAIN else self.runs[key]
        return [self.runs[key][seed]["losses"]["info_nce"] for seed in seeds]

    def levels(self, what, bits=None):
        """The same of untrained encoders."""
        chosen = [run for run in self.untrained if bits is None or run["bits"] == bits]
        return [0.0] if what == GAIN else [score(run, what) for run in chosen]


def _once(values):
    return sorted(set(values))
