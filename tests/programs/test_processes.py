"""Runs of several processes: who ends whom, what is said, and what the ranks agree on."""

import hashlib
import os
import re
import signal
import time

import pytest
import spawned_ranks
import torch
from command_lines import TINY
from forked_program import abandoned
from made_folders import make_folders
from run_files import checkpoints
from started_runs import LONG, Forked, TwoRanks, all_end, at_step, run

import main_moco

RUN = [*TINY, *LONG, "-j", "2"]
# The ranks of users are spawned. Forked ones end in the same way, and start at once.
SPAWN = pytest.param("spawn", marks=pytest.mark.slow)
STARTS = pytest.mark.parametrize("start", ["fork", SPAWN])


def knows_tiny():
    main_moco.pretrain = spawned_ranks.pretrain


def test_spawned_ranks_with_data_workers_save_and_end_on_sigterm(folders, tmp_path):
    with TwoRanks(*RUN, folders, "--output-dir", tmp_path, prepare=knows_tiny, start="spawn") as program:
        program.wait_for("Epoch: [1][0/3]")
        everyone = program.below()
        assert len(everyone) >= 4  # ranks and workers
        began = time.monotonic()
        os.kill(program.pid, signal.SIGTERM)
        assert program.end(60) == 75 and "continue with --resume auto" in program.output, program.output
        assert time.monotonic() - began < 30 and all_end(everyone, 5)
    assert checkpoints(tmp_path) and "Traceback" not in program.output


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGTERM, 75, marks=pytest.mark.slow), (signal.SIGINT, 130)],
)
def test_a_signal_while_ranks_are_spawned_is_not_a_fault(folders, tmp_path, number, code):
    with TwoRanks(*RUN, folders, "--output-dir", tmp_path, prepare=knows_tiny, start="spawn") as program:
        deadline = time.monotonic() + 30
        while len(program.ranks()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(program.pid, number)
        assert program.end(60) == code, program.output
    assert "Traceback" not in program.output and "error" not in program.output


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_bad_image_of_one_rank_is_named(tmp_path, start):
    make_folders(tmp_path)
    bad = tmp_path / "train" / "bee" / "3.jpg"
    bad.write_text("no image")
    words = [*RUN, tmp_path, "--output-dir", tmp_path / "out"]
    with TwoRanks(*words, prepare=knows_tiny, start=start) as program:
        assert program.end(60) == 2, program.output
    assert f"main_moco.py: error: {bad} cannot be read as an image" in program.output
    assert program.output.count("error: ") == 1 and "Traceback" not in program.output


@pytest.mark.parametrize(
    ("ranks", "start"),
    [
        pytest.param("0", "spawn", marks=pytest.mark.slow),
        ("1", "fork"),
        pytest.param("1", "spawn", marks=pytest.mark.slow),
        ("01", "fork"),
        ("01", "spawn"),
    ],
)
def test_the_traceback_of_an_exception_is_shown(folders, tmp_path, start, ranks, monkeypatch):
    def fails():
        main_moco.pretrain = spawned_ranks.failing

    monkeypatch.setenv(spawned_ranks.FAILING, f"{ranks}:unexpected")
    with TwoRanks(*RUN, folders, "--output-dir", tmp_path, prepare=fails, start=start) as program:
        assert program.end(60) == 1, program.output
    assert "ValueError: as intended" in program.output
    assert program.output.count("Traceback") == 1 and "another process" not in program.output
    assert "Epoch: [0][0/3]" in program.output


@pytest.mark.parametrize("world", [1, 2])
def test_a_gpu_without_enough_memory_becomes_one_sentence(folders, tmp_path, world, monkeypatch):
    def fails():
        main_moco.pretrain = spawned_ranks.failing

    monkeypatch.setenv(spawned_ranks.FAILING, "01:no memory")
    output = run(*RUN, folders, "--output-dir", tmp_path, prepare=fails, world=world, code=2)
    said = re.findall(r"^main_moco.py: error: (.*)", output, re.MULTILINE)
    assert len(said) == 1 and said[0].startswith("the GPU's memory does not hold a step (CUDA out of memory")
    assert "lower --batch-size" in said[0] and "Traceback" not in output and "another process" not in output


@STARTS
@pytest.mark.parametrize("killed", [0, 1])
def test_kill_9_of_a_rank_ends_all_and_says_which(folders, tmp_path, start, killed):
    with TwoRanks(*RUN, folders, "--output-dir", tmp_path, prepare=knows_tiny, start=start) as program:
        program.wait_for("Epoch: [0][2/3]")
        everyone, ranks = program.below(), program.ranks()
        assert len(ranks) == 2
        os.kill(ranks[killed], signal.SIGKILL)
        began = time.monotonic()
        assert program.end(60) == 2, program.output
        assert all_end(everyone, 10) and time.monotonic() - began < 60
    said = re.findall(r"^main_moco.py: error: (.*)", program.output, re.MULTILINE)
    assert said == [f"rank {killed} died (ended by SIGKILL); the others were ended"]
    assert "Traceback" not in program.output


def as_torchrun_does():
    """Start two ranks with torchrun's variables, and wait for them."""
    ranks = []
    for rank in range(2):
        if not (pid := os.fork()):
            os.environ.update(TORCHELASTIC_RUN_ID="run", RANK=str(rank), LOCAL_RANK=str(rank))
            main_moco.main()
            os._exit(0)
        ranks.append(pid)
    for pid in ranks:
        os.waitpid(pid, 0)


@pytest.mark.parametrize("moment", ["starting", "training"])
@pytest.mark.parametrize("launcher", ["parent", "torchrun"])
def test_kill_9_of_the_launcher_ends_all_where_sigint_is_ignored(
    folders, tmp_path, free_port, monkeypatch, launcher, moment
):
    """As it is in all that a script starts in the background."""

    def stand_still(*_):
        print("standing", flush=True)
        time.sleep(60)

    def prepare():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if moment == "starting":
            main_moco.check_arch = stand_still

    words = [*RUN, folders, "--output-dir", tmp_path]
    if launcher == "torchrun":
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
        program = Forked(*words, prepare=prepare, main=as_torchrun_does)
    else:
        program = TwoRanks(*words, prepare=prepare)
    with program:
        program.wait_for("standing" if moment == "starting" else "Epoch: [0][2/3]")
        everyone = program.below()
        os.kill(program.pid, signal.SIGKILL)
        assert all_end(everyone, 10)
    assert bool(checkpoints(tmp_path)) == (moment == "training")  # it was saved


@pytest.mark.parametrize("world", [1, 2])
def test_a_killed_data_worker_ends_the_run_with_a_sentence(folders, tmp_path, world):
    before = set(os.listdir("/dev/shm"))
    with (Forked, TwoRanks)[world - 1](*RUN, folders, "--output-dir", tmp_path) as program:
        program.wait_for("epoch 0")
        everyone, ranks = program.below(), program.ranks() if world == 2 else []
        worker = [pid for pid in everyone if pid not in ranks][-1]
        os.kill(worker, signal.SIGKILL)
        assert program.end(60) == 2, program.output
        assert all_end(everyone, 10)
    assert re.search(
        rf"error: data worker {worker} (is killed by signal|exited unexpectedly)", program.output
    )
    assert "Traceback" not in program.output and "another process" not in program.output
    assert abandoned(before, [program.pid, *everyone]) == set()


class Seen:
    """Writes what this rank's steps used and made to the files folder/rank0.pt, folder/rank1.pt."""

    def __init__(self, folder, steps):
        self.draws, self.batches, self.folder, self.steps = [], [], folder, steps

    def prepare(self):
        real_augment, real_moco = main_moco.DeviceAugment, main_moco.MoCo

        def augment(*arguments):
            engine = real_augment(*arguments)

            def noted(batch):
                self.batches.append(batch.indices.tolist())
                self.draws += [
                    hashlib.sha256(batch.records[:, i].tobytes()).hexdigest()
                    for i in range(len(batch.indices))
                ]
                return engine(batch)

            return noted

        def moco(*arguments):
            self.model = real_moco(*arguments)
            return self.model

        main_moco.DeviceAugment, main_moco.MoCo = augment, moco
        at_step(self.steps, self.write)

    def write(self):
        state = {"model": self.model.state_dict(), "draws": self.draws, "batches": self.batches}
        torch.save(state, self.folder / f"rank{os.environ['RANK']}.pt")


def test_ranks_share_weights_and_queue_but_no_random_draws(tmp_path):
    steps, images = 50, 120
    make_folders(tmp_path, train=images // 3)
    words = [*TINY, "-j", "4", "-p", "100", "--epochs", "4", "--lr", "0.3", tmp_path]
    run(*words, "--output-dir", tmp_path, world=2, prepare=Seen(tmp_path, steps).prepare)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    own = ("running_mean", "running_var")  # of BatchNorm: each rank's until the next step
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][name]) or name.endswith(own), name
    running = "encoder_q.bn.running_mean"
    assert not torch.equal(first["model"][running], second["model"][running])  # negative control
    assert torch.equal(first["model"]["queue_ptr"], torch.tensor([steps * 8 % 20]))

    assert len(first["batches"]) == len(second["batches"]) == steps
    draws = first["draws"] + second["draws"]
    assert len(draws) == 8 * steps == len(set(draws))
    orders = []
    for start in range(0, steps - 14, 15):  # each image once in an epoch, half of them on each rank
        epoch = [sum(rank["batches"][start : start + 15], []) for rank in (first, second)]
        assert sorted(epoch[0] + epoch[1]) == list(range(images)) and len(epoch[0]) == images // 2
        orders.append(tuple(epoch[0]))
    assert len(set(orders)) == len(orders) == 3
