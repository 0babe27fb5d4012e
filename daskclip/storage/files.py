"""Chunks of an array as files in a local folder: read, written, copied and listed."""

import errno
import mmap
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from daskclip.storage.durable import (
    DIGESTS,
    PIECE,
    Data,
    aligned_buffer,
    digest_entries,
    digest_entry,
    digest_stored,
)

with suppress(ImportError):  # not POSIX: importing daskclip must work all the same
    import fcntl

Bytes = npt.NDArray[np.uint8]

CHUNK = re.compile(r"c|(c[./])?\d+([./]\d+)*")
"""Key of a chunk in any of zarr's encodings."""
LEFT = re.compile(r".*\.(partial|[0-9a-f-]{32,36})", re.DOTALL)
"""Key of what a write of zarr that was interrupted leaves behind."""
DOCUMENTS = (".zmetadata", ".zattrs", "zarr.json", ".zgroup", ".zarray")
"""Keys of metadata. The last one of a folder makes a node of it, so it is written last."""
NODE_DOCUMENTS = DOCUMENTS[2:]
OURS = re.compile(r"\.(.*\.)?daskclip")
"""Names of the record of a run in what it wrote, and of work folders beside targets."""
DIRECT = 1 << 20  # bytes of a file from which on writing bypasses the page cache

_thread = threading.local()


class Stored(NamedTuple):
    """A file or an object in a listing."""

    key: str
    size: int
    version: str
    """Differs when the content does: the times of a file, the ETag of an object; '' if unknown."""
    changed: int = 0
    """When it was written, in nanoseconds; 0 if unknown."""


@dataclass(frozen=True)
class ChunkFiles:
    """The chunks of an array in a local folder, by key."""

    folder: Path
    depth: int
    """Number of names in a chunk's key."""

    def read(
        self, keys: Sequence[str], buffers: Sequence[Bytes | None] = ()
    ) -> Iterator[Bytes | None]:
        """Bytes of each file, valid until the next file is read; see `read`."""
        for key, buffer in zip_longest(keys, buffers):
            yield read(f"{self.folder}/{key}", buffer)

    def write(self, encoded: Iterable[tuple[str, Data | None]]) -> int:
        """Write the chunks that are not None, and return their digest."""
        # a token of its own: another worker may be running the same task again
        total, token = 0, uuid4().hex
        for key, data in encoded:
            if data is not None:
                total += digest_entries([(key, data)])
                write(self.folder, key, data, token)
        return total % DIGESTS

    def digest(self, keys: Sequence[str]) -> int:
        """Digest of the files that exist."""
        return copy_files(self.folder, None, keys)

    def are_absent(self, keys: Sequence[str]) -> bool:
        """Whether none of the files exists."""
        return not any(os.path.exists(f"{self.folder}/{key}") for key in keys)

    def last_changed(self, keys: Sequence[str]) -> str:
        """Key of the file that was written or removed last."""
        times = {}
        for key in keys:
            path = self.folder / key
            while not os.path.lexists(path):  # removing a file changes the time of its folder
                path = path.parent
            times[key] = path.lstat().st_ctime_ns, path == self.folder / key
        return max(times, key=lambda key: times[key])

    def listed(self, changes: bool) -> Iterator[Stored]:
        """Everything in the folder except what `is_hidden`; see `listed`.

        Folders in the place of chunks are refused: zarr would read some as the fill value.
        """
        return listed(self.folder, changes, self._skips)

    def _skips(self, key: str, entry: os.DirEntry[str]) -> bool:
        deep = entry.is_dir(follow_symlinks=False) and key.count("/") + 1 >= self.depth
        if deep and CHUNK.fullmatch(key):
            raise ValueError(f"{key} is a folder and not a chunk")
        return entry.name.startswith(".") and is_hidden(key)


def is_hidden(key: str) -> bool:
    """Whether a key in the folder of an array is hidden; metadata of an array in it is not."""
    *folders, name = key.split("/")
    own = name if not folders or name not in DOCUMENTS else ""
    return any(part.startswith(".") for part in (*folders, own))


def listed(
    folder: Path, changes: bool, skips: Callable[[str, os.DirEntry[str]], bool]
) -> Iterator[Stored]:
    """Everything in a folder except what ``skips`` says, in no order; links are refused.

    With ``changes``, versions include what no program can set and no copy keeps: ctime and inode.
    """
    # one generator for all folders: a nested one would pass each of a million files upwards
    folders = [""]
    while folders:
        prefix, inside = folders.pop(), []
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                key = f"{prefix}{entry.name}"
                if skips(key, entry):
                    continue
                if entry.is_symlink():
                    raise ValueError(f"{key} is a symbolic link")
                if entry.is_file():
                    status = entry.stat()
                    version, changed = f"{status.st_mtime_ns}", 0
                    if changes:
                        changed = status.st_ctime_ns
                        version += f" {changed} {status.st_ino}"
                    yield Stored(key, status.st_size, version, changed)
                elif not entry.is_dir():
                    raise ValueError(f"{key} is not a regular file")
                else:
                    inside.append(f"{key}/")
        folders += reversed(inside)


def copy_files(source: Path, target: Path | None, keys: Iterable[str]) -> int:
    """Copy the files that exist, each atomically, and return their digest.

    Without a target they are only read.
    """
    total, token, buffer = 0, uuid4().hex, _page_buffer()
    for key in keys:
        try:
            file: Any = open(source / key, "rb", buffering=0)  # noqa: SIM115
        except (FileNotFoundError, NotADirectoryError):
            continue
        size = found = 0
        with file, _replacing(target, key, token) if target else nullcontext() as out:
            while n := file.readinto(buffer):
                size, found = size + n, digest_stored(buffer[:n], found)
                if out is not None:
                    _write_all(out, buffer[:n])
        total += digest_entry(key, size, found)
    return total % DIGESTS


def read(path: str, buffer: Bytes | None = None) -> Bytes | None:
    """Bytes of a file, or None if it does not exist.

    They are in ``buffer`` if they fit, else in this thread's own buffer, which the next call
    reuses.
    """
    try:
        file = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        buffer = _page_buffer() if buffer is None else buffer
        at = os.readv(file, [buffer.data]) if len(buffer) else 0
        if at == len(buffer):  # a full buffer: the file may go on
            size = os.fstat(file).st_size
            if size > at:
                larger = _page_buffer(size)
                larger[:at] = buffer
                buffer = larger
            while at < size and (n := os.readv(file, [buffer[at:size].data])):
                at += n
    finally:
        os.close(file)
    return buffer if at == len(buffer) else buffer[:at]


def write(folder: Path, key: str, data: Data, token: str) -> None:
    """Create or replace a file atomically, in an existing folder.

    ``token`` is unique among concurrent writers.
    """
    # as few system calls as possible: around each, another thread may take the GIL
    with _replacing(folder, key, token) as file:
        _write_all(file, np.frombuffer(data, np.uint8))


def _write_all(file: int, data: Bytes) -> None:
    at = _write_pages(file, data) if len(data) >= DIRECT else 0
    while at < len(data):
        at += os.write(file, data[at:].data)


def _write_pages(file: int, data: Bytes) -> int:
    """Write whole pages with O_DIRECT, and return the bytes written.

    For large files, writing through the page cache is slower.
    """
    flags, buffer, at = fcntl.fcntl(file, fcntl.F_GETFL), _page_buffer(), 0
    end = len(data) // mmap.PAGESIZE * mmap.PAGESIZE
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
        aligned = data.ctypes.data % mmap.PAGESIZE == 0
        while at < end and at % mmap.PAGESIZE == 0:
            piece = data[at:end] if aligned else buffer[: min(len(buffer), end - at)]
            if not aligned:  # O_DIRECT takes only memory that starts at a page
                piece[:] = data[at : at + len(piece)]
            at += os.write(file, piece.data)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system has no O_DIRECT, or not for this memory
            raise
    # the rest, less than a page, goes through the page cache
    fcntl.fcntl(file, fcntl.F_SETFL, flags)
    return at


def _page_buffer(size: int = 2 * PIECE) -> Bytes:
    """Aligned buffer of this thread; it is kept, since fresh pages take longer than a copy."""
    if len(getattr(_thread, "pages", b"")) < size:
        _thread.pages = np.frombuffer(aligned_buffer(size + size // 8), np.uint8)
    pages: Bytes = _thread.pages
    return pages


@contextmanager
def _replacing(folder: Path, key: str, token: str) -> Iterator[int]:
    """Open a file that replaces the file of ``key`` when the context ends."""
    path = f"{folder}/{key}"
    # not a longer name than that of the file, which may have the longest that there is
    part, flags = (
        f"{path.rpartition('/')[0]}/{token}.partial",
        os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    )
    try:
        # the mode that Python's own open gives; the default of os.open makes files executable
        file = os.open(part, flags, 0o666)
    except FileNotFoundError:
        # never the folder of the array itself: a task may have outlived its run
        for parent in [*Path(key).parents][-2::-1]:
            (folder / parent).mkdir(exist_ok=True)
        file = os.open(part, flags, 0o666)
    try:
        yield file
    finally:
        os.close(file)
    # not after an error: then the old file stays, and the part is removed with the run
    os.replace(part, path)


def fingerprint(chunks: Iterable[Stored], others: Iterable[Stored] = ()) -> dict[str, Any]:
    """Number of chunks, a hash of all keys, sizes and versions, and the key changed last."""
    count, total, newest, last = 0, 0, 0, None
    for one, listing in ((1, chunks), (0, others)):
        for key, size, version, changed in listing:
            # a name that is no UTF-8 has surrogates
            text = f"{key} {size} {version}".encode(errors="surrogatepass")
            # a sum does not depend on the order, so that no list of a billion keys is sorted
            total += int.from_bytes(blake2b(text, digest_size=16).digest(), "big")
            count += one
            if changed > newest:
                newest, last = changed, key
    return {"chunks": count, "hash": f"{total % 2**128:032x}", "newest": last}
