"""Whole runs on null CUDA (helpers/null_cuda.py), where GPUs compute nothing and all else is as with a GPU:
how runs of several GPUs end, what they refuse, and whether late copies spoil batches.
"""

import os
import re
import signal
import subprocess

import null_cuda
import pytest
from command_lines import TINY, program
from made_folders import make_folders
from run_files import checkpoints
from started_runs import LONG, SPAWN, Program, all_end

from moco.run.resources import available_cores

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(null_cuda.missing() is not None, reason=str(null_cuda.missing())),
]
SCRIPT = "tests/helpers/null_cuda.py"
RUN = [*TINY, *LONG, "-b", "16", "-j", "2", "--device-aug", "off"]
STARTS = pytest.mark.parametrize("start", ["spawn", "torchrun"])
GPUS = pytest.mark.parametrize("gpus", [2, 8])


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return null_cuda.build(tmp_path_factory.mktemp("null_cuda"))


@pytest.fixture
def variables(library, monkeypatch):
    """`variables(gpus, **settings)`: programs that are started from now on run on null CUDA."""

    def set_all(gpus, **settings):
        for name, value in null_cuda.environment(library, gpus, **settings).items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.fixture
def images(tmp_path):
    """A folder of 48 training images, three steps of 16, that a test may change."""
    make_folders(tmp_path / "images", train=16)
    return tmp_path / "images"


def started(start, gpus, *words):
    """A run of a process per GPU."""
    if start == "spawn":
        return Program(SCRIPT, *SPAWN, *words)
    return Program("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}", SCRIPT, *words)


def ends(program, seconds, start, code):
    """Whether it ends in time, with this exit code or torchrun's 1, and leaves no process.

    The seconds are for a core per two ranks, as a rank's interpreter takes half a second of a core to end.
    """
    everyone = program.below()
    ranks = int(re.search(r"(\d+) process\(es\) on cuda", program.output)[1])
    ended = program.end(seconds * max(1, ranks / 2 / available_cores()))
    assert ended == (code if start == "spawn" else 1), program.output
    return all_end(everyone, 5)


@STARTS
@GPUS
def test_sigterm_saves_and_ends(images, tmp_path, variables, start, gpus):
    variables(gpus)
    with started(start, gpus, *RUN, "--output-dir", tmp_path / "out", images) as program:
        program.wait_for("Epoch: [1][0/3]")
        os.kill(program.pid, signal.SIGTERM)
        assert ends(program, 15, start, 75)
    assert "(SIGTERM);\n   saved " in program.output and "error:" not in program.output
    assert len(checkpoints(tmp_path / "out")) >= 1


@STARTS
@GPUS
def test_a_bad_image_of_one_rank_is_named(images, tmp_path, variables, start, gpus):
    variables(gpus)
    with started(start, gpus, *RUN, "--output-dir", tmp_path / "out", images) as program:
        program.wait_for("Epoch: [1][0/3]")
        bad = images / "train" / "bee" / "3.jpg"
        bad.write_text("no image")
        assert ends(program, 20, start, 2)
    assert f"main_moco.py: error: {bad} cannot be read as an image" in program.output
    if start == "spawn":
        assert program.output.count("main_moco.py: error: ") == 1 and "Traceback" not in program.output


def test_a_rank_that_destroys_its_groups_when_it_fails_alone_would_hang(images, tmp_path, variables):
    """The negative control of the test above, and of ncclCommFinalize."""
    variables(2, NULL_DESTROY=1)
    with started("spawn", 2, *RUN, "--output-dir", tmp_path / "out", images) as program:
        program.wait_for("Epoch: [1][0/3]")
        (images / "train" / "bee" / "3.jpg").write_text("no image")
        with pytest.raises(subprocess.TimeoutExpired):
            program.end(20)


@STARTS
@GPUS
def test_a_gpu_without_enough_memory_becomes_a_sentence(images, tmp_path, variables, start, gpus):
    variables(gpus, NULL_OOM=1)
    with started(start, gpus, *RUN, "--output-dir", tmp_path / "out", images) as program:
        program.wait_for("Epoch: [0][1/3]")
        assert ends(program, 20, start, 2)
    known = r"GPU 1 has 80.00 GiB, [\d.]+ GiB free, and [\d.]+ GiB more were needed"
    sentence = rf"main_moco.py: error: the GPU's memory does not hold a step \({known}\); lower --batch-size"
    assert re.search(sentence, program.output), program.output
    if start == "spawn":
        assert program.output.count("main_moco.py: error: ") == 1 and "Traceback" not in program.output


def test_more_ranks_than_gpus_are_refused(images, tmp_path, variables):
    for gpus, ranks, sentence in (
        (1, 2, "error: ranks 0 and 1 have the same GPU (00000000-0000-0000-0000-000000000000); start one"),
        (2, 3, "error: process 2 of this machine has no GPU of its own (of 2); start one process per GPU"),
    ):
        variables(gpus)
        with started("torchrun", ranks, *RUN, "--output-dir", tmp_path / "out", images) as program:
            assert program.end(60) == 1 and sentence in program.output, program.output
        assert not (tmp_path / "out").exists() or checkpoints(tmp_path / "out") == []


def test_a_launcher_may_show_each_rank_its_own_gpu_alone(images, tmp_path, variables):
    variables(1, NULL_GPU_PER_RANK=1)
    words = [*RUN, "--epochs", "1", "--output-dir", tmp_path / "out", images]
    with started("torchrun", 2, *words) as program:
        assert program.end(60) == 0, program.output
    assert "2 process(es) on cuda" in program.output


def test_a_run_goes_on_without_pinned_memory(images, tmp_path, variables):
    variables(1, NULL_PIN_ERROR=304)
    with Program(SCRIPT, *RUN, "--epochs", "2", "--output-dir", tmp_path / "out", images) as run:
        assert run.end(60) == 0, run.output
    assert len(re.findall("^note: CUDA cannot pin .*error 304", run.output, re.MULTILINE)) == 1
    assert "Epoch: [1][2/3]" in run.output


@pytest.mark.parametrize("lag", [0, 3, 20, 2000])
@pytest.mark.parametrize(("workers", "size"), [(0, 4), (2, 16), (3, 64)])
def test_late_copies_spoil_no_batch(variables, lag, workers, size):
    variables(1, NULL_LAG=lag, PYTHONPATH=".")
    assert wrong_batches(workers, size) == 0
    if lag == 20:  # negative control: slots are filled again though their copies have not ended
        variables(1, NULL_LAG=lag, NULL_LYING_EVENTS=1)
        assert wrong_batches(workers, size) > 20


def wrong_batches(workers, size):
    ended = program("tests/helpers/null_cuda_ring.py", str(workers), str(size))
    assert ended.returncode == 0, ended.stderr
    return int(re.fullmatch(r"(\d+) of 120\n", ended.stdout)[1])
