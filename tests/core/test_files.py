"""Files and folders that appear whole or not at all, locks and hashes."""

import os
import signal
import stat

import pytest
from forked_program import forked

from moco.errors import UserError
from moco.files import atomic_file, atomic_folder, check_free, file_hash, locked, make_output_folder, sha256


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


def test_a_lock_is_held_by_one_and_goes_with_its_process(tmp_path):
    def holder():
        with locked(tmp_path / "lock", "taken"):
            print("held", flush=True)
            signal.pause()

    pid, output = forked(holder, (1,))
    assert output.readline() == "held\n"
    with pytest.raises(UserError, match="taken"), locked(tmp_path / "lock", "taken"):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with locked(tmp_path / "lock", "taken"):
        pass


def test_hashes_of_files(tmp_path):
    (tmp_path / "a").write_bytes(bytes(3_000_000))  # more than a chunk
    assert file_hash(tmp_path / "a", "md5") == "c9fc2d3dd83ab67a129ac10b09c9ebbb"
    assert sha256(tmp_path / "a") == "35bce4eae54ec8e6cc2868baa8d157914d6ae2858811b4cc0c078c94460fa26f"
