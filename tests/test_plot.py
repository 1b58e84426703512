"""The picture of runs: its lines hold what the logs say, and nothing stands for what they do not say."""

import math
import sys

import matplotlib
import pytest
from log_lines import end, start, step, write
from PIL import Image
from sheets import refused

from moco import plot
from moco.log_reader import by_head, read_log, run_names
from moco.plot import figure_of


def whole(run=0.0, epochs=3, **of_start):
    """Lines of a run with every quantity; `run` is added to the loss, so that runs differ."""
    lines = [start(**of_start)]
    for epoch in range(epochs):
        values = {"acc1": 5.0 + epoch, "pos_similarity": 0.5, "neg_similarity": 0.1 * epoch, "alignment": 1.0}
        values |= {"uniformity": -1.0 - epoch, "lr": 0.1 / (1 + epoch), "images_per_s": 900.0}
        values["queue_fill"] = 0.25 * epoch
        lines += [step(epoch, n, run + epoch + n / 10, **values) for n in (0, 2)]
        knn = {"knn": {"shape": 20.0 + epoch, "color": 90.0}} if epoch % 2 else {}
        lines.append(end(epoch, run + epoch + 0.1, **values, **knn))
    return lines


def draw(*folders):
    logs = [read_log(folder) for folder in folders]
    return figure_of(logs, run_names(log.path for log in logs))


def lines_of(figure):
    """{gid: [(x, y), ...]} of all lines of a figure but the levels at chance."""
    lines = [line for axis in figure.axes for line in axis.lines if line.get_gid() != "chance"]
    return {line.get_gid(): list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in lines}


def panel(figure, title):
    return next(axis for axis in figure.axes if axis.get_title(loc="left").startswith(title))


def test_the_lines_hold_the_numbers_of_the_logs(tmp_path):
    figure = draw(write(tmp_path / "a", *whole()), write(tmp_path / "b", *whole(run=7.0, epochs=2)))
    lines = lines_of(figure)
    assert lines["0 loss steps"] == [(0, 0), (0.5, 0.2), (1, 1), (1.5, 1.2), (2, 2), (2.5, 2.2)]
    assert lines["0 loss epochs"] == [(0.5, 0.1), (1.5, 1.1), (2.5, 2.1)]
    assert lines["1 loss steps"] == [(0, 7.0), (0.5, 7.2), (1, 8.0), (1.5, 8.2)]
    assert lines["1 loss epochs"] == [(0.5, 7.1), (1.5, 8.1)]
    assert lines["0 knn/shape epochs"] == [(2, 21.0)]  # after the second epoch
    assert lines["1 knn/color epochs"] == [(2, 90.0)]
    assert [y for _, y in lines["0 queue_fill steps"]] == [0, 0, 25, 25, 50, 50]  # %
    assert [y for _, y in lines["0 lr steps"]] == [0.1, 0.1, 0.05, 0.05, 0.1 / 3, 0.1 / 3]
    for name in ("acc1", "pos_similarity", "neg_similarity", "alignment", "uniformity", "images_per_s"):
        told = [entry[name] for entry in whole() if entry["kind"] == "step"]
        assert [y for _, y in lines[f"0 {name} steps"]] == told
        assert len(lines[f"1 {name} epochs"]) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert len({axis.get_xlim() for axis in figure.axes}) == 1  # panels can be compared
    assert figure.axes[0].get_xlim()[1] > 2.5


def test_the_levels_at_chance_are_dotted_lines(tmp_path):
    folders = [write(tmp_path / str(n), *whole(chance=chance)) for n, chance in enumerate((3.0, 6.5, 3.0))]
    axis = panel(draw(*folders), "Loss")
    levels = {line.get_ydata()[0]: line.get_color() for line in axis.lines if line.get_gid() == "chance"}
    assert levels == {3.0: "#000000", 6.5: axis.lines[2].get_color()}  # black where runs share it
    assert axis.get_title(loc="left") == "Loss (nats); dotted: chance 3.00, 6.50"
    low, high = axis.get_ylim()
    assert low < 3.0 and high > 6.5
    without = panel(draw(write(tmp_path / "none", *whole(chance=None))), "Loss")
    assert not [line for line in without.lines if line.get_gid() == "chance"]


def test_what_is_missing_gets_no_panel_and_what_is_null_leaves_a_gap(tmp_path):
    lines = [start(), step(0, 0, 1.0, acc1=None), step(0, 1, None), step(0, 2, 3.0, knn=None), end(0, None)]
    figure = draw(write(tmp_path, *lines))
    assert [axis.get_title(loc="left")[:4] for axis in figure.axes] == ["Loss"]
    (x, y), (nothing_x, nothing), last = lines_of(figure)["0 loss steps"]
    assert (x, y, nothing_x, last) == (0, 1.0, 0.25, (0.5, 3.0)) and math.isnan(nothing)
    assert "0 loss epochs" not in lines_of(figure)


def linear(*lrs, epochs=2):
    """Lines of a linear evaluation whose losses and accuracies tell its classifiers and epochs apart."""
    lines = [start() | {"program": "main_lincls.py"}]
    for epoch in range(epochs):
        lines.append(step(epoch, 0, 1.0, acc1=3.0, lr=lrs[0], head=lrs[0]))
        own = [
            {"head": lr, "lr": lr / 2, "loss": lr + epoch, "acc1": 30.0 * lr, "val_acc1": 20.0 * lr + epoch}
            for lr in lrs
        ]
        lines.append(end(epoch, **own[0], heads=own))
    return lines


def test_linear_evaluations_have_their_panels_and_several_classifiers_a_curve_each(tmp_path, cli):
    figure = draw(write(tmp_path / "one", *linear(1.0)))
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles[1:3] == ["Training accuracy, top 1 (%)", "Validation accuracy, top 1 (%)"]
    lines = lines_of(figure)
    assert lines["0 val_acc1 epochs"] == [(1, 20.0), (2, 21.0)]  # after each epoch
    assert lines["0 acc1 epochs"] == [(0.5, 30.0), (1.5, 30.0)] and len(lines["0 loss steps"]) == 2
    assert figure._supxlabel.get_text().endswith("validation: after it)")
    assert draw(write(tmp_path / "moco", *whole()))._supxlabel.get_text().endswith("kNN: after it)")

    several = write(tmp_path / "several", *linear(1.0, 0.25)) / "log.jsonl"
    several = several.rename(several.with_name("linear.jsonl"))
    curves = by_head(read_log(several.parent), "several")
    assert [name for _, name in curves] == ["several --lr 1", "several --lr 0.25"]
    lines = lines_of(figure_of(*zip(*curves, strict=True)))
    assert lines["1 val_acc1 epochs"] == [(1, 5.0), (2, 6.0)] and "0 loss steps" not in lines
    assert lines["1 lr epochs"] == [(0.5, 0.125), (1.5, 0.125)]
    [(log, name)] = by_head(read_log(tmp_path / "one"), "one")
    assert name == "one" and len(log.steps) == 2
    assert run_names([several, tmp_path / "one" / "log.jsonl"]) == ["several", "one"]

    words = [several.parent, tmp_path / "one", "-o", tmp_path / "o.png"]
    assert cli(plot.main, *words)[0] == 0
    said = r"moco/log.jsonl is of a pre-training and .*several/linear.jsonl of a linear evaluation: draw them"
    refused(cli(plot.main, tmp_path / "moco", *words, "--force"), said)


@pytest.mark.parametrize("lines", [[step(0, 0, 2.0, lr=0.1)], [end(0, 2.0, lr=0.1, knn={"class": 50.0})]])
def test_one_point_is_seen(lines, tmp_path):
    figure = draw(write(tmp_path, start(), *lines))
    left, right = figure.axes[0].get_xlim()
    for axis in figure.axes:
        for line in axis.lines:
            if line.get_gid() != "chance":
                assert line.get_marker() in (".", "o")
                assert left < line.get_xdata()[0] < right and right - left > 0.5


def test_learning_rates_far_apart_get_a_logarithmic_axis(tmp_path):
    runs = [write(tmp_path / str(lr), start(), step(0, 0, 1.0, lr=lr)) for lr in (0.03, 0.2, 1.0)]
    assert panel(draw(*runs[:2]), "Learning").get_yscale() == "linear"
    assert panel(draw(*runs), "Learning").get_yscale() == "log"


def test_every_text_has_its_place(tmp_path):
    folders = [write(tmp_path / f"{'long_name_' * 4}{n}", *whole(chance=11.0 + n / 9)) for n in range(5)]
    figure = draw(*folders, write(tmp_path / "_$x$_{", *whole()))
    figure.draw_without_rendering()
    frame = figure.bbox
    texts = [axis._left_title for axis in figure.axes] + figure.legends[0].get_texts() + [figure._supxlabel]
    assert figure.legends[0].get_texts()[-1].get_text() == r"_\$x\$_{"
    boxes = [text.get_window_extent() for text in texts]
    for box in boxes:
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
    for one, box in enumerate(boxes):
        assert box.width > 5 and not any(box.overlaps(other) for other in boxes[:one])


def test_the_program_writes_the_picture_and_leaves_matplotlib_as_it_was(tmp_path, cli, monkeypatch):
    run, out = write(tmp_path / "run", start(), step(0, 0, 1.0)), tmp_path / "out.png"
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 31.0)  # as a matplotlibrc may
    before = dict(matplotlib.rcParams)
    assert cli(plot.main, run, "-o", out) == (0, f"{out}\n", "")
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or matplotlib.pyplot.get_fignums() == []
    with Image.open(out) as image:
        assert image.format == "PNG" and image.width == 2000
    first = out.read_bytes()
    code, _, errors = cli(plot.main, run, "-o", out)
    assert code == 2 and "--force" in errors and out.read_bytes() == first
    assert (
        cli(plot.main, run / "log.jsonl", write(tmp_path / "b", step(0, 0, 2.0)), "-o", out, "--force")[0]
        == 0
    )
    assert out.read_bytes() != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "out.png", "run"]


@pytest.mark.parametrize(
    "run, out, words",
    [
        ("nothing", "o.png", "there is no run folder and no log .*nothing"),
        ("empty_folder", "o.png", "the folder .*empty_folder has no log.jsonl; is it the --output-dir"),
        (".", "o.png", "has no log.jsonl; name a run in it, such as .*blank"),
        ("blank", "o.png", "holds no step and no epoch yet"),
        ("started", "o.png", "holds no step and no epoch yet"),
        ("words.txt", "o.png", "words.txt is no log"),
        ("checkpoint.pth.tar", "o.png", "checkpoint.pth.tar is no log"),
        ("run", "o.jpeg2", "must end in .png or another format that matplotlib writes: avif.* png"),
        ("run", "o", "must end in .png"),
        ("run", "o.pgf", "must end in .png"),
        ("x" * 300, "o.png", "there is no run folder and no log"),
        ("run", "x" * 300 + ".png", "cannot write .*File name too long"),
        ("run", "no/o.png", "the folder .*no does not exist"),
        ("run", "folder.png", "folder.png exists already"),
    ],
)
def test_wrong_use_is_one_sentence(run, out, words, tmp_path, cli):
    write(tmp_path / "run", *whole())
    write(tmp_path / "blank")
    write(tmp_path / "started", start())
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "words.txt").write_text("Epoch: [0][ 0/50]\n")
    (tmp_path / "checkpoint.pth.tar").write_bytes(b"PK\x03\x04" + bytes(100))
    before = sorted(tmp_path.rglob("*"))
    refused(cli(plot.main, tmp_path / run, "-o", tmp_path / out, "--force"), words)
    assert sorted(tmp_path.rglob("*")) == before


def test_without_matplotlib_its_pip_line_is_told(tmp_path, cli, monkeypatch):
    run, out = write(tmp_path / "run", *whole()), tmp_path / "o.png"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused(cli(plot.main, run, "-o", out), "pip install matplotlib")
    assert not out.exists()
    monkeypatch.undo()


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, cli, monkeypatch):
    run, out = write(tmp_path / "run", *whole(epochs=1)), tmp_path / "o.png"
    out.write_text("old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", full)
    refused(cli(plot.main, run, "-o", out, "--force"), "cannot write .*No space left on device")
    assert out.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["o.png", "run"]
