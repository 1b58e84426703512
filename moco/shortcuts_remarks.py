"""Sentences under the table of a sweep: on runs that diverged, readouts at an end, runs made otherwise."""

import math

from moco.factors import hidden
from moco.measure import RENEWED, SHARED, both_readings
from moco.shortcuts_results import second_readings, without_reading

NOT_READ = {SHARED: "the same bits for all images", RENEWED: "renewed statistics of BatchNorm"}


def remarks(results):
    """What a reader of the numbers must know of single runs, a sentence each."""
    yield from _on_pictures(results)
    yield from on_failures(results)
    for reading, words in NOT_READ.items():
        if reading in second_readings(results) and (names := without_reading(results, reading)):
            yield f"These were not read with {words}: {', '.join(names)}"
    yield from _on_weight_decays(results)
    yield from _on_differences_in_making(results)


def _on_pictures(results):
    """What pictures were trained on and read from, where that is not the whole of Trifeature."""
    names = ("hide", "read_without", "recolor")
    for hide, read, recolor in sorted({tuple(r.get(name) or "" for name in names) for r in results}):
        if recolor:
            shown = " ".join(hidden(read or hide))
            yield f"Trained on views of colors at random, and read from the same pictures, all with {shown}."
        elif hide and read:
            trained, shown = (" ".join(hidden(words)) for words in (hide, read))
            yield f"Trained on pictures that all have {trained}, and read from the same with {shown}."
        elif hide:
            yield f"All pictures have the same {_words(hide)}, those to train on and those to read from."
        elif read:
            yield f"Trained on all factors, and read from the same pictures with one {_words(read)} for all."


def _words(words):
    return words.replace("=", ", ")


def on_failures(results):
    """Which runs diverged, and which readouts did not converge, or not in a fit made to choose the decay."""
    yield from (f"{run['name']} diverged: {run['reason']}" for run in results if run.get("diverged"))
    from moco.readout import TOLERANCE  # not before a sweep's arguments are checked: it imports torch

    taken, tried = {}, {}
    for result in results:
        for factor, found in both_readings(result).items():
            if not found["converged"]:
                kind = tried if found.get("gradient", math.inf) <= TOLERANCE else taken
                kind.setdefault(result["name"], []).append(factor)
    for words, found in (
        ("Readouts that did not converge", taken),
        ("Readouts that converged, but for a fit made to choose the weight decay", tried),
    ):
        if found:
            each = "; ".join(f"{name}: {', '.join(factors)}" for name, factors in found.items())
            yield f"{words}: {each}"


def _on_weight_decays(results):
    """How many took an end of the grid, where more would perhaps have read better."""
    for word, end_of in (("least", min), ("greatest", max)):
        chosen, ends = {}, set()
        for result in results:
            for factor, readout in both_readings(result).items() if "weight_decays" in result else ():
                end = end_of(result["weight_decays"])  # the same for all of a sweep
                chosen.setdefault(factor, []).append(readout["weight_decay"] == end)
                ends.add(end)
        if any(map(any, chosen.values())):
            counts = ", ".join(f"{factor} {sum(found)} of {len(found)}" for factor, found in chosen.items())
            grid_end = " or ".join(f"{end:g}" for end in sorted(ends))
            yield f"Readouts that chose the {word} weight decay there is, {grid_end}: {counts}"


def _on_differences_in_making(results):
    made_by = {}
    for result in results:
        known = {"code": result.get("code", "unknown"), **result.get("versions", {}), **_hardware(result)}
        for name, version in known.items():
            made_by.setdefault(name, []).append(version)
    for name, found in made_by.items():
        if len(set(found)) > 1:
            each = ", ".join(f"{version} (runs: {found.count(version)})" for version in dict.fromkeys(found))
            yield f"Not all runs were made by the same {name}: {each}"


def _hardware(result):
    """Which processor and GPU it was made on, as far as it says so."""
    return {name: found for name in ("cpu", "gpu") if (found := result.get("hardware", {}).get(name))}
