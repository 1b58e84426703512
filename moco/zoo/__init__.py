"""Released models by name: download, check, load.

    path = moco.zoo.resolve("ifm-eps0.1")       # also takes the path of a checkpoint
    backbone = moco.zoo.load("ifm-eps0.1")      # images (N, 3, H, W), float32, normalized -> (N, 2048)

README.md in this folder says how a file is checked; `python -m moco.zoo` is the command line.
"""

import contextlib
import difflib
import fcntl
import http.client
import os
import re
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision

from moco.errors import UserError
from moco.files import atomic_file, file_hash, sha256
from moco.run.checkpoint import encoder_state, load_strictly, read


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

    @property
    def file(self):
        """The name of the file, here and on a mirror."""
        return f"{self.name}.pth.tar"


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


def resolve(name_or_path, mirror=None):
    """The path of a checkpoint, given as a path or as the name of a released model, which is downloaded once.

    A file of that name wins. Raises UserError; for a wrong name or path with the nearest right one.
    """
    path = Path(name_or_path)
    if os.path.isfile(path):  # unlike Path.is_file, it also answers when the name is too long for a file
        return path
    names = [model.name for model in MODELS]
    if str(name_or_path) in names:
        return fetch(str(name_or_path), mirror=mirror)
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; name the checkpoint file in it")
    around = path.parent.glob("*") if os.path.isdir(path.parent) else []
    nearest = _nearest(str(path), names + [str(other) for other in around if other.is_file()])
    raise UserError(f"there is no file {path}, and no released model of that name{nearest}")


def load(name_or_path, mirror=None):
    """The query encoder of a released model, or of a ResNet-50 checkpoint: torchvision's without `fc`.

    Returns a module in eval mode on the CPU, from images (N, 3, H, W), float32, normalized with ImageNet's
    mean and std, to features (N, 2048). No random number is drawn. Raises UserError.
    """
    path = resolve(name_or_path, mirror)
    return _backbone(read(path), path)


def fetch(name, folder=None, mirror=None, force=False, timeout=60):
    """The path of a released model's file in `folder` (default: torch.hub's), downloaded unless it is there.

    mirror: download `mirror`/NAME.pth.tar instead (default: the environment variable ZOO_BASE_URL).
    force: download even if the file is there; it is replaced once the new one has passed the checks.
    timeout: seconds without a byte after which the connection counts as broken.
    Raises UserError, also when the file that is there does not pass the checks.
    """
    model = next((model for model in MODELS if model.name == name), None)
    if model is None:
        nearest = _nearest(name, [model.name for model in MODELS])
        raise UserError(f"there is no released model {name}{nearest}")
    path = Path(folder or cache_folder()) / model.file
    record = path.with_name(f"{path.name}.sha256")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_process(path.parent):
            if os.path.exists(path) and not force:
                try:
                    check(model, path, record)
                except UserError as error:
                    again = f"python -m moco.zoo download {name} --force" + (
                        f" --to {folder}" if folder else ""
                    )
                    raise UserError(
                        f"{path} is not {name} or is damaged ({error}); replace it: {again}"
                    ) from None
            else:
                mirror = mirror or os.environ.get("ZOO_BASE_URL")
                url = f"{mirror.rstrip('/')}/{model.file}" if mirror else model.url
                _download(model, url, path, record, timeout)
            if not record.exists():
                with atomic_file(record) as temporary:
                    temporary.write_text(f"{sha256(path)}  {model.file}\n")
    except OSError as error:
        raise UserError(
            f"cannot write into {path.parent} ({error.strerror}); choose another folder"
        ) from error
    return path


def cache_folder():
    """The folder of downloaded models, in torch.hub's, so that TORCH_HOME and XDG_CACHE_HOME count."""
    return Path(torch.hub.get_dir()) / "checkpoints" / "moco"


def check(model, path, record):
    """Raise UserError unless `path` is the model's file: that of `record`, else a whole checkpoint of MoCo.

    record: a file as sha256sum writes it, with the SHA-256 of the first download; it need not exist.
    """
    with open(path, "rb") as file:
        start = file.read(100_000).lstrip()
    if start.startswith(b"<"):  # a pickle or zip never does
        title = re.search(r"<title[^>]*>(.*?)</title>", start.decode(errors="replace"), re.I | re.S)
        raise UserError("it is a web page" + (f', "{" ".join(title[1].split())}"' if title else ""))
    if record.exists():
        digest, known = sha256(path), record.read_text(errors="replace").split()
        if digest not in known:
            raise UserError(
                f"its SHA-256 starts with {digest[:12]}, but that of the first download, in {record}, with "
                f"{known[0][:12] if known else 'nothing'}; if the record is wrong, delete {record}"
            )
        return
    if model.md5 and not (md5 := file_hash(path, "md5")).startswith(model.md5):
        raise UserError(f"its md5 starts with {md5[:8]}, but the published one with {model.md5}")
    checkpoint = read(path)
    if not any(name.startswith("encoder_q.") for name in checkpoint["state_dict"]):
        raise UserError(f"{path} has no query encoder (encoder_q.*), so it is not a checkpoint of MoCo")
    _backbone(checkpoint, path)


def _download(model, url, path, record, timeout):
    """Download `url`, check the file, give it its name. Raises UserError with the link and the folder."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)  # torch.hub waits for ever
    try:
        with atomic_file(path) as temporary:
            torch.hub.download_url_to_file(url, str(temporary), progress=sys.stderr.isatty())
            try:
                check(model, temporary, record)
            except UserError as error:
                reason = str(error).replace(str(temporary), "the file")
                raise UserError(f"the file that arrived was refused and removed: {reason}") from None
    except (UserError, OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(
            f"cannot download {model.name} ({_reason(error, timeout)}); try again later, or download "
            f"{model.link} in a browser and put the file into the folder {path.parent.absolute()} "
            f"as {path.name}"
        ) from None
    finally:
        socket.setdefaulttimeout(before)


def _reason(error, timeout):
    """What urllib, http.client, a socket or the disk says, in one line."""
    if hasattr(error, "code"):  # an HTTPError
        return " ".join(str(error).split())
    cause = getattr(error, "reason", error)  # what a URLError wraps
    if isinstance(cause, TimeoutError):
        return f"no answer for {timeout:g} s"
    said = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return " ".join(said.split())


def _backbone(checkpoint, path):
    with torch.device("meta"):
        model = torchvision.models.resnet50(weights=None)
    model.fc = torch.nn.Identity()
    model = model.to_empty(device="cpu")
    load_strictly(model, encoder_state(checkpoint, path), path)
    return model.eval()


@contextlib.contextmanager
def _one_process(folder):
    """Wait until no other process downloads into `folder`, so that the ranks of a run do it once."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: each downloads, the last one stays
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _nearest(name, names):
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "; `python -m moco.zoo list` shows the names"
