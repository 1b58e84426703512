"""Released models by name: download, check, keep and load them.

    python -m moco.zoo list
    python -m moco.zoo download ifm-eps0.1              # into torch.hub's folder; prints the path
    python -m moco.zoo download ifm-eps0.1 --to DIR
    python main_lincls.py --pretrained ifm-eps0.1 ...   # the same names wherever a checkpoint is asked for

    backbone = moco.zoo.load("ifm-eps0.1")              # (N, 3, H, W) float32, normalised -> (N, 2048)

A file gets its name only after it was checked: its size, the published md5 prefix if there is one, and that
it loads as a MoCo ResNet-50. Its SHA-256 is then recorded in torch.hub's folder (NAME.pth.tar.sha256, as
sha256sum writes it) and checked at every later use and download. The four files on Google Drive have no
published hash: their first download is trusted, and the record tells whether later ones are the same.

Memory: a download runs in a process without torch and takes a few MB, whatever the size. The check that the
file loads then imports torch (some hundred MB) and takes about 10 MB on top of that, also whatever the size.
"""

import argparse
import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from moco.download import download
from moco.errors import UserError, run_program
from moco.web import address_fault
from moco.zoo_check import cache_folder, check, record_hash, resnet50_without_fc

DRIVE_HOST = "https://drive.usercontent.google.com"


@dataclass(frozen=True)
class Model:
    """A released checkpoint, on Google Drive (`drive_id`) or at `url` with the first digits of its `md5`.

    `top1` is the published linear accuracy in per cent, on the data set named in `text`.
    """

    name: str
    top1: float
    text: str
    drive_id: str | None = None
    url: str | None = None
    md5: str | None = None

    @property
    def file(self):
        """The file's name, here and on a mirror."""
        return f"{self.name}.pth.tar"

    @property
    def link(self):
        """What a person opens to fetch the file by hand."""
        return self.url or f"https://drive.google.com/file/d/{self.drive_id}/view"


def _on_drive(name, top1, method, drive_id):
    return Model(name, top1, f"{method}, 200 epochs on ImageNet-100", drive_id=drive_id)


def _official(version, epochs, top1, md5):
    stem = f"moco_v{version}_{epochs}ep"
    url = f"https://dl.fbaipublicfiles.com/moco/moco_checkpoints/{stem}/{stem}_pretrain.pth.tar"
    text = f"MoCo v{version}, {epochs} epochs on ImageNet-1k"
    return Model(stem.replace("_", "-"), top1, text, url=url, md5=md5)


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
    """The path of a checkpoint that is given as a path or as a released model's name, fetched if need be.

    A file of that name wins. Raises UserError; for a wrong name or path with the nearest right one.
    """
    path = Path(name_or_path)
    if os.path.isfile(path):  # unlike Path.is_file, it answers also when the name is too long for a file
        return path
    names = [model.name for model in MODELS]
    if str(name_or_path) in names:
        return fetch(str(name_or_path), mirror=mirror)
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; name the checkpoint file in it")
    around = path.parent.glob("*") if os.path.isdir(path.parent) else []
    neighbours = [str(other) for other in around if other.is_file()]
    nearest = _nearest(str(path), names + neighbours)
    raise UserError(f"there is no file {path}, and no released model of that name{nearest}")


def load(name_or_path, mirror=None):
    """The query encoder of a released model, or of a ResNet-50 checkpoint: torchvision's without `fc`.

    Returns a module in eval mode on the CPU, from images (N, 3, H, W), float32, normalised as ImageNet's, to
    features (N, 2048). No random number is drawn. Raises UserError.
    """
    from moco.checkpoint import encoder_state, load_strictly
    from moco.checkpoint_reader import read_checkpoint

    path = resolve(name_or_path, mirror)
    model = resnet50_without_fc().to_empty(device="cpu")
    load_strictly(model, encoder_state(read_checkpoint(path), path), path)
    return model.eval()


def fetch(name, folder=None, mirror=None, force=False, drive_host=DRIVE_HOST):
    """Path of the released model's file in `folder` (torch.hub's by default), downloaded unless it is there.

    mirror: fetch `mirror`/NAME.pth.tar instead; the environment variable ZOO_BASE_URL when None.
    force: download also when the file is there; it is replaced once the new one is whole and checked.
    Raises UserError, also when the file that is there does not pass the checks.
    """
    model = _find(name)
    path = Path(folder or cache_folder()) / model.file
    if os.path.exists(path) and not force:
        try:
            check(model, path)
        except (UserError, OSError) as error:
            again = f"python -m moco.zoo download {name} --force" + (f" --to {folder}" if folder else "")
            raise UserError(f"{path} is not {name} or is damaged ({error}); replace it: {again}") from error
    else:
        url = _address(model, mirror or os.environ.get("ZOO_BASE_URL"), drive_host)
        download(url, path, link=model.link, verify=lambda part: check(model, part), force=force)
    record_hash(model, path)
    return path


def _address(model, mirror, drive_host):
    if mirror:
        if fault := address_fault(mirror):
            raise UserError(f"the mirror {mirror} is not a usable address: {fault}")
        return f"{mirror.rstrip('/')}/{model.file}"
    return model.url or f"{drive_host}/download?id={model.drive_id}&export=download&confirm=t"


def _find(name):
    for model in MODELS:
        if model.name == name:
            return model
    raise UserError(f"there is no released model {name}{_nearest(name, [model.name for model in MODELS])}")


def _nearest(name, names):
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "; `python -m moco.zoo list` shows the names"


def main(arguments=None):
    """The command line; `arguments` as in sys.argv[1:]."""
    parser = argparse.ArgumentParser(
        prog="python -m moco.zoo", description="Released models of MoCo and IFM by name."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="show the names, with the published linear accuracy")
    get = commands.add_parser("download", help="fetch and check one model, and print its path")
    get.add_argument("name", metavar="NAME", help="as `list` shows it, for example ifm-eps0.1")
    get.add_argument("--to", metavar="DIR", help="folder for the file (default: torch.hub's, see TORCH_HOME)")
    get.add_argument(
        "--mirror", metavar="URL", help="fetch URL/NAME.pth.tar instead (default: $ZOO_BASE_URL)"
    )
    get.add_argument(
        "--force", action="store_true", help="download even if the file is there, and replace it"
    )
    args = parser.parse_args(arguments)
    if args.command == "list":
        width = max(len(model.name) for model in MODELS)
        print(f"{'name':{width}}  top-1  model")
        for model in MODELS:
            print(f"{model.name:{width}}  {model.top1:5.1f}  {model.text}")
        print("top-1: published accuracy in % of a linear classifier on the data set named")
    else:
        print(fetch(args.name, args.to, args.mirror, args.force))


if __name__ == "__main__":
    run_program(main)
