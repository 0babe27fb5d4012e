"""A read-only Zarr store of flat arrays: documents are made, chunks are ranges of bytes."""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Self

import numpy as np
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype

from daskclip.errors import SourceChangedError
from daskclip.grid import all_coords
from daskclip.storage.durable import file_status
from daskclip.storage.foreign.arrays import Bytes, FileArray, FlatArray, in_memory
from daskclip.storage.foreign.headers import INDEX, read_npy, read_safetensors, read_shards

CHUNK = re.compile(r"(?:(.*)/)?c((?:/(?:0|[1-9]\d{0,18}))*)", re.DOTALL)


class FlatStore(Store):
    """Arrays of a flat file or of several, or one in memory, as a Zarr array or group."""

    supports_writes = supports_deletes = False
    supports_listing = True

    def __init__(
        self,
        path: str,
        arrays: Mapping[str, FlatArray],
        files: Sequence[str] = (),
        attributes: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(read_only=True)
        self.path = path
        self.arrays = arrays
        """Arrays by name: '' if there is no group."""
        self.files = (*files,)
        """Files that are read; none for an array in memory."""
        self._opened = self._status
        self._documents = {_join(name, "zarr.json"): a.document() for name, a in arrays.items()}
        for group in () if "" in arrays else {"", *_groups(arrays)}:
            own = {} if group else {**(attributes or {})}
            about = {"zarr_format": 3, "node_type": "group", "attributes": own}
            self._documents[_join(group, "zarr.json")] = about

    @classmethod
    def of_path(cls, path: str) -> Self:
        """Read the headers of a file or of a folder of shards."""
        path = os.path.abspath(path)
        if path.lower().endswith(".npy"):
            return cls(path, {"": read_npy(path)}, [path])
        if not os.path.isdir(path):
            arrays, attributes = read_safetensors(path)
            return cls(path, arrays, [path], attributes)
        arrays, attributes = read_shards(path)
        files = {os.path.join(path, INDEX), *(array.path for array in arrays.values())}
        return cls(path, arrays, sorted(files), attributes)

    def __reduce__(self) -> tuple[Any, ...]:
        if not self.files:
            raise TypeError("an array in memory is not sent to other processes")
        if "" in self.arrays:
            return type(self), (self.path, self.arrays, self.files)
        # the headers of all arrays would be sent with each of them
        return _opened_once, (type(self), self.path, self._opened)

    def __str__(self) -> str:
        return self.path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlatStore) and (self.files, self.arrays) == (
            other.files, other.arrays,
        )  # fmt: skip

    @property
    def version(self) -> str:
        """Text that changes when the files do; '' for memory, and files in it that do not tell."""
        return self._status if _keep_times(self.files) else ""

    @property
    def _status(self) -> str:
        """Sizes, times and inodes of the files."""
        return " ".join(map(file_status, self.files))

    def require_same(self) -> None:
        """Require that the files are those whose headers were read."""
        if self._status != self._opened:
            raise SourceChangedError(f"source {self} has changed since; open it again")

    def read(self, key: str, buffer: Bytes | None = None) -> Any:
        """Bytes of a document or of a chunk, in ``buffer`` if they fit; None for other keys."""
        if key in self._documents:
            return np.frombuffer(json.dumps(self._documents[key]).encode(), np.uint8)
        array, coords = self._chunk(key)
        if array is None:
            return None
        if buffer is None or len(buffer) < array.chunk_nbytes:
            buffer = np.empty(array.chunk_nbytes, np.uint8)
        return array.read(coords, buffer)

    def _chunk(self, key: str) -> tuple[FlatArray | None, list[int]]:
        """Array and coordinates of a chunk; no array for other keys."""
        match = CHUNK.fullmatch(key)
        array = self.arrays.get(match[1] or "") if match else None
        coords = [int(i) for i in match[2].split("/")[1:]] if match else []
        if array is None or len(coords) != len(array.shape):
            return None, []
        inside = all(i < n for i, n in zip(coords, array.grid, strict=True))
        return (array if inside else None), coords

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Bytes of a document or of a chunk, read in a thread."""
        found = await asyncio.to_thread(self.read, key)
        return None if found is None else prototype.buffer.from_array_like(_cut(found, byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Several of them."""
        return [await self.get(key, prototype, wanted) for key, wanted in key_ranges]

    async def exists(self, key: str) -> bool:
        """Whether a key is that of a document or of a chunk."""
        return key in self._documents or self._chunk(key)[0] is not None

    async def set(self, key: str, value: Buffer) -> None:
        """Raise ValueError: nothing can be written."""
        self._check_writable()

    async def delete(self, key: str) -> None:
        """Raise ValueError: nothing can be removed."""
        self._check_writable()

    async def list(self) -> AsyncIterator[str]:
        """All keys."""
        for key in self._keys(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """All keys with a prefix."""
        for key in self._keys(prefix):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Names in a folder."""
        top = f"{prefix}/" if prefix and not prefix.endswith("/") else prefix
        for name in {key[len(top) :].split("/")[0] for key in self._keys(top)}:
            yield name

    def _keys(self, prefix: str) -> Iterator[str]:
        """All keys with a prefix, made one at a time."""
        arrays: Mapping[str, FlatArray] = self.arrays
        documents: Iterable[str] = self._documents
        if prefix.endswith("/") and (name := prefix[:-1]) in arrays:
            # nothing else is below an array, and a group may have very many of them
            arrays, documents = {name: arrays[name]}, [_join(name, "zarr.json")]
        yield from (key for key in documents if key.startswith(prefix))
        for name, array in arrays.items():
            top = _join(name, "c")
            # the chunks of other arrays are not gone through
            if top.startswith(prefix) or prefix.startswith(top):
                keys = ("/".join((top, *map(str, at))) for at in all_coords(array.grid))
                yield from (key for key in keys if key.startswith(prefix))


def _keep_times(paths: Iterable[str]) -> bool:
    """Whether the times of files change when they are written to through a memory map."""
    with open("/proc/self/mountinfo", errors="surrogateescape") as mounts:
        kinds = {f[2]: f[f.index("-") + 1] for f in map(str.split, mounts)}
    devices = {os.stat(path).st_dev for path in paths}
    mounted = {kinds.get(f"{os.major(device)}:{os.minor(device)}") for device in devices}
    return mounted.isdisjoint(("tmpfs", "ramfs", "devtmpfs"))


@lru_cache(maxsize=16)
def _opened_once(kind: type[FlatStore], path: str, status: str) -> FlatStore:
    """A store that this process has opened already, if its files had this status then."""
    return kind.of_path(path)


def open_flat_store(source: object) -> FlatStore | None:
    """Store of a file, a folder of shards or an array in memory; None if it is none of them."""
    # a subclass may hold more than its elements, as a masked array does
    if type(source) in (np.ndarray, np.memmap):
        array = in_memory(np.asanyarray(source))
        if isinstance(array, FileArray):
            return FlatStore(array.path, {"": array}, [array.path])
        return FlatStore(f"array of shape {array.shape} in memory", {"": array})
    if not isinstance(source, str):
        return None
    is_file = source.lower().endswith((".npy", ".safetensors")) and os.path.isfile(source)
    is_zarr = os.path.exists(os.path.join(source, "zarr.json"))
    if is_file or (not is_zarr and os.path.isfile(os.path.join(source, INDEX))):
        return FlatStore.of_path(source)
    return None


def _join(name: str, key: str) -> str:
    return f"{name}/{key}" if name else key


def _groups(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        while name := name.rpartition("/")[0]:
            yield name


def _cut(data: Bytes, wanted: ByteRequest | None) -> Bytes:
    if isinstance(wanted, RangeByteRequest):
        return data[wanted.start : wanted.end]
    if isinstance(wanted, OffsetByteRequest):
        return data[wanted.offset :]
    if isinstance(wanted, SuffixByteRequest):
        return data[max(0, len(data) - wanted.suffix) :]
    return data
