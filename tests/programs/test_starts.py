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
        (["TORCHRUN"], "needs the variables WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
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


def launched(variables, *words):
    """The program, started by a launcher that sets `variables` and adds `words`."""
    return Forked(*words, prepare=lambda: os.environ.update({k: str(v) for k, v in variables.items()}))


@pytest.mark.parametrize("launcher", ["deepspeed", "by flags", pytest.param("srun", marks=pytest.mark.slow)])
def test_processes_of_any_launcher_that_says_where_they_meet_join(
    launcher, folders, tmp_path, free_port, whole
):
    def variables(rank):
        if launcher == "by flags":
            return {"RANK": rank, "WORLD_SIZE": 2}
        own = {"srun": {"SLURM_PROCID": rank, "SLURM_NTASKS": 2, "SLURM_LOCALID": rank}}.get(launcher, {})
        own |= {"LOCAL_RANK": rank, "LOCAL_SIZE": 2} if launcher == "deepspeed" else {}
        return own | {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}

    words = [*TINY, "--output-dir", tmp_path, folders]
    words += ["--dist-url", f"tcp://127.0.0.1:{free_port}"] if launcher == "by flags" else []
    flags = [[f"--local_rank={rank}"] if launcher == "deepspeed" else [] for rank in range(2)]
    first, second = (launched(variables(rank), *words, *flags[rank]) for rank in range(2))
    with first, second:
        assert [first.end(), second.end()] == [0, 0], first.output + second.output
    assert "2 process(es)" in first.output and "Epoch" not in second.output
    starts = [line for line in (tmp_path / "log.jsonl").read_text().splitlines() if '"kind": "start"' in line]
    assert len(starts) == 1
    # -b is of both, as they are of one machine
    assert content(tmp_path) == content(whole(2)) != content(whole(1))


SLURM = {"SLURM_PROCID": 1, "SLURM_NTASKS": 2, "SLURM_LOCALID": 1}
MEETING = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}


@pytest.mark.parametrize(
    ("variables", "words", "message"),
    [
        (
            SLURM,
            [],
            r"Slurm says that this is process 1 of 2, but not .*`export RANK=\$SLURM_PROCID "
            r"WORLD_SIZE=\$SLURM_NTASKS MASTER_ADDR=HOST MASTER_PORT=29500`",
        ),
        ({"PMI_RANK": 0, "PMI_SIZE": 2}, [], r"MPI says .* WORLD_SIZE=\$PMI_SIZE MASTER_ADDR=HOST"),
        (
            {"OMPI_COMM_WORLD_RANK": 0, "OMPI_COMM_WORLD_SIZE": 4},
            [],
            "Open MPI says that this is process 0 of 4",
        ),
        ({"RANK": 0, "WORLD_SIZE": 2}, [], "the environment says .* `export MASTER_ADDR=HOST"),
        (
            SLURM,
            SPAWN[:1],
            r"if each of them is a node, add --world-size \$SLURM_NTASKS --rank \$SLURM_PROCID",
        ),
        (
            MEETING,
            SPAWN[:1],
            r"a node, add --world-size \$WORLD_SIZE .*leave out --multiprocessing-distributed",
        ),
        (
            SLURM,
            ["--dist-url", "tcp://127.0.0.1:1"],
            r"RANK=\$SLURM_PROCID WORLD_SIZE=\$SLURM_NTASKS` before",
        ),
        (SLURM, [SPAWN[0], "--dist-url", "tcp://127.0.0.1:1"], "if each of them is a node"),
        ({"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}, [], "but not RANK: set it"),
        (MEETING | {"RANK": 2}, [], "RANK must be between 0 and 1"),
        (MEETING | {"LOCAL_RANK": "a"}, [], "LOCAL_RANK must be a whole number, not 'a'"),
        (
            MEETING | {"LOCAL_RANK": 0},
            ["--local-rank=1"],
            "--local-rank is 1 and the variable LOCAL_RANK is 0",
        ),
    ],
)
def test_one_of_several_processes_does_not_start_a_run_of_its_own(
    variables, words, message, folders, tmp_path, cli, monkeypatch
):
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_RANK", str(variables.get("LOCAL_RANK", 0)))  # set by the program, taken back
    words = [*TINY, *words, "--output-dir", tmp_path, folders]
    code, output, errors = cli(main_moco.main, *words)
    assert code == 2 and output == "" and errors.count("\n") == 1
    assert re.search(message, errors), errors
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (SLURM, ["--world-size", "1"]),
        ({"SLURM_PROCID": 0, "SLURM_NTASKS": 1}, []),
        ({"SLURM_NTASKS": 4}, []),  # a shell of salloc
        (MEETING | {"RANK": 0, "WORLD_SIZE": 1}, []),
    ],
)
def test_a_process_that_is_the_only_one_starts(variables, words, folders, tmp_path):
    with launched(variables, *TINY, "--epochs", "1", *words, "--output-dir", tmp_path, folders) as program:
        assert program.end() == 0, program.output
    assert "1 process(es)" in program.output


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
