"""What `pip install .` brings, and that pyproject.toml names every package that the code imports."""

import ast
import os
import re
import subprocess
import sys
import zipfile

import pytest
from command_lines import ROOT

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {package for packages in PROJECT["optional-dependencies"].values() for package in packages}
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "torch.utils.tensorboard": "tensorboard"}  # by module
SOURCES = [*ROOT.glob("main_*.py"), *(ROOT / "moco").rglob("*.py")]


def required():
    """The packages of requirements.txt."""
    return re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)


def imported(source):
    """The packages that a source imports, or asks find_spec for, without Python's own."""
    modules = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("find_spec", "import_module")):
            modules += [word.value for word in node.args if isinstance(word, ast.Constant)]
    packages = {PACKAGES.get(module, PACKAGES.get(top := module.split(".")[0], top)) for module in modules}
    return packages - set(sys.stdlib_module_names) - {"moco"}


@pytest.mark.parametrize(
    ("source", "packages"),
    [
        ("import os, torch.nn", {"torch"}),
        ("def f():\n    from sklearn.manifold import TSNE", {"scikit-learn"}),
        ("from torch.utils.tensorboard import SummaryWriter\nfrom moco import zoo", {"tensorboard"}),
        ("importlib.util.find_spec('timm')", {"timm"}),
        ("from PIL import Image", {"pillow"}),
    ],
)
def test_imported_packages_are_found(source, packages):
    assert imported(source) == packages


def test_every_imported_package_is_required_or_an_extra():
    found = set().union(*(imported(path.read_text()) for path in SOURCES))
    assert {"torch", "pyarrow", "matplotlib"} <= found
    assert found - set(required()) - EXTRAS == set(), "pyproject.toml lacks an extra for these"


def test_every_package_that_a_message_asks_for_is_an_extra():
    asked = set().union(*(re.findall(r"pip install ([\w-]+)", path.read_text()) for path in SOURCES))
    assert "pyarrow" in asked and asked - EXTRAS == set()


@pytest.mark.slow
def test_the_wheel_has_the_package_alone_and_runs_anywhere(tmp_path):
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, names):  # the build writes into its folder
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    local = ["--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *local, "-q", "-w", tmp_path, tmp_path / "clone"], check=True)
    (wheel,) = tmp_path.glob("moco_ifm-*.whl")
    with zipfile.ZipFile(wheel) as file:
        content = set(file.namelist())
        metadata = file.read(next(name for name in content if name.endswith("METADATA"))).decode()
    package = {name for name in names if name.startswith("moco/") and not name.endswith("README.md")}
    assert {name for name in content if ".dist-info/" not in name} == package
    needs = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE)
    assert needs == required() and "Requires-Python: >=3.10" in metadata
    assert set(re.findall(r"^Requires-Dist: ([\w-]+);", metadata, re.MULTILINE)) == EXTRAS

    place = tmp_path / "installed"
    subprocess.run([*pip, "install", *local, "-q", "--target", place, wheel], check=True)
    environment = {**os.environ, "PYTHONPATH": str(place)}

    def run(*words, folder="/"):
        command = [sys.executable, "-m", *words]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    assert "ifm-eps0.1" in run("moco.zoo", "list").stdout
    classes = "import moco.imagenet100 as m; print(m.__file__, len(m.read_classes()))"
    shown = subprocess.check_output([sys.executable, "-c", classes], cwd="/", env=environment, text=True)
    assert shown.split() == [str(place / "moco" / "imagenet100.py"), "100"]
    sweep = run("moco.shortcuts", "randbit", "--out", str(tmp_path / "out"))
    assert sweep.returncode == 2 and "not installed with moco: start it in a clone" in sweep.stderr
    assert not (tmp_path / "out").exists()
