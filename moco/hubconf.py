"""Entry points of torch.hub for a local clone:

    torch.hub.load("PATH/TO/CLONE/moco", "backbone", "ifm-eps0.1", source="local")

torch.hub looks for this file at the top of the folder that it is given, so that is the package's, not the
clone's; for the same reason `source="github"`, which knows only whole repositories, does not find it.
"""

dependencies = ["torch", "torchvision"]


def backbone(checkpoint="ifm-eps0.1"):
    """The pre-trained query encoder without its head, in eval mode on the CPU.

    From images (N, 3, H, W), float32, normalised by ImageNet's mean and deviation, to features (N, 2048).
    `checkpoint` is a released model's name (`python -m moco.zoo list`), which is downloaded when it is not
    there, or the path of a checkpoint with a ResNet-50.
    """
    return _zoo().load(checkpoint)


def _zoo():
    """This clone's moco.zoo. torch.hub runs this file outside of its package, and the clone need not be on
    Python's path, which is left as it is.
    """
    import importlib.util
    import sys
    from pathlib import Path

    file = Path(__file__).resolve().with_name("__init__.py")
    if "moco" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "moco", file, submodule_search_locations=[str(file.parent)]
        )
        sys.modules["moco"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["moco"])
    loaded = sys.modules["moco"].__file__
    if Path(loaded).resolve() != file:
        raise ImportError(f"another package `moco` is loaded already, from {loaded}: start Python anew")
    import moco.zoo

    return moco.zoo
