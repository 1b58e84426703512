"""Parts of MoCo: momentum, queue, precision, shuffling, and one process that does what several do."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny import TinyEncoder
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import convnext_tiny, squeezenet1_1

from moco import losses
from moco.batchnorm import interleave, split_batchnorm
from moco.builder import MoCo, concat_all_gather
from moco.encoders import base_encoder
from moco.errors import UserError


def images(count, size=16, seed=0, dtype=torch.float32):
    return torch.randn(2, count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_momentum_update_rounds_as_published():
    torch.manual_seed(0)
    model = MoCo(TinyEncoder, 16, 32, m=0.99)
    with torch.no_grad():
        for p in model.encoder_q.parameters():
            p.add_(torch.randn_like(p))
    pairs = list(zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True))
    published = [k * 0.99 + q * (1.0 - 0.99) for q, k in pairs]
    one_rounding_less = [k.clone().mul_(0.99).add_(q, alpha=1.0 - 0.99) for q, k in pairs]
    model._momentum_update_key_encoder()
    assert all(torch.equal(k, p) for (_, k), p in zip(pairs, published, strict=True))
    assert not all(torch.equal(k, o) for (_, k), o in zip(pairs, one_rounding_less, strict=True))
    assert all(k.grad is None and not k.requires_grad for _, k in pairs)


@pytest.mark.parametrize("K", [12, 10, 4, 3])
def test_queue_is_first_in_first_out_for_any_k(K):
    torch.manual_seed(0)
    model = MoCo(TinyEncoder, 2, K)
    expected, pointer = [column.clone() for column in model.queue.T], 0
    for step in range(7):
        keys = torch.randn(4, 2)
        for key in keys:
            expected[pointer], pointer = key, (pointer + 1) % K
        model._dequeue_and_enqueue(keys)
        assert torch.equal(model.queue, torch.stack(expected, dim=1)), f"step {step}"
        assert model.queue_ptr.tolist() == [pointer]
        assert model.queue_ptr.dtype == torch.long


def test_outputs_and_labels():
    torch.manual_seed(0)
    model = MoCo(TinyEncoder, 16, 32)
    logits, labels = model(*images(8))
    assert logits.shape == (8, 33)
    assert labels.dtype == torch.long
    assert not labels.any()
    logits, logits_ifm, labels = model(*images(8), epsilon=0.1)
    shift = (logits_ifm - logits) * model.T
    torch.testing.assert_close(shift, torch.tensor([-0.1] + [0.1] * 32).expand(8, 33), rtol=0, atol=1e-6)
    assert len(MoCo(TinyEncoder, 16, 32, epsilon=0.0)(*images(8))) == 3


def test_autocast_leaves_similarities_in_float32():
    torch.manual_seed(0)
    model = MoCo(TinyEncoder, 16, 4096, T=0.05)
    features, queue = [], model.queue.clone()
    for encoder in (model.encoder_q, model.encoder_k):
        encoder.register_forward_hook(lambda module, inputs, output: features.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        logits, logits_ifm, _ = model(*images(8), epsilon=0.1)
    assert features[0].dtype == torch.bfloat16
    assert logits.dtype == logits_ifm.dtype == model.queue.dtype == torch.float32
    q = F.normalize(features[0].double(), dim=1)
    torch.testing.assert_close(logits[:, 1:].double(), q @ queue.double() / 0.05, rtol=0, atol=2e-5)
    low = (q.bfloat16() @ queue.bfloat16()).double() / 0.05
    assert (low - q @ queue.double() / 0.05).abs().max() > 1e-2


def test_keys_come_back_in_the_order_of_their_images():
    """In evaluation mode BatchNorm ignores the batch, so shuffling must leave no trace in the positives."""
    torch.manual_seed(0)
    model = MoCo(TinyEncoder, 16, 32).double().eval()
    view, _ = images(8, dtype=torch.float64)
    logits, _ = model(view, view)
    torch.testing.assert_close(logits[:, 0] * model.T, torch.ones(8, dtype=torch.float64))
    logits, _ = model(view, view.flip(0))
    assert (logits[:, 0] * model.T < 0.999999).any()


def train_steps(model, rank, world, arch_size, steps=2):
    """Losses, logits and gradients of the steps of one of `world` processes, and the final state."""
    wrapped = DistributedDataParallel(model) if world > 1 else model
    sgd = torch.optim.SGD(wrapped.parameters(), 0.1, momentum=0.9)
    seen = []
    for step in range(steps):
        im_q, im_k = images(8, arch_size, seed=step, dtype=torch.float64).chunk(world, dim=1)[rank]
        torch.manual_seed(step)
        logits, logits_ifm, labels = wrapped(im_q, im_k)
        loss = losses.ifm(logits, logits_ifm, labels, 1.0)
        sgd.zero_grad()
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.encoder_q.parameters()])
        sgd.step()
        seen.append((loss.detach(), logits.detach(), gradients))
    return seen, model.state_dict()


def split_run(rank, world, make, groups, size, compiled=False):
    torch.manual_seed(0)
    model = MoCo(make, 16, 24, 0.9, 0.2, mlp=True, epsilon=0.1, bn_splits=groups).double()
    if compiled:
        for encoder in (model.encoder_q, model.encoder_k):
            encoder.compile(backend="aot_eager")
    seen, state = train_steps(model, rank, world, size)
    as_arrays = [[t.numpy() for t in step] for step in seen]
    return as_arrays, {name: t.numpy() for name, t in state.items()}


def of_timm(num_classes):
    """A network with BatchNorm and activation in one module."""
    return base_encoder("timm:test_efficientnet")(num_classes)


def test_an_activation_within_batchnorm_stays():
    own, split = (of_timm(4).train() for _ in range(2))
    split.load_state_dict(own.state_dict())
    assert split_batchnorm(split, 2)
    x = torch.randn(4, 3, 32, 32)
    groups = torch.cat([x[::2], x[1::2]])
    assert torch.allclose(split(interleave(groups, 2))[::2], own(x[::2]), atol=1e-4)
    assert not torch.allclose(own(x), split(x), atol=1e-2)  # negative control


@pytest.mark.parametrize(
    ("make", "size", "compiled"),
    [
        (TinyEncoder, 16, False),
        (TinyEncoder, 16, True),
        (base_encoder("shufflenet_v2_x0_5"), 64, False),
        (base_encoder("conv3", image_size=16), 16, False),  # with a BatchNorm1d
        pytest.param(of_timm, 32, False, marks=pytest.mark.slow),
    ],
)
def test_one_process_with_groups_is_as_many_processes(run_ranks, make, size, compiled):
    (first, state), (second, _) = run_ranks(2, split_run, make, 1, size)
    one, one_state = split_run(0, 1, make, 2, size, compiled)
    for (loss_a, logits_a, slope), (loss_b, logits_b, _), (loss, logits, one_slope) in zip(
        first, second, one, strict=True
    ):
        assert loss == pytest.approx((loss_a + loss_b) / 2, abs=1e-10)
        torch.testing.assert_close(*map(torch.tensor, (logits[:4], logits_a)), rtol=0, atol=1e-10)
        torch.testing.assert_close(*map(torch.tensor, (logits[4:], logits_b)), rtol=0, atol=1e-10)
        torch.testing.assert_close(*map(torch.tensor, (one_slope, slope)), rtol=0, atol=1e-10)
    assert state.keys() == one_state.keys()
    for name in state:  # running statistics included: those of rank 0, of group 0
        torch.testing.assert_close(
            torch.tensor(one_state[name]), torch.tensor(state[name]), rtol=0, atol=1e-10, msg=name
        )
    without, _ = split_run(0, 1, make, 1, size)
    assert abs(without[0][0] - one[0][0]) > 1e-4


def test_what_moco_cannot_take_is_the_sentence_of_the_program():
    with pytest.raises(
        UserError, match="has its one Linear classifier, and SqueezeNet has none; choose another"
    ):
        MoCo(squeezenet1_1)
    with pytest.raises(
        UserError, match="ConvNeXt has no BatchNorm that --bn-splits could split: leave it out"
    ):
        MoCo(convnext_tiny, K=8, bn_splits=2)


def many_steps(rank, world):
    torch.manual_seed(rank)  # other starts: DistributedDataParallel must make them equal
    model = MoCo(TinyEncoder, 8, 64, 0.9, 0.2, epsilon=0.1)
    wrapped = DistributedDataParallel(model)
    sgd = torch.optim.SGD(wrapped.parameters(), 0.1)
    for step in range(50):
        im_q, im_k = images(4, seed=100 * rank + step)
        logits, logits_ifm, labels = wrapped(im_q, im_k)
        sgd.zero_grad()
        losses.ifm(logits, logits_ifm, labels, 1.0).backward()
        sgd.step()
    for name, tensor in {
        **dict(model.named_parameters()),
        "queue": model.queue,
        "queue_ptr": model.queue_ptr,
    }.items():
        theirs = concat_all_gather(tensor[None].float())
        assert torch.equal(theirs[0], theirs[1]), name
    own = concat_all_gather(images(1, seed=rank))
    assert not torch.equal(own[0], own[1])  # the comparison can fail
    return dist.get_world_size()


def test_queue_and_weights_agree_across_ranks(run_ranks):
    assert run_ranks(2, many_steps) == [2, 2]


def one_non_finite_key(rank, world):
    torch.manual_seed(0)
    model = MoCo(TinyEncoder, 8, 16)
    wrapped, before = DistributedDataParallel(model), model.queue.clone()
    im_q, im_k = images(4, seed=rank)
    if rank == 1:
        im_k[2, 0, 0, 0] = torch.inf
    wrapped(im_q, im_k)
    return torch.equal(model.queue, before), model.queue_ptr.item()


def test_a_non_finite_key_of_one_rank_enters_no_queue(run_ranks):
    assert run_ranks(2, one_non_finite_key) == [(True, 8)] * 2
    model = MoCo(TinyEncoder, 8, 16)
    before = model.queue.clone()
    model(*images(4))
    assert not torch.equal(model.queue, before)  # negative control


@pytest.mark.parametrize("size", [0.0, 1e-5])
def test_a_classifier_that_starts_at_zero_is_drawn(size):
    """As torchvision's vision transformers have it, and some of timm's."""

    def encoder(num_classes):
        network = TinyEncoder(num_classes)
        torch.nn.init.uniform_(network.fc.weight, -size, size)
        torch.nn.init.zeros_(network.fc.bias)
        return network

    model = MoCo(encoder, 8, 16)
    images = torch.randn(4, 3, 16, 16)
    loss, *_, q, k = model(images, images, weights=(1.0, 0.0))
    assert torch.allclose(q.norm(dim=1), torch.ones(4)) and torch.allclose(k.norm(dim=1), torch.ones(4))
    assert torch.allclose(model.queue.norm(dim=0), torch.ones(16))
    loss.backward()
    assert model.encoder_q.fc.weight.grad.norm() < 1000
    with torch.random.fork_rng():  # negative control: weights of the usual size stay
        torch.manual_seed(0)
        before = TinyEncoder(8).fc.weight
        torch.manual_seed(0)
        assert torch.equal(MoCo(TinyEncoder, 8, 16).encoder_q.fc.weight, before)
