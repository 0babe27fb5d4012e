"""Objects in a Zarr store that is not a local folder: read, listed, and created only once."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, ObjectStore

from daskclip import errors
from daskclip.storage.durable import DIGESTS, Data, digest_entries
from daskclip.storage.files import NODE_DOCUMENTS, Stored
from daskclip.storage.retry import is_refused, kind_and_remedy, retrying

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")

PRECONDITION = "PreconditionFailed"
DELETE_BATCH = 1000  # the limit of S3 for objects removed in one request
IO_BYTES = 1 << 22  # of chunks in one batch: decoded bytes to fetch, encoded bytes to store


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
        # large chunks one at a time, so that memory is as planned
        count = max(1, IO_BYTES // self.unit_nbytes)
        for i in range(0, len(keys), count):
            yield from get(self.store, [join(self.path, key) for key in keys[i : i + count]])

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
        """Everything stored for the array except hidden objects."""
        # ``changes`` makes no difference: an ETag changes with the content
        return (stored for stored in listed(self.store, self.path) if "/." not in f"/{stored.key}")


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
            raise kind(f"{text}; {remedy}") from error


def open_url(url: str, options: dict[str, Any] | None) -> tuple[Store, str]:
    """Store of a whole bucket, and the key in it that a URL names."""
    # the whole bucket, since groups above a target are checked too
    found = FsspecStore.from_url(url, options)
    bucket, _, key = found.path.strip("/").partition("/")
    return FsspecStore(found.fs, path=bucket), key.strip("/")


def url(store: Store, path: str) -> str:
    """URL of an object, for messages."""
    if isinstance(store, FsspecStore):
        return str(store.fs.unstrip_protocol(join(store.path, path)))
    bucket = getattr(getattr(store, "store", None), "config", {}).get("bucket")
    if bucket and isinstance(store, ObjectStore):
        return "s3://" + join(bucket, str(store.store.prefix or ""), path)
    return join(str(store), path)


def get(store: Store, keys: Iterable[str]) -> list[Bytes | None]:
    """Bytes of each object, or None; fetched concurrently."""
    prototype = default_buffer_prototype()
    found = sync(_gathered(store.get(key, prototype) for key in keys))
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
                await store.fs._pipe_file(join(store.path, key), data, mode="create")
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


def delete(store: Store, keys: Iterable[str]) -> None:
    """Delete objects; missing ones are ignored."""
    sync(_gathered(store.delete(key) for key in keys))


def listed(store: Store, prefix: str) -> Iterator[Stored]:
    """All objects below ``prefix``, with keys relative to it."""
    root = f"{prefix}/" if prefix else ""
    if isinstance(store, FsspecStore):
        top = join(store.path, prefix)
        # fsspec's cache of listings does not know what other programs write
        store.fs.invalidate_cache()
        found = sync(store.fs._find(top, detail=True))
        store.fs.invalidate_cache()
        for name, about in found.items():
            key = name[len(top) :].lstrip("/")
            version = about.get("ETag") or about.get("etag") or about.get("mtime") or ""
            if key:  # else an object that stands for a folder
                yield Stored(key, about.get("size") or 0, str(version))
    elif isinstance(store, ObjectStore):
        for batch in store.store.list(root or None):
            for about in batch:
                key, version = about["path"].removeprefix(root), about["e_tag"] or ""
                yield Stored(key, about["size"], version)
    else:
        # zarr's interface lists keys only: their content cannot be told to have changed
        for key in sync(_collected(store.list_prefix(root))):
            yield Stored(key.removeprefix(root), 0, "")


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
