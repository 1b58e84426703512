"""The query encoder of a checkpoint, without its head, in the form that another library loads.

    python -m moco.export checkpoint_0199.pth.tar backbone.pth --to timm
    python -m moco.export ifm-eps0.1 backbone.pkl --to detectron2

The program prints the lines that load the file in that library.
"""

import copyreg
import os
import pickle
import re
from pathlib import Path

import numpy as np
import torch

from moco.encoders import RESNETS, SMALL, TIMM, backbone, base_encoder, last_linear, on_meta_device
from moco.errors import Parser, UserError, first_line, printable, run_program, shell_word
from moco.files import atomic_file, check_free
from moco.run.backbone import arch_of, encoder_state, network_settings
from moco.run.checkpoint import read
from moco.zoo import resolve

SUFFIXES = {  # by which the libraries recognize the formats
    "torchvision": (".pth", ".pt"),
    "timm": (".pth", ".pt"),
    "detectron2": (".pkl",),
    "safetensors": (".safetensors",),
}
USAGE = {
    "torchvision": "{build}\nmodel.load_state_dict(torch.load({python}, weights_only=True))",
    "timm": 'model = timm.create_model("{arch}", num_classes=0, checkpoint_path={python})',
    "detectron2": "MODEL.WEIGHTS {shell} MODEL.RESNETS.STRIDE_IN_1X1 False INPUT.FORMAT RGB\n"
    "MODEL.PIXEL_MEAN [123.675,116.28,103.53] MODEL.PIXEL_STD [58.395,57.12,57.375]",
    "safetensors": "{build}\nmodel.load_state_dict(safetensors.torch.load_file({python}))",
}


def export(checkpoint, out, to, arch=None, force=False):
    """Write the backbone of `checkpoint` (a path or the name of a released model) to the file `out`.

    to: a key of SUFFIXES; arch: as in training, default: the checkpoint's. Returns (arch, number of tensors,
    in words where in the file they were, lines of Python or of a configuration that load the file). Every
    tensor is written with its dtype, under the names of torchvision or timm, or under Detectron2's (there
    bfloat16, which NumPy lacks, as float32).
    Raises UserError.
    """
    out, path = Path(out), resolve(checkpoint)
    if not out.name.endswith(SUFFIXES[to]):
        raise UserError(f"{out} must end in {' or '.join(SUFFIXES[to])}, by which {to} files are recognized")
    check_free(out, force)
    if os.path.exists(out) and os.path.samefile(out, path):
        raise UserError(f"{out} is the checkpoint itself, which the export would replace: name another file")
    content = read(path)
    arch = arch_of(content, path, arch)
    if arch is None:
        raise UserError(f"{path} does not say which network it holds: name it with --arch, such as resnet50")
    settings = network_settings(content, path, arch)
    encoder = base_encoder(arch, **settings)
    _check_library(to, arch, settings["stem"])
    state, taken = encoder_state(content, path, on_meta_device(lambda: backbone(encoder)), arch)
    lines = _usage(to, arch, last_linear(encoder), state, **settings)
    # Copies, since a tensor may be a view of a larger one or in channels_last order.
    state = {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}
    try:
        with atomic_file(out) as temporary:
            if to == "detectron2":
                _write_detectron2(state, temporary)
            elif to == "safetensors":
                _write_safetensors(state, temporary, arch)
            else:
                torch.save(state, temporary)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot write {out} ({reason}); choose another place") from error
    return arch, len(state), taken, lines.format(python=repr(str(out)), shell=shell_word(out))


def _check_library(to, arch, stem):
    """Raise UserError when the library has no such network."""
    home = "timm" if arch.startswith(TIMM) else "safetensors" if arch == "conv3" else "torchvision"
    is_resnet = arch.startswith(RESNETS)
    has_it = {"timm": is_resnet, "detectron2": is_resnet and stem is None, "safetensors": True}
    if to != home and not has_it.get(to, False):
        with_stem = f" with --stem {stem}" if stem else ""
        raise UserError(f"{to} has no {arch}{with_stem} as it is here: export it --to {home}")


def _usage(to, arch, head, state, stem, image_size):
    """USAGE, with the lines that build the network in place of {build}; head: the name of its classifier."""
    if to == "detectron2" or to == "timm" and arch.startswith(RESNETS) and stem is None:
        return USAGE[to].replace("{arch}", arch)
    size = ""
    if arch.startswith(TIMM):
        import timm

        name = arch.removeprefix(TIMM)
        config = timm.get_pretrained_cfg(name)
        if config.fixed_input_size and config.input_size[-1] != image_size:
            size = f", img_size={image_size}"
        build = f'model = timm.create_model("{name}"{size})'
    elif arch == "conv3":
        build = f"import moco.encoders; model = moco.encoders.Conv3(image_size={image_size})"
    elif to == "timm":
        build = f'model = timm.create_model("{arch}")'
    else:
        size = f"image_size={image_size}" if arch.startswith("vit_") and image_size != 224 else ""
        build = f"model = torchvision.models.{arch}({size})"
    place = re.sub(r"\.(\d+)", r"[\1]", f"model.{head}")
    build += f"; {place} = torch.nn.Identity()"
    if stem == SMALL:
        out = state["conv1.weight"].shape[0]
        build += f"\nmodel.conv1 = torch.nn.Conv2d(3, {out}, 3, 1, 1, bias=False)"
        build += "; model.maxpool = torch.nn.Identity()"
    return USAGE["torchvision" if to == "timm" else to].replace("{build}", build)


def detectron2_name(name):
    """Detectron2's name for a tensor of torchvision's ResNet.

    The rules are those of MoCo's published detection/convert-pretrain-to-detectron2.py: conv1 -> stem.conv1,
    layerN -> res(N+1), bnN -> convN.norm, downsample.0 and .1 -> shortcut and shortcut.norm.
    """
    parts = name.split(".")
    if parts[0].startswith("layer"):
        parts[0] = f"res{int(parts[0][-1]) + 1}"
    else:
        parts.insert(0, "stem")
    name = ".".join(f"conv{part[-1]}.norm" if part.startswith("bn") else part for part in parts)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def _write_detectron2(state, path):
    # NumPy 2 pickles arrays under a module name that NumPy 1, common beside Detectron2, does not have.
    table = copyreg.dispatch_table.copy()
    table[np.ndarray] = lambda a: (np.ndarray, (a.shape, a.dtype.str, bytearray(a.tobytes())))
    arrays = {
        detectron2_name(name): (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in state.items()
    }
    with open(path, "wb") as file:
        pickler = pickle.Pickler(file, protocol=4)
        pickler.dispatch_table = table
        pickler.dump({"model": arrays, "__author__": "MOCO", "matching_heuristics": True})


def _write_safetensors(state, path, arch):
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise UserError("safetensors is not installed: `pip install safetensors`") from error
    path.write_bytes(save(state, metadata={"format": "pt", "arch": arch}))


def main():
    parser = Parser(
        prog="python -m moco.export",
        description="Write the backbone of a checkpoint, its query encoder without the head, "
        "in the form that another library loads, and print how to load it there.",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="file of this or another program, or a released model's name (python -m moco.zoo list)",
    )
    parser.add_argument("out", metavar="OUT", help="file to write: .pth, .pkl (detectron2) or .safetensors")
    parser.add_argument("--to", required=True, choices=SUFFIXES, help="the library that is to load it")
    parser.add_argument(
        "-a", "--arch", help="name of the network, as in training (default: what the checkpoint says)"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args()
    arch, tensors, taken, lines = export(args.checkpoint, args.out, args.to, args.arch, args.force)
    print(printable(f"{args.checkpoint}: {taken}"))
    print(f"{printable(args.out)}: the {tensors} tensors of a {arch} backbone; load it in {args.to} with")
    print(lines)


if __name__ == "__main__":
    run_program(main, "python -m moco.export")
