"""Numbers that go wrong, processes that die, disks that fill: what stays, and what is said."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from command_lines import ROOT
from forked_program import forked
from test_resume import FRESH, WORDS, checkpoints, content, pretrained
from tiny import TinyEncoder

import main_moco
from moco import losses
from moco.builder import MoCo
from moco.checkpoint_reader import read_checkpoint
from moco.errors import UserError
from moco.watch import SAME, Signals


def spoil_a_weight(monkeypatch):
    """Have a weight of the query encoder be no number from the second step on."""
    real, steps = main_moco.torch.manual_seed, []  # called at the start of each step, and once before

    def seeded(seed):
        steps.append(seed)
        if len(steps) == 3:
            next(models[0].encoder_q.parameters()).data.view(-1)[0] = torch.nan
        return real(seed)

    models = []

    def made(*arguments, **options):
        models.append(MoCo(*arguments, **options))
        return models[0]

    monkeypatch.setattr(main_moco, "MoCo", made)
    monkeypatch.setattr(main_moco.torch, "manual_seed", seeded)


@pytest.mark.parametrize("fault", ["1e30", "1e6", "weight"])
def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_checkpoints(
    folders, tmp_path, cli, monkeypatch, fault
):
    words = [*WORDS, *FRESH, "--output-dir", tmp_path, folders]
    assert cli(main_moco.main, *words, "--epochs", "1")[0] == 0
    before = (tmp_path / "checkpoint_0000.pth.tar").read_bytes()
    if fault == "weight":
        spoil_a_weight(monkeypatch)
    lr = {"1e30": r"5e\+29", "1e6": r"500000", "weight": "0.015"}[fault]
    more = [] if fault == "weight" else ["--lr", fault]
    code, _, errors = cli(main_moco.main, *words, "--resume", "auto", *more)
    assert code == 2
    step = "1" if fault == "weight" else r"\d"
    assert re.search(
        rf"the loss of epoch 1 became nan or infinite in step {step} or just before, at lr {lr};", errors
    )
    assert "lower --lr" in errors and errors.count("\n") == 1
    assert checkpoints(tmp_path) == ["checkpoint_0000.pth.tar"]
    assert (tmp_path / "checkpoint_0000.pth.tar").read_bytes() == before


def test_weights_that_the_last_step_of_an_epoch_ruined_leave_the_checkpoint_before(folders, tmp_path, cli):
    words = [*WORDS, "-b", "24", "--keep", "1", "--output-dir", tmp_path, "--resume", "auto", folders]
    assert cli(main_moco.main, *words, "--epochs", "2")[0] == 0
    sound = (tmp_path / "checkpoint_0001.pth.tar").read_bytes()
    code, _, errors = cli(main_moco.main, *words, "--epochs", "6", "--lr", "1e36")
    assert code == 2 and "the loss of epoch 3 became nan" in errors and "from the one before" in errors
    assert checkpoints(tmp_path) == ["checkpoint_0001.pth.tar", "checkpoint_0002.pth.tar"]
    assert (tmp_path / "checkpoint_0001.pth.tar").read_bytes() == sound
    words[words.index("auto")] = tmp_path / "checkpoint_0001.pth.tar"
    code, output, errors = cli(main_moco.main, *words, "--epochs", "4")
    assert code == 0, errors
    assert "note: 1 file(s) of another run" in output
    assert checkpoints(tmp_path) == ["checkpoint_0002.pth.tar.before", "checkpoint_0003.pth.tar"]


def infinite_on_one_rank(rank, world, words, folder, where):
    """As `pretrained`, but one rank sees an infinite pixel in the second step."""
    real, calls = main_moco.finisher, [0]

    def finisher(*arguments):
        finish, how = real(*arguments)

        def spoilt(batch):
            views = [view.clone() for view in finish(batch)]
            calls[0] += 1
            if rank == 1 and calls[0] == 2:
                views[where][0, 0, 0, 0] = torch.inf
            return views

        return spoilt, how

    main_moco.finisher = finisher
    try:
        pretrained(rank, world, words, folder)
    except UserError as error:
        return calls[0], error.sentence
    finally:
        main_moco.finisher = real


@pytest.mark.parametrize("where", [0, 1], ids=["query", "key"])
def test_an_infinite_pixel_on_one_rank_stops_all_with_one_message(run_ranks, folders, tmp_path, where):
    words = [*WORDS, "--output-dir", tmp_path]
    first, second = run_ranks(2, infinite_on_one_rank, words, folders, where)
    assert first == second
    assert first[0] == 3 and "the loss of epoch 0 became nan or infinite" in first[1]
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_keys_that_are_no_numbers_do_not_enter_the_queue(value):
    torch.manual_seed(0)
    model, images = MoCo(TinyEncoder, 4, 8), torch.randn(2, 4, 3, 8, 8)
    before = model.queue.clone()
    spoilt = images.clone()
    spoilt[1, 0, 0, 0, 0] = value
    loss, *_ = model(*spoilt, weights=losses.weights(None, None))
    assert not loss.isfinite() and torch.equal(model.queue, before)
    fresh = MoCo(TinyEncoder, 4, 8)
    before = fresh.queue.clone()
    fresh(*images)
    assert not torch.equal(fresh.queue, before)  # negative control


def test_a_second_signal_ends_at_once():
    def main():
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # by a terminal and by a parent: counts once
            print(signals.name)
            time.sleep(SAME + 0.2)
            os.kill(os.getpid(), signal.SIGINT)
            print("still here")

    pid, output = forked(main, (1, 2))
    assert output.read() == "SIGTERM\n"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGINT


def test_signals_are_only_heard_inside():
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        assert signals.name is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.name == "SIGUSR1"
    assert signal.getsignal(signal.SIGTERM) == before


def test_kill_9_at_random_moments_of_saving_leaves_the_newest_file_whole(tmp_path):
    """Twenty processes that do nothing but save are killed; one of them in the middle of a file."""
    code = (
        "import sys, torch\nfrom moco.run_folder import RunFolder\n"
        "folder, state = RunFolder(sys.argv[1], keep=2), {'module.x': torch.zeros(1_000_000)}\n"
        "for epoch in range(1, 10_000):\n"
        "    state['module.x'] += 1\n"
        "    folder.save({'state_dict': state, 'epoch': epoch, 'step': 0}); folder.tidy()\n"
        "    print(epoch, flush=True)\n"
    )
    unfinished = 0
    program = subprocess.Popen(
        [sys.executable, "-c", FORKS, str(tmp_path), code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    for line in program.stdout:
        folder = tmp_path / line.strip()
        files = os.listdir(folder)
        unfinished += any(name.endswith(".tmp") for name in files)
        names = sorted(name for name in files if not name.startswith("."))
        assert names
        for name in names:
            state = read_checkpoint(folder / name)
            assert (state["state_dict"]["x"] == state["epoch"]).all()
    assert program.wait() == 0
    assert unfinished >= 1  # a kill did hit a save


FORKS = """
import os, random, signal, sys, time
import torch
import moco.run_folder
random.seed(0)
for number in range(20):
    folder = os.path.join(sys.argv[1], str(number)); os.mkdir(folder)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv[1] = folder
        exec(sys.argv[2]); os._exit(0)
    while not any(n.startswith("checkpoint") for n in os.listdir(folder)): time.sleep(0.001)
    time.sleep(random.uniform(0, 0.03))
    os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    print(number, flush=True)
"""


def test_a_full_disk_keeps_the_older_checkpoint(folders, tmp_path, cli):
    resource = pytest.importorskip("resource")
    words = [*WORDS, *FRESH, "--output-dir", tmp_path, folders]
    assert cli(main_moco.main, *words, "--epochs", "1")[0] == 0
    before = content(tmp_path, "checkpoint_0000.pth.tar")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # files end at 1 MiB, as on a full disk
    try:
        code, _, errors = cli(main_moco.main, *words, "--resume", "auto")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert code == 2 and "cannot write the checkpoint" in errors and errors.count("\n") == 1
    assert checkpoints(tmp_path) == ["checkpoint_0000.pth.tar"]
    assert content(tmp_path, "checkpoint_0000.pth.tar") == before
