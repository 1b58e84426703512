"""A SHA-256 of a checkpoint file at its own end, so that a flipped bit anywhere in the file is found.

torch writes a zip archive, whose last record says in its last two bytes how long a comment follows. Here the
comment is `sha256:` and the hash of all bytes before it, with a length of 0, as torch wrote them. Readers of
zip archives, torch's among them, pass over it.
"""

import contextlib
import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

from moco.errors import UserError

END = b"PK\x05\x06"  # of the last record: APPNOTE.TXT 4.3.16
END_BYTES, LENGTH_BYTES = 22, 2
MARK = b"sha256:"
SEAL_BYTES = len(MARK) + 64
PIECE = 1 << 20
PAUSE = 0.002  # seconds between two looks at how far a file has grown


@contextlib.contextmanager
def sealed(path):
    """Seal the file at `path`, which exists, when the block has written it from its beginning to its end.

    While the block writes, its bytes are hashed and sent to the disk, so that hardly more time passes than
    the slowest of the three takes. At the end the file is on the disk. Raises OSError.
    """
    whole = threading.Event()
    with ThreadPoolExecutor(2) as threads:
        hashing = threads.submit(_hash_what_comes, path, whole)
        threads.submit(_flush_what_comes, path, whole)
        try:
            yield
        finally:
            whole.set()
        seal = MARK + hashing.result().hexdigest().encode()
    with open(path, "r+b") as file:
        file.seek(-LENGTH_BYTES, os.SEEK_END)
        file.write(_length(seal) + seal)
        file.flush()
        os.fsync(file.fileno())


def check_seal(path):
    """Raise UserError when the bytes of a file are not those that were sealed, or its end is cut off.

    A file without a seal passes: others write none.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - END_BYTES - SEAL_BYTES))
        tail = file.read()
        at = tail.rfind(END)
        end, seal = tail[at : at + END_BYTES], tail[at + END_BYTES :]
        if at < 0 or (not seal and end.endswith(_length(b""))):
            return
        digest, left = hashlib.sha256(), size - len(seal) - LENGTH_BYTES
        file.seek(0)
        while piece := file.read(min(left, PIECE)):
            digest.update(piece)
            left -= len(piece)
    digest.update(_length(b""))
    if not end.endswith(_length(seal)) or seal != MARK + digest.hexdigest().encode():
        raise UserError(f"{path} is damaged: its content has not the SHA-256 that was saved with it")


def _length(comment):
    return len(comment).to_bytes(LENGTH_BYTES, "little")


def _hash_what_comes(path, whole):
    digest, buffer = hashlib.sha256(), bytearray(PIECE)
    with open(path, "rb", buffering=0) as file:
        while True:
            nothing_will_come = whole.is_set()
            if read := file.readinto(buffer):
                digest.update(memoryview(buffer)[:read])
            elif nothing_will_come:
                return digest
            else:
                whole.wait(PAUSE)


def _flush_what_comes(path, whole):
    with open(path, "rb") as file, contextlib.suppress(OSError):  # then the caller's fsync says it
        while not whole.wait(PAUSE):
            os.fsync(file.fileno())
