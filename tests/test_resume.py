"""A run that stops, after an epoch or within one, and goes on is to the bit a run that never stopped."""

import hashlib
import os
import signal
import sys

import pytest
import torch
from command_lines import MOCO

import main_moco
from moco.distributed import Process
from moco.run_folder import RunFolder
from moco.watch import PREEMPTED

WORDS = [*MOCO, "-a", "tiny", "--method", "ifm", "--epochs", "2", "--keep", "9"]
FRESH = ["-a", "shufflenet_v2_x0_5"]  # besides, for processes that are started anew: they know no `tiny`


def pretrained(rank, world, words, folder, stop=None):
    """Run pre-training in this process, which gets a signal within a step with `stop`: (rank, step, number).

    Returns how it ended.
    """
    sys.argv = ["main_moco.py", *map(str, words), str(folder)]
    args, steps = main_moco.parse_args(), [0]
    main_moco.check(args)
    real = main_moco.rank_accuracy

    def counted(ranks):
        steps[0] += 1
        if stop and stop[:2] == (rank, steps[0]):
            os.kill(os.getpid(), stop[2])
        return real(ranks)

    main_moco.rank_accuracy = counted
    try:
        main_moco.pretrain(Process(rank, world, rank, world, world, torch.device("cpu")), args, folder)
    except SystemExit as end:
        return end.code
    finally:
        main_moco.rank_accuracy = real
    return 0


def content(folder, name="checkpoint_0001.pth.tar"):
    """{entry: SHA-256} of a checkpoint: of the keys, types, shapes and bytes, in order."""
    checkpoint = torch.load(folder / name, weights_only=True)
    return {key: content_hash(value) for key, value in checkpoint.items() if key != "settings"}


def content_hash(value):
    digest = hashlib.sha256()
    _add_to(digest, value)
    return digest.hexdigest()


def _add_to(digest, value):
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.view(-1).view(torch.uint8).numpy() if plain.numel() else b"")
    elif isinstance(value, dict):
        digest.update(f"dict {len(value)}".encode())
        for key, item in value.items():
            _add_to(digest, key)
            _add_to(digest, item)
    elif isinstance(value, (list, tuple)):
        digest.update(f"{type(value).__name__} {len(value)}".encode())
        for item in value:
            _add_to(digest, item)
    else:
        digest.update(f"{type(value).__name__} {value!r}".encode())


def checkpoints(folder):
    """The names of the files of a run, without its log."""
    return sorted(set(os.listdir(folder)) - {"log.jsonl"})


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """`whole(world)`: the folder of a run of that many processes that never stopped, with one worker each."""
    made = {}

    def run(run_ranks, world):
        if world not in made:
            made[world] = tmp_path_factory.mktemp(f"whole{world}")
            words = [*WORDS, "-j", world, "--output-dir", made[world]]
            assert run_ranks(world, pretrained, words, folders) == [0] * world
        return made[world]

    return run


@pytest.mark.parametrize(
    ("world", "workers", "step", "number"),
    [
        (1, 0, 1, signal.SIGTERM),
        (1, 4, 4, signal.SIGINT),
        (1, 1, 3, signal.SIGUSR1),
        (2, 0, 3, signal.SIGINT),
        (2, 1, 1, signal.SIGUSR1),
        (2, 4, 4, signal.SIGTERM),
    ],
)
def test_a_run_stopped_by_a_signal_goes_on_exactly(
    run_ranks, folders, tmp_path, whole, world, workers, step, number
):
    words = [*WORDS, "-j", workers * world, "--output-dir", tmp_path]
    stop = (world - 1, step, number)
    assert run_ranks(world, pretrained, words, folders, stop) == [PREEMPTED] * world
    stopped = checkpoints(tmp_path)
    assert "checkpoint_0001.pth.tar" not in stopped and len(stopped) == (2 if step == 4 else 1)
    assert run_ranks(world, pretrained, [*words, "--resume", "auto"], folders) == [0] * world
    expected = content(whole(run_ranks, world))
    assert content(tmp_path) == expected
    assert content(tmp_path, "checkpoint_0000.pth.tar") != expected  # negative control


def test_a_run_told_to_stop_after_its_last_step_has_simply_ended(run_ranks, folders, tmp_path, whole):
    words = [*WORDS, "--output-dir", tmp_path]
    assert run_ranks(1, pretrained, words, folders, (0, 6, signal.SIGUSR1)) == [0]
    assert content(tmp_path) == content(whole(run_ranks, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["-b", "4"], "the middle of an epoch of 8 global batch, and here it would be 4"),
        (["--bn-splits", "2"], "the middle of an epoch of 1 batchnorm groups, and here it would be 2"),
        (["--seed", "9"], "the middle of an epoch of --seed 3, whose other half --seed 9 does not know"),
        (["--moco-k", "24"], "is of a run with --moco-k 20, not 24"),
        (["--moco-dim", "9"], "is of a run with --moco-dim 8, not 9"),
        (["-a", "resnet34"], "is of -a tiny, not of -a resnet34"),
    ],
)
def test_what_cannot_go_on_says_why(stopped, folders, cli, change, message):
    code, _, errors = cli(
        main_moco.main, *WORDS, *change, "--resume", "auto", "--output-dir", stopped, folders
    )
    assert code == 2 and message in errors and errors.count("\n") == 1


@pytest.fixture
def stopped(run_ranks, folders, tmp_path):
    """The folder of a run that was stopped after 4 steps, in its second epoch."""
    assert run_ranks(1, pretrained, [*WORDS, "--output-dir", tmp_path], folders, (0, 4, signal.SIGINT)) == [
        75
    ]
    assert checkpoints(tmp_path) == ["checkpoint_0000.pth.tar", "checkpoint_0001_000001.pth.tar"]
    return tmp_path


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = b""
    else:  # one bit in the middle of the largest tensors
        data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped"])
def test_a_damaged_newest_file_is_named_and_the_one_before_is_used(
    stopped, folders, run_ranks, whole, capfd, how
):
    newest = stopped / "checkpoint_0001_000001.pth.tar"
    damage(newest, how)
    words = [*WORDS, "--output-dir", stopped, "--resume"]
    assert run_ranks(1, pretrained, [*words, "auto"], folders) == [0]
    output, _ = capfd.readouterr()
    assert (
        f"warning: {newest}" in output and f"--resume auto: {stopped / 'checkpoint_0000.pth.tar'}" in output
    )
    assert content(stopped) == content(whole(run_ranks, 1))


def test_without_a_good_file_nothing_is_started_anew(stopped, folders, cli):
    for path in stopped.glob("checkpoint*"):
        damage(path, "flipped")
    words = [*WORDS, "--output-dir", stopped, folders, "--resume"]
    code, output, errors = cli(main_moco.main, *words, "auto")
    assert code == 2 and "none of the 2 checkpoints" in errors and "Epoch" not in output
    code, _, errors = cli(main_moco.main, *words, stopped / "checkpoint_0000.pth.tar")
    assert code == 2 and "is damaged: its content has not the SHA-256" in errors


def test_files_that_stay(tmp_path):
    folder, others = RunFolder(tmp_path, keep=2, save_freq=3), ["checkpoint.pth.tar", "checkpoint_1.txt"]
    for name in others:
        (tmp_path / name).write_text("")
    tensors = {"state_dict": {"module.x": torch.zeros(2)}}
    for epoch in range(8):
        folder.save(tensors | {"epoch": epoch, "step": 5})
        folder.wait()
        assert f"checkpoint_{epoch:04d}_000005.pth.tar" in os.listdir(tmp_path)
        folder.save(tensors | {"epoch": epoch + 1, "step": 0})
        folder.wait()
        if epoch:  # the one before stays until what follows is known to be sound
            assert f"checkpoint_{epoch:04d}.pth.tar" in (names := os.listdir(tmp_path))
            assert f"checkpoint_{epoch:04d}_000005.pth.tar" in names
    folder.tidy()
    left = sorted(set(os.listdir(tmp_path)) - set(others))
    assert left == [f"checkpoint_{epoch:04d}.pth.tar" for epoch in (2, 5, 6, 7)]
    said = []
    other = RunFolder(tmp_path)
    (tmp_path / ".checkpoint_0008.pth.tar.half.tmp").write_text("")
    other.start(6, 0, said.append)
    assert len(said) == 1 and said[0].startswith(
        f"note: 2 file(s) of another run in {tmp_path} are set aside"
    )
    left = sorted(set(os.listdir(tmp_path)) - set(others))
    names = ["2.pth.tar", "5.pth.tar", "6.pth.tar.before", "7.pth.tar.before"]
    assert left == [f"checkpoint_000{name}" for name in names]
    assert other.newest_good(print)[0] == tmp_path / "checkpoint_0005.pth.tar"
