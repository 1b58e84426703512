"""Files and folders that appear whole or not at all, and hashes."""

import os
import stat

import pytest

from moco.errors import UserError
from moco.files import (
    atomic_file,
    atomic_folder,
    check_free,
    file_hash,
    make_output_folder,
    sha256,
)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path, before = tmp_path / "a", tmp_path / "before"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path, before) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old"}
    with atomic_file(path, before) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "new", "before": "old"}
    (tmp_path / "usual").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a"
    with pytest.raises(KeyboardInterrupt), atomic_folder(path) as temporary:
        (temporary / "x").write_text("half")
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == []
    for replace, text in ((False, "1"), (True, "2")):
        with atomic_folder(path, replace) as temporary:
            (temporary / "x").write_text(text)
    with pytest.raises(FileExistsError), atomic_folder(path):
        pass
    assert list(path.parent.iterdir()) == [path] and (path / "x").read_text() == "2"


def test_paths_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").touch()
    check_free(tmp_path / "free", force=False)
    check_free(tmp_path / "file", force=True)
    for path, force, message in (
        (tmp_path / "file", False, "exists already: name another file, or replace it with --force"),
        (tmp_path, True, "exists already"),
        (tmp_path / "missing" / "x", False, "does not exist: make it"),
    ):
        with pytest.raises(UserError, match=message):
            check_free(path, force)
    make_output_folder(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").is_dir()
    with pytest.raises(UserError, match="cannot write to --output-dir"):
        make_output_folder(tmp_path / "file" / "x")


def test_a_folder_made_meanwhile_by_one_who_knows_no_locks_stays(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(FileExistsError, match="exists already"), atomic_folder(path) as temporary:
        (temporary / "x").touch()
        path.mkdir()
        (path / "theirs").touch()
    assert os.listdir(tmp_path) == ["a"] and os.listdir(path) == ["theirs"]


def test_hashes_of_files(tmp_path):
    (tmp_path / "a").write_bytes(bytes(3_000_000))  # more than a chunk
    assert file_hash(tmp_path / "a", "md5") == "c9fc2d3dd83ab67a129ac10b09c9ebbb"
    assert sha256(tmp_path / "a") == "35bce4eae54ec8e6cc2868baa8d157914d6ae2858811b4cc0c078c94460fa26f"
