"""An array, or a group with all arrays in it: opened, fingerprinted, and moved to another place."""

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import zarr
from zarr.abc.store import Store
from zarr.storage import LocalStore, StorePath, ZipStore

from daskclip.errors import SourceError, error_text
from daskclip.storage import files
from daskclip.storage import object_store as objects
from daskclip.storage.array import StoredArray, local_folder, location
from daskclip.storage.durable import digest_entries
from daskclip.storage.files import DOCUMENTS, NODE_DOCUMENTS
from daskclip.storage.retry import retrying

METADATA_SIZE = 1 << 24  # bytes of JSON: parsing takes many times as much memory
FETCH_BATCH = 64  # documents fetched together


@dataclass(frozen=True)
class Hierarchy:
    """A Zarr array or group, its metadata as stored, and the arrays that this describes."""

    store: Store
    path: str
    documents: dict[str, bytes]
    """Metadata documents, byte for byte, by relative key; a group's come after its members'."""

    @classmethod
    def open(cls, place: Store | Path | str, path: str = "") -> Self:
        """Read the metadata in a folder or below a key of a store; there may be none."""
        store = _store(place)
        if isinstance(store, LocalStore):
            return cls(store, path, _read_documents(store.root / path))
        return cls(store, path, retrying(_fetch_documents, store, path))

    def __str__(self) -> str:
        return location(self.store, self.path)

    @property
    def store_path(self) -> StorePath:
        """Where it is stored, for zarr."""
        return StorePath(self.store, self.path)

    @property
    def folder(self) -> Path | None:
        """Its folder, if it is on a local file system."""
        return local_folder(self.store, self.path)

    @property
    def is_group(self) -> bool:
        return "" not in self.arrays

    @property
    def record_array(self) -> str:
        """Name of the array to keep the journal in."""
        # zarr warns of foreign files in a group; parsing all arrays of a group may take seconds
        for key in sorted(self.documents):
            name, kind = _split(key)
            if _is_array({kind: self.documents[key]}):
                return name
        return ""

    @property
    def groups(self) -> list[str]:
        """Names of all groups, outer ones first."""
        nodes = {_split(key)[0] for key in self.documents if _split(key)[1] in NODE_DOCUMENTS}
        return sorted(nodes - self.arrays.keys())

    @cached_property
    def arrays(self) -> dict[str, StoredArray]:
        """All arrays by relative path: '' if the hierarchy is an array itself."""
        found = {}
        for key, data in self.documents.items():
            name, kind = _split(key)
            document = json.loads(data) if kind in ("zarr.json", ".zarray") else {}
            if kind == ".zarray":
                document["attributes"] = self.attributes(name)
            elif not document or document["node_type"] != "array":
                continue
            try:
                found[name] = StoredArray(zarr.Array.from_dict(self.store_path / name, document))
            except Exception as error:  # broken metadata makes zarr raise anything
                if not name:
                    raise
                raise SourceError(
                    f"array {name} of source {self} cannot be opened ({error_text(error)}); "
                    "install what it needs, or move it away"
                ) from error
        return dict(sorted(found.items()))

    def attributes(self, name: str) -> dict[str, Any]:
        """Attributes of an array or a group."""
        document = self.documents.get(objects.join(name, "zarr.json"))
        if document is not None:
            return dict(json.loads(document).get("attributes") or {})
        return dict(json.loads(self.documents.get(objects.join(name, ".zattrs"), b"{}")))

    def moved_to(self, place: Store | Path, path: str = "") -> Self:
        """The same metadata at another place, where nothing need be stored."""
        moved = type(self)(_store(place), path, self.documents)
        arrays = {}
        for name, stored in self.arrays.items():
            metadata: Any = stored.array.metadata
            array = zarr.AsyncArray(metadata, moved.store_path / name)
            arrays[name] = StoredArray(zarr.Array(array))
        # the cached property is set: parsing the documents of a large group again takes seconds
        vars(moved)["arrays"] = arrays
        return moved

    def reread(self) -> Self:
        """The same arrays with the documents as they are stored now."""
        again = self.open(self.store, self.path)
        vars(again)["arrays"] = self.arrays
        return again

    def write_documents(self, folder: Path) -> None:
        """Create a folder that has the same metadata and no chunks."""
        # sorted: outer folders first
        for name in sorted({"", *(_split(key)[0] for key in self.documents)}):
            os.mkdir(folder / name)
        for key, data in self.documents.items():
            with open(folder / key, "wb") as file:
                file.write(data)

    @property
    def paths(self) -> list[str]:
        """Local files that every process that reads it must see."""
        folder = self.folder
        if isinstance(self.store, ZipStore):
            return [str(self.store.path)]
        return [str(folder / key) for key in self.documents if folder and "/" not in key]

    def digest(self) -> int:
        """Digest of the documents."""
        return digest_entries(self.documents.items())

    def fingerprint(self, *, changes: bool) -> dict[str, Any]:
        """Fingerprint of the documents and of the chunks stored now.

        Chunks are read only where the store has no versions of them. With ``changes``, it also
        covers the times of chunks that a copy does not keep.
        """
        found = {"metadata": self.digest()}
        try:
            return found | retrying(lambda: files.fingerprint(self._chunks(changes)))
        except ValueError as error:
            text = f"{error_text(error)} in {self}; store regular files there"
            raise SourceError(text) from error

    def _chunks(self, changes: bool) -> Iterator[files.Stored]:
        for name, array in self.arrays.items():
            # codecs add little to data that they cannot compress; a larger file, which is no
            # chunk, would be read into memory
            largest = 2 * array.unit_nbytes + (1 << 24)
            prefix = f"{name}/" if name else ""
            for stored in array.versioned(changes=changes):
                if not files.CHUNK.fullmatch(stored.key):
                    continue
                key = prefix + stored.key
                if stored.size > largest:
                    raise ValueError(f"{key} has {stored.size} bytes, which no chunk there takes")
                yield stored._replace(key=key)


def _store(place: Store | Path | str) -> Store:
    return LocalStore(place) if isinstance(place, str | Path) else place


def _read_documents(folder: Path, prefix: str = "") -> dict[str, bytes]:
    """Metadata in a folder and, of a group, below it; symbolic links are refused."""
    inside: list[os.DirEntry[str]] = []
    own, found = dict[str, bytes](), dict[str, bytes]()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in DOCUMENTS:
                own[entry.name] = _document(entry)
            elif entry.is_dir() and not entry.name.startswith("."):
                inside.append(entry)
    # zarr finds nothing below a folder that is not a node, nor nodes below an array
    if not own.keys() & set(NODE_DOCUMENTS):
        return {}
    for entry in () if _is_array(own) else inside:
        if entry.is_symlink():
            raise SourceError(f"{entry.path} is a symbolic link; copy what it leads to")
        found |= _read_documents(Path(entry.path), f"{prefix}{entry.name}/")
    # in this order they are written: the last one makes a node of the folder
    return found | {prefix + name: own[name] for name in DOCUMENTS if name in own}


def _document(entry: os.DirEntry[str]) -> bytes:
    if entry.is_symlink():
        raise SourceError(f"{entry.path} is a symbolic link; copy what it leads to")
    if not entry.is_file():
        raise SourceError(f"{entry.path} is not a regular file; move it away")
    size = entry.stat().st_size
    if size > METADATA_SIZE:
        raise SourceError(
            f"{entry.path} has {size} bytes, above the {METADATA_SIZE} of metadata that are read; "
            "move large attributes elsewhere"
        )
    return Path(entry.path).read_bytes()


def _is_array(documents: dict[str, bytes]) -> bool:
    """Whether documents of a node, by kind, are those of an array."""
    node = json.loads(documents.get("zarr.json", b"{}"))
    return ".zarray" in documents or node.get("node_type") == "array"


def _fetch_documents(store: Store, path: str) -> dict[str, bytes]:
    """Metadata at a key of an object store and, of a group, below it."""
    names = [""]  # of nodes, inner ones first
    root = _get(store, path, DOCUMENTS)
    if root and not _is_array(root):
        group = zarr.open_group(StorePath(store, path), mode="r")
        with warnings.catch_warnings():
            # zarr warns of objects that are no nodes, such as a lock
            warnings.simplefilter("ignore")
            names = sorted(["", *dict(group.members(max_depth=None))], reverse=True)
    # formats are not mixed in a group, and each missing document costs a request
    kinds = DOCUMENTS if "zarr.json" not in root else ("zarr.json",)
    keys = [objects.join(name, kind) for name in names for kind in kinds]
    found: dict[str, bytes] = {}
    for i in range(0, len(keys), FETCH_BATCH):
        found |= _get(store, path, keys[i : i + FETCH_BATCH])
    return found


def _get(store: Store, path: str, keys: Sequence[str]) -> dict[str, bytes]:
    data = objects.get(store, [objects.join(path, key) for key in keys])
    return {k: d.tobytes() for k, d in zip(keys, data, strict=True) if d is not None}


def _split(key: str) -> tuple[str, str]:
    """Name of a node, and that of its document."""
    name, _, kind = key.rpartition("/")
    return name, kind
