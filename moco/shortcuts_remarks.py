"""Sentences under the table of a sweep: on runs that diverged, readouts at an end, runs made otherwise."""


def remarks(results):
    """What a reader of the numbers must know of single runs, a sentence each."""
    yield from (f"{run['name']} diverged: {run['reason']}" for run in results if run.get("diverged"))
    unsure = [r["name"] for r in results if not all(x["converged"] for x in r.get("readout", {}).values())]
    if unsure:
        yield f"Readouts of these did not converge: {', '.join(unsure)}"
    yield from _on_weight_decays(results)
    yield from _on_differences_in_making(results)


def _on_weight_decays(results):
    """How many took an end of the grid, where more would perhaps have read better."""
    from moco.readout import WEIGHT_DECAYS

    chosen = {}
    for result in results:
        for factor, readout in result.get("readout", {}).items():
            chosen.setdefault(factor, []).append(readout.get("weight_decay"))
    for word, end in (("least", min(WEIGHT_DECAYS)), ("greatest", max(WEIGHT_DECAYS))):
        counts = [f"{factor} {found.count(end)} of {len(found)}" for factor, found in chosen.items()]
        if any(end in found for found in chosen.values()):
            yield f"Readouts that chose the {word} weight decay there is, {end:g}: {', '.join(counts)}"


def _on_differences_in_making(results):
    made_by = {}
    for result in results:
        for name, version in (result.get("versions", {}) | {"code": result.get("code", "unknown")}).items():
            made_by.setdefault(name, []).append(version)
    for name, found in made_by.items():
        if len(set(found)) > 1:
            each = ", ".join(f"{version} (runs: {found.count(version)})" for version in dict.fromkeys(found))
            yield f"Not all runs were made by the same {name}: {each}"
