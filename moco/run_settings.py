"""What a run's flags come to: its data, how they are loaded, where files go, and what decides its numbers."""

import tempfile
from pathlib import Path

from moco import trifeature
from moco.data import Loading
from moco.decoders import decoder
from moco.errors import UserError


def data_folder(args):
    """The folder that holds train/ and val/, from DIR or --dataset_root and --dataset. Raises UserError."""
    if args.folder and args.dataset_root:
        raise UserError(f"give either DIR ({args.folder}) or --dataset_root, not both")
    if args.folder:
        return Path(args.folder)
    if args.dataset_root is None and args.dataset != "trifeature":
        raise UserError(
            f"where are the images? Give a folder with train/ and val/, or --dataset_root ROOT for "
            f"ROOT/{args.dataset}, or --dataset trifeature, which needs no download"
        )
    folder = Path(args.dataset_root or "data") / args.dataset
    if args.dataset == "trifeature":
        trifeature.ensure(folder, size=64, renders=4)  # 4,000 images, some seconds
    return folder


def loading_of(args, device):
    """Where the photometric half is done ("off": in the workers), and the Loading of the flags."""
    on_cuda = "float" if args.fast else "exact"
    device_aug = args.device_aug or (on_cuda if device.type == "cuda" else "off")
    resize = args.resize or ("pil" if device_aug == "off" else "torch")
    return device_aug, Loading(
        args.image_size, resize, args.batch_size, args.workers, args.decoder, args.cache
    )


def loading_line(loader, loading):
    """What was chosen for the data, in two lines for the console."""
    resize = "crops on the device" if loading.cache == "device" else f"resize {loading.resize}"
    return (
        f"{loader.num_workers} loader worker(s) each, {decoder(loading.decode)[1]}, {resize};\n"
        f"   {loader.transport}"
    )


def fast_line(args, chosen):
    """What --fast turned on, among what was `chosen` (settings), and what was given besides."""
    flags = {"amp": "--amp {}", "channels_last": "--channels-last", "compile": "--compile"}
    turned_on = [
        text.format(chosen[name]) for name, text in flags.items() if chosen[name] and not getattr(args, name)
    ]
    if chosen["device_aug"] == "float" and args.device_aug is None:
        turned_on.append("--device-aug float")
    return "--fast turns on: " + (", ".join(turned_on) or "nothing more on this device with these flags")


def settings(args, device_aug, loading, execution, seed):
    """What decides what is computed, as plain values: flags as given, and what was chosen for the others."""
    elsewhere = (
        *("folder", "dataset_root", "dataset", "workers", "decoder", "cache", "output_dir", "pretrained"),
        *("resume", "keep", "save_freq", "print_freq", "knn", "tensorboard", "start_epoch", "rank", "gpu"),
        *("multiprocessing_distributed", "world_size", "dist_url", "dist_backend", "fast"),
    )
    given = {name: value for name, value in vars(args).items() if name not in elsewhere}
    chosen = {name: getattr(execution, name) for name in ("amp", "channels_last", "compile")}
    resize = "device" if loading.cache == "device" else loading.resize
    return given | chosen | {"device_aug": device_aug, "resize": resize, "seed": seed}


def check_output(folder):
    """Make the output folder and try whether files can be written there. Raises UserError."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to --output-dir {folder} ({error.strerror}); choose another folder"
        ) from error
