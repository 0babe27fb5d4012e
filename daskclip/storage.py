"""Zarr arrays: made, read, written and told apart."""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeGuard
from uuid import uuid4

import dask.array as da
import numpy as np
import numpy.typing as npt
import zarr
from dask.base import tokenize
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from daskclip import chunks, files
from daskclip.blocks import Box, box_shape, boxes, grid, index, shift
from daskclip.errors import SourceError, StorageError, reason

Array = npt.NDArray[Any]

METADATA = ("zarr.json", ".zarray", ".zattrs")
NUMBER = re.compile(r"\d+")
GETS = 1 << 22  # bytes of chunks that are fetched together


def is_array(x: Any) -> TypeGuard[zarr.Array[Any]]:
    """Whether ``x`` is a Zarr array."""
    return isinstance(x, zarr.Array)


def write_unit(array: zarr.Array[Any]) -> tuple[int, ...]:
    """Shape of what is stored as one object."""
    return array.shards or array.chunks


def unit_nbytes(array: zarr.Array[Any]) -> int:
    """Bytes of what is stored as one object, decoded."""
    return math.prod(write_unit(array)) * array.dtype.itemsize


def as_dask(array: zarr.Array[Any]) -> da.Array:
    """Lazy array with one chunk for each stored object."""
    token = tokenize(
        str(array.store), array.path, array.metadata.to_dict(), ensure_deterministic=True
    )
    lazy: da.Array = da.from_array(array, chunks=write_unit(array), name=f"zarr-{token}")
    return lazy


def location(array: zarr.Array[Any]) -> str:
    """Where an array is, for people."""
    return str(local_path(array) or array.store_path)


def local_path(array: zarr.Array[Any]) -> Path | None:
    """Folder of an array on a local file system."""
    if not isinstance(array.store, LocalStore):
        return None
    return (array.store.root / array.path).absolute()


def fingerprint(array: zarr.Array[Any], *, changes: bool) -> dict[str, Any]:
    """What tells one state of an array from another, without reading a chunk.

    With ``changes``, by times that a copy does not keep.
    """
    folder = local_path(array)
    if folder is None:
        buffers = array.metadata.to_buffer_dict(default_buffer_prototype())
        return {
            "metadata": files.digest(b"".join(b.to_bytes() for _, b in sorted(buffers.items())))
        }
    found = {"metadata": files.digest_files(folder, METADATA)}
    try:
        largest = 2 * unit_nbytes(array) + (1 << 24)
        return found | files.fingerprint(folder, depth(array), largest, changes=changes)
    except ValueError as error:
        raise SourceError(f"{reason(error)} in {folder}; store regular files there") from error


def depth(array: zarr.Array[Any]) -> int:
    """Number of names in the key of a chunk."""
    return array.metadata.encode_chunk_key((0,) * array.ndim).count("/") + 1


def keys(array: zarr.Array[Any], region: Box) -> Iterator[str]:
    """Keys of all that is stored as one object in a region of whole units, there or not."""
    return (key for key, _ in _units(array, region))


def _units(array: zarr.Array[Any], region: Box) -> Iterator[tuple[str, Box]]:
    """Key and place in the region of all that is stored as one object."""
    unit = write_unit(array)
    for inside in boxes(box_shape(region), unit):
        cell = [s.start // u for s, u in zip(shift(inside, region), unit, strict=True)]
        yield array.metadata.encode_chunk_key(tuple(cell)), inside


def open_made(folder: Path) -> zarr.Array[Any]:
    """An array of ours, for reading and writing."""
    try:
        return zarr.open_array(folder, mode="r+")
    except Exception as error:  # broken metadata makes zarr raise anything
        raise StorageError(
            f"{folder} cannot be opened any more ({reason(error)}); discard the run and begin again"
        ) from error


def create_like(array: zarr.Array[Any], folder: Path) -> None:
    """Array without chunks in ``folder``, with the metadata of ``array`` to the byte."""
    folder.mkdir()
    origin = local_path(array)
    for key, buffer in array.metadata.to_buffer_dict(default_buffer_prototype()).items():
        stored = origin / key if origin else None
        data = stored.read_bytes() if stored and stored.is_file() else buffer.to_bytes()
        (folder / key).write_bytes(data)


def last_changed(array: zarr.Array[Any], region: Box) -> str:
    """Key of the chunk of a region that was written last, as far as a local file system tells."""
    folder, times = local_path(array) or Path(), {}
    for key in keys(array, region):
        path = folder / key
        while not os.path.lexists(path):  # its folder tells when it was removed
            path = path.parent
        times[key] = path.lstat().st_ctime_ns, path == folder / key
    return max(times, key=lambda key: times[key])


def read(array: zarr.Array[Any], region: Box, missing: str, out: Array | None = None) -> Array:
    """Values of a region of whole units, decoded one after the other, into ``out`` if given."""
    how = chunks.chain(array)
    units = list(_units(array, region))
    values = np.empty(box_shape(region), array.dtype) if out is None else out
    parts = [values[index(inside)] for _, inside in units]
    rooms = [chunks.elements(how, part) for part in parts]
    stored = _stored(array, [key for key, _ in units], rooms)
    for (key, _), part, room, data in zip(units, parts, rooms, stored, strict=True):
        if data is not None:
            if room is None or data is not room:
                chunks.decode(how, data, part)
        elif missing == "error":
            raise SourceError(
                f"chunk {key} of {location(array)} is missing; restore it, or use missing='fill' "
                "to take it for the fill value"
            )
        else:
            part[...] = how.fill
    return values


def write(array: zarr.Array[Any], region: Box, values: Array) -> int:
    """Write a region of whole units, and return the digest of its files.

    Chunks that are the fill value to the bit stay absent.
    """
    folder, how, digest, token = local_path(array), chunks.chain(array), 0, uuid4().hex
    assert folder is not None
    for key, inside in _units(array, region):
        data = chunks.encode(how, values[index(inside)])
        if data is not None:
            files.write(folder, key, data, token)
            digest = files.digest_file(key, data, digest)
    return digest


def stored_blocks(
    array: zarr.Array[Any], block: tuple[int, ...], weights: tuple[int, ...], blocks: int
) -> Array | None:
    """Whether anything of each block is stored; None if it is not zeros else, or not known.

    ``weights`` times the place of a block in its grid is its number.
    """
    unit = write_unit(array)
    if local_path(array) is None or array.fill_value:
        return None
    found = np.zeros(blocks, bool)
    for _, cell in cells(array):
        if cell is not None:
            steps = (i * u // n for i, u, n in zip(cell, unit, block, strict=True))
            found[sum(i * w for i, w in zip(steps, weights, strict=True))] = True
    return found


def cells(array: zarr.Array[Any]) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """Key of every file of a local array, and its place in the grid of what is stored, if any."""
    folder, ndim, ends = local_path(array), array.ndim, grid(array.shape, write_unit(array))
    assert folder is not None
    for key, _ in files.scan(folder, depth(array)):
        numbers = [int(i) for i in NUMBER.findall(key)]
        cell = tuple(numbers[-ndim:] if ndim else ())
        inside = len(cell) == ndim and all(i < n for i, n in zip(cell, ends, strict=True))
        yield key, cell if inside and key == array.metadata.encode_chunk_key(cell) else None


def is_empty(array: zarr.Array[Any], region: Box) -> bool:
    """Whether a region is known to be all zeros because none of its chunks is stored."""
    folder = local_path(array)
    return (
        folder is not None
        and not array.fill_value
        and not any((folder / key).exists() for key in keys(array, region))
    )


def _stored(array: zarr.Array[Any], names: list[str], rooms: list[Any]) -> Iterator[Any]:
    """Bytes of what is stored under each key, or None; they are good until the next ones.

    They are the room for the key, if there is one and they fill it. Some are fetched at a time
    where that saves waiting.
    """
    folder = local_path(array)
    if folder is not None:
        for key, room in zip(names, rooms, strict=True):
            yield files.read(f"{folder}/{key}", room)
        return
    together = max(1, GETS // unit_nbytes(array))
    for i in range(0, len(names), together):
        for found in sync(_get_all(array, names[i : i + together])):
            yield None if found is None else found.as_numpy_array()


async def _get_all(array: zarr.Array[Any], names: Iterable[str]) -> list[Any]:
    prototype = default_buffer_prototype()
    places = (f"{array.path}/{key}".lstrip("/") for key in names)
    return await asyncio.gather(*(array.store.get(place, prototype) for place in places))
