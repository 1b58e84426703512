"""What measurements have in common, and the tables for a person who reads them: at most 80 columns."""

import os
import platform
import textwrap

import numpy as np
import torch

from moco.cores import available_cores


def spread(values):
    """Median and quartiles of the rounds, four digits each."""
    low, median, high = (float(f"{value:.4g}") for value in np.percentile(values, (25, 50, 75)))
    return {"median": median, "low": low, "high": high}


def machine(device):
    """What was measured on, and how busy it was."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    return {
        "cpu": name,
        "cores": available_cores(),
        "load_average": round(os.getloadavg()[0], 1),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def data_tables(report):
    """The report of moco.bench_data as text."""
    images, hardware = report["images"], report["hardware"]
    source = f"of {images['folder']}" if images["folder"] else "made to be like photographs"
    head = (
        f"{hardware['cpu']}, {hardware['cores']} cores, load {hardware['load_average']}",
        "Python {python}, torch {torch}, torchvision {torchvision}".format(**report["versions"]),
        f"decoder {report['decoder']}",
        f"{images['count']} images {source}: {images['mean_width']:.0f} x {images['mean_height']:.0f} and "
        f"{images['mean_kilobytes']:.0f} KB on average",
        f"two views of {report['size']} pixels; medians [and quartiles] of {report['rounds']} rounds",
    )
    parts = (
        (line for text in head for line in textwrap.wrap(text, 80)),
        _pipelines(report),
        _stages(report["published_stages_percent"]),
        _workers(report),
        _device_half(report["device_half"], hardware["gpu"]),
    )
    return "\n\n".join("\n".join(part) for part in parts)


def _pipelines(report):
    yield f"{'One core, CPU time':42}{'pairs/s':>21}{'published':>10}{'limit':>7}"
    for row in report["pipelines"].values():
        rate, published, limit = row["pairs_per_s"], row["to_published"], row["to_limit"]
        yield f"{row['what']:42}{_rate(rate):>21}{published['median']:>9.2f}x{limit['median']:>7.2f}"
    if "simplejpeg" not in report["pipelines"]:
        yield "(no simplejpeg here, which decodes faster: pip install simplejpeg)"


def _stages(shares):
    text = ", ".join(f"{name} {share:.0f} %" for name, share in shares.items())
    yield from textwrap.wrap("The published pipeline's time: " + text, 80)


def _workers(report):
    if not report["workers"]:
        yield "Transport and loaders: not run (--workers 0)"
        return
    how = f"{report['workers']} workers, batches of {report['batch_size']}"
    yield f"{'Transport: ' + how:42}{'CPU':>9}{'clock':>10}{'first start':>12}{'later':>7}"
    for name, row in report["transport"].items():
        cpu, clock = row["cpu_ms_per_pair"]["median"], row["clock_ms_per_pair"]["median"]
        first, later = row["first_start_s"], row["later_starts_s"]["median"]
        yield f"{name:42}{cpu:>6.3f} ms{clock:>7.3f} ms{first:>10.2f} s{later:>5.2f} s"
    whole = report["end_to_end"]
    yield ""
    yield f"{'End to end: ' + how:42}{'pairs/s':>21}{'per CPU second':>17}"
    for name, text in (("published", "published DataLoader"), ("fast", f"the ring, {report['decoder']}")):
        row = whole[name]
        yield f"{text:42.42}{_rate(row['pairs_per_s']):>21}{row['pairs_per_cpu_s']['median']:>17.1f}"
    ratio, cpu = whole["fast_to_published"], whole["fast_to_published_cpu"]
    yield f"{'ratio':42}{_rate(ratio, 2):>21}{cpu['median']:>17.2f}"


def _device_half(report, gpu):
    if "not_run" in report:
        yield f"Device half: not run ({report['not_run']})"
        return
    yield f"{'Device half: ' + str(report['views']) + ' views':60}{'ms':>20}"
    for mode in ("exact", "float"):
        if mode in report:
            yield f"{mode + ' on ' + gpu:60.60}{report[mode]['ms']:>20.2f}"
            yield from textwrap.wrap(report[mode]["how"], 80, initial_indent="  ", subsequent_indent="  ")


def _rate(row, digits=None):
    digits = (0 if row["median"] >= 200 else 1) if digits is None else digits
    return "{median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]".format(**row, digits=digits)


def in_turns(names, rounds, turn, done):
    """What turn(name) gives for every name in each round, a dict of lists. Each round starts with another.

    done: called after each round.
    """
    names = list(names)
    taken = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(turn(name))
        done()
    return taken
