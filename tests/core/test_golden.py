"""moco.builder.MoCo against recorded runs of the published model (tests/golden, CPU and gloo)."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TinyEncoder
from torch.nn.parallel import DistributedDataParallel

from moco import losses
from moco.builder import MoCo

GOLDEN = Path(__file__).parent.parent / "golden"


def load(name):
    record = np.load(GOLDEN / f"{name}.npz")
    return ast.literal_eval(str(record["config"])), record


def state_of(record, prefix):
    return {n.removeprefix(prefix): torch.from_numpy(record[n]) for n in record.files if n.startswith(prefix)}


def build(config, **changes):
    c = config | changes
    torch.manual_seed(c["seed"])
    epsilon = c["epsilon"] if c["method"] else None
    splits = c.get("bn_splits", 1)
    model = MoCo(TinyEncoder, c["dim"], c["K"], c["m"], c["T"], c["mlp"], epsilon=epsilon, bn_splits=splits)
    if c.get("compiled"):
        for encoder in (model.encoder_q, model.encoder_k):
            encoder.compile(backend="aot_eager")
    return model


def replay(rank, world, name, changes):
    """Train as the recorded run did. Returns this rank's losses, the first logits and the final state."""
    config, record = load(name)
    model = DistributedDataParallel(build(config, **changes))
    sgd = torch.optim.SGD(
        model.parameters(), config["lr"], momentum=config["momentum"], weight_decay=config["weight_decay"]
    )
    curve, first = [], None
    for step in range(config["steps"]):
        im_q, im_k = torch.from_numpy(record["views"][step]).chunk(world, dim=1)[rank]
        torch.manual_seed(1000 + step)
        logits, *perturbed, labels = model(im_q, im_k)
        first = logits.detach() if first is None else first
        loss = (
            losses.ifm(logits, *perturbed, labels, config["alpha"])
            if perturbed
            else losses.info_nce(logits, labels)
        )
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        curve.append(loss.item())
    state = {n: t.numpy() for n, t in model.module.state_dict().items()}
    return curve, first.numpy(), state


@pytest.mark.parametrize("name", ["mocov2_1proc", "ifm_1proc"])
def test_the_seed_gives_the_recorded_initial_state(name):
    config, record = load(name)
    own, recorded = build(config).state_dict(), state_of(record, "init/")
    assert own.keys() == recorded.keys()
    assert all(torch.equal(own[n], recorded[n]) for n in recorded)


@pytest.mark.parametrize("name", ["mocov2_1proc", "ifm_1proc", "ifm_2proc"])
def test_recorded_training_is_reproduced(run_ranks, name):
    config, record = load(name)
    ranks = run_ranks(config["world"], replay, name, {})
    for rank, (curve, _, _) in enumerate(ranks):
        np.testing.assert_allclose(curve, record["losses"][rank], rtol=0, atol=1e-6)
    _, logits, state = ranks[0]
    np.testing.assert_allclose(logits, record["logits0"], rtol=0, atol=1e-5)
    for n, recorded in state_of(record, "final/").items():
        np.testing.assert_allclose(state[n], recorded, rtol=0, atol=1e-5, err_msg=n)


@pytest.mark.parametrize("compiled", [False, True])
def test_one_process_with_groups_reproduces_the_recorded_training_of_two(run_ranks, compiled):
    config, record = load("ifm_2proc")
    ((curve, logits, _),) = run_ranks(1, replay, "ifm_2proc", {"bn_splits": 2, "compiled": compiled})
    np.testing.assert_allclose(curve, record["losses"].mean(axis=0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(logits[: len(logits) // 2], record["logits0"], rtol=0, atol=1e-5)
    ((without, _, _),) = run_ranks(1, replay, "ifm_2proc", {"compiled": compiled})
    assert np.abs(np.array(without) - curve).max() > 1e-5


@pytest.mark.parametrize("changes", [{"m": 0.98}, {"epsilon": 0.11}, {"T": 0.21}])
def test_other_settings_fail_the_comparison(run_ranks, changes):
    (curve, _, _), _ = run_ranks(2, replay, "ifm_2proc", changes)
    assert np.abs(np.array(curve) - load("ifm_2proc")[1]["losses"][0]).max() > 1e-5
