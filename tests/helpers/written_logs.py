"""What runs have written about themselves: log.jsonl, and TensorBoard's files as it reads them."""

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Of a line of a step, and of an epoch.
NUMBERS = {
    *("loss", "acc1", "acc5", "lr", "seconds", "data_seconds", "images_per_s", "memory_mb", "queue_fill"),
    *("pos_similarity", "neg_similarity", "alignment", "uniformity", "grad_norm", "queue_mean"),
    *("info_nce", "ifm_weight", "ifm_weight_p95", "ifm_factor"),  # with --method
}


def lines_of(folder):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    text = (folder / "log.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def scalars(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    found = [((tag, e.step), e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
    assert len(found) == len(dict(found))  # none twice
    return dict(found)


def expected_scalars(entries, steps=3):
    """{(tag, place): value} of the lines of steps and epochs, of which a later one counts."""
    expected = {}
    for entry in entries:
        place = entry["epoch"] * steps + entry.get("step", steps - 1) + 1
        expected |= {(f"{entry['kind']}/{name}", place): entry[name] for name in NUMBERS}
        expected |= {("epoch/rankme", place): entry["rankme"]} if "rankme" in entry else {}
        expected |= {(f"epoch/knn/{name}", place): value for name, value in entry.get("knn", {}).items()}
    return expected
