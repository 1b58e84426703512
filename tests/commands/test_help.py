"""The help of every command fits a terminal of 80 columns and names what the command takes."""

import importlib

import pytest

COMMANDS = {
    "moco.check": ["DIR"],
    "moco.embed": ["CKPT", "DIR", "OUT", "--layer"],
    "moco.export": ["CKPT", "OUT"],
    "moco.imagenet100": ["IMAGENET", "OUT"],
    "moco.plot": ["RUN"],
    "moco.show": ["pairs", "neighbors"],
    "moco.show pairs": ["DIR", "--aug-plus"],
    "moco.show neighbors": ["CKPT", "DIR", "--neighbors"],
    "moco.zoo.__main__": ["list", "download"],
    "moco.zoo.__main__ download": ["NAME", "--to"],
    "moco.bench.__main__": ["data", "step"],
    "moco.bench.__main__ data": ["DIR", "--rounds"],
    "moco.bench.__main__ step": ["--traffic", "--rounds"],
    "moco.trifeature.__main__": ["--size"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_fits_80_columns(command, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    module, *words = command.split()
    code, output, _ = cli(importlib.import_module(module).main, *words, "--help")
    assert code == 0 and max(map(len, output.splitlines())) <= 80
    assert all(word in output for word in COMMANDS[command])
