"""Objects in a Zarr store that is not a local folder: read, listed, and created only once."""

import asyncio
import os
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar
from zipfile import ZipFile

import numpy as np
import numpy.typing as npt
from zarr.abc.store import RangeByteRequest, Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, ObjectStore, ZipStore

from daskclip import errors
from daskclip.storage.durable import DIGESTS, Data, digest_entries
from daskclip.storage.files import CHUNK, NODE_DOCUMENTS, Stored, is_hidden
from daskclip.storage.retry import http_status, is_refused, kind_and_remedy, retrying
from daskclip.storage.stores import (
    READ_ONLY,
    is_web,
    linked_files,
    path_in,
    protocols_of,
    quoted,
    store_version,
)

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")

_large = threading.Lock()

PRECONDITION = "PreconditionFailed"
DELETE_BATCH = 1000  # the limit of S3 for objects removed in one request
IO_BYTES = 1 << 22  # of chunks in one batch: decoded bytes to fetch, encoded bytes to store
CLOUDS = {"S3Store": "s3", "GCSStore": "gs", "AzureStore": "az"}
"""Schemes of the stores of obstore whose ETags follow from what is stored."""


@dataclass(frozen=True)
class ChunkObjects:
    """The chunks of an array in an object store, by key."""

    store: Store
    path: str
    unit_nbytes: int
    """Decoded bytes of a chunk."""

    def read(
        self, keys: Sequence[str], buffers: Sequence[Bytes | None] = ()
    ) -> Iterator[Bytes | None]:
        """Bytes of each object, or None; small ones are fetched some at a time."""
        for i in range(0, len(keys), self._count):
            names = [join(self.path, key) for key in keys[i : i + self._count]]
            yield from get(self.store, names)

    @property
    def _count(self) -> int:
        """Number of chunks to fetch together."""
        # large chunks one at a time, so that memory is as planned
        return max(1, IO_BYTES // self.unit_nbytes)

    def write(self, encoded: Iterable[tuple[str, Data | None]]) -> int:
        """Create the chunks that are not None, some at a time, and return their digest."""
        total, size = 0, 0
        batch: list[tuple[str, bytes]] = []
        for key, data in encoded:
            if data is not None:
                total += digest_entries([(key, data)])
                batch.append((join(self.path, key), bytes(data)))
                size += len(data)
            # small chunks together, since each request waits; large ones would fill the memory
            if size >= IO_BYTES:
                put_once(self.store, batch)
                batch, size = [], 0
        if batch:
            put_once(self.store, batch)
        return total % DIGESTS

    def digest(self, keys: Sequence[str]) -> int:
        """Digest of the objects that exist."""
        stored = zip(keys, self.read(keys), strict=True)
        return digest_entries((key, data) for key, data in stored if data is not None)

    def are_absent(self, keys: Sequence[str]) -> bool:
        """Return False: asking would take a request for each key."""
        return False

    def last_changed(self, keys: Sequence[str]) -> str:
        """Return the first key: objects are not asked for their times."""
        return keys[0]

    def listed(self, changes: bool) -> Iterator[Stored]:
        """Everything stored for the array except hidden objects and folders."""
        if is_web(self.store):
            # a page need not link to all that is there, and what is missing would count as zeros
            raise NotImplementedError("a web server does not list what is stored")
        # ``changes`` makes no difference: an ETag changes with the content
        found = listed(self.store, self.path)
        return (one for one in found if not (is_hidden(one.key) or one.key.endswith("/")))

    def versioned(self, grid: Iterable[str]) -> Iterator[Stored]:
        """Everything in `listed`, chunks with a version; see `versioned`.

        The keys of ``grid`` are those of all chunks that there may be, for a store that cannot be
        listed.
        """
        return versioned(self.store, self.path, self._found(grid), self._count)

    def _found(self, grid: Iterable[str]) -> Iterator[Stored]:
        """Listed chunks, or all of ``grid`` if there is no listing."""
        try:
            found = self.listed(False)
            return chain([*islice(found, 1)], found)
        except Exception as error:
            if not cannot_list(error):
                raise
        return (Stored(key, 0, "") for key in grid)


@dataclass(frozen=True)
class ObjectPrefix:
    """The objects below a prefix of a store, by their names relative to it."""

    store: Store
    path: str

    def __str__(self) -> str:
        return url(self.store, self.path)

    @property
    def can_create(self) -> bool:
        """Whether the store has a call that creates an object only if it does not exist."""
        return isinstance(self.store, FsspecStore | ObjectStore)

    @property
    def is_read_only(self) -> bool:
        """Whether nothing can be created there, whatever the rights."""
        return any(protocols & READ_ONLY for protocols in protocols_of(self.store))

    def has_node(self) -> bool:
        """Whether a Zarr array or group is at the prefix."""
        return any(data is not None for data in self.get(*NODE_DOCUMENTS))

    def get(self, *names: str) -> list[Bytes | None]:
        """Bytes of each object, or None."""
        return self._retrying("reading", get, self.store, [*map(self._key, names)])

    def put(self, name: str, data: bytes) -> None:
        """Create or replace an object."""
        self._retrying("writing", put, self.store, self._key(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Create an object; False if it exists, possibly from an earlier try."""
        (created,) = self._retrying("writing", create, self.store, [(self._key(name), data)])
        return created

    def put_once(self, named: Sequence[tuple[str, bytes]]) -> None:
        """Create objects, in no order; existing ones must have the same bytes."""
        keyed = [(self._key(name), data) for name, data in named]
        self._retrying("writing", put_once, self.store, keyed)

    def upload(self, name: str, path: Path) -> None:
        """Create or replace an object with the content of a file, which is sent in parts."""
        self._retrying("writing", upload, self.store, self._key(name), path)

    def names(self, below: str = "") -> list[str]:
        """Sorted names of all objects, or of those below a name."""
        top = self._key(below)
        keys = self._retrying("listing", lambda: [s.key for s in listed(self.store, top)])
        return sorted(f"{below}/{key}".lstrip("/") for key in keys)

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects, in no order; missing ones are ignored."""
        for i in range(0, len(names), DELETE_BATCH):
            keys = [*map(self._key, names[i : i + DELETE_BATCH])]
            self._retrying("removing", delete, self.store, keys)

    def _key(self, name: str) -> str:
        return f"{self.path}/{name}".strip("/")

    def _retrying(self, doing: str, function: Callable[..., T], *arguments: object) -> T:
        try:
            return retrying(function, *arguments)
        except errors.DaskClipError:
            raise
        except Exception as error:
            text = f"{doing} objects at {self} failed ({errors.error_text(error)})"
            kind: type[Exception]
            kind, remedy = kind_and_remedy(error)
            if is_refused(error):
                kind, remedy = errors.TargetPermissionError, "check credentials and rights"
            elif isinstance(error, FileNotFoundError):
                kind, remedy = errors.TargetError, "check the bucket"
            elif isinstance(error, NotImplementedError):
                kind, remedy = errors.TargetError, "choose a path, or a URL of an object store"
            raise kind(f"{text}; {remedy}") from error


def url(store: Store, path: str) -> str:
    """URL or path of an object, for messages and to know a store again in another process."""
    if isinstance(store, FsspecStore):
        return str(store.fs.unstrip_protocol(store.fs._strip_protocol(path_in(store, path))))
    if isinstance(store, ZipStore):
        return join(os.path.realpath(store.path), path)
    inner = store.store if isinstance(store, ObjectStore) else store
    root = type(inner).__name__
    if root in CLOUDS:
        config: dict[str, str] = getattr(inner, "config", {})
        root = f"{CLOUDS[root]}://{config.get('bucket') or config.get('container_name')}"
    # the text of others may hold an address in memory, which each process has its own
    place = getattr(inner, "url", "") if root == "HTTPStore" else ""
    return join(place or root, str(getattr(inner, "prefix", None) or "").strip("/"), path)


def cannot_list(error: BaseException) -> bool:
    """Whether a store has no listing, or refuses it."""
    return (
        is_refused(error)
        or isinstance(error, NotImplementedError | FileNotFoundError)
        or http_status(error) in (404, 405, 501)
        or type(error).__name__ == "NotSupportedError"
    )


def get(store: Store, keys: Iterable[str]) -> list[Bytes | None]:
    """Bytes of each object, or None; fetched concurrently."""
    prototype = default_buffer_prototype()
    found = sync(_gathered(store.get(quoted(store, key), prototype) for key in keys))
    return [None if b is None else b.as_numpy_array() for b in found]


def put(store: Store, key: str, data: bytes) -> None:
    """Create or replace an object."""
    sync(store.set(key, default_buffer_prototype().buffer.from_bytes(data)))


def create(store: Any, objects: Iterable[tuple[str, bytes]]) -> list[bool]:
    """Create objects concurrently; False for each that exists, which is not replaced."""

    async def created(key: str, data: bytes) -> bool:
        try:
            # zarr has no such call: that of the library below is used
            if isinstance(store, FsspecStore):
                await store.fs._pipe_file(path_in(store, key), data, mode="create")
            else:
                await store.store.put_async(key, data, mode="create")
        except Exception as error:
            if not _exists_already(error):
                raise
            return False
        return True

    return sync(_gathered(created(key, data) for key, data in objects))


def put_once(store: Store, objects: Sequence[tuple[str, bytes]]) -> None:
    """Create objects; existing ones must have the same bytes."""
    created = create(store, objects)
    # a request may have succeeded although its answer was lost: the same bytes will do
    existing = [both for both, new in zip(objects, created, strict=True) if not new]
    for (key, data), stored in zip(existing, get(store, [k for k, _ in existing]), strict=True):
        if stored is None or stored.tobytes() != data:
            raise errors.StorageError(
                f"{url(store, key)} was written by something else; discard the run and begin again"
            )


def download(store: Store, key: str, path: Path) -> None:
    """Copy an object to a new file, in pieces."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        if isinstance(store, ZipStore) and store.read_only:
            # from zarr, each piece would be unpacked from the beginning of the object
            with ZipFile(store.path) as packed, packed.open(key) as stream:
                shutil.copyfileobj(stream, file, IO_BYTES)
            return
        key = quoted(store, key)
        prototype, size = default_buffer_prototype(), sync(store.getsize(key))
        for start in range(0, size, IO_BYTES):
            piece = RangeByteRequest(start, min(start + IO_BYTES, size))
            data = sync(store.get(key, prototype, piece))
            file.write(b"" if data is None else data.to_bytes())


def upload(store: Any, key: str, path: Path) -> None:
    """Create or replace an object; see `ObjectPrefix.upload`."""
    # zarr has no such call: that of the library below is used, which holds several parts
    with _large if path.stat().st_size > IO_BYTES else nullcontext():
        if isinstance(store, FsspecStore):
            sync(store.fs._put_file(str(path), path_in(store, key)))
        else:
            sync(store.store.put_async(key, path))


def delete(store: Store, keys: Iterable[str]) -> None:
    """Delete objects; missing ones are ignored."""
    sync(_gathered(store.delete(key) for key in keys))


def listed(store: Store, prefix: str) -> Iterator[Stored]:
    """All objects below ``prefix``, with keys relative to it.

    Versions are the ETags of object stores, and else empty. Others would not do: times are coarse
    or can be set, and those of a cache are not of the bytes that it reads.
    """
    root, layers = f"{prefix}/" if prefix else "", protocols_of(store)
    if is_web(store):
        for key in sync(linked_files(store, prefix)):
            yield Stored(key, 0, "")
    elif isinstance(store, FsspecStore):
        fs = store.fs
        top = fs._strip_protocol(path_in(store, prefix))
        # fsspec's cache of listings does not know what other programs write
        fs.invalidate_cache()
        found = sync(fs._find(top, detail=True))
        fs.invalidate_cache()
        for name, about in found.items():
            key = name[len(top) :].lstrip("/")
            version = about.get("ETag") or about.get("etag") or ""
            if key:  # else an object that stands for a folder
                yield Stored(key, about.get("size") or 0, "" if layers[1:] else str(version))
    elif isinstance(store, ObjectStore):
        has_etags = type(store.store).__name__ in CLOUDS
        for batch in store.store.list(root or None):
            for about in batch:
                key, version = about["path"].removeprefix(root), about["e_tag"] or ""
                yield Stored(key, about["size"], version if has_etags else "")
    else:
        # zarr's interface lists keys only
        for key in sync(_collected(store.list_prefix(root))):
            yield Stored(key.removeprefix(root), 0, "")


def checked(key: str) -> str:
    """A key, if a file in a folder can have that name."""
    if "\0" in key or not {"", ".", ".."}.isdisjoint(key.split("/")):
        raise errors.SourceError(f"key {key!r} is not a path in a folder; rename or remove it")
    return key


def versioned(store: Store, path: str, found: Iterator[Stored], count: int) -> Iterator[Stored]:
    """Objects below a path that exist, each with a version that differs when its bytes do.

    That is the version of the whole store or of the listing, if they have one. Else the objects are
    read, ``count`` at a time, and the version is a digest. What is no chunk is not read.
    """
    version = store_version(store)
    while batch := [*islice(found, count)]:
        keys = [s.key for s in batch if not (version or s.version) and CHUNK.fullmatch(s.key)]
        read = dict(zip(keys, _read(store, path, keys), strict=True))
        for stored in batch:
            if stored.key not in read:
                yield stored._replace(version=stored.version or version)
            elif (data := read[stored.key]) is not None:
                digest = blake2b(data.data, digest_size=16).hexdigest()
                yield Stored(stored.key, len(data), digest)


def _read(store: Store, path: str, keys: Sequence[str]) -> list[Bytes | None]:
    try:
        return retrying(get, store, [join(path, key) for key in keys])
    except Exception as error:
        kind, remedy = kind_and_remedy(error)
        why = f"{type(error).__name__}: {errors.error_text(error)}; {remedy}"
        where = f"{len(keys)} objects of {url(store, path)} from {keys[0]} on"
        raise kind(f"reading {where} failed: {why}") from error


# sync takes a coroutine, which asyncio.gather is not
async def _gathered(calls: Iterable[Awaitable[T]]) -> list[T]:
    return await asyncio.gather(*calls)


async def _collected(keys: AsyncIterator[str]) -> list[str]:
    return [key async for key in keys]


def join(*parts: str) -> str:
    """Join parts of a key; empty ones are left out."""
    return "/".join(part.rstrip("/") for part in parts if part)


def _exists_already(error: Exception) -> bool:
    """Whether a store refused to replace an object."""
    # obstore, fsspec, and s3fs, which translates a 412 to a plain OSError
    if type(error).__name__ == "AlreadyExistsError" or isinstance(error, FileExistsError):
        return True
    response = getattr(error.__cause__ or error, "response", None) or {}
    return bool(response.get("Error", {}).get("Code") == PRECONDITION)
