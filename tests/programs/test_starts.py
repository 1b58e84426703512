"""Every way to start a run of several processes, and the starts that are refused."""

import errno
import fcntl
import os
import re
import socket
import sys
import time

import pytest
from command_lines import MOCO, TINY, losses_of, program
from forked_program import gone_within
from run_files import content
from started_runs import SPAWN, Forked, run

import main_moco

FRESH = ["-a", "shufflenet_v2_x0_5"]  # for processes that are started anew: they know no `tiny`


def nodes(port, folders, outs, *more):
    """Nodes of two on this machine, of one process each: one for each folder of `outs`; `more` words each."""
    words = [*MOCO, *FRESH, "--epochs", "1", "-j", "0", folders, "-b", "4", "--multiprocessing-distributed"]
    words += ["--world-size", "2", "--dist-url", f"tcp://127.0.0.1:{port}"]
    more = more or [[]] * len(outs)
    return [Forked(*words, "--rank", rank, "--output-dir", out, *more[rank]) for rank, out in enumerate(outs)]


def test_torchrun_and_two_nodes_give_the_same_bits(folders, tmp_path, free_port):
    """torchrun starts its processes anew, as users do."""
    words = [
        *MOCO,
        *FRESH,
        "-j",
        "2",
        "--epochs",
        "1",
        str(folders),
        "--output-dir",
        str(tmp_path / "torchrun"),
    ]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master-port={free_port}"]
    torchrun = program(sys.executable, *torchrun, "main_moco.py", *words)
    assert torchrun.returncode == 0, torchrun.stderr
    first, second = nodes(free_port, folders, [tmp_path / "first", tmp_path / "second"])
    with first, second:
        assert [first.end(120), second.end(120)] == [0, 0], first.output + second.output
    assert losses_of(first.output) == losses_of(torchrun.stdout)
    assert len(losses_of(first.output)) == 3
    one, other = (content(tmp_path / name, "checkpoint_0000.pth.tar") for name in ("torchrun", "first"))
    assert one == other
    assert not os.listdir(tmp_path / "second")  # only the first process writes


def test_nodes_with_other_flags_are_refused(folders, tmp_path, free_port):
    one, other = nodes(free_port, folders, [tmp_path, tmp_path], ["--moco-k", "20"], ["--moco-k", "24"])
    with one, other:
        for node in (one, other):
            assert node.end() == 2 and "Epoch: " not in node.output
            assert "started differently: moco_k is 20 on rank 0 and 24 on rank 1" in node.output
    assert not os.listdir(tmp_path)


def test_a_port_in_use_is_said(folders, tmp_path, free_port):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port))
        taken.listen()
        with nodes(free_port, folders, [tmp_path])[0] as node:
            assert node.end() == 2
    assert f"the port of tcp://127.0.0.1:{free_port} is in use" in node.output
    assert "Traceback" not in node.output


def test_a_run_that_waits_for_other_nodes_ends_at_once_on_a_signal(folders, tmp_path, free_port):
    place = ("127.0.0.1", free_port)
    with nodes(free_port, folders, [tmp_path])[0] as node:
        assert gone_within(20, lambda: socket.socket().connect_ex(place) == 0)  # it listens
        time.sleep(0.3)
        os.kill(node.pid, 15)
        assert node.end(10) == -15, node.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SPAWN[:-1], "1"], "needs --rank between 0 and 0"),
        (["TORCHRUN", "--world-size", "2"], "torchrun starts the processes .* leave out"),
        (["TORCHRUN"], "needs the variables MASTER_ADDR, MASTER_PORT, WORLD_SIZE"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_start_that_contradicts_itself_is_refused(words, message, folders, tmp_path, cli, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    if words[0] == "TORCHRUN":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
        words = words[1:]
    code, output, errors = cli(main_moco.main, *TINY, *words, "--output-dir", tmp_path, folders)
    assert code == 2 and output == "" and errors.count("\n") == 1
    assert re.search(message, errors), errors


@pytest.mark.parametrize("locks", [True, False])
def test_a_folder_belongs_to_one_run_at_a_time(folders, tmp_path, monkeypatch, locks):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")  # as on Lustre without `-o flock`

    if not locks:
        monkeypatch.setattr(fcntl, "flock", flock)
    words = [*TINY, "-j", "0", "--output-dir", tmp_path, folders]
    with Forked(*words, "--epochs", "100000", "--keep", "100000") as program:
        program.wait_for("epoch 1")
        files = {path.name for path in tmp_path.iterdir() if path.suffix != ".tmp"}
        output = run(*words, "--resume", "auto", code=2)
        assert f"another run (process {program.pid}) is using --output-dir {tmp_path}" in output
        assert "Epoch" not in output and files <= {path.name for path in tmp_path.iterdir()}
    run(*words, "--resume", "auto", "--epochs", "1")  # a dead process (kill -9) does not block
