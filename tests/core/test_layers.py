"""Imports go down the layers only: a table of them, held to the syntax trees of all modules."""

import ast
from pathlib import Path

import pytest
from command_lines import ROOT

COMMANDS = ("check", "embed", "export", "imagenet100", "plot", "show", "bench", "shortcuts")
LAYERS = [  # from the lowest: a part may import the parts of lower layers, and the lowest its own layer too
    ("builder", "losses", "shuffle", "batchnorm", "encoders", "loader", "options", "seeds", "errors", "files")
    + ("lock", "progress"),
    ("trifeature",),
    ("data", "run"),
    ("zoo",),
    ("evaluate",),
    (*COMMANDS, "main_moco", "main_lincls"),
]
HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts}
STYLE = "plot"  # a command whose style of figures the other commands share


def imports(source):
    """The absolute names that a source imports, also within functions; "." for a relative import."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ("." if node.level else f"{node.module}.{alias.name}" for alias in node.names)


def violations(files):
    """What `files` ({Path: source}) import against the layers, as texts."""
    found = []
    for path, source in files.items():
        here = path.parts[path.parts[0] == "moco"].removesuffix(".py")
        if here not in HEIGHT and here != "__init__":
            found.append(f"{path} is in no layer")
        for name in imports(source):
            there = name.removeprefix("moco.").split(".")[0]
            if not name.startswith(("moco.", "main_", ".")) or here == there:
                continue
            style = here in COMMANDS and there == STYLE
            below = HEIGHT.get(there, 99) < max(HEIGHT.get(here, 0), 1)  # the lowest layer has no order
            if not (below or style):
                found.append(f"{path} imports {there or name}")
    return found


def test_imports_go_down():
    files = [*ROOT.glob("main_*.py"), *(ROOT / "moco").rglob("*.py")]
    assert len(files) > 40
    assert violations({path.relative_to(ROOT): path.read_text() for path in files}) == []


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("moco/data/ring.py", "from moco.run.launch import Rank", "run"),
        ("moco/run/log.py", "import moco.data.loader as loader", "data"),
        ("moco/run/log.py", "def f():\n    from moco import data", "data"),
        ("moco/evaluate/knn.py", "from moco.plot import style", "plot"),
        ("main_moco.py", "from moco.plot import style", "plot"),
        ("moco/data/ring.py", "from ..run import launch", "."),
        ("moco/helpers.py", "import torch", None),
        ("moco/data/ring.py", "from moco.helpers import x", "helpers"),
    ],
)
def test_what_goes_up_or_across_is_found(path, source, fault):
    expected = f"{path} imports {fault}" if fault else f"{path} is in no layer"
    assert violations({Path(path): source}) == [expected]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("moco/builder.py", "from moco.losses import contrast"),
        ("moco/data/ring.py", "import moco.data.pil\nfrom moco import trifeature"),
        ("moco/shortcuts/report.py", "from moco.plot import style"),
        ("main_moco.py", "import torch\nfrom moco.run import launch\nfrom moco.evaluate import knn"),
    ],
)
def test_what_goes_down_is_not(path, source):
    assert violations({Path(path): source}) == []
