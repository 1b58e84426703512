"""Draws the curves of runs, from the logs in their folders, or maps of features, into one picture.

    python -m moco.plot runs/ifm -o ifm.png
    python -m moco.plot runs/ifm runs/moco -o both.png
    python -m moco.plot runs/linear -o linear.png       (a curve per --lr of a linear evaluation)
    python -m moco.plot features.npz -o map.png         (each image a point; --tsne)

It needs matplotlib (`pip install matplotlib`), and --tsne scikit-learn.
"""

import contextlib
import functools
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moco.errors import Parser, UserError, printable, run_program
from moco.evaluate.feature_file import SUFFIXES, read_features
from moco.files import atomic_file, check_free
from moco.trifeature import COLORS, FACTORS, factor_of, is_combination

# The style of all pictures of the project.

WIDTH, DPI = 10, 200  # inches; dots per inch: letters of 8 points and more are readable at 1000 pixels

# Okabe & Ito's colors, which people with any kind of color vision tell apart, without the yellow.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
BLACK, GRAY = "#000000", "#444444"
PALETTE = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, BLACK)

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "savefig.dpi": DPI,
}


def check_picture(out, force):
    """Raise UserError unless a picture can be written to `out`: to be called before the work of drawing."""
    check_free(out, force)
    known = sorted(_matplotlib().figure.Figure().canvas.get_supported_filetypes())
    if _suffix(out) not in known:
        raise UserError(f"{out} must end in .png or another format that matplotlib writes: {' '.join(known)}")


@contextlib.contextmanager
def own_style():
    """Gives matplotlib with the settings above during the block, whatever a matplotlibrc says; figures are
    made and saved in one.
    """
    matplotlib = _matplotlib()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # all but the backend
        matplotlib.rcParams.update(STYLE)
        yield matplotlib


def save_picture(figure, out):
    """Write a Figure to `out` in the format of its suffix. Raises UserError, and an old file stays then."""
    try:
        with own_style(), atomic_file(out) as temporary:
            figure.savefig(temporary, format=_suffix(out))
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror or error}); choose another place") from error


def literal(text, most=110):
    """A text's last `most` letters for matplotlib, which takes a bare dollar for the start of a formula."""
    text = printable(text)
    return (text if len(text) <= most else f"…{text[1 - most :]}").replace("$", r"\$")


def _suffix(out):
    return Path(out).suffix.removeprefix(".").lower()


def _matplotlib():
    try:
        import matplotlib.figure  # not pyplot: no figure stays open, no setting of the caller's is touched
    except ImportError as error:
        raise UserError(
            "matplotlib, which draws the picture, is not installed: pip install matplotlib"
        ) from error
    return matplotlib


# Reading the log of a run (moco.run.log): one JSON object a line, of the kinds "start", "step" and "epoch".

LOGS = LOG, LINEAR_LOG = "log.jsonl", "linear.jsonl"


@dataclass
class Run:
    """A log. steps: the printed steps, epochs: the finished epochs, in order, each a dict of the log's names
    and values, and `at`, where it starts, in epochs. chance: the loss at chance, or None. linear: whether it
    is a linear evaluation.
    """

    name: str
    steps: list
    epochs: list
    chance: float | None
    linear: bool


def read_run(path):
    """The Run of an output folder or of the log in it. Raises UserError when there is none.

    Of a repeated (epoch, step) the last line counts. A start removes the earlier lines from its position on:
    for a new run all of them.
    """
    path = Path(path)
    log = next((path / name for name in LOGS if os.path.isfile(path / name)), path)
    try:
        lines = log.read_bytes().splitlines()
    except OSError as error:
        raise UserError(
            f"there is no log in {path} ({error.strerror}); name a run's --output-dir or the {LOG} in it"
        ) from error
    start, found = {}, {}
    for line in lines:
        try:
            entry = json.loads(line)
            kind, position = entry["kind"], (entry["epoch"], entry.get("step", math.inf))
        except (ValueError, TypeError, LookupError):  # a line that was cut off when the run was killed
            continue
        if kind == "start":
            found, start = {earlier: found[earlier] for earlier in found if earlier < position}, entry
        else:
            found[position] = entry | {"at": position[0] + entry.get("step", 0) / start.get("steps", 1)}
    if not found:
        raise UserError(f"{log} holds no step and no epoch yet; try again when the run has printed some")
    entries = [found[position] for position in sorted(found)]
    steps, epochs = ([entry for entry in entries if entry["kind"] == kind] for kind in ("step", "epoch"))
    linear = log.name == LINEAR_LOG or any("val_acc1" in entry for entry in epochs)
    return Run(str(path), steps, epochs, start.get("chance"), linear)


def by_head(run):
    """A Run for each classifier of a linear evaluation with several; of any other, the Run itself.

    They have no steps: those in the log are of one at a time, the best so far.
    """
    heads = {}
    for entry in run.epochs:
        for own in entry.get("heads") or ():
            heads.setdefault(own["head"], []).append(entry | own)
    if len(heads) < 2:
        return [run]
    return [replace(run, name=f"{run.name} --lr {lr:g}", steps=[], epochs=own) for lr, own in heads.items()]


# Drawing the curves.

MARKERS = "os^Dv"  # 35 runs before a pair of color and marker comes again
COLUMNS = 3
LOSS = "Loss (nats)"
LINEAR = {"Training accuracy, top 1 (%)": ["acc1"], "Validation accuracy, top 1 (%)": ["val_acc1"]}
OTHERS = {
    "Cosine: positive (solid), negative (dashed)": ["pos_similarity", "neg_similarity"],
    "Alignment: mean |q − k|² of positives": ["alignment"],
    "Uniformity: log mean exp(−2|q − q′|²)": ["uniformity"],
    "RankMe: effective rank of features": ["rankme"],
    "Norm of the gradient": ["grad_norm"],
    "Weight of IFM: mean (solid), 95th percentile": ["ifm_weight", "ifm_weight_p95"],
    "IFM's factor on the gradient": ["ifm_factor"],
    "InfoNCE without IFM (nats)": ["info_nce"],
    "Length of the queue's mean": ["queue_mean"],
    "Learning rate": ["lr"],
    "Images per second": ["images_per_s"],
    "Share of the queue filled": ["queue_fill"],
}


def figure_of(runs):
    """A matplotlib Figure with the curves of Runs, all of pre-training or all of linear evaluation.

    A line's gid is "RUN QUANTITY steps" or "RUN QUANTITY epochs", RUN counted from 0; that of a loss at
    chance is "chance". A quantity that no log has gets no panel; a value that is null leaves a gap.
    """
    panels = panels_of(runs)
    legend_columns = max(1, min(COLUMNS, 110 // max(len(literal(run.name)) for run in runs)))
    rows, legend_rows = math.ceil(len(panels) / COLUMNS), math.ceil(len(runs) / legend_columns)
    with own_style() as matplotlib:
        size = WIDTH, 0.5 + 2.2 * rows + 0.2 * legend_rows
        figure = matplotlib.figure.Figure(size, layout="constrained")
        axes = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True).ravel()
        for (title, names), axis in zip(panels.items(), axes, strict=False):
            axis.set_title(title)
            axis.tick_params(labelbottom=True, length=0)
            for number, run in enumerate(runs):
                for name, dashes in zip(names, ("-", "--"), strict=False):
                    _draw_run(axis, run, name, number, dashes)
            if title == LOSS:
                _draw_chance(axis, runs)
            else:  # 0 is in view
                axis.update_datalim([(0, 0)], updatex=False)
                axis.autoscale_view()
        for axis in axes[len(panels) :]:
            axis.remove()
        after = "validation" if runs[0].linear else "kNN and RankMe"
        caption = (
            f"epochs (plain: single steps; markers: means of an epoch, at its middle; {after}: after it)"
        )
        figure.supxlabel(caption, fontsize=8, color=GRAY)
        handles = [matplotlib.lines.Line2D([], [], **_look(number)) for number in range(len(runs))]
        names = [literal(run.name) for run in runs]
        figure.legend(handles, names, loc="outside upper left", ncols=legend_columns, frameon=False)
    return figure


def panels_of(runs):
    """{title: names of the log's quantities, a second one dashed} for what at least one log has."""
    knn = dict.fromkeys(label for run in runs for entry in run.epochs for label in entry.get("knn") or ())
    accuracies = {"Contrastive accuracy, top 1 (%)": ["acc1"]}
    accuracies |= {f"kNN accuracy: {literal(label, 25)} (%)": [f"knn/{label}"] for label in knn}
    panels = {LOSS: ["loss"]} | (LINEAR if runs[0].linear else accuracies) | OTHERS
    entries = [entry for run in runs for entry in (*run.steps, *run.epochs)]
    return {title: names for title, names in panels.items() if any(curve(entries, name)[0] for name in names)}


def curve(entries, name):
    """(epochs, values) of a quantity in the lines of a log: two lists, nan where it is null.

    "knn/shape" is the entry shape of the dict knn. Lines that do not have it are left out, and both lists are
    empty where no line has a number.
    """
    outer, _, inner = name.partition("/")
    x, y = [], []
    for entry in entries:
        values = (entry.get(outer) or {}) if inner else entry
        if (key := inner or outer) in values:
            x.append(entry["at"])
            y.append(math.nan if values[key] is None else values[key])
    return (x, y) if any(map(math.isfinite, y)) else ([], [])


def _draw_run(axis, run, name, number, dashes):
    """The steps of a run as a thin line, and the means of its epochs as a strong one with markers."""
    look, (x, y), means = _look(number), curve(run.steps, name), curve(run.epochs, name)
    if x:
        faint = {"linewidth": 0.7, "alpha": 0.3} if len(means[0]) > 1 else {"linewidth": 1.4}
        dot = {"marker": "." if len(x) == 1 else None, "color": look["color"]}
        axis.plot(x, y, linestyle=dashes, **faint, **dot, gid=f"{number} {name} steps")
    if means[0]:
        after = 1 if name.startswith(("knn/", "rankme", "val_")) else 0.5
        x, every = [at + after for at in means[0]], math.ceil(len(means[0]) / 12)
        gid = f"{number} {name} epochs"
        axis.plot(x, means[1], linestyle=dashes, linewidth=1.4, markevery=every, **look, gid=gid)


def _draw_chance(axis, runs):
    """The losses at chance as dotted lines."""
    for chance in {run.chance for run in runs} - {None}:
        axis.axhline(chance, color=BLACK, linestyle=":", gid="chance")
        axis.set_title(f"{LOSS}; dotted: at chance")


def _look(number):
    """Color and marker of a run."""
    color, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
    return {"color": color, "marker": marker, "markersize": 4.5}


# Maps: each image a point in two dimensions, near those with similar features.

POINTS = 3000  # of a map
NAMED = 14  # classes in a legend, by color and marker; those with fewer images are gray
TURNS = 10


@dataclass
class Map:
    """points: float64 (n, 2); axes: what the two are, in words, or none; labels: int64 (n,); names: of the
    labels, or none.
    """

    title: str
    points: np.ndarray
    axes: list
    labels: np.ndarray
    names: list

    def __post_init__(self):
        counts = np.bincount(self.labels, minlength=len(self.names))
        largest = np.argsort(-counts, kind="stable")[: NAMED if self.names else 0]
        self.named = sorted(number for number in largest.tolist() if counts[number])  # what gets a color
        self.others = [number for number in np.flatnonzero(counts).tolist() if number not in self.named]

    def legend(self):
        """The texts of the legend."""
        texts = [printable(self.names[number]).replace("$", r"\$") for number in self.named]
        texts = [text if len(text) <= 24 else f"{text[:23]}…" for text in texts]
        return texts + [f"{len(self.others):,} others"] * bool(self.named and self.others)


def maps_of(path, tsne=False):
    """The Maps of a file of features (moco.evaluate.feature_file) by PCA or by t-SNE: of its classes, or for
    Trifeature of each factor. Raises UserError.

    The features are taken at length 1, as their cosines compare them; of more than POINTS images as many,
    always the same, are drawn at random.
    """
    arrays = read_features(path)
    features = arrays["features"]
    count, width = features.shape
    if count < 3 or width < 2:
        raise UserError(f"{path} has {count} x {width} features; a map needs 3 images and 2 features")
    chosen = np.random.default_rng(0).permutation(count)[:POINTS]
    features = features[chosen].astype(np.float64)
    if not np.isfinite(features).all():
        raise UserError(f"{path} has features that are not finite; write it anew from a healthy run")
    features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    if tsne:
        points, axes = _tsne()(perplexity=min(30, (len(chosen) - 1) / 3)).fit_transform(features), []
    else:
        points, shares = principal_components(features)
        axes = [f"component {n} ({share:.0%} of the variance)" for n, share in enumerate(shares, 1)]
    images = f"{len(chosen):,} of {count:,} images" if len(chosen) < count else f"{count:,} images"
    place = f"{path}\n{images} by {'t-SNE' if tsne else 'PCA'}", points, axes
    if "labels" not in arrays:
        return [Map(*place, np.zeros(len(chosen), int), [])]
    labels, classes = arrays["labels"][chosen], arrays["classes"].tolist()
    if not all(map(is_combination, classes)):
        return [Map(*place, labels, classes)]
    title, *place = place
    maps = []
    for factor, values in FACTORS.items():
        numbers = np.array([factor_of(name, factor) for name in classes])
        maps.append(Map(f"{title}, {factor}", *place, numbers[labels], list(values)))
    return maps


def principal_components(rows):
    """(float64 (n, 2), the share of the variance that each of the two has): rows, n x d, by PCA.

    The signs are such that the greatest weight of a component is positive.
    """
    import torch  # which curves do not need

    centered = torch.from_numpy(rows - rows.mean(axis=0))
    variances, directions = torch.linalg.eigh(centered.T @ centered)  # in ascending order
    directions = directions[:, -2:].flip(1)
    greatest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    shares = variances[-2:].flip(0) / variances.sum().clamp(min=1e-12)
    return (centered @ (directions * greatest.sign())).numpy(), shares.tolist()


def figure_of_maps(maps):
    """A matplotlib Figure with a panel for each Map. The gid of points is the number of their label."""
    columns = min(COLUMNS, len(maps))
    rows, width = math.ceil(len(maps) / columns), WIDTH / columns
    texts = [text for each in maps for text in each.legend()]
    legend_columns = max(1, int(width / (0.55 + 0.068 * max(map(len, texts), default=0))))
    legend_rows = max(math.ceil(len(each.legend()) / legend_columns) for each in maps)
    side = min(width - 0.3, 6)  # inches
    with own_style() as matplotlib:
        height = rows * (side + 1.05 + 0.17 * legend_rows)
        figure = matplotlib.figure.Figure((WIDTH, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, each in zip(axes, maps, strict=False):
            letters = int(width / 0.085)
            axis.set_title("\n".join(literal(line, letters) for line in each.title.splitlines()))
            handles = _draw_map(axis, each, side)
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2 / side), "ncols": legend_columns}
            if each.named:
                axis.legend(handles, each.legend(), frameon=False, fontsize=8, **place)
        for axis in axes[len(maps) :]:
            axis.remove()
    return figure


def _draw_map(axis, each, side):
    """The points of a Map in a square of `side` inches. Returns handles for its legend."""
    gray = {"color": "#c8c8c8" if each.named else BLUE, "marker": "o", "zorder": 1, "markeredgewidth": 0}
    looks = dict.fromkeys(each.others, gray)
    for place, number in enumerate(each.named):
        looks[number] = gray | _look(place) | {"zorder": 2}
        if all(name in COLORS for name in each.names):
            own = {"color": COLORS[each.names[number]], "markeredgecolor": GRAY, "markeredgewidth": 0.3}
            looks[number] |= own
    size = min(5, side * 30 / len(each.labels) ** 0.5)
    for turn in range(TURNS):  # so that no label is drawn over all others
        points, labels = each.points[turn::TURNS], each.labels[turn::TURNS]
        for number, look in looks.items():
            shown = {"linestyle": "none", "alpha": 0.8, "gid": str(number), **look, "markersize": size}
            axis.plot(*points[labels == number].T, **shown)
    low, high = each.points.min(axis=0), each.points.max(axis=0)
    half = 0.53 * (high - low).max() or 1
    left, bottom = (low + high) / 2 - half
    axis.set(xlim=(left, left + 2 * half), ylim=(bottom, bottom + 2 * half), box_aspect=1)
    axis.grid(False)
    axis.tick_params(labelbottom=False, labelleft=False, length=0)
    for set_label, text in zip((axis.set_xlabel, axis.set_ylabel), each.axes, strict=False):
        set_label(text, fontsize=8, color=GRAY)
    of_legend = [looks[number] for number in (*each.named, *each.others[:1])]
    return [axis.plot([], [], **{"linestyle": "none", **look, "markersize": 5})[0] for look in of_legend]


def _tsne():
    """scikit-learn's TSNE, as a function of its perplexity, the same every time."""
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UserError(
            "scikit-learn, which computes t-SNE, is not installed: pip install scikit-learn, or leave --tsne "
            "out for PCA"
        ) from error
    return functools.partial(TSNE, init="pca", random_state=0)


def main():
    parser = Parser(prog="python -m moco.plot", description=__doc__.splitlines()[0], allow_abbrev=False)
    text = (
        f"output folder of a run, or its log: {LOG} of a pre-training, {LINEAR_LOG} of a linear evaluation; "
    )
    text += "or features of moco.embed"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=text)
    text = "picture to write; .pdf and .svg work as well"
    parser.add_argument("-o", "--out", required=True, metavar="OUT.png", help=text)
    parser.add_argument("--tsne", action="store_true", help="map features by t-SNE (default: PCA)")
    parser.add_argument("--force", action="store_true", help="replace OUT.png if it exists")
    args = parser.parse_args()

    kinds = {path: Path(path).suffix in SUFFIXES for path in args.runs}
    if len(set(kinds.values())) > 1:
        one, other = (next(path for path in kinds if kinds[path] == kind) for kind in (True, False))
        raise UserError(f"{one} is of features and {other} of a run: draw them in two pictures")
    is_map = kinds[args.runs[0]]
    if args.tsne and not is_map:
        raise UserError("--tsne maps features (.npz, .npy), not the curves of a run: leave it out")
    runs = [] if is_map else _curves_of(args.runs)
    check_picture(args.out, args.force)
    if is_map:
        if args.tsne:
            _tsne()
        figure = figure_of_maps([each for path in args.runs for each in maps_of(path, args.tsne)])
    else:
        figure = figure_of(runs)
    save_picture(figure, args.out)
    print(printable(args.out))


def _curves_of(paths):
    runs = [read_run(path) for path in paths]
    if len({run.linear for run in runs}) > 1:
        one, other = (next(run.name for run in runs if run.linear == linear) for linear in (False, True))
        raise UserError(f"{one} is a pre-training and {other} a linear evaluation: draw them in two pictures")
    return [curves for run in runs for curves in by_head(run)]


if __name__ == "__main__":
    run_program(main, "python -m moco.plot")
