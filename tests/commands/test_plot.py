"""What is read of a log that was cut off, continued or started anew; the picture holds what it says."""

import json
import math
import os
import sys

import matplotlib
import pytest
from PIL import Image
from sheets import refused

from moco import plot
from moco.plot import by_head, figure_of, read_run


def start(epoch=0, step=0, steps=4, chance=3.0, **more):
    return {"kind": "start", "epoch": epoch, "step": step, "steps": steps, "chance": chance, **more}


def step(epoch, number, loss, **more):
    return {"kind": "step", "epoch": epoch, "step": number, "loss": loss, **more}


def end(epoch, loss, **more):
    return {"kind": "epoch", "epoch": epoch, "loss": loss, **more}


def write(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def losses(run):
    return [entry["loss"] for entry in run.steps], [entry["loss"] for entry in run.epochs]


def test_the_last_line_of_a_step_counts_and_a_start_removes_what_it_repeats(tmp_path):
    killed = [start(), step(0, 0, 1.0), step(0, 2, 1.1), end(0, 1.2), step(1, 0, 1.3), step(1, 2, 1.4)]
    repeated = [*killed, step(1, 2, 9.0), end(1, 9.1)]
    assert losses(read_run(write(tmp_path, *repeated))) == ([1.0, 1.1, 1.3, 9.0], [1.2, 9.1])
    resumed = [*repeated, start(1, 1, steps=8), step(1, 2, 5.0)]  # what came after step 0 was lost
    run = read_run(write(tmp_path, *resumed))
    assert losses(run) == ([1.0, 1.1, 1.3, 5.0], [1.2])
    assert [entry["at"] for entry in run.steps] == [0, 0.5, 1, 1.25]  # each by its own start's steps
    anew = [*resumed, start(), step(0, 0, 7.0)]  # a shorter new run in the same folder
    assert losses(read_run(write(tmp_path, *anew))) == ([7.0], [])


def test_a_line_that_is_cut_off_or_damaged_is_left_out(tmp_path):
    lines = [start(), step(0, 0, 1.0), step(0, 2, 1.1), end(0, 1.2)]
    path = write(tmp_path, *lines) / "log.jsonl"
    data, last = path.read_bytes(), len(json.dumps(lines[-1])) + 1
    assert losses(read_run(path)) == ([1.0, 1.1], [1.2])
    for cut in range(2, last, 5):
        path.write_bytes(data[:-cut])
        assert losses(read_run(path)) == ([1.0, 1.1], [])
    path.write_bytes(b'\xff\x00\n[1]\n{"loss": 2.0}\n' + data)
    assert losses(read_run(path)) == ([1.0, 1.1], [1.2])


def complete(run=0.0, epochs=3, **of_start):
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
    return figure_of([read_run(folder) for folder in folders])


def lines_of(figure):
    """{gid: [(x, y), ...]} of all lines of a figure but the losses at chance."""
    lines = [line for axis in figure.axes for line in axis.lines if line.get_gid() != "chance"]
    return {line.get_gid(): list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in lines}


def test_the_lines_hold_the_numbers_of_the_logs(tmp_path):
    figure = draw(write(tmp_path / "a", *complete()), write(tmp_path / "b", *complete(run=7.0, epochs=2)))
    lines = lines_of(figure)
    assert lines["0 loss steps"] == [(0, 0), (0.5, 0.2), (1, 1), (1.5, 1.2), (2, 2), (2.5, 2.2)]
    assert lines["0 loss epochs"] == [(0.5, 0.1), (1.5, 1.1), (2.5, 2.1)]
    assert lines["1 loss steps"] == [(0, 7.0), (0.5, 7.2), (1, 8.0), (1.5, 8.2)]
    assert lines["1 loss epochs"] == [(0.5, 7.1), (1.5, 8.1)]
    assert lines["0 knn/shape epochs"] == [(2, 21.0)]  # after the second epoch
    assert lines["1 knn/color epochs"] == [(2, 90.0)]
    for name in ("acc1", "pos_similarity", "neg_similarity", "alignment", "uniformity", "lr", "queue_fill"):
        logged = [entry[name] for entry in complete() if entry["kind"] == "step"]
        assert [y for _, y in lines[f"0 {name} steps"]] == logged
        assert len(lines[f"1 {name} epochs"]) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"{tmp_path}/a", f"{tmp_path}/b"]


def test_the_losses_at_chance_are_drawn(tmp_path):
    def levels(*chances):
        folders = [write(tmp_path / str(n), *complete(chance=chance)) for n, chance in enumerate(chances)]
        return {line.get_ydata()[0] for line in draw(*folders).axes[0].lines if line.get_gid() == "chance"}

    assert levels(3.0, 6.5) == {3.0, 6.5} and levels(None) == set()


def test_what_is_missing_gets_no_panel_and_what_is_null_leaves_a_gap(tmp_path):
    lines = [start(), step(0, 0, 1.0, acc1=None), step(0, 1, None), step(0, 2, 3.0, knn=None), end(0, None)]
    figure = draw(write(tmp_path, *lines))
    assert [axis.get_title(loc="left")[:4] for axis in figure.axes] == ["Loss"]
    (x, y), (nothing_x, nothing), last = lines_of(figure)["0 loss steps"]
    assert (x, y, nothing_x, last) == (0, 1.0, 0.25, (0.5, 3.0)) and math.isnan(nothing)
    assert "0 loss epochs" not in lines_of(figure)


def linear(*lrs, epochs=2):
    """Lines of a linear evaluation whose losses and accuracies differ by classifier and epoch."""
    lines = [start(program="main_lincls.py")]
    for epoch in range(epochs):
        lines.append(step(epoch, 0, 1.0, acc1=3.0, lr=lrs[0], head=lrs[0]))
        own = [
            {"head": lr, "lr": lr / 2, "loss": lr + epoch, "acc1": 30.0 * lr, "val_acc1": 20.0 * lr + epoch}
            for lr in lrs
        ]
        lines.append(end(epoch, **own[0], heads=own))
    return lines


def test_linear_evaluations_have_their_panels_and_several_classifiers_a_curve_each(tmp_path, cli):
    one, several = write(tmp_path / "one", *linear(1.0)), write(tmp_path / "several", *linear(1.0, 0.25))
    (several / "log.jsonl").rename(several / "linear.jsonl")
    figure = draw(one)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles[1:3] == ["Training accuracy, top 1 (%)", "Validation accuracy, top 1 (%)"]
    lines = lines_of(figure)
    assert lines["0 val_acc1 epochs"] == [(1, 20.0), (2, 21.0)]  # after each epoch
    assert lines["0 acc1 epochs"] == [(0.5, 30.0), (1.5, 30.0)] and len(lines["0 loss steps"]) == 2
    curves = by_head(read_run(several))
    assert [run.name for run in curves] == [f"{several} --lr 1", f"{several} --lr 0.25"]
    lines = lines_of(figure_of(curves))
    assert lines["1 val_acc1 epochs"] == [(1, 5.0), (2, 6.0)] and "0 loss steps" not in lines

    moco = write(tmp_path / "moco", *complete())
    said = "moco is a pre-training and .*several a linear evaluation: draw them in two pictures"
    refused(cli(plot.main, moco, several, one, "-o", tmp_path / "o.png"), said)


def test_one_point_is_seen(tmp_path):
    for lines in ([step(0, 0, 2.0, lr=0.1)], [end(0, 2.0, lr=0.1, knn={"class": 50.0})]):
        for axis in draw(write(tmp_path, start(), *lines)).axes:
            [point] = axis.lines[0].get_xydata()
            assert axis.lines[0].get_marker() in (".", "o") and axis.viewLim.contains(*point)


def test_no_text_overlaps_another(tmp_path):
    folders = [write(tmp_path / f"{'long_name_' * 4}{n}", *complete(chance=11.0 + n / 9)) for n in range(5)]
    odd = tmp_path / os.fsdecode(b"_$x$_{\xff")  # a file name can hold any bytes
    figure = draw(*folders, write(odd, *complete()), write(tmp_path / ("x" * 200), *complete()))
    figure.draw_without_rendering()
    frame = figure.bbox
    texts = [axis._left_title for axis in figure.axes] + figure.legends[0].get_texts() + [figure._supxlabel]
    assert figure.legends[0].get_texts()[-2].get_text().endswith(r"/_\$x\$_{\udcff")
    boxes = [text.get_window_extent() for text in texts]
    for one, box in enumerate(boxes):
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        assert box.width > 5 and not any(box.overlaps(other) for other in boxes[:one])


def test_the_program_writes_the_picture_and_leaves_matplotlib_as_it_was(tmp_path, cli, monkeypatch):
    run, out = write(tmp_path / "run", start(), step(0, 0, 1.0)), tmp_path / "out.png"
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 31.0)  # as a matplotlibrc may
    before = dict(matplotlib.rcParams)
    assert cli(plot.main, run / "log.jsonl", "-o", out) == (0, f"{out}\n", "")
    assert dict(matplotlib.rcParams) == before
    with Image.open(out) as image:
        assert image.format == "PNG" and image.width == 2000
    first = out.read_bytes()
    refused(cli(plot.main, run, "-o", out), "--force")
    assert out.read_bytes() == first
    assert cli(plot.main, run, write(tmp_path / "b", start(), end(0, 2.0)), "-o", out, "--force")[0] == 0
    assert out.read_bytes() != first
    odd = tmp_path / os.fsdecode(b"\xff\n.png")
    assert cli(plot.main, run, "-o", odd) == (0, f"{tmp_path}/\\udcff\\n.png\n", "")


@pytest.mark.parametrize(
    "run, out, words",
    [
        ("nothing", "o.png", "there is no log in .*nothing .*; name a run's --output-dir"),
        ("started", "o.png", "holds no step and no epoch yet"),
        ("run", "o.jpeg2", "must end in .png or another format that matplotlib writes: avif.* png"),
        ("run", "x" * 300 + ".png", "cannot write .*File name too long"),
        ("run", "no/o.png", "the folder .*no does not exist"),
    ],
)
def test_wrong_use_is_one_sentence(run, out, words, tmp_path, cli):
    write(tmp_path / "run", *complete())
    write(tmp_path / "started", start())
    before = sorted(tmp_path.rglob("*"))
    refused(cli(plot.main, tmp_path / run, "-o", tmp_path / out, "--force"), words)
    assert sorted(tmp_path.rglob("*")) == before


def test_without_matplotlib_its_pip_line_is_said(tmp_path, cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused(cli(plot.main, write(tmp_path, *complete()), "-o", tmp_path / "o.png"), "pip install matplotlib")


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, cli, monkeypatch):
    run, out = write(tmp_path / "run", *complete(epochs=1)), tmp_path / "o.png"
    out.write_text("old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", full)
    refused(cli(plot.main, run, "-o", out, "--force"), "cannot write .*No space left on device")
    assert out.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["o.png", "run"]
