"""Chunk files in local folders: read, written, copied and listed."""

from __future__ import annotations

import errno
import mmap
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from daskclip.storage.durable import DIGESTS, PIECE, aligned_buffer, digest, digest_entry

with suppress(ImportError):  # not POSIX: importing daskclip must work all the same
    import fcntl

Bytes = npt.NDArray[np.uint8]

CHUNK = re.compile(r"c|(c[./])?\d+([./]\d+)*")  # key of a chunk in any of zarr's encodings
DIRECT = 1 << 20  # bytes from which on a file is written past the page cache

_thread = threading.local()


def digest_files(folder: Path, keys: Iterable[str]) -> int:
    """Digest of those of the files that are there."""
    return copy_files(folder, None, keys)


def copy_files(source: Path, target: Path | None, keys: Iterable[str]) -> int:
    """Copy those of the files that are there, if anywhere; each appears whole.

    Returns their digest.
    """
    total, token, room = 0, uuid4().hex, _pages()
    for key in keys:
        try:
            file: Any = open(source / key, "rb", buffering=0)  # noqa: SIM115
        except (FileNotFoundError, NotADirectoryError):
            continue
        content = 0
        with file, _appearing(target, key, token) if target else nullcontext() as out:
            while n := file.readinto(room):
                content = digest(room[:n], content)
                if out is not None:
                    _put(out, room[:n])
        total += digest_entry(key, content)
    return total % DIGESTS


def read(path: str, room: Bytes | None = None) -> Bytes | None:
    """Bytes of a file, or None if there is none.

    They are in ``room`` if it holds them, else in memory that is good until the thread's next call.
    """
    try:
        file = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        room = _pages() if room is None else room
        at = os.readv(file, [room.data]) if len(room) else 0
        if at == len(room):  # there may be more
            size = os.fstat(file).st_size
            if size > at:
                larger = _pages(size)
                larger[:at] = room
                room = larger
            while at < size and (n := os.readv(file, [room[at:size].data])):
                at += n
    finally:
        os.close(file)
    return room if at == len(room) else room[:at]


def write(folder: Path, key: str, data: Any, token: str) -> None:
    """Make or replace a file in a folder that is there; it appears whole.

    ``token`` is in no other name that is written meanwhile.
    """
    # few calls: each lets other threads of Python go first
    with _appearing(folder, key, token) as file:
        _put(file, np.frombuffer(data, np.uint8))


def _put(file: int, data: Bytes) -> None:
    at = _put_pages(file, data) if len(data) >= DIRECT else 0
    while at < len(data):
        at += os.write(file, data[at:].data)


def _put_pages(file: int, data: Bytes) -> int:
    """Write whole pages past the page cache, which takes longer than the disk; returns bytes."""
    flags, room, at = fcntl.fcntl(file, fcntl.F_GETFL), _pages(), 0
    end = len(data) // mmap.PAGESIZE * mmap.PAGESIZE
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
        aligned = data.ctypes.data % mmap.PAGESIZE == 0
        while at < end and at % mmap.PAGESIZE == 0:
            piece = data[at:end] if aligned else room[: min(len(room), end - at)]
            if not aligned:
                piece[:] = data[at : at + len(piece)]
            at += os.write(file, piece.data)
    except OSError as error:
        if error.errno != errno.EINVAL:  # else not on this file system, or not from there
            raise
    fcntl.fcntl(file, fcntl.F_SETFL, flags)
    return at


def _pages(size: int = 2 * PIECE) -> Bytes:
    """Memory of each thread for files on their way: fresh pages take longer than a copy."""
    if len(getattr(_thread, "pages", b"")) < size:
        _thread.pages = np.frombuffer(aligned_buffer(size + size // 8), np.uint8)
    pages: Bytes = _thread.pages
    return pages


@contextmanager
def _appearing(folder: Path, key: str, token: str) -> Iterator[int]:
    path = f"{folder}/{key}"
    part, flags = f"{path}.{token}.partial", os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        file = os.open(part, flags)
    except FileNotFoundError:
        # not the folder itself: a task may have outlived its run
        for parent in [*Path(key).parents][-2::-1]:
            (folder / parent).mkdir(exist_ok=True)
        file = os.open(part, flags)
    try:
        yield file
    finally:
        os.close(file)
    os.replace(part, path)


class Stored(NamedTuple):
    """What a listing tells of a file or an object."""

    key: str
    size: int
    version: str
    """Differs when the content does: the times of a file, the ETag of an object."""
    changed: int = 0
    """When it was written, in nanoseconds; 0 where that is not told."""


def listed(folder: Path, depth: int, *, changes: bool, prefix: str = "") -> Iterator[Stored]:
    """Everything in the folder of an array but hidden files, in no order.

    ``depth`` is the number of names in a chunk's key. Links, and folders in the place of chunks,
    are refused: zarr would read some of them as the fill value.

    With ``changes``, versions tell what no program can set; a copy does not keep it.
    """
    with os.scandir(folder / prefix) as entries:
        for entry in entries:
            key = f"{prefix}{entry.name}"
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                raise ValueError(f"{key} is a symbolic link")
            if entry.is_dir():
                if depth == 1 and CHUNK.fullmatch(key):
                    raise ValueError(f"{key} is a folder and not a chunk")
                yield from listed(folder, max(1, depth - 1), changes=changes, prefix=f"{key}/")
            elif entry.is_file():
                status = entry.stat()
                version = str(status.st_mtime_ns)
                if changes:
                    version += f" {status.st_ctime_ns} {status.st_ino}"
                changed = status.st_ctime_ns if changes else 0
                yield Stored(key, status.st_size, version, changed)
            else:
                raise ValueError(f"{key} is not a regular file")


def fingerprint(found: Iterable[Stored]) -> dict[str, Any]:
    """What tells one state of chunks from another."""
    chunks, total, newest, last = 0, 0, 0, None
    for key, size, version, changed in found:
        text = f"{key} {size} {version}"
        # a sum needs no order, and so no list of a billion names
        total += int.from_bytes(blake2b(text.encode(), digest_size=16).digest(), "big")
        chunks += 1
        if changed > newest:
            newest, last = changed, key
    return {"chunks": chunks, "hash": f"{total % 2**128:032x}", "newest": last}
