"""An array, or a group with all that is in it: opened, told from other states, made elsewhere."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import zarr
from zarr.storage import LocalStore, StorePath

from daskclip.errors import SourceError, error_text
from daskclip.storage import array as storage
from daskclip.storage import files
from daskclip.storage import object_store as objects
from daskclip.storage.retry import is_refused, retrying

# the last one of a folder makes a node of it
DOCUMENTS = (".zmetadata", ".zattrs", "zarr.json", ".zgroup", ".zarray")
MADE_BY = DOCUMENTS[2:]
METADATA_SIZE = 1 << 24  # bytes of JSON: what decodes it takes many times as much
FETCH_BATCH = 64  # documents fetched at a time


@dataclass(frozen=True)
class Hierarchy:
    """What is stored below one place: an array, or a group."""

    store: Any
    path: str
    documents: dict[str, bytes]
    """Metadata by key below the place, to the byte; that of a node after what is in it."""

    def __str__(self) -> str:
        return storage.location(self)

    @property
    def place(self) -> StorePath:
        """Where it is."""
        return StorePath(self.store, self.path)

    @property
    def folder(self) -> Path | None:
        """Where it is on a local file system."""
        return storage.local_path(self)

    @property
    def is_group(self) -> bool:
        return "" not in self.arrays

    @property
    def home(self) -> str:
        """Array for what a run keeps: zarr warns of whatever else it finds in a group."""
        for key in sorted(self.documents):
            name, kind = _split(key)
            if kind == ".zarray" or (kind == "zarr.json" and _is_array(self.documents[key])):
                return name
        return ""

    @property
    def groups(self) -> list[str]:
        """Names of all groups, the outer ones first."""
        nodes = {_split(key)[0] for key in self.documents if _split(key)[1] in MADE_BY}
        return sorted(nodes - self.arrays.keys())

    @cached_property
    def arrays(self) -> dict[str, zarr.Array[Any]]:
        """All arrays, by their path below the place: '' for an array at the place itself."""
        found = {}
        for key, data in self.documents.items():
            name, kind = _split(key)
            if kind not in ("zarr.json", ".zarray"):
                continue
            document = json.loads(data)
            if kind == ".zarray":
                document["attributes"] = self.attributes(name)
            elif document["node_type"] != "array":
                continue
            try:
                found[name] = zarr.Array.from_dict(self.place / name, document)
            except Exception as error:  # zarr raises anything
                if not name:
                    raise
                raise SourceError(
                    f"array {name} of source {self} cannot be opened ({error_text(error)}); "
                    "install what it needs, or move it away"
                ) from error
        return dict(sorted(found.items()))

    def attributes(self, name: str) -> dict[str, Any]:
        """Attributes of a node."""
        document = self.documents.get(objects.join(name, "zarr.json"))
        if document is not None:
            return dict(json.loads(document).get("attributes") or {})
        return dict(json.loads(self.documents.get(objects.join(name, ".zattrs"), b"{}")))

    def at(self, store: Any, path: str = "") -> Hierarchy:
        """The same metadata in another place, where there may be nothing yet."""
        moved = replace(self, store=store, path=path)
        # metadata is not parsed again
        moved.__dict__["arrays"] = {
            name: zarr.Array(zarr.AsyncArray(a.metadata, moved.place / name))
            for name, a in self.arrays.items()
        }
        return moved

    def moved(self, folder: Path) -> Hierarchy:
        """The same metadata in a folder."""
        return self.at(LocalStore(folder))

    @property
    def paths(self) -> list[str]:
        """Files that whoever reads it must see."""
        folder = self.folder
        return [str(folder / key) for key in self.documents if folder and "/" not in key]

    def digest(self) -> int:
        """Digest of its metadata."""
        return storage.digest_of(self.documents.items())

    def fingerprint(self, *, changes: bool) -> dict[str, Any]:
        """What tells one state of what is stored from another, without reading a chunk.

        With ``changes``, by times that a copy does not keep.
        """
        found = {"metadata": self.stored().digest()}
        try:
            return found | retrying(lambda: files.fingerprint(self._chunks(changes)))
        except ValueError as error:
            raise SourceError(
                f"{error_text(error)} in {self}; store regular files there"
            ) from error
        except Exception as error:
            # by a store that cannot list, or may not
            if self.folder is None and (
                isinstance(error, NotImplementedError) or is_refused(error)
            ):
                return found
            raise

    def stored(self) -> Hierarchy:
        """What is in its place now."""
        return at_place(self.store, self.path)

    def make(self, folder: Path) -> Hierarchy:
        """The same without chunks in a new folder."""
        for name in ("", *sorted({_split(key)[0] for key in self.documents} - {""})):
            os.mkdir(folder / name)
        for key, data in self.documents.items():
            with open(folder / key, "wb") as file:
                file.write(data)
        return self.moved(folder)

    def _chunks(self, changes: bool) -> Iterator[files.Stored]:
        for name, array in self.arrays.items():
            largest = 2 * storage.unit_nbytes(array) + (1 << 24)
            for one in storage.listed(array, changes=changes):
                if not files.CHUNK.fullmatch(one.key):
                    continue
                key = objects.join(name, one.key)
                if one.size > largest:
                    raise ValueError(f"{key} has {one.size} bytes, which no chunk there takes")
                yield one._replace(key=key)


def at_folder(folder: Path | str) -> Hierarchy:
    """What is in a folder."""
    return at_place(LocalStore(folder), "")


def at_place(store: Any, path: str) -> Hierarchy:
    """What is at a place of a store; without documents if that is no node."""
    if isinstance(store, LocalStore):
        return Hierarchy(store, path, dict(_documents(store.root / path)))
    return Hierarchy(store, path, retrying(lambda: _fetched(store, path)))


def _documents(folder: Path, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    """Metadata in a folder and, if it is a group's, below it; refused if it leads elsewhere."""
    inside, own = [], {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in DOCUMENTS:
                own[entry.name] = _document(entry)
            elif entry.is_dir() and not entry.name.startswith("."):
                inside.append(entry)
    if not own.keys() & set(MADE_BY):
        return
    for entry in inside if ".zarray" not in own and not _is_array(own.get("zarr.json")) else ():
        if entry.is_symlink():
            raise SourceError(f"{entry.path} is a symbolic link; copy what it leads to")
        yield from _documents(Path(entry.path), f"{prefix}{entry.name}/")
    for name in DOCUMENTS:
        if name in own:
            yield prefix + name, own[name]


def _document(entry: os.DirEntry[str]) -> bytes:
    if entry.is_symlink():
        raise SourceError(f"{entry.path} is a symbolic link; copy what it leads to")
    if not entry.is_file():
        raise SourceError(f"{entry.path} is not a regular file; move it away")
    if entry.stat().st_size > METADATA_SIZE:
        raise SourceError(
            f"{entry.path} has {entry.stat().st_size} bytes, above the {METADATA_SIZE} of metadata "
            "that are read; move large attributes elsewhere"
        )
    return Path(entry.path).read_bytes()


def _is_array(document: bytes | None) -> bool:
    return document is not None and json.loads(document).get("node_type") == "array"


def _fetched(store: Any, path: str) -> dict[str, bytes]:
    """Metadata at a place of an object store, and of what is in a group there."""
    names = [""]
    root = _get(store, path, DOCUMENTS)
    if ".zarray" not in root and not _is_array(root.get("zarr.json")) and root:
        group = zarr.open_group(StorePath(store, path), mode="r")
        with warnings.catch_warnings():  # about what is no node, such as a lock
            warnings.simplefilter("ignore")
            names = [*sorted((n for n, _ in group.members(max_depth=None)), reverse=True), ""]
    kinds = DOCUMENTS if "zarr.json" not in root else ("zarr.json",)
    keys = [objects.join(name, kind) for name in names for kind in kinds]
    found: dict[str, bytes] = {}
    for i in range(0, len(keys), FETCH_BATCH):
        found |= _get(store, path, keys[i : i + FETCH_BATCH])
    return found


def _get(store: Any, path: str, keys: Any) -> dict[str, bytes]:
    data = objects.get(store, [objects.join(path, key) for key in keys])
    return {k: d.tobytes() for k, d in zip(keys, data, strict=True) if d is not None}


def _split(key: str) -> tuple[str, str]:
    """Name of a node, and of its document."""
    name, _, kind = key.rpartition("/")
    return name, kind
