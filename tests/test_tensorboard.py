"""TensorBoard's curves and --knn of a run that is stopped within an epoch and goes on."""

import signal

import pytest
import torch
from conftest import make_folders
from test_resume import FRESH, WORDS, pretrained
from written_logs import expected_scalars, lines_of, scalars

from moco.checkpoint import encoder_state
from moco.checkpoint_reader import read_checkpoint
from moco.data import Loading, image_folder
from moco.distributed import Process
from moco.encoders import base_encoder
from moco.execution import Execution
from moco.knn_evaluation import KnnEvaluation
from moco.run_log import NUMBERS
from moco.watch import PREEMPTED


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_stopped_within_an_epoch_goes_on_in_its_curves_and_in_knn(run_ranks, tmp_path, world):
    images, out = tmp_path / "images", tmp_path / "run"
    make_folders(images, val=20)
    out.mkdir()
    words = [*WORDS, *FRESH, "-p", 1, "--knn", 1, "--tensorboard", "--resume", "auto", "--output-dir", out]
    stop = (world - 1, 4, signal.SIGTERM)
    assert run_ranks(world, pretrained, words, images, stop) == [PREEMPTED] * world
    before = scalars(out / "tensorboard")
    assert run_ranks(world, pretrained, words, images) == [0] * world
    lines = lines_of(out)
    places = [(line["epoch"], line["step"]) for line in lines if line["kind"] == "start"]
    assert places == [(0, 0), (1, world)]
    entries = [line for line in lines if line["kind"] != "start"]
    found = scalars(out / "tensorboard")
    assert found == pytest.approx(expected_scalars(entries), rel=1e-6)
    assert len(found) == 8 * len(NUMBERS) + 2 and before.items() < found.items()

    percents = [line["knn"] for line in entries if "knn" in line]
    encoders = [read_checkpoint(out / f"checkpoint_000{epoch}.pth.tar") for epoch in range(2)]
    alone = [one_process_finds(encoder_state(content, out), images) for content in encoders]
    assert alone == percents and percents[0] != percents[1]


def one_process_finds(state, images):
    encoder = base_encoder("shufflenet_v2_x0_5")(num_classes=1)
    encoder.fc = torch.nn.Identity()
    encoder.load_state_dict(state)
    process = Process.alone(torch.device("cpu"))
    knn = KnnEvaluation(1, 1, "shufflenet_v2_x0_5", process, Execution(process.device))
    knn.load(images, image_folder(images, "train"), Loading(16, "pil", 8, 0))
    return knn(0, encoder)["knn"]
