"""Fetch one large file over HTTP: continued where it broke off, under its final name only when whole."""

import contextlib
import fcntl
import json
import os
import re
import sys
import time
from pathlib import Path

from moco.errors import UserError
from moco.files import fsync_path
from moco.progress import Progress
from moco.web import BrokenError, RangeError, RefusedError, network_errors, new_opener, open_file

PIECE = 1 << 20  # bytes that are read at a time


def download(url, path, *, link=None, verify=None, force=False, timeout=30.0, tries=4, pause=1.0):
    """Fetch `url` into `path` and return `path`. A file that stands there already is kept, unless `force`.

    What has arrived is kept in `path` + ".part", with the server's mark of that version in ".part.json", and
    the next call continues it, also after Ctrl-C or a kill. A second process that wants the same file waits
    for the first and uses its result. Memory: a few MiB, whatever the size.

    link: what a person opens when the program cannot fetch the file; `url` if None.
    verify: called with the path of the whole file before it gets its name; raises UserError to refuse it.
    timeout: seconds without a byte after which the connection counts as broken.
    tries: how many connections in a row may fail without bringing a new MiB, with `pause`, 2 `pause`,
    4 `pause` ... seconds between them.

    Raises UserError: a sentence with the reason, the link, and the folder and name for a fetch by hand.
    """
    path = Path(path)
    part, note = Path(f"{path}.part"), Path(f"{path}.part.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(part, note) as file:
            if path.exists() and not force:  # perhaps by the process that we waited for
                part.unlink()
                return path
            _fetch(url, file, note, path.name, timeout, tries, pause)
            os.fsync(file.fileno())
            if verify:
                _verify(verify, part, note)
            os.replace(part, path)
            note.unlink(missing_ok=True)
            fsync_path(path.parent)
            return path
    except RefusedError as error:
        raise UserError(
            f"cannot download {path.name}: {error}; try again later, or fetch {link or url} by hand and put "
            f"the file into the folder {path.parent.absolute()} as {path.name}"
        ) from None
    except OSError as error:  # those of the network have become a RefusedError: this one is of the disk
        raise UserError(
            f"cannot write {path.name} into the folder {path.parent.absolute()} ({error.strerror or error}); "
            f"make room or choose another folder (the file comes from {link or url})"
        ) from error


@contextlib.contextmanager
def _alone(part, note):
    """Open `part` for appending and lock it; a second process waits here until the first one has ended."""
    while True:
        with open(part, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that downloads {part.stem}", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, part):  # it was renamed or removed while we waited: a lock on nothing
                continue
            try:
                yield file
            finally:
                if _size(file) == 0 and _is_at(file, part):
                    note.unlink(missing_ok=True)
                    part.unlink()
            return


def _is_at(file, path):
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _verify(verify, part, note):
    try:
        verify(part)
    except UserError as error:
        note.unlink(missing_ok=True)
        part.unlink()  # to continue it would bring the same bytes again
        raise RefusedError(f"what arrived was refused and removed ({error})") from None


def _fetch(url, file, note, label, timeout, tries, pause):
    """Append to `file` until it is whole, with a new connection after each failure that may pass."""
    opener = new_opener()
    failures = 0
    while True:
        before = _size(file)
        try:
            return _fetch_once(opener, url, file, note, label, timeout)
        except BrokenError as error:
            failures = 1 if _size(file) >= before + PIECE else failures + 1
            if failures >= tries:
                kept = (
                    f", and the {_size(file) / 1e6:.0f} MB that have arrived are kept" if _size(file) else ""
                )
                raise RefusedError(f"{error} ({failures} times in a row{kept})") from None
            wait = pause * 2 ** (failures - 1)
            print(f"{label}: {error}; trying again in {wait:.0f} s", file=sys.stderr, flush=True)
            time.sleep(wait)


def _fetch_once(opener, url, file, note, label, timeout):
    """Send one request and append what it brings, after what `file` holds if that is of the same version."""
    known = _read_note(note, url)
    if known is None:
        file.truncate(0)
    done = _size(file)
    if done and done == known["size"]:
        return
    headers = {}
    if done:
        headers["Range"] = f"bytes={done}-"
        if known["version"]:
            headers["If-Range"] = known["version"]  # the rest if it is this version, otherwise all of it
    try:
        response = open_file(opener, url, headers, timeout)
    except RangeError:
        file.truncate(0)
        raise
    with response:
        version, total = _version(response.headers), _total(response)
        if response.status == 206:
            start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            other = (
                known is None
                or version not in ("", known["version"])  # If-Range lets a server leave it out
                or (total and known["size"] and total != known["size"])
            )
            if other or not start or int(start[1]) != done:
                file.truncate(0)
                raise BrokenError("the file on the server has changed since its first part was fetched")
            total = total or known["size"]
        else:
            file.truncate(0)  # before the note: no old byte may stand beside the mark of a new version
            done = 0
            note.write_text(json.dumps({"url": url, "version": version, "size": total}))
        _copy(response, file, done, total, label)


def _copy(response, file, done, total, label):
    """Append the body of `response` to `file`, which holds `done` of `total` bytes (None: nobody knows)."""
    with Progress(label, total, "MB", scale=1e6) as progress:
        progress.skip(done)
        while total is None or done < total:
            with network_errors(response.url):
                piece = response.read1(PIECE if total is None else min(PIECE, total - done))
            if not piece:
                break
            file.write(piece)
            done += len(piece)
            progress.update(len(piece))
        file.flush()
    if total is not None and done < total:
        raise BrokenError(f"the connection ended after {done / 1e6:.1f} of {total / 1e6:.1f} MB")


def _version(headers):
    """The mark of a version that may stand in If-Range (RFC 9110, 13.1.5): a strong ETag, a date, or ""."""
    tag = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")


def _total(response):
    """Size of the whole file in bytes; None when the server does not say."""
    size = response.headers.get("Content-Length", "")
    if response.status == 206:
        size = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(size) if size.isdecimal() else None


def _read_note(note, url):
    """What is known of the partial file from `url`; None when nothing is that would tell another version."""
    try:
        known = json.loads(note.read_text())
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(known, dict) or known.get("url") != url:
        return None
    return known if known.get("version") or known.get("size") else None


def _size(file):
    file.flush()
    return os.fstat(file.fileno()).st_size
