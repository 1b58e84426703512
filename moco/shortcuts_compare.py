"""What a factor in the pictures takes from the others: readouts of one sweep less those of another, by seed.

python -m moco.shortcuts_compare runs/with_color runs/recolored
python -m moco.shortcuts_compare runs/with_color runs/recolored -o suppression.png

Both must be read from the same pictures, as sweeps with --read-without color are, --recolor beside it or not.
"""

import argparse
import json
from pathlib import Path

from moco.errors import UserError, run_program
from moco.factors import hidden
from moco.measure import NAMES
from moco.pictures import check_picture, save_picture
from moco.shortcuts_remarks import on_failures
from moco.shortcuts_report import SECOND, by_chance, difference_cells, head_lines, line
from moco.shortcuts_results import (
    SETTING,
    columns_of,
    number,
    over_temperatures,
    rows,
    score,
    second_readings,
    sound,
    untrained,
)
from moco.sweep import SETTINGS, read_results

PICTURES = ("image_size", "renders", "data", "images")  # settings of a sweep that decide what is read

UNTRAINED = "untrained"  # in place of a recipe


def main():
    parser = argparse.ArgumentParser(description="readouts of one sweep less those of another, by seed")
    parser.add_argument("first", help="folder of a sweep by moco.shortcuts")
    parser.add_argument("second", help="folder of the sweep that is taken away")
    parser.add_argument("-o", "--out", metavar="FILE", help="also draw a picture (needs matplotlib)")
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    args = parser.parse_args()
    if args.out:
        check_picture(args.out, args.force)
    print(comparison(args.first, args.second), end="")
    if args.out:
        save_picture(figure(args.first, args.second), args.out)
        print(f"\n{args.out}")


def comparison(first, second):
    """Markdown: means over seeds of readouts in the folder `first` less those in `second`, 95 % intervals.

    Each setting (recipe, T, bits, epsilon) of the first less the same of the second, or where that has not
    this epsilon, less its epsilon 0; untrained encoders too, which are 0 where they are the same. Runs that
    diverged are counted. If both were read in a second way, so a second table of that. Raises UserError when
    a folder holds no run that was read or no pair is in both, and when the two were read from different
    pictures or for different factors.
    """
    results, settings, columns = _both(first, second)
    lines = [
        f"Linear readout of {Path(first).name} less that of {Path(second).name} with the same seed: points.",
        *_on_settings(*settings),
        "",
        *_table(*results, columns),
    ]
    seconds = [second_readings(of_sweep) for of_sweep in results]
    for reading in seconds[0]:
        if reading in seconds[1]:
            lines += ["", SECOND[reading], "", *_table(*(found[reading] for found in seconds), columns)]
    for folder, found in zip((first, second), results, strict=True):
        lines += [line for told in on_failures(found) for line in ("", f"{Path(folder).name}: {told}")]
    return "\n".join(lines) + "\n"


def figure(first, second):
    """matplotlib's Figure of two sweeps in folders, as both were read last; see `comparison`."""
    from moco.shortcuts_compare_figure import figure_of

    results, _, columns = _both(first, second)
    seconds = [second_readings(of_sweep) for of_sweep in results]
    how = next((reading for reading in reversed(seconds[0]) if reading in seconds[1]), None)
    results = [found[how] for found in seconds] if how else results
    return figure_of([Path(folder).name for folder in (first, second)], results, columns, NAMES.get(how))


def differences(first, second, columns):
    """{(*setting, epsilon of the second): {seed: {column: difference}}}; and how many pairs diverged, alike.

    Of untrained encoders first. Seeds are those in both.
    """
    pairs, bad = {}, {}
    for bits in sorted({run["bits"] for run in untrained(first)}):
        pairs[UNTRAINED, "", bits, "", ""] = [
            {run["seed"]: run for run in untrained(of_sweep, bits)} for of_sweep in (first, second)
        ]
    found, base = rows(first), rows(second)
    for key, runs in found.items():
        same = key if key in base else (*key[:3], 0.0)
        if same in base:
            pairs[(*key, same[3])] = runs, base[same]
    for key, both in pairs.items():
        seeds = both[0].keys() & both[1].keys()
        mine, theirs = map(sound, both)
        bad[key] = len(seeds - (mine.keys() & theirs.keys()))
        pairs[key] = {
            s: {c: score(mine[s], c) - score(theirs[s], c) for c in columns}
            for s in sorted(mine.keys() & theirs.keys())
        }
    there = [key for key in pairs if pairs[key] or bad[key]]
    return {key: pairs[key] for key in there}, {key: bad[key] for key in there}


def _table(first, second, columns):
    """The lines of one way of reading."""
    pairs, bad = differences(first, second, columns)
    trained = {key: found for key, found in pairs.items() if key[0] != UNTRAINED}
    for less in sorted({key[4] for key in trained}):
        mine = {key[:4]: found for key, found in trained.items() if key[4] == less}
        together = over_temperatures(mine, {key[:3] for key in mine})
        pairs |= {(*key, less): found for key, found in together.items()}
    names = [name for name in SETTING if name != "bits" or any(key[2] for key in pairs)]
    yield from head_lines([*names, "less epsilon", "seeds", *columns])
    for key, of_seeds in pairs.items():
        cells = difference_cells(key[:4], of_seeds, names, columns)
        less = key[4] if key[4] == "" else number(key[4])
        count = cells[len(names)] + (f", {bad[key]} diverged" if bad.get(key) else "")
        yield line([*cells[: len(names)], less, count, *cells[len(names) + 1 :]])
    of_trained = {key: found for key, found in pairs.items() if key[0] != UNTRAINED}
    for sentence in by_chance(of_trained, columns, "nothing differed"):
        yield from ("", sentence)


def _both(first, second):
    """(results of both, settings of both, columns), if both were read alike."""
    results, settings = [], []
    for folder in (first, second):
        settings.append(_settings(folder))
        results.append(read_results(folder))
        if not any("readout" in result for result in results[-1]):
            raise UserError(f"{folder} has no run that was read; let its sweep finish some")
    told = []
    for found in settings:
        told.append({name: found.get(name) for name in PICTURES})
        read_of = found.get("read_without") or found.get("hide")
        told[-1]["for all"] = " ".join(hidden(read_of)) if read_of else None
    if told[0] != told[1]:
        differ = ", ".join(f"{n}: {told[0][n]} and {told[1][n]}" for n in told[0] if told[0][n] != told[1][n])
        raise UserError(f"{first} and {second} were read from different pictures ({differ}), so that their "
                        "readouts cannot be compared")  # fmt: skip
    columns = [columns_of(found) for found in results]
    if columns[0] != columns[1]:
        each = " and ".join(", ".join(found) for found in columns)
        raise UserError(f"{first} and {second} were read for different factors: {each}")
    if not any(key[0] != UNTRAINED for key in differences(*results, columns[0])[0]):
        raise UserError(f"no trained run of {first} has the same T, recipe and seed as one of {second}")
    return results, settings, columns[0]


def _on_settings(first, second):
    """In what the sweeps differ, by what was taken out of pictures and by all else."""
    names = [name for name in sorted(first.keys() | second.keys()) if first.get(name) != second.get(name)]
    each = {name: f"{name} {first.get(name)} and {second.get(name)}" for name in names}
    each.pop("renew_statistics", None)  # one reading more
    pictures = [each.pop(name) for name in ("hide", "read_without", "recolor") if name in each]
    if pictures:
        yield f"The sweeps differ in pictures: {'; '.join(pictures)}."
    if each:
        others = "; ".join(each.values())
        yield f"They differ in more than pictures, so differences are of that, too: {others}."
    if not pictures and not each:
        yield "The sweeps have the same settings."


def _settings(folder):
    path = Path(folder) / SETTINGS
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} holds no sweep ({path}: {error}); give the --out of one") from error


if __name__ == "__main__":
    run_program(main)
