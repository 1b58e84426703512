"""What a log says of a run that was cut off, killed, continued or started anew, and how runs are called."""

import json

from log_lines import end, start, step, write

from moco.log_reader import read_log, run_names


def losses(log):
    return [entry["loss"] for entry in log.steps], [entry["loss"] for entry in log.epochs]


def test_of_what_stands_there_twice_the_newest_counts(tmp_path):
    killed = [start(), step(0, 0, 1.0), step(0, 2, 1.1), end(0, 1.2), step(1, 0, 1.3), step(1, 2, 1.4)]
    repeated = [*killed, step(1, 2, 9.0), end(1, 9.1)]
    assert losses(read_log(write(tmp_path, *repeated))) == ([1.0, 1.1, 1.3, 9.0], [1.2, 9.1])
    resumed = [*repeated, start(1, 1, chance=4.0), step(1, 2, 5.0)]  # what came after step 0 was lost
    log = read_log(write(tmp_path, *resumed))
    assert losses(log) == ([1.0, 1.1, 1.3, 5.0], [1.2])
    assert log.chances == [3.0, 4.0]
    anew = [*resumed, start(chance=2.0), step(0, 0, 7.0)]  # a shorter new run in the same folder
    log = read_log(write(tmp_path, *anew))
    assert losses(log) == ([7.0], []) and log.chances == [2.0]


def test_steps_are_placed_by_the_start_that_they_belong_to(tmp_path):
    log = read_log(write(tmp_path, start(steps=4), step(0, 2, 1.0), start(1, 0, steps=8), step(1, 2, 1.0)))
    assert [entry["at"] for entry in log.steps] == [0.5, 1.25]
    log = read_log(write(tmp_path, step(0, 0, 1.0), step(0, 2, 1.0), step(0, 3, 1.0)))  # none is told
    assert [entry["at"] for entry in log.steps] == [0, 0.5, 0.75]


def test_a_log_is_read_up_to_where_it_is_cut_off(tmp_path, capsys):
    lines = [start(), step(0, 0, 1.0), step(0, 2, 1.1), end(0, 1.2)]
    path = write(tmp_path, *lines) / "log.jsonl"
    data = path.read_bytes()
    last = len(json.dumps(lines[-1])) + 1
    assert losses(read_log(path)) == ([1.0, 1.1], [1.2]) and capsys.readouterr().err == ""
    for cut in range(2, last):
        path.write_bytes(data[:-cut])
        assert losses(read_log(path)) == ([1.0, 1.1], [])
        told = capsys.readouterr().err
        assert told == f"note: {path} is cut off in line 4: read up to there\n"
    # A resumed run's first line then stands behind what was cut off.
    path.write_bytes(
        data[:-20] + json.dumps(start(0, 2)).encode() + b"\n" + json.dumps(step(0, 2, 8.0)).encode()
    )
    log = read_log(path)
    assert losses(log) == ([1.0, 8.0], []) and len(log.starts) == 2
    assert "line 4 is cut off or damaged and left out" in capsys.readouterr().err


def test_lines_of_no_use_are_told_and_left_out(tmp_path):
    lines = [start(), {"kind": "step", "epoch": "0", "step": 1}, step(0, 0, 1.0), {"loss": 2.0}, end(-1, 1.0)]
    notes = []
    assert losses(read_log(write(tmp_path, *lines, step(0, 1, 2.0)), notes.append)) == ([1.0, 2.0], [])
    assert len(notes) == 1 and "3 lines, the first of them 2," in notes[0]


def test_names_are_short_and_no_two_alike(tmp_path):
    def names(*folders):
        return run_names(tmp_path / folder / "log.jsonl" for folder in folders)

    assert names("a", "b") == ["a", "b"]
    assert names("a/out", "b/out", "c") == ["a/out", "b/out", "c"]
    assert names("x/a/out", "y/a/out", "z/out") == ["x/a/out", "y/a/out", "z/out"]
    assert names("a", "a") == ["1: a", "2: a"]
    [long] = names("resnet18_" + "very" * 20 + "_seed0")
    assert len(long) == 45 and long.startswith("resnet18_") and long.endswith("_seed0")
    paper = [f"ifm_moco_v2_epsilon_{epsilon}_imagenet100" for epsilon in ("0.05", "0.1", "0.2")]
    assert names(*paper) == paper
    alike = names(*("s" * 40 + f"_eps{n}_" + "e" * 40 for n in range(2)))
    assert "_eps0_" in alike[0] and "_eps1_" in alike[1] and max(map(len, alike)) <= 45
