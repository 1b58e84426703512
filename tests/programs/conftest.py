"""Finished runs that tests compare with."""

import pytest
from command_lines import TINY
from started_runs import run


@pytest.fixture(scope="session")
def whole(folders, tmp_path_factory):
    """`whole(world)`: the folder of a run of that many processes that never stopped, with one worker each."""
    made = {}

    def folder(world):
        if world not in made:
            made[world] = tmp_path_factory.mktemp(f"whole{world}")
            run(*TINY, "-j", world, "--output-dir", made[world], folders, world=world)
        return made[world]

    return folder
