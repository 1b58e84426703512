"""Files from strangers: nothing runs, memory does not fill, and every flipped bit is found."""

import ctypes
import os
import random
import re
import zipfile
from pathlib import Path

import pytest
import torch
from command_lines import MOCO, SMALL
from forked_program import forked
from test_checkpoint import Trap, upstream_layout
from test_resume import WORDS

import main_lincls
import main_moco
from moco.checkpoint import save_checkpoint
from moco.checkpoint_reader import check_kinds, read_checkpoint
from moco.errors import UserError
from moco.linear_checkpoint import restore
from moco.resume import same_course

SUMS = {"Loss": (torch.zeros(()), 3)}
OF_TWO_HEADS = {  # entries of a linear evaluation in one process, in the middle of an epoch
    "heads": [{}, {}], "logs": [[SUMS, SUMS]], "data": {"processes": 1},
    "classes": ["cat", "dog"], "confusion": [[0, 1, 2], [1, 1, 5]],
}  # fmt: skip


@pytest.mark.parametrize("flag", ["--resume", "--pretrained"])
def test_programs_refuse_a_pickle_that_would_make_a_folder(folders, tmp_path, cli, flag):
    path, sprung = tmp_path / "trap.pth.tar", tmp_path / "sprung"
    torch.save({**upstream_layout(mlp=True)[0], "extra": Trap(sprung)}, path)
    main, words = (main_moco.main, MOCO) if flag == "--resume" else (main_lincls.main, SMALL)
    code, output, errors = cli(main, *words, folders, "--output-dir", tmp_path, flag, path)
    assert code == 2 and errors.count("\n") == 1 and "could run code; refused" in errors
    assert not sprung.exists() and "Epoch" not in output
    torch.load(path, weights_only=False)  # the trap is a real one
    assert sprung.exists()


def peak_of(read, path):
    """Megabytes by which the memory of a process grows at most while it reads the file, and what was said."""

    def peak():
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024

    def main():
        ctypes.CDLL(None).malloc_trim(0)  # what earlier tests left free is not there to be used unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on: proc(5)
        before = peak()
        try:
            read(path)
        except UserError as error:
            print(error.sentence)
        print(peak() - before)

    pid, output = forked(main, (1, 2))
    *said, megabytes = output.read().splitlines()
    assert os.waitpid(pid, 0)[1] == 0
    return float(megabytes), "\n".join(said)


def test_a_small_file_that_would_unpack_to_a_large_one_takes_no_memory(tmp_path):
    plain, bomb = tmp_path / "plain", tmp_path / "bomb.pth.tar"
    with torch.serialization.skip_data():  # 256 MiB, of which nothing is written
        torch.save({"state_dict": {"x": torch.empty(1 << 26)}}, plain)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target,
    ):
        for name in source.namelist():
            with target.open(name, "w") as file:
                if name.endswith("data/0"):
                    for _ in range(256):
                        file.write(bytes(1 << 20))
                else:
                    file.write(source.read(name))
    assert bomb.stat().st_size < 2_000_000
    megabytes, said = peak_of(read_checkpoint, bomb)
    assert "zip bomb" in said and megabytes < 20
    megabytes, _ = peak_of(lambda path: torch.load(path, weights_only=True), bomb)
    assert megabytes > 250  # negative control: torch unpacks it


@pytest.mark.parametrize("entry", ["state_dict", "optimizer"])
def test_a_tensor_that_says_it_is_larger_than_its_file_is_refused(folders, tmp_path, cli, entry):
    """One number that stands for 10^12 of them."""
    words = [*WORDS, "--output-dir", tmp_path, folders]
    assert cli(main_moco.main, *words, "--epochs", "1")[0] == 0
    path, huge = tmp_path / "checkpoint_0000.pth.tar", torch.zeros(1, dtype=torch.float64).expand(10**12)
    checkpoint = torch.load(path, weights_only=True)
    if entry == "state_dict":
        checkpoint[entry]["module.queue"] = huge
    else:
        checkpoint[entry]["state"][0]["momentum_buffer"] = huge
    torch.save(checkpoint, path)
    code, _, errors = cli(main_moco.main, *words, "--resume", path)
    assert code == 2 and errors.count("\n") == 1
    assert {"state_dict": "does not fit this model", "optimizer": "the optimizer state in"}[entry] in errors


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("epoch", "1"), ("step", 1.5), ("seed", None), ("arch", 18), ("settings", [1]), ("data", "x"),
        ("optimizer", []), ("log", {"Loss": 1.0}), ("noted", {"x": (1.0, 1)}), ("heads", {}),
        ("step", -1), ("epoch", -3), ("best_acc1", torch.zeros(2)), ("log", {"Loss": (torch.zeros(3), 1)}),
        ("classes", ["a", 2]), ("confusion", 5), ("confusion", [[0, 1]]), ("confusion", [[0, 2, 4]]),
        ("confusion", [[0, 1, 0]]), ("logs", [{}]), ("logs", [[SUMS]]), ("logs", [[SUMS, SUMS]] * 2),
        ("logs", [[SUMS, {"Loss": 1.0}]]),
    ],
    ids=str,
)  # fmt: skip
def test_an_entry_of_another_type_is_named(tmp_path, entry, value):
    path, good = tmp_path / "x.pth.tar", {"log": SUMS, **OF_TWO_HEADS, **upstream_layout(mlp=True)[0]}
    check_kinds(good, path)
    with pytest.raises(UserError, match=f"its entry {entry} "):
        check_kinds({**good, entry: value}, path)


def test_places_that_no_run_leaves_are_named():
    data, settings = {"images": 30, "global_batch": 8}, {"seed": 0}
    same_course({"step": 3}, "x", data, settings, print)
    with pytest.raises(
        UserError, match="x is no checkpoint of this program: it stands after 4 of an epoch's 3"
    ):
        same_course({"step": 4}, "x", data, settings, print)
    lacks = [{"history": [{"epoch": 0, "loss": 1.0, "acc5": 1.0}]}]
    with pytest.raises(UserError, match="x is no checkpoint of this program: its entry heads holds other"):
        restore([], {"heads": lacks}, "x", epochs=1)


def test_every_flipped_bit_is_found(tmp_path):
    path, chance = tmp_path / "checkpoint_0000.pth.tar", random.Random(0)
    save_checkpoint(upstream_layout(mlp=True)[0], path)
    assert read_checkpoint(path)["epoch"] == 200
    whole = path.read_bytes()
    bits = 8 * len(whole)
    accepted = 0
    for bit in [*chance.sample(range(bits), 300), *range(bits - 8 * 93, bits)]:
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(UserError, match="damaged"):
            read_checkpoint(path)
        try:
            torch.load(path, weights_only=True)
            accepted += 1
        except Exception:
            continue
    assert accepted > 250  # negative control: torch finds few
    for cut in range(1, 94):
        path.write_bytes(whole[:-cut])
        with pytest.raises(UserError, match="damaged"):
            read_checkpoint(path)


def test_what_is_sealed_is_still_a_checkpoint_of_torch_and_a_zip_archive(tmp_path):
    path = tmp_path / "checkpoint_0000.pth.tar"
    checkpoint, model = upstream_layout(mlp=True)
    save_checkpoint(checkpoint, path)
    loaded = torch.load(path, weights_only=True)
    assert loaded.keys() == checkpoint.keys()
    assert torch.equal(loaded["state_dict"]["module.queue"], model.queue)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"sha256:")
    torch.save(checkpoint, path)  # of others: without a seal
    assert read_checkpoint(path)["epoch"] == 200
