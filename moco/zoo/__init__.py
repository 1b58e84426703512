"""Released models by name, and the weights that torchvision and timm release: download, check, load.

    path = moco.zoo.resolve("ifm-eps0.1")       # also takes the path of a checkpoint
    backbone = moco.zoo.load("ifm-eps0.1")      # images (N, 3, H, W), float32, normalized -> (N, 2048)

README.md in this folder says how a file is checked; `python -m moco.zoo` is the command line.
"""

import contextlib
import difflib
import http.client
import io
import os
import socket
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torchvision import models

from moco.encoders import TIMM, base_encoder, last_linear, replace_layer
from moco.errors import UserError, first_line, printable, shell_word
from moco.files import atomic_file, file_hash, sha256
from moco.lock import locked
from moco.run.backbone import loaded_backbone
from moco.run.checkpoint import read

TIMEOUT = 60  # seconds without a byte after which a connection counts as broken


@dataclass(frozen=True)
class Model:
    """A released checkpoint: `url` of the file, `link` for a browser, first digits of the published `md5`.

    top1: published linear accuracy in percent, on the data set named in `text`.
    """

    name: str
    top1: float
    text: str
    url: str
    link: str
    md5: str | None = None


def _on_drive(name, top1, method, file_id):
    return Model(
        name,
        top1,
        f"{method}, 200 epochs on ImageNet-100",
        url=f"https://drive.usercontent.google.com/download?id={file_id}&export=download&confirm=t",
        link=f"https://drive.google.com/file/d/{file_id}/view",
    )


def _official(version, epochs, top1, md5):
    stem = f"moco_v{version}_{epochs}ep"
    url = f"https://dl.fbaipublicfiles.com/moco/moco_checkpoints/{stem}/{stem}_pretrain.pth.tar"
    text = f"MoCo v{version}, {epochs} epochs on ImageNet-1k"
    return Model(stem.replace("_", "-"), top1, text, url=url, link=url, md5=md5)


# Sources: the READMEs of IFM (Robinson et al. 2021, "Can contrastive learning avoid shortcut solutions?")
# and of MoCo (He et al. 2020, Chen et al. 2020).
MODELS = (
    _on_drive("mocov2-in100", 80.5, "MoCo v2", "1j9xEZc4P-8VOlqc2jnBlnZlqRCHxEzwy"),
    _on_drive("ifm-eps0.05", 81.1, "IFM-MoCo v2, epsilon 0.05", "1rAsixq90OVi_0n6iFtN2IGzzfsI9V8JY"),
    _on_drive("ifm-eps0.1", 81.4, "IFM-MoCo v2, epsilon 0.1", "1kNj6YleQu8vrC6ggbFVYvIUhiMHgbkew"),
    _on_drive("ifm-eps0.2", 80.9, "IFM-MoCo v2, epsilon 0.2", "1A4k6fC5jcoBLHGyJjd5ggBVPW9TtODtp"),
    _official(1, 200, 60.6, "b251726a"),
    _official(2, 200, 67.7, "59fd9945"),
    _official(2, 800, 71.1, "a04e12f8"),
)


def resolve(name_or_path, arch=None, image_size=224):
    """The path of a checkpoint, given as a path or as the name of a released model, which is downloaded once.

    With `arch`, the name of a network as of moco.encoders, "torchvision" and "timm" are names too: of the
    weights that the library uses by default for it, and of timm's for images of `image_size`.
    A file of that name wins. Raises UserError; for a wrong name or path with the nearest right one.
    """
    path = Path(name_or_path)
    if os.path.isfile(path):  # unlike Path.is_file, it also answers when the name is too long for a file
        return path
    names = [model.name for model in MODELS]
    if str(name_or_path) in names:
        return fetch(str(name_or_path))
    if arch and str(name_or_path) in LIBRARIES:
        return LIBRARIES[str(name_or_path)](arch.removeprefix(TIMM), image_size)
    names += LIBRARIES if arch else ()
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; name the checkpoint file in it")
    files = path.parent.glob("*") if os.path.isdir(path.parent) else []
    hint = _hint(str(path), names + [str(file) for file in files if file.is_file()])
    raise UserError(f"there is no file {path}, and no released model of that name; {hint}")


def load(name_or_path):
    """The query encoder of a released model, or of a ResNet-50 checkpoint: torchvision's without `fc`.

    Returns a module in eval mode on the CPU, from images (N, 3, H, W), float32, normalized with ImageNet's
    mean and std, to features (N, 2048). No random number is drawn. Raises UserError.
    """
    path = resolve(name_or_path)
    return _backbone(read(path), path)


def fetch(name, folder=None, force=False):
    """The path of a released model's file in `folder` (default: torch.hub's), downloaded unless it is there.

    With the environment variable ZOO_BASE_URL, $ZOO_BASE_URL/NAME.pth.tar is downloaded instead.
    force: download even if the file is there; it is replaced once the new one has passed the checks.
    Raises UserError, also when the file that is there does not pass the checks.
    """
    released = {model.name: model for model in MODELS}
    if name not in released:
        raise UserError(f"there is no released model {name}; {_hint(name, list(released))}")
    folder = Path(folder or cache_folder())
    path = folder / f"{name}.pth.tar"
    with _made_and_locked(folder):  # so that the ranks of a run download once
        if force or not os.path.exists(path):
            model = released[name]
            check = partial(_check, model, record=_record(path))
            _download(name, model.url, model.link, path, check)
        else:
            try:
                _check(released[name], path, _record(path))
            except UserError as error:
                raise UserError(
                    f"{path} is not {name} or is damaged ({error}); `python -m moco.zoo download {name} "
                    f"--force --to {shell_word(folder)}` replaces it"
                ) from None
        if not _record(path).exists():
            with atomic_file(_record(path)) as temporary:
                temporary.write_text(f"{sha256(path)}  {path.name}\n")
    return path


def cache_folder():
    """The folder of downloaded models, in torch.hub's, so that TORCH_HOME and XDG_CACHE_HOME count."""
    return Path(torch.hub.get_dir()) / "checkpoints" / "moco"


@contextlib.contextmanager
def _made_and_locked(folder):
    """Make a folder and hold a lock on it. Raises UserError when it or, in the block, its files cannot be
    written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"cannot write into {folder} ({reason}); choose another folder") from error


def _record(path):
    """The file that holds the SHA-256 of the first download of `path`, as sha256sum writes it."""
    return path.with_name(f"{path.name}.sha256")


def _check(model, path, record):
    """Raise UserError unless `path` is the model's file: that of `record`, or else a checkpoint of MoCo."""
    known = record.read_text(errors="replace").split() if record.exists() else None
    if known and sha256(path) in known:
        return
    checkpoint = read(path)
    if known is not None:
        raise UserError(
            f"its SHA-256 is not that of the first download, in {record}; if the record is wrong, delete it"
        )
    if model.md5 and not (md5 := file_hash(path, "md5")).startswith(model.md5):
        raise UserError(f"its md5 starts with {md5[:8]}, but the published one with {model.md5}")
    if not any(name.startswith("encoder_q.") for name in checkpoint["state_dict"]):
        raise UserError(f"{path} has no query encoder (encoder_q.*), so it is not a checkpoint of MoCo")
    _backbone(checkpoint, path)


def _of_torchvision(arch, image_size):
    """The path of torchvision's default weights of its network `arch`, in torch.hub's folder."""
    try:
        url = models.get_model_weights(arch).DEFAULT.url
    except (ValueError, AttributeError) as error:
        raise UserError(f"torchvision has no weights of {arch}; leave --pretrained out") from error
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]  # as torch.hub names it
    digits = path.stem.rpartition("-")[2]  # the first of its SHA-256

    def check(file):
        if not sha256(file).startswith(digits):
            raise UserError(f"its SHA-256 does not start with {digits}")

    with _made_and_locked(path.parent):
        if not path.exists():
            _download(f"torchvision's weights of {arch}", url, url, path, check)
    return path


def _of_timm(arch, image_size):
    """The path of a file with timm's default weights of its network `arch`, without the classifier.

    timm downloads them, and fits to the size of the images what depends on it; so the file is one per size.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(
            "--pretrained timm needs a package that is not installed: pip install timm"
        ) from error
    construct = base_encoder(TIMM + arch, image_size=image_size)
    if not timm.is_model_pretrained(arch):
        raise UserError(f"timm has no weights of {arch}; leave --pretrained out")
    config = timm.get_pretrained_cfg(arch)
    path = cache_folder() / f"timm-{config.architecture}.{config.tag}-{image_size}.pth"
    with _made_and_locked(path.parent):
        if not path.exists():
            network = _downloaded_by_timm(partial(construct, num_classes=1, pretrained=True), arch, config)
            replace_layer(network, last_linear(construct), nn.Identity())
            torch.save(network.state_dict(), content := io.BytesIO())  # on a full disk it hides the reason
            with atomic_file(path) as temporary:
                temporary.write_bytes(content.getbuffer())
    return path


def _downloaded_by_timm(construct, arch, config):
    try:
        with torch.random.fork_rng(devices=[]):
            return construct()
    except Exception as error:  # of its own, of the hub's client and of its transport
        place = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
        reason = first_line(error).partition(". ")[0]
        raise UserError(
            f"timm cannot get its weights of {arch} ({reason}); try again later, or download the file from "
            f"{place} in a browser and name it: --pretrained FILE"
        ) from error


LIBRARIES = {"torchvision": _of_torchvision, "timm": _of_timm}  # of a network's name and the images' size


def _download(name, url, link, path, check):
    """Download `url` to `path`, which appears when it has passed check(file). Raises UserError with the name,
    the link for a browser and the folder.
    """
    mirror = os.environ.get("ZOO_BASE_URL")
    url = f"{mirror.rstrip('/')}/{path.name}" if mirror else url
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torch.hub waits for ever
    try:
        with atomic_file(path) as temporary:
            torch.hub.download_url_to_file(url, str(temporary), progress=sys.stderr.isatty())
            check(temporary)
    except (UserError, OSError, http.client.HTTPException, ValueError) as error:
        reason = first_line(error)
        if isinstance(error, UserError):
            reason = f"what arrived was refused: {error}".replace(printable(temporary), "the file")
        raise UserError(
            f"cannot download {name} ({reason}); try again later, or download {link} in a "
            f"browser and put the file into the folder {path.parent.absolute()} as {path.name}"
        ) from None
    finally:
        socket.setdefaulttimeout(before)


def _backbone(checkpoint, path):
    named = checkpoint.get("arch")
    other = f", and the file names {named}" if isinstance(named, str) and named != "resnet50" else ""
    return loaded_backbone(checkpoint, path, "resnet50", advice=f"moco.zoo reads ResNet-50s{other}")[0]


def _hint(name, names):
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "`python -m moco.zoo list` shows the names"
