"""Numbers that are not finite, and disks that are full or read-only: what stays, and what is said."""

import os
import re
import resource
import shutil
import tempfile

import pytest
import torch
from command_lines import TINY
from run_files import checkpoints, content
from started_runs import at_step, run

import main_moco


def spoil_a_weight():
    """Have a weight of the query encoder be nan from the second step on."""
    real = main_moco.MoCo

    def made(*arguments):
        model = real(*arguments)
        at_step(1, lambda: next(model.encoder_q.parameters()).data.view(-1)[:1].fill_(torch.nan))
        return model

    main_moco.MoCo = made


@pytest.mark.parametrize("printed", ["1", "1000"])
@pytest.mark.parametrize("fault", ["1e30", "1e6", "weight"])
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoints(
    folders, tmp_path, fault, printed
):
    words = ["-p", printed, "--output-dir", tmp_path, folders]
    run(*TINY, *words, "--epochs", "1")
    before = (tmp_path / "checkpoint_0000.pth.tar").read_bytes()
    prepare = spoil_a_weight if fault == "weight" else lambda: None
    more = [] if fault == "weight" else ["--lr", fault, "--epochs", "9"]
    output = run(*TINY, *words, "--resume", "auto", *more, prepare=prepare, code=3)
    epoch, step, lr = re.search(
        r"error: the loss of epoch (\d) became nan or infinite in step (\d) or before, at lr (\S+); .*--lr",
        output,
    ).groups()
    assert "Traceback" not in output and output.count("error: ") == 1
    if fault == "weight":
        assert (epoch, step, lr) == ("1", "1" if printed == "1" else "2", "0.015")
    assert float(lr) == pytest.approx(0.015 if fault == "weight" else float(fault), rel=0.5)
    last = int(epoch) - 1  # nothing was saved after it
    assert checkpoints(tmp_path)[-1] == f"checkpoint_000{last}.pth.tar"
    assert (tmp_path / "checkpoint_0000.pth.tar").read_bytes() == before


def test_weights_that_the_last_step_of_an_epoch_ruined_leave_the_checkpoint_before(folders, tmp_path):
    words = [*TINY, "-b", "24", "--keep", "1", "--output-dir", tmp_path, folders]
    run(*words, "--epochs", "2")
    good = (tmp_path / "checkpoint_0001.pth.tar").read_bytes()
    output = run(*words, "--resume", "auto", "--epochs", "6", "--lr", "1e36", code=3)
    assert "the loss of epoch 3 became nan" in output and "from the one before" in output
    assert checkpoints(tmp_path) == ["checkpoint_0001.pth.tar", "checkpoint_0002.pth.tar"]
    assert (tmp_path / "checkpoint_0001.pth.tar").read_bytes() == good
    before = tmp_path / "checkpoint_0001.pth.tar"
    run(*words, "--resume", before, "--epochs", "4", "--overwrite")
    assert checkpoints(tmp_path) == ["checkpoint_0003.pth.tar"]


@pytest.mark.parametrize("where", [0, 1], ids=["query", "key"])
def test_an_infinite_pixel_on_one_rank_stops_all_with_one_message(folders, tmp_path, where):
    spoilt = tmp_path / "spoilt"

    def prepare():
        real, calls = main_moco.DeviceAugment, [0]

        def augment(*arguments):
            engine = real(*arguments)

            def spoiling(batch):
                views = [view.clone() for view in engine(batch)]
                calls[0] += 1
                if os.environ["RANK"] == "1" and calls[0] == 2:
                    views[where][0, 0, 0, 0] = torch.inf
                    spoilt.touch()
                return views

            return spoiling

        main_moco.DeviceAugment = augment

    output = run(*TINY, "--output-dir", tmp_path / "out", folders, world=2, prepare=prepare, code=3)
    assert spoilt.exists() and output.count("error: ") == 1 and "Traceback" not in output
    assert "the loss of epoch 0 became nan or infinite in step 1 or before" in output
    assert checkpoints(tmp_path / "out") == []


def as_nobody():
    """Go on as a user who is not root, whom the modes of files do not bind."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_fails_during_the_run_keeps_the_older_checkpoint(folders, tmp_path, whole, fault):
    def act():  # in the last step, for which all images are read
        if fault == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192,) * 2)  # files end there, as on a full disk
        else:
            os.chmod(tmp_path, 0o555)
            as_nobody()

    words = [*TINY, "-j", "0", "--output-dir", tmp_path, "-p", "1000", folders]
    output = run(*words, prepare=lambda: at_step(6, act), code=2)
    reason = {"full": "File too large", "read-only": "Permission denied"}[fault]
    sentence = f"error: cannot write the checkpoint {tmp_path}/checkpoint_0001.pth.tar ("
    assert sentence in output and reason in output and "Epoch: [1][0/3]" in output
    assert "Traceback" not in output and output.count("error: ") == 1
    assert checkpoints(tmp_path) == ["checkpoint_0000.pth.tar"]
    state, expected = (content(folder, "checkpoint_0000.pth.tar") for folder in (tmp_path, whole(1)))
    assert state["state_dict"] == expected["state_dict"] and state["optimizer"] == expected["optimizer"]


def test_a_folder_that_may_not_be_written_to_is_found_before_the_first_step():
    place = tempfile.mkdtemp()  # below folders that everybody may enter
    os.chmod(place, 0o555)

    try:
        output = run(*TINY, "--output-dir", place, "data", prepare=as_nobody, code=2)
        assert f"cannot write to --output-dir {place} (Permission denied)" in output
        assert output.count("\n") == 1 and os.listdir(place) == []
    finally:
        shutil.rmtree(place)
