"""Durable writes to local file systems, and the digests that detect changes."""

import ctypes
import mmap
import os
import zlib
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any
from uuid import uuid4

import google_crc32c
import numpy as np
import numpy.typing as npt

Data = bytes | memoryview | npt.NDArray[Any]
"""Bytes, or an array of any dtype."""

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h
DIGESTS = 1 << 64
"""Number of different digests: sums of digests are taken modulo this."""
PIECE = 1 << 20  # bytes in one call


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int | bytes) -> None:
    if getattr(_libc(), name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def sync_filesystem(folder: Path) -> None:
    """Write everything cached for the file system of ``folder`` to disk.

    One call covers the files, folders and names of a block; an fsync per chunk is no faster.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _call("syncfs", descriptor)
    finally:
        os.close(descriptor)


def exchange_directories(a: Path, b: Path) -> None:
    """Exchange two directories atomically."""
    _call("renameat2", AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE)


def file_status(path: str | Path) -> str:
    """Size, times and inode of a file, one of which changes when it is replaced or written to."""
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def write_durably(path: Path, data: bytes) -> None:
    """Create or replace a file atomically; it is on disk on return."""
    # a name of its own: a late task and its repetition may write the same file at once
    part = path.with_name(f"{path.name}.{uuid4().hex}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    # the fsync above does not cover the name of the file
    sync_filesystem(path.parent)


def digest(data: Data, before: int = 0) -> int:
    """CRC-32C of bytes, or of the elements of an array in memory order, continuing ``before``."""
    if isinstance(data, np.ndarray):
        data = data.ravel(order="K").view(np.uint8)
    # in pieces: google_crc32c may copy its argument, and a whole block would be held twice
    for start in range(0, len(data), PIECE):
        before = google_crc32c.extend(before, data[start : start + PIECE])
    return before


def digest_stored(data: Data, before: int = 0) -> int:
    """CRC-32C and CRC-32 of encoded bytes in one number, continuing ``before``."""
    # all chunks that end with their own CRC, as some codecs leave them, have the same CRC of that
    # kind: the other kind tells them apart
    other = zlib.crc32(memoryview(data), before & 0xFFFFFFFF)  # type: ignore[arg-type]
    return digest(data, before >> 32) << 32 | other


def digest_entry(key: str, size: int, stored: int) -> int:
    """Digest of a key, and of the size and the `digest_stored` of the bytes stored there."""
    # hashed: a sum of plain CRCs would not change if two chunks changed places
    # a name that is no UTF-8 has surrogates
    text = f"{key} {size} {stored:016x}".encode(errors="surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big")


def digest_entries(entries: Iterable[tuple[str, Data]]) -> int:
    """Sum of the digests of keys and the bytes stored there, modulo `DIGESTS`."""
    found = (digest_entry(key, len(data), digest_stored(data)) for key, data in entries)
    return sum(found) % DIGESTS


def aligned_buffer(size: int) -> mmap.mmap:
    """Zeroed memory that starts at a page boundary, in huge pages where available."""
    buffer = mmap.mmap(-1, max(size, 1))
    # fewer page faults; neither all kernels nor all systems have them
    with suppress(OSError, AttributeError):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer
