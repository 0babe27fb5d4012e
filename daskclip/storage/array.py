"""Zarr arrays: made, read, written and told apart."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store
from zarr.storage import LocalStore, StorePath

from daskclip.grid import grid
from daskclip.storage import durable, files
from daskclip.storage import object_store as objects
from daskclip.storage.retry import retrying

Array = npt.NDArray[Any]

V2_NAMES = "_ARRAY_DIMENSIONS"
NUMBER = re.compile(r"\d+")


def is_array(x: Any) -> TypeGuard[zarr.Array[Any]]:
    """Whether ``x`` is a Zarr array."""
    return isinstance(x, zarr.Array)


def write_unit(array: zarr.Array[Any]) -> tuple[int, ...]:
    """Shape of what is stored as one object."""
    return array.shards or array.chunks


def unit_nbytes(array: zarr.Array[Any]) -> int:
    """Bytes of what is stored as one object, decoded."""
    return math.prod(write_unit(array)) * array.dtype.itemsize


def make_norms(
    folder: Path,
    *,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    names: list[str | None] | None,
    attributes: dict[str, Any],
) -> None:
    """Make an array for norms in a folder; what is not stored of it is 0."""
    zarr.create_array(
        LocalStore(folder), shape=shape, chunks=chunks, dtype="float64", fill_value=0.0,
        zarr_format=3, dimension_names=names, attributes=attributes,
    )  # fmt: skip


def dimension_names(array: zarr.Array[Any]) -> list[str | None] | None:
    """Names of the dimensions, in format 2 by xarray's attribute."""
    names = getattr(array.metadata, "dimension_names", None) or attributes(array).get(V2_NAMES)
    return list(names) if isinstance(names, list | tuple) and len(names) == array.ndim else None


def attributes(array: zarr.Array[Any]) -> dict[str, Any]:
    """Attributes of an array; none where the document has something else."""
    found: Any = array.metadata.attributes
    return dict(found) if isinstance(found, dict) else {}


def location(array: Any) -> str:
    """Where an array or a group is, for people."""
    return str(local_path(array) or objects.url(array.store, array.path))


def local_path(array: Any) -> Path | None:
    """Folder of an array or a group on a local file system."""
    if not isinstance(array.store, LocalStore):
        return None
    return Path(array.store.root, array.path).absolute()


def listed(array: zarr.Array[Any], *, changes: bool = False) -> Iterator[files.Stored]:
    """All that is stored for an array, but what is hidden."""
    folder = local_path(array)
    if folder is not None:
        depth = array.metadata.encode_chunk_key((0,) * array.ndim).count("/") + 1
        return files.listed(folder, depth, changes=changes)
    found = objects.listed(array.store, array.path)
    return (stored for stored in found if "/." not in f"/{stored.key}")


def digest_stored(array: zarr.Array[Any], names: Iterable[str]) -> int:
    """Digest of what is stored under those of the keys that there are."""
    folder = local_path(array)
    if folder is not None:
        return files.digest_files(folder, names)
    found = ((key, _get(array, key)) for key in names)
    return digest_of((key, data) for key, data in found if data is not None)


def digest_of(stored: Iterable[tuple[str, Any]]) -> int:
    """Digest of what is, or will be, stored under some keys."""
    return durable.digest_entries(stored)


def place(target: Any, options: dict[str, Any] | None) -> str | tuple[Any, str] | None:
    """Path of a folder, or store and key, that something means; None if nothing."""
    if isinstance(target, zarr.Array | zarr.Group):
        target = target.store_path
    if isinstance(target, str | os.PathLike):
        name = os.fspath(target).removeprefix("file://")
        return objects.at(name, options) if "://" in name else name
    store, path = (target.store, target.path) if isinstance(target, StorePath) else (target, "")
    if isinstance(store, LocalStore):
        return str(store.root / path)
    return (store, path) if isinstance(store, Store) else None


def _get(array: zarr.Array[Any], key: str) -> Any:
    (data,) = retrying(lambda: objects.get(array.store, [objects.join(array.path, key)]))
    return data


def stored_blocks(
    array: zarr.Array[Any], block: tuple[int, ...], weights: tuple[int, ...], blocks: int
) -> Array | None:
    """Whether anything of each block is stored; None if it is not zeros else, or not known.

    ``block_strides`` times the place of a block in its grid is its number.
    """
    unit = write_unit(array)
    if array.fill_value:
        return None
    found = np.zeros(blocks, bool)
    for _, cell in cells(array):
        if cell is not None:
            steps = (i * u // n for i, u, n in zip(cell, unit, block, strict=True))
            found[sum(i * w for i, w in zip(steps, weights, strict=True))] = True
    return found


def cells(array: zarr.Array[Any]) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """Key of all that is stored, and its place in the grid of chunks or shards, if any."""
    ndim, ends = array.ndim, grid(array.shape, write_unit(array))
    for key, *_ in listed(array):
        numbers = [int(i) for i in NUMBER.findall(key)]
        cell = tuple(numbers[-ndim:] if ndim else ())
        inside = len(cell) == ndim and all(i < n for i, n in zip(cell, ends, strict=True))
        yield key, cell if inside and key == array.metadata.encode_chunk_key(cell) else None
