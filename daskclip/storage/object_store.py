"""Objects under a Zarr store that is no local folder: fetched, listed, and made only once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, ObjectStore

from daskclip.errors import (
    DaskClipError,
    StorageError,
    TargetError,
    TargetPermissionError,
    error_text,
)
from daskclip.storage.files import Stored
from daskclip.storage.retry import T, is_refused, kind_and_remedy, retrying

PRECONDITION = "PreconditionFailed"
DELETE_BATCH = 1000  # objects removed by one request of most stores


def can_create(store: Any) -> bool:
    """Whether a store is of a kind that may be able to refuse to replace what it holds."""
    return isinstance(store, FsspecStore | ObjectStore)


def at(url: str, options: dict[str, Any] | None) -> tuple[Any, str]:
    """Store and key of a URL; the store holds the whole bucket."""
    found = FsspecStore.from_url(url, options)
    bucket, _, key = found.path.strip("/").partition("/")
    return FsspecStore(found.fs, path=bucket), key.strip("/")


def url(store: Any, path: str) -> str:
    """Where an object is, for people."""
    if isinstance(store, FsspecStore):
        return str(store.fs.unstrip_protocol(join(store.path, path)))
    bucket = getattr(getattr(store, "store", None), "config", {}).get("bucket")
    if bucket:
        return "s3://" + join(bucket, str(store.store.prefix or ""), path)
    return join(str(store), path)


def get(store: Any, keys: Iterable[str]) -> list[Any]:
    """Bytes of each object, as arrays, or None; fetched together."""
    prototype = default_buffer_prototype()
    found = sync(_together(store.get(key, prototype) for key in keys))
    return [None if b is None else b.as_numpy_array() for b in found]


def put(store: Any, key: str, data: bytes) -> None:
    """Make or replace an object."""
    sync(store.set(key, default_buffer_prototype().buffer.from_bytes(data)))


def create(store: Any, objects: Iterable[tuple[str, bytes]]) -> list[bool]:
    """Make objects together; False for each that there was one of that name, which stays."""

    async def created(key: str, data: bytes) -> bool:
        try:
            if isinstance(store, FsspecStore):
                await store.fs._pipe_file(join(store.path, key), data, mode="create")
            else:
                await store.store.put_async(key, data, mode="create")
        except Exception as error:
            if not _was_there(error):
                raise
            return False
        return True

    return sync(_together(created(key, data) for key, data in objects))


def put_once(store: Any, objects: list[tuple[str, bytes]]) -> None:
    """Make objects; what an earlier try made of them, or another worker, is the same."""
    made = create(store, objects)
    there = [both for both, new in zip(objects, made, strict=True) if not new]
    for (key, data), stored in zip(there, get(store, [key for key, _ in there]), strict=True):
        if stored is None or stored.tobytes() != data:
            raise StorageError(
                f"{url(store, key)} was written by something else; discard the run and begin again"
            )


def delete(store: Any, keys: Iterable[str]) -> None:
    """Remove objects; those that are not there are none the worse."""
    sync(_together(store.delete(key) for key in keys))


def listed(store: Any, prefix: str) -> Iterator[Stored]:
    """All objects whose key begins with ``prefix``, a slash and more; keys without these."""
    root = f"{prefix}/" if prefix else ""
    if isinstance(store, FsspecStore):
        top = join(store.path, prefix)
        # what another program wrote meanwhile is not in what fsspec remembers
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
        for key in sync(_collected(store.list_prefix(root))):
            yield Stored(key.removeprefix(root), 0, "")


@dataclass(frozen=True)
class ObjectPrefix:
    """Objects of a target below its place in a store; their names begin after it."""

    store: Any
    path: str

    def __str__(self) -> str:
        return url(self.store, self.path)

    def get(self, *names: str) -> list[Any]:
        """Bytes of each object, or None."""
        return self._do("reading", lambda: get(self.store, [*map(self._key, names)]))

    def put(self, name: str, data: bytes) -> None:
        """Make or replace an object."""
        self._do("writing", lambda: put(self.store, self._key(name), data))

    def create(self, name: str, data: bytes) -> bool:
        """Make an object; False if there is one, unless an earlier try made it."""
        (made,) = self._do("writing", lambda: create(self.store, [(self._key(name), data)]))
        return made

    def put_once(self, named: Sequence[tuple[str, bytes]]) -> None:
        """Make objects, in no order; there may be the same ones."""
        keyed = [(self._key(name), data) for name, data in named]
        self._do("writing", lambda: put_once(self.store, keyed))

    def names(self, below: str = "") -> list[str]:
        """Names of all objects, or of those below a name, in order."""
        top = self._key(below)
        keys = self._do("listing", lambda: [s.key for s in listed(self.store, top)])
        return sorted(f"{below}/{key}".lstrip("/") for key in keys)

    def delete(self, names: list[str]) -> None:
        """Remove objects, in no order."""
        for i in range(0, len(names), DELETE_BATCH):
            keys = [*map(self._key, names[i : i + DELETE_BATCH])]
            self._do("removing", partial(delete, self.store, keys))

    def _key(self, name: str) -> str:
        return f"{self.path}/{name}".strip("/")

    def _do(self, doing: str, function: Callable[[], T]) -> T:
        try:
            return retrying(function)
        except DaskClipError:
            raise
        except Exception as error:
            text = f"{doing} objects at {self} failed ({error_text(error)})"
            if is_refused(error):
                raise TargetPermissionError(f"{text}; check credentials and rights") from error
            if isinstance(error, FileNotFoundError):
                raise TargetError(f"{text}; check the bucket") from error
            kind, remedy = kind_and_remedy(error)
            raise kind(f"{text}; {remedy}") from error


async def _together(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*calls)


async def _collected(keys: Any) -> list[str]:
    return [key async for key in keys]


def join(*parts: str) -> str:
    """Key of what has these names, one below the other; some may be empty."""
    return "/".join(part.rstrip("/") for part in parts if part)


def _was_there(error: Exception) -> bool:
    """Whether a store refused to replace an object."""
    if type(error).__name__ == "AlreadyExistsError" or isinstance(error, FileExistsError):
        return True
    response = getattr(error.__cause__ or error, "response", None) or {}
    return bool(response.get("Error", {}).get("Code") == PRECONDITION)
