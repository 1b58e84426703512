"""What a factor in the pictures takes from the others: readouts of one sweep less those of another, by seed.

python -m moco.shortcuts_compare runs/with_color runs/without_color
python -m moco.shortcuts_compare runs/with_color runs/without_color -o suppression.png

Both must be read from the same pictures, as sweeps with --read-without color and with --hide color are.
"""

import argparse
import json
from pathlib import Path

from moco.errors import UserError, run_program
from moco.pictures import check_picture, save_picture
from moco.shortcuts_report import difference_cells, head_lines, line
from moco.shortcuts_results import (
    SETTING,
    WORST,
    columns_of,
    over_temperatures,
    rows,
    score,
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


def figure(first, second):
    """matplotlib's Figure of two sweeps in folders; see `comparison`."""
    from moco.shortcuts_compare_figure import figure_of

    results, _, columns = _both(first, second)
    return figure_of([Path(folder).name for folder in (first, second)], results, columns)


def comparison(first, second):
    """Markdown: means over seeds of readouts in the folder `first` less those in `second`, 95 % intervals.

    Of settings (recipe, T, bits, epsilon) in both, and of the untrained encoders, which are 0 where these
    are the same; runs that diverged are left out, and of two readings of random bits the second is. Raises
    UserError when a folder holds no finished run or no setting is in both, and when the two were read from
    different pictures or for different factors.
    """
    results, settings, columns = _both(first, second)
    pairs = differences(*results, columns)
    trained = {key: found for key, found in pairs.items() if key[0] != UNTRAINED}
    if not trained:
        raise UserError(
            f"no trained run of {first} has the same T, epsilon, recipe and seed as one of {second}"
        )
    pairs |= over_temperatures(trained, {key[:3] for key in trained})
    names = [name for name in SETTING if name != "bits" or any(key[2] for key in pairs)]
    lines = [
        f"Linear readout of {Path(first).name} less that of {Path(second).name} with the same seed: points.",
        _differences_in_settings(*settings),
        "",
        *head_lines([*names, "seeds", *columns]),
        *(line(difference_cells(key, of_seeds, names, columns)) for key, of_seeds in pairs.items()),
    ]
    factors = [column for column in columns if column != WORST]
    cells = sum(len(factors) for key, found in pairs.items() if len(found) > 1 and key[0] != UNTRAINED)
    if cells:
        lines += [
            "",
            f"If nothing differed, about {cells / 20:.1f} of the {cells} intervals of factors of trained "
            "encoders would leave out 0.",
        ]
    return "\n".join(lines) + "\n"


def differences(first, second, columns):
    """{setting: {seed: {column: difference}}} of seeds in both; of untrained encoders first."""
    pairs = {}
    for bits in sorted({run["bits"] for run in untrained(first)}):
        mine, theirs = ({run["seed"]: run for run in untrained(r, bits)} for r in (first, second))
        pairs[UNTRAINED, "", bits, ""] = mine, theirs
    found, base = rows(first), rows(second)
    pairs |= {key: (sound(found[key]), sound(base[key])) for key in found if key in base}
    of_seeds = {
        key: {s: {c: score(mine[s], c) - score(theirs[s], c) for c in columns} for s in mine if s in theirs}
        for key, (mine, theirs) in pairs.items()
    }
    return {key: found for key, found in of_seeds.items() if found}


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
        told[-1]["one value for all of"] = found.get("read_without") or found.get("hide")
    if told[0] != told[1]:
        differ = ", ".join(f"{n}: {told[0][n]} and {told[1][n]}" for n in told[0] if told[0][n] != told[1][n])
        raise UserError(f"{first} and {second} were read from different pictures ({differ}), so that their "
                        "readouts cannot be compared")  # fmt: skip
    columns = [columns_of(found) for found in results]
    if columns[0] != columns[1]:
        each = " and ".join(", ".join(found) for found in columns)
        raise UserError(f"{first} and {second} were read for different factors: {each}")
    return results, settings, columns[0]


def _differences_in_settings(first, second):
    names = [name for name in sorted(first.keys() | second.keys()) if first.get(name) != second.get(name)]
    each = "; ".join(f"{name} {first.get(name)} and {second.get(name)}" for name in names)
    return f"The sweeps' settings differ in {each}." if each else "The sweeps have the same settings."


def _settings(folder):
    path = Path(folder) / SETTINGS
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} holds no sweep ({path}: {error}); give the --out of one") from error


if __name__ == "__main__":
    run_program(main)
