"""The README's numbers are those of the runs in .results/."""

import itertools
import math
import re
from pathlib import Path
from statistics import fmean

from moco.shortcuts.report import cell, interval, table
from moco.shortcuts.sweep import read_results

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / ".results"
README = (ROOT / "moco" / "shortcuts" / "README.md").read_text()
TEXT = " ".join(README.split())
OWN, RENEWED, SHARED = "readout", "readout_renewed", "readout_shared_bits"
COLOR = "with_color36", "recolored36"


def accuracies(name, reading, factor, **place):
    """{seed: percent} of trained runs, mean over the temperatures."""
    found = {}
    for run in read_results(RESULTS / name):
        if run["trained"] and place.items() <= run.items():
            found.setdefault(run["seed"], []).append(run.get(reading, run[OWN])[factor]["accuracy"])
    return {seed: fmean(values) for seed, values in found.items()}


def change(one, two):
    assert one.keys() == two.keys() and len(one) >= 3
    return cell([one[seed] - two[seed] for seed in one], sign="+")


def row(first):
    """The other cells of the README's table row that begins with `first`."""
    return re.search(rf"^\| {re.escape(first)} \| (.*) \|$", README, re.MULTILINE)[1].split(" | ")


def test_what_color_takes():
    for first, reading in (
        ("re-estimated on the pictures that are read", RENEWED),
        ("the encoder's own", OWN),
    ):
        sweeps = [[accuracies(name, reading, f) for name in COLOR] for f in ("shape", "texture")]
        assert row(first) == [change(*pair) for pair in sweeps]


def test_what_ifm_changes():
    exclude_0 = {RENEWED: 0, OWN: 0}
    for reading, epsilon in itertools.product(exclude_0, (0.1, 0.2, 0.5)):
        cells = []
        for factor in ("shape", "texture"):
            one, two = (accuracies("with_color", reading, factor, epsilon=e) for e in (epsilon, 0))
            mean, half = interval([one[seed] - two[seed] for seed in one])
            exclude_0[reading] += abs(mean) > half
            cells.append(change(one, two))
        assert reading == OWN or row(str(epsilon)) == cells
    assert exclude_0 == {RENEWED: 2, OWN: 0}
    assert "two do, both of a loss of shape; with the encoders' own statistics none does" in TEXT


def test_the_losses_and_the_bound_of_the_shortcut():
    def loss(name, **place):
        runs = [run for run in read_results(RESULTS / name) if run["trained"]]
        found = [run["losses"]["training"] for run in runs if place.items() <= run.items()]
        return cell(found, 2)

    with_color, recolored = (f"to {loss(name, T=0.07)} and {loss(name, T=0.2)}" for name in COLOR)
    assert f"falls {with_color} nats at T 0.07 and 0.2" in TEXT
    assert f"without it {recolored}, of {math.log(1025):.2f} at chance" in TEXT
    delta = 2**-8
    alone = math.log(1 + 1024 * delta + 1024 * (1 - delta) * math.exp(-1 / 0.2))
    assert f"= {alone:.2f} nats" in TEXT and f"end at {loss('randbit', bits=8, epsilon=0)}." in TEXT


def test_random_bits():
    def shape(reading, bits, epsilon=0):
        return accuracies("randbit", reading, "shape", bits=bits, epsilon=epsilon)

    def percent(found):
        return cell(list(found.values()))

    start = {
        (reading, run["bits"], run["seed"]): run.get(reading, run[OWN])["shape"]["accuracy"]
        for run in read_results(RESULTS / "randbit")
        for reading in (OWN, SHARED)
        if not run["trained"]
    }
    before = {seed: start[SHARED, 4, seed] for seed in range(3)}
    for words in (
        f"seems to be lost: {percent(shape(OWN, 8))} % with 8 bits, {percent(shape(OWN, 0))} % without",
        f"reads as little ({cell([start[OWN, 8, seed] for seed in range(3)])} %)",
        f"have kept it: {percent(shape(SHARED, 8))} % with 8 bits, and with 4 bits "
        f"{change(shape(SHARED, 4), before)[1:]} points above",
        f"shape by {change(shape(OWN, 8, 0.1), shape(OWN, 8))} (own bits) and "
        f"{change(shape(SHARED, 8, 0.1), shape(SHARED, 8))} points (shared bits)",
    ):
        assert words in TEXT
    assert table(read_results(RESULTS / "randbit")) == (RESULTS / "randbit" / "table.md").read_text()


def test_what_is_cited_is_there_and_nothing_else():
    folders = {path.name for path in RESULTS.iterdir() if path.is_dir()}
    assert folders == {"randbit", "recolored36", "with_color", "with_color36"}
    assert all(name in README for name in folders) and "commit 087b8cc" in (RESULTS / "README.md").read_text()
    for name in folders:
        results = read_results(RESULTS / name)
        assert len(results) == len({run["name"] for run in results}) > 0
        assert all(readout["converged"] for run in results for readout in run[OWN].values())
    links = re.findall(r"\]\((\.\./[^)\s]+)\)", README)
    assert links and all((ROOT / "moco" / "shortcuts" / link).exists() for link in links)
