"""The backbone in a checkpoint, of this or another program: found by the names and shapes of a network."""

import contextlib
import math
import re
from dataclasses import dataclass

import torch
from torchvision import models

from moco.encoders import RESNETS, SMALL, TIMM, backbone, base_encoder, is_known, last_linear, on_meta_device
from moco.errors import UserError
from moco.run.checkpoint import WRITTEN, load_strictly, plain_names, some_of, state_dicts

COUNTER = "num_batches_tracked"  # of BatchNorm; files from before torch 0.4.1 and converted ones lack it
ENTRIES = (  # of a file that hold a state_dict; of several whole backbones that of the first is taken
    "state_dict",  # MoCo, IFM, MoCo v3, mmselfsup, timm, Lightning (solo-learn, lightly)
    "model_state_dict",
    "model",  # torchvision's references, Barlow Twins
    "net",
    "teacher",  # DINO: its eval_linear.py takes it and not the student
    "classy_state_dict.base_model.model.trunk",  # VISSL: extra_scripts/convert_vissl_to_torchvision.py
)
NAME_IT = "Name the same network of torchvision, or of timm as timm:NAME, with --arch"
# Words in the names of encoders that follow another one, which is taken instead where the file has it:
# encoder_k (MoCo), momentum_encoder (MoCo v3), momentum_backbone (solo-learn), backbone_momentum (lightly),
# target_net (mmselfsup's BYOL), state_dict_ema (timm); of DINO's two the student is the one that is left.
FOLLOWERS = {"k", "key", "momentum", "ema", "target", "student"}


def load_encoder(network, checkpoint, path, arch, advice=None):
    """Load all of `network` but its classifier from a checkpoint. Returns what was taken, in words.

    Arguments and errors are those of `encoder_state`.
    """
    state, taken = encoder_state(checkpoint, path, network, arch, advice)
    load_strictly(network, state, path, network.state_dict().keys() - state.keys())  # its classifier may miss
    return taken


def initial_state(checkpoint, path, encoder, head, arch, stem=None, image_size=None):
    """({name: tensor}, in words what was taken and what stays as it was drawn) to start pre-training from.

    The names are those of `encoder`, an encoder of MoCo (also on the meta device), without the ones below
    `head` unless the file holds MoCo's query encoder with a head of the same shapes. arch, stem, image_size:
    of the run. checkpoint, path: as of `encoder_state`. Raises UserError when it is of another network.
    """
    named = checkpoint.get("arch")
    if isinstance(named, str) and named.removeprefix(TIMM) != arch.removeprefix(TIMM):
        raise UserError(f"{path} is of -a {named}, not of -a {arch}: use the same, or other weights")
    if network_settings(checkpoint, path, arch, stem, image_size)["stem"] != stem:
        raise UserError(f"{path} is of a network with --stem small: add the flag")
    own, best = _best(checkpoint, path, encoder, arch)
    of_head = {name: t for name, t in encoder.state_dict().items() if name.startswith(head + ".")}
    names, misfits = {}, []
    if best.prefix.endswith("encoder_q."):  # a classifier is no head, even of the same shape
        names = {name: best.prefix + name for name in of_head}
        misfits = [_misfit(best.state, names[name], tensor, arch) for name, tensor in of_head.items()]
        names = {} if any(misfits) else names
    state = _complete(best, own) | {name: best.state[there] for name, there in names.items()}
    wanted = {*best.names.values(), *names.values()}
    taken, left = wanted & best.state.keys(), best.state.keys() - wanted

    fresh = [] if names else [f"the head {head}" + next((f" ({why})" for why in misfits if why), "")]
    fresh += ["BatchNorm's counters"] * (taken != wanted)
    said = f"{len(taken)} of the encoder's {len(own) + len(of_head)} tensors are those {best.description}"
    said += f", {len(left)} of other parts left out" * bool(left)
    return state, f"{said}; fresh: {', '.join([*fresh, 'the queue'])}"


def loaded_backbone(checkpoint, path, arch, image_size=None, advice=None):
    """(network in eval mode on the CPU, from images to features N x d; the side of the images that it was
    trained on or is made for; what was taken, in words).

    The network is built as the file says (`network_settings`); torch's generator stays as it was. Arguments
    and errors are those of `encoder_state` and `network_settings`.
    """
    settings = network_settings(checkpoint, path, arch, image_size=image_size)
    network = backbone(base_encoder(arch, **settings))
    taken = load_encoder(network, checkpoint, path, arch, advice)
    return network.eval(), settings["image_size"], taken


def arch_of(checkpoint, path, arch=None):
    """`arch` or, when it is None, the architecture that the checkpoint read from `path` names, or None.

    Raises UserError when that is of another program, and not known here.
    """
    named = checkpoint.get("arch")
    if arch is not None or not isinstance(named, str):
        return arch
    try:
        base_encoder(named)
    except UserError as error:
        if named.startswith(TIMM):
            raise
        raise UserError(f"{path} names the architecture {named}, but {error} {NAME_IT}") from error
    return named


def network_settings(checkpoint, path, arch, stem=None, image_size=None):
    """{"stem": ..., "image_size": ...}: keywords with which base_encoder builds the network of a file.

    The stem is that of the shapes in the file. The size is `image_size`, that of the run's settings, the one
    to which the shapes of conv3 and vision transformers belong, or 224. stem, image_size: what a user asks
    for, or None. Raises UserError when the shapes are of another.
    """
    has_small_stem, size = False, None
    for state in state_dicts(checkpoint).values():
        for name, tensor in state.items():
            parts, shape = name.split("."), tuple(tensor.shape)
            if arch.startswith(RESNETS) and parts[-2:] == ["conv1", "weight"] and len(shape) == 4:
                within_a_block = any(part.startswith("layer") for part in parts)
                has_small_stem |= not within_a_block and shape[2:] == (3, 3)
            elif arch == "conv3" and name.endswith("hidden.0.weight") and len(shape) == 2:
                size = 8 * math.isqrt(shape[1] // 64)
            elif arch.startswith("vit_") and parts[-1] == "pos_embedding" and len(shape) == 3:
                size = int(arch.rpartition("_")[2]) * math.isqrt(max(shape[1] - 1, 0))
    if stem == SMALL and not has_small_stem:
        raise UserError(f"{path} is of a network without --stem small: leave it out")
    trained = checkpoint.get("settings")
    trained = trained.get("image_size") if isinstance(trained, dict) else None  # others may have any
    trained = trained if isinstance(trained, int) and trained > 0 else None
    step = 8 if arch == "conv3" else 1  # it takes all sizes that round up to the same
    if size and image_size and size != step * math.ceil(image_size / step):
        raise UserError(f"{path} is of --image-size {trained or size}, not {image_size}: use the same")
    return {"stem": SMALL if has_small_stem else None, "image_size": image_size or trained or size or 224}


def encoder_state(checkpoint, path, network, arch, advice=None):
    """({name: tensor} of a backbone, where in the file they were in words).

    The names are those of `network`, without its classifier. Raises UserError when there is none.

    checkpoint: what `read` returned for `path` (named in messages), of this or another program; network: a
    network `arch`, also on the meta device; advice: what to do when it does not fit.

    Whatever stands in front of the names, such as `backbone.`, is taken when all tensors of the network are
    there in its shapes, and none more of its layers. BatchNorm's counters may be missing and are 0 then. Of
    several backbones ENTRIES and FOLLOWERS say which is taken; where they do not, it is an error.
    """
    own, best = _best(checkpoint, path, network, arch, advice)
    taken = f"the tensors {best.description}"
    if left := len(best.state.keys() - best.names.values()):
        taken += f", {left} of other parts left out"
    return _complete(best, own), taken


def _best(checkpoint, path, network, arch, advice=None):
    """({name: tensor} of the network without its classifier, the _Backbone of the checkpoint to take)."""
    own, found = _found(checkpoint, network, arch)
    total = sum(not _is_counter(name) for name in own)
    whole = [each for each in found if each.misfit is None]
    in_part = [each for each in found if 2 * each.fitting >= total]
    if not whole or in_part[0].preference < whole[0].preference:  # the one to take is incomplete
        near = _nearest(checkpoint, path, arch, in_part)
        named = checkpoint.get("arch")
        if advice is None and not near and isinstance(named, str) and not is_known(named):
            advice = f"the file names {named}, which is not known here. {NAME_IT}"
        if in_part and in_part[0].fitting >= total - 2 and "pos_embed" in (in_part[0].misfit or ""):
            near, advice = None, "it is of another --image-size: use the same"
        advice = advice or f"{'' if near else 'if it is of another architecture, '}name that with --arch"
        advice = f"its tensors are those of {near}; {advice}" if near else advice
        raise UserError(f"{path} {_no_backbone(checkpoint, in_part or found, total, arch, advice)}")
    best = whole[0]
    for name, tensor in best.tensors():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{path}: {name} {best.place} is not finite, as after training that diverged; name an "
                "earlier checkpoint"
            )
    for other in whole[1:]:
        if other.preference == best.preference and not other.same_tensors(best):
            raise UserError(
                f"{path} holds several backbones of {arch}, {best.place} and {other.place}: write the "
                "tensors of the one that you want to a file of their own"
            )
    return own, best


def _complete(best, own):
    """The tensors of a whole _Backbone by the network's names, with counters of 0 where it lacks them."""
    state = {name: best.state.get(best.names[name]) for name in own}
    for name, tensor in state.items():
        if _is_counter(name) and (tensor is None or tensor.shape != own[name].shape):
            state[name] = torch.zeros(own[name].shape, dtype=own[name].dtype)
    return state


@dataclass(frozen=True)
class _Backbone:
    """Tensors of a file that are a backbone, whole or in part.

    entry, state: the dict that holds them, as of `state_dicts`, under plain names; names: theirs in it, by
    the network's; prefix: what stands before them, written: with the marks that plain names lack.
    """

    entry: str
    prefix: str
    written: str
    numbered: bool  # layers have numbers, as in nn.Sequential(*network.children())
    state: dict
    names: dict
    fitting: int  # how many have the network's shape, without counters
    misfit: str | None

    @property
    def place(self):
        return (f"under {self.written} " if self.written else "") + f"of the file's {self.entry}"

    @property
    def description(self):
        return self.place + (", numbered as its layers" if self.numbered else "")

    @property
    def preference(self):
        """Smaller is preferred."""
        follows = bool(FOLLOWERS & set(re.split(r"[._]", f"{self.entry}.{self.prefix}")))
        return follows, ENTRIES.index(self.entry) if self.entry in ENTRIES else len(ENTRIES)

    def tensors(self):
        """(name in the file, tensor) of each but the counters, in the network's order."""
        return [(name, self.state[name]) for own, name in self.names.items() if not _is_counter(own)]

    def same_tensors(self, other):
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return all(torch.equal(one, two) for (_, one), (_, two) in pairs)


def _head(network, arch):
    """The name of the classifier, which may be replaced in `network`."""
    return "fc" if hasattr(network, "fc") else last_linear(base_encoder(arch))


def _found(checkpoint, network, arch):
    """({name: tensor} of the network without its classifier, its _Backbones, the preferred one first)."""
    head = _head(network, arch)
    own = {name: x for name, x in network.state_dict().items() if not name.startswith(head + ".")}
    layers = [name for name, _ in network.named_children()]
    found = _backbones(checkpoint, own, layers, head, arch)
    return own, sorted(found, key=lambda each: (each.preference, -each.fitting))


def _nearest(checkpoint, path, arch, in_part):
    """One of torchvision's networks, or conv3, whose whole backbone the file holds, or None.

    in_part: whether the file has half of what was asked for; then only similar networks are looked at.
    """
    families = (re.match("[a-z]*", arch)[0], *RESNETS)
    names = sorted(models.list_models(module=models), key=lambda name: not name.startswith(families))
    if max(map(len, state_dicts(checkpoint).values())) < 60:  # the smallest ResNet has as many
        families = families[:1]
        in_part = True
    if in_part:
        names = [name for name in names if name.startswith(families)]
    for name in [*names, "conv3"]:
        if name != arch and not name.startswith("regnet"):  # regnets are slow to construct
            with contextlib.suppress(UserError):  # of a network that MoCo cannot take
                encoder = base_encoder(name, **network_settings(checkpoint, path, name))
                network = on_meta_device(lambda encoder=encoder: encoder(num_classes=1))
                if any(each.misfit is None for each in _found(checkpoint, network, name)[1]):
                    return name
    return None


def _backbones(checkpoint, own, layers, head, arch):
    """The _Backbones of a checkpoint that have a tensor or more of the network's `own` in its shape.

    layers: the names of the network's children, whose order numbers them; head: that of its classifier.
    """
    numbers = {name: str(number) for number, name in enumerate(layers)}
    split = {name: name.partition(".") for name in [*own, head]}
    by_number = {name: numbers.get(layer, layer) + dot + rest for name, (layer, dot, rest) in split.items()}
    namings = [  # each: the network's names to the file's, and what the file's start with
        (False, {name: name for name in split}, set(layers)),
        (True, by_number, set(numbers.values())),  # lightly's examples
    ]
    for entry, state in state_dicts(checkpoint).items():
        written = dict(zip(plain_names(state), state, strict=False))
        if entry == "state_dict":
            written |= checkpoint.get(WRITTEN, {})
        state = plain_names(state)
        for numbered, naming, starts in namings:
            for prefix in _prefixes(state, {naming[name] for name in own}):
                names = {name: prefix + naming[name] for name in own}
                misfits = {
                    name: _misfit(state, names[name], own[name], arch)
                    for name in own
                    if not _is_counter(name)
                }
                ours = set(names.values())
                more = [  # ResNet-34 has all tensors of ResNet-18 and more
                    f"{name} is not in {arch}"
                    for name in state
                    if name.startswith(prefix) and name not in ours
                    if name[len(prefix) :].partition(".")[0] in starts
                    if not name.startswith(f"{prefix}{naming[head]}.")
                ]
                if fitting := sum(misfit is None for misfit in misfits.values()):
                    misfit = next(filter(None, [*misfits.values(), *more]), None)
                    start = _written_prefix(prefix, names, written)
                    yield _Backbone(entry, prefix, start, numbered, state, names, fitting, misfit)


def _written_prefix(prefix, names, written):
    """What stands in a file before the first of the plain `names` that it has, which start with `prefix`."""
    name = next(name for name in names.values() if name in written)
    return written[name].removesuffix(name.removeprefix(prefix))


def _misfit(state, name, tensor, arch):
    """In words, why the tensor `name` of a state_dict cannot be that of the network, or None."""
    if name not in state:
        return f"{name} is missing"
    there, here = tuple(state[name].shape), tuple(tensor.shape)
    return None if there == here else f"{name} is {there} there and {here} in {arch}"


def _prefixes(state, tails):
    """What is in front of one of the `tails` in a name of the state_dict."""
    depth = max(tail.count(".") for tail in tails) + 1
    found = set()
    for name in state:
        parts = name.split(".")
        for start in range(max(0, len(parts) - depth), len(parts)):
            if (tail := ".".join(parts[start:])) in tails:
                found.add(name.removesuffix(tail))
    return sorted(found)


def _is_counter(name):
    return name.rpartition(".")[2] == COUNTER


def with_counters(state_dict, network):
    """A state_dict of `network` with BatchNorm's counters, which torch takes as 0 where a file lacks them."""
    own = network.state_dict().items()
    return {name: torch.zeros_like(tensor) for name, tensor in own if _is_counter(name)} | state_dict


def _no_backbone(checkpoint, found, total, arch, advice):
    """What is wrong with a checkpoint in which `found` are the best _Backbones, the preferred one first."""
    settings = checkpoint.get("settings")
    if isinstance(settings, dict) and settings.get("random_bits"):
        return (
            "is of a run with --random-bits, whose encoder takes more than the three channels of an image; "
            "python -m moco.shortcuts randbit measures such encoders"
        )
    if not found:
        tensors = state_dicts(checkpoint)
        largest = max(tensors, key=lambda entry: len(tensors[entry]))
        has = f"its {largest} has {some_of(tensors[largest])}"
        return f"does not fit {arch}, of whose backbone it holds no tensor: {has}; {advice}"
    shown = []
    for each in found:
        if not any(each.entry == one.entry and each.prefix.startswith(one.prefix) for one in shown):
            shown.append(each)
    counts = some_of([f"{each.fitting} {each.place}" for each in shown])
    has = f"it has {counts}, and {shown[0].misfit}"
    return f"does not fit {arch}: of the backbone's {total} tensors {has}; {advice}"
