"""An array, or a group with all arrays in it: opened, fingerprinted, and moved to another place."""

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import zarr
from zarr.abc.store import Store
from zarr.storage import LocalStore, StorePath, ZipStore

from daskclip.errors import SourceError, error_text
from daskclip.storage import files, metadata
from daskclip.storage import object_store as objects
from daskclip.storage.array import StoredArray, local_folder, location
from daskclip.storage.durable import DIGESTS, digest_entries
from daskclip.storage.foreign.bfloat16 import knowing_bfloat16
from daskclip.storage.foreign.store import FlatStore
from daskclip.storage.metadata import ancestors, is_ours, split
from daskclip.storage.retry import retrying
from daskclip.storage.stores import is_web, store_version

ZSTD = {"name": "zstd", "configuration": {"level": 0, "checksum": False}}
COPY_THREADS, COPY_BATCH = 8, 64  # of copying files from or to object stores


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
            return cls(store, path, metadata.read_documents(store.root / path))
        return cls(store, path, retrying(metadata.fetch_documents, store, path))

    def __str__(self) -> str:
        return location(self.store, self.path)

    @property
    def store_path(self) -> StorePath:
        """Place where it is stored, for zarr."""
        return _at(self.store, self.path)

    @property
    def folder(self) -> Path | None:
        """Its folder, if it is on a local file system."""
        return local_folder(self.store, self.path)

    @property
    def is_flat(self) -> bool:
        """Whether it is made of flat arrays, which Zarr does not store."""
        return isinstance(self.store, FlatStore)

    @cached_property
    def target_documents(self) -> dict[str, bytes]:
        """Documents of a target: the same, but that the chunks of flat arrays are compressed."""
        made = {}
        for name in self.arrays if self.is_flat else ():
            about = self.document(name)
            about["codecs"].append(ZSTD)
            made[objects.join(name, "zarr.json")] = json.dumps(about).encode()
        return self.documents | made

    @property
    def is_group(self) -> bool:
        return "" not in self.arrays

    @property
    def record_array(self) -> str:
        """Name of the array to keep the journal in."""
        # zarr warns of foreign files in a group; parsing all arrays of a group may take seconds
        for name in sorted(self._nodes):
            if self._is_array(name):
                return name
        return ""

    @property
    def groups(self) -> list[str]:
        """Names of all groups, outer ones first."""
        nodes = {split(key)[0] for key in self.documents if split(key)[1] in files.NODE_DOCUMENTS}
        return sorted(nodes - self.arrays.keys() - self.unopened.keys())

    @property
    def arrays(self) -> dict[str, StoredArray]:
        """All arrays that zarr can open by relative path: '' if the hierarchy is one itself."""
        return self._opened[0]

    @property
    def unopened(self) -> dict[str, str]:
        """Why the other arrays cannot be opened, by relative path."""
        return self._opened[1]

    @cached_property
    def _nodes(self) -> set[str]:
        """Names of the folders that have metadata."""
        return {split(key)[0] for key in self.documents}

    def _is_array(self, name: str) -> bool:
        kinds = {kind: objects.join(name, kind) for kind in files.DOCUMENTS}
        own = {kind: self.documents[key] for kind, key in kinds.items() if key in self.documents}
        return metadata.is_array(own, self._where(name))

    def _where(self, name: str) -> str:
        return objects.join(str(self), name)

    @cached_property
    def _opened(self) -> tuple[dict[str, StoredArray], dict[str, str]]:
        found, failed = {}, {}
        for name in filter(self._is_array, sorted(self._nodes)):
            place = _at(self.store, objects.join(self.path, name))
            try:
                document = self.document(name)
                with knowing_bfloat16(document):
                    array = StoredArray(zarr.Array.from_dict(place, document))
                # zarr finds some faults here only; those of a single array have own messages
                if name:
                    _ = array.dtype, array.unit_nbytes
                found[name] = array
            except Exception as error:  # broken metadata makes zarr raise anything
                if not name:
                    raise
                failed[name] = error_text(error)
        return found, failed

    def document(self, name: str) -> dict[str, Any]:
        """Metadata of an array."""
        where, key = self._where(name), objects.join(name, "zarr.json")
        if key in self.documents:
            return metadata.parse(self.documents[key], where)
        found = metadata.parse(self.documents[objects.join(name, ".zarray")], where)
        return found | {"attributes": self.attributes(name)}

    def attributes(self, name: str) -> dict[str, Any]:
        """Attributes of an array or a group; empty where something else is in their place."""
        data = self.documents.get(objects.join(name, "zarr.json"))
        if data is not None:
            found = metadata.parse(data, self._where(name)).get("attributes")
            return found if isinstance(found, dict) else {}
        data = self.documents.get(objects.join(name, ".zattrs"), b"{}")
        return metadata.parse(data, self._where(name))

    def dimension_names(self, name: str) -> list[str | None] | None:
        """Names of the dimensions of an array: its own, or those of the image it is a level of."""
        own, ndim = self.arrays[name].dimension_names, self.arrays[name].ndim
        if own and any(own):
            return own
        for attributes, path in self._groups_of(name):
            axes = metadata.axes_of(attributes, path)
            if axes and len(axes) == ndim:
                return axes
        return own

    def _groups_of(self, name: str) -> Iterator[tuple[dict[str, Any], str]]:
        """Attributes of the groups that an array is in, inner ones first, and its path in each."""
        if name:
            for group in (*ancestors(name), ""):
                yield self.attributes(group), name[len(group) :].lstrip("/")
            return
        # of an array that was opened by itself: paths of levels have one or two names
        store, path = self.store, self.path
        if self.folder is not None:
            store, path = LocalStore("/", read_only=True), str(self.folder)[1:]
        for group in islice((*ancestors(path), ""), 2 if path else 0):
            attributes = {}
            # there may be no group, or none that may be read
            with suppress(Exception):
                kinds = metadata.get_documents(store, group, ("zarr.json", ".zattrs"))
                attributes = type(self)(store, group, kinds).attributes("")
            yield attributes, path[len(group) :].lstrip("/")

    def moved_to(self, place: Store | Path, path: str = "") -> Self:
        """The metadata of a target at another place, where nothing need be stored."""
        moved = type(self)(_store(place), path, self.target_documents)
        if self.is_flat:
            return moved
        arrays = {}
        for name, stored in self.arrays.items():
            metadata: Any = stored.array.metadata
            array = zarr.AsyncArray(metadata, _at(moved.store, objects.join(path, name)))
            arrays[name] = StoredArray(zarr.Array(array))
        # the cached property is set: parsing the documents of a large group again takes seconds
        vars(moved)["_opened"] = arrays, self.unopened
        return moved

    def reread(self) -> Self:
        """The same arrays with the documents as they are stored now."""
        again = self.open(self.store, self.path)
        vars(again)["_opened"] = self._opened
        return again

    def write_documents(self, folder: Path) -> None:
        """Create a folder that has the metadata of a target and no chunks."""
        # a folder between the root and a node may have no metadata
        for name in self._nodes:
            os.makedirs(folder / name, exist_ok=True)
        for key, data in self.target_documents.items():
            with open(folder / key, "wb") as file:
                file.write(data)

    @property
    def paths(self) -> list[str]:
        """Local files that every process that reads it must see."""
        folder = self.folder
        if isinstance(self.store, ZipStore):
            return [str(self.store.path)]
        if isinstance(self.store, FlatStore):
            return [*self.store.files]
        return [str(folder / key) for key in self.documents if folder and "/" not in key]

    def digest(self) -> int:
        """Digest of the documents."""
        return digest_entries(self.documents.items())

    def others(self, *, changes: bool = False) -> Iterator[files.Stored]:
        """Files in a group that are neither metadata nor below an array that can be opened.

        Hidden ones too, but what runs keep: their records and work folders. Empty folders are no
        files. A store that cannot list has none.
        """
        if not self.documents or not self.is_group:
            return
        if self.folder is not None:
            listing = files.listed(self.folder, changes, lambda key, _: self._is_known(key))
            yield from self._regular(listing)
            return
        # a web server may link to folders as if they were files
        folders = {f for n in self._nodes for f in (n, *ancestors(n))} if is_web(self.store) else ()
        try:
            for stored in objects.listed(self.store, self.path):
                if stored.key in folders:
                    continue
                # a key that ends with a slash stands for a folder
                is_outside = self.arrays.keys().isdisjoint(ancestors(stored.key))
                is_known = stored.key in self.documents or is_ours(stored.key)
                if is_outside and not is_known and not stored.key.endswith("/"):
                    yield stored._replace(key=objects.checked(stored.key))
        except Exception as error:
            if not objects.cannot_list(error):
                raise

    def _is_known(self, key: str) -> bool:
        """Whether a key is a document or an array, or belongs to a run."""
        return key in self.documents or key in self.arrays or is_ours(key)

    def copy_others(self, target: Self | None = None) -> int:
        """Copy `others`, each in pieces, and return their digest; without a target, only read.

        Those that are in the folder of a target are removed before.
        """
        keys = (stored.key for stored in self.others())
        here, there = self.folder, None if target is None else target.folder
        if target is not None and there is not None:
            # of an earlier attempt that was stopped while it copied
            for stored in target.others():
                (there / stored.key).unlink()
        if here is not None and (target is None or there is not None):
            return files.copy_files(here, there, keys)
        total, copy = 0, partial(retrying, self._copy_other, target)
        # several at a time, since each request waits
        with ThreadPoolExecutor(COPY_THREADS) as pool:
            while some := [*islice(keys, COPY_BATCH)]:
                total += sum(pool.map(copy, some))
        return total % DIGESTS

    def _copy_other(self, target: Self | None, key: str) -> int:
        with TemporaryDirectory(prefix="daskclip-") as scratch:
            folder = self.folder
            if folder is None:
                folder = Path(scratch)
                objects.download(self.store, objects.join(self.path, key), folder / key)
            there = None if target is None else target.folder
            digest = files.copy_files(folder, there, [key])
            if target is not None and there is None:
                objects.ObjectPrefix(target.store, target.path).upload(key, folder / key)
        return digest

    def fingerprint(
        self, *, changes: bool, whole: bool = False, as_files: bool = False
    ) -> dict[str, Any]:
        """Fingerprint of the documents, and of the chunks and other files stored now.

        They are read only where the store has no versions of them. With ``changes``, it also covers
        the times of files that a copy does not keep; with ``whole``, what a copy would leave
        behind is refused; with ``as_files``, what no folder can hold.
        """

        def stored_now() -> dict[str, Any]:
            chunks = self._regular(self._chunks(changes, whole))
            return files.fingerprint(chunks, self._versioned_others(changes, as_files))

        return {"metadata": self.digest()} | retrying(stored_now)

    def _regular(self, listing: Iterator[files.Stored]) -> Iterator[files.Stored]:
        """Pass a listing on, with errors of what is no regular file translated."""
        try:
            yield from listing
        except ValueError as error:
            text = f"{error_text(error)} in {self}; store regular files there"
            raise SourceError(text) from error

    def _versioned_others(self, changes: bool, as_files: bool) -> Iterator[files.Stored]:
        whole = "" if self.folder else store_version(self.store)
        others = self.others(changes=changes)
        for stored in self._as_files(others) if as_files and not self.folder else others:
            # read where the store has no versions
            version = stored.version or whole or f"{self._copy_other(None, stored.key):016x}"
            yield stored._replace(version=version)

    def _as_files(self, others: Iterable[files.Stored]) -> list[files.Stored]:
        """Other objects; refuse one that others are below, since no file can be a folder."""
        others, names, folders = [*others], set[str](), set[str]()
        for key in (*self.documents, *(stored.key for stored in others)):
            names.add(key)
            folders |= {*ancestors(key)}
        for key in sorted(names & folders):
            raise SourceError(
                f"{self._where(key)} is an object with others below it, which no folder can hold; "
                "rename it, or clip to an object store"
            )
        return others

    def _chunks(self, changes: bool, whole: bool) -> Iterator[files.Stored]:
        for name, array in self.arrays.items():
            # codecs add little to data that they cannot compress; a larger file, which is no
            # chunk, would be read into memory
            largest = 2 * array.unit_nbytes + (1 << 24)
            prefix = f"{name}/" if name else ""
            for stored in array.versioned(changes=changes):
                key = prefix + stored.key
                if not files.CHUNK.fullmatch(stored.key):
                    if whole and not (key in self.documents or files.LEFT.fullmatch(key)):
                        where = self._where(key)
                        raise SourceError(
                            f"{where} is no part of what is stored in {self}; move it away"
                        )
                    continue
                if stored.size > largest:
                    raise ValueError(f"{key} has {stored.size} bytes, which no chunk there takes")
                yield stored._replace(key=key)


def _store(place: Store | Path | str) -> Store:
    return LocalStore(place) if isinstance(place, str | Path) else place


def _at(store: Store, path: str) -> StorePath:
    """Path in a store as it is; zarr would take a backslash in a name for a slash."""
    place = StorePath(store)
    place.path = path
    return place
