"""Regions of Zarr arrays: read, written and copied, a whole chunk or shard at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from daskclip.errors import SourceError
from daskclip.grid import Box, box_shape, boxes, index, shift
from daskclip.storage import array as storage
from daskclip.storage import codecs as chunks
from daskclip.storage import durable, files
from daskclip.storage import object_store as objects

Array = npt.NDArray[Any]
IO_BYTES = 1 << 22  # bytes of chunks that are fetched, or stored, together


def keys(array: Any, region: Box) -> Iterator[str]:
    """Keys of all that is stored as one object in a region of whole units, there or not."""
    return (key for key, _ in _units(array, region))


def _units(array: Any, region: Box) -> Iterator[tuple[str, Box]]:
    """Key and place in the region of all that is stored as one object."""
    unit = storage.write_unit(array)
    for inside in boxes(box_shape(region), unit):
        cell = [s.start // u for s, u in zip(shift(inside, region), unit, strict=True)]
        yield array.metadata.encode_chunk_key(tuple(cell)), inside


def last_changed(array: Any, region: Box) -> str:
    """Key of the chunk of a region that was written last, as far as a local file system tells."""
    folder, times = storage.local_path(array) or Path(), {}
    for key in keys(array, region):
        path = folder / key
        while not os.path.lexists(path):  # its folder tells when it was removed
            path = path.parent
        times[key] = path.lstat().st_ctime_ns, path == folder / key
    return max(times, key=lambda key: times[key])


def read(array: Any, region: Box, missing: str, out: Array | None = None) -> Array:
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
                f"chunk {key} of {storage.location(array)} is missing; restore it, or use "
                "missing='fill' to take it for the fill value"
            )
        else:
            part[...] = how.fill
    return values


def write(array: Any, region: Box, values: Array) -> int:
    """Write a region of whole units, and return the digest of what is stored.

    Chunks that are the fill value to the bit stay absent.
    """
    how = chunks.chain(array)
    encoded = ((k, chunks.encode(how, values[index(i)])) for k, i in _units(array, region))
    return _put(array, encoded)


def copy(source: Any, target: Any, region: Box) -> int:
    """Copy what is stored for a region of whole units, and return its digest."""
    names, (here, there) = list(keys(source, region)), map(storage.local_path, (source, target))
    if here is not None and there is not None:
        return files.copy_files(here, there, names)
    stored = _stored(source, names, [None] * len(names))
    return _put(target, zip(names, stored, strict=True))


def _put(array: Any, encoded: Iterable[tuple[str, Any]]) -> int:
    """Store what there is of encoded chunks, and return its digest."""
    folder, total, token = storage.local_path(array), 0, uuid4().hex
    batch: list[tuple[str, bytes]] = []
    for key, data in encoded:
        if data is None:
            continue
        total += durable.digest_entry(key, durable.digest(data))
        if folder is not None:
            files.write(folder, key, data, token)
            continue
        batch.append((objects.join(array.path, key), bytes(data)))
        if sum(len(data) for _, data in batch) >= IO_BYTES:
            objects.put_once(array.store, batch)
            batch = []
    if batch:
        objects.put_once(array.store, batch)
    return total % durable.DIGESTS


def is_empty(array: Any, region: Box) -> bool:
    """Whether a region is known to be all zeros because none of its chunks is stored."""
    folder = storage.local_path(array)
    return (
        folder is not None
        and not array.fill_value
        and not any((folder / key).exists() for key in keys(array, region))
    )


def _stored(array: Any, names: list[str], rooms: list[Any]) -> Iterator[Any]:
    """Bytes of what is stored under each key, or None; they are good until the next ones.

    They are the room for the key, if there is one and they fill it. Some are fetched at a time
    where that saves waiting.
    """
    folder = storage.local_path(array)
    if folder is not None:
        for key, room in zip(names, rooms, strict=True):
            yield files.read(f"{folder}/{key}", room)
        return
    together = max(1, IO_BYTES // storage.unit_nbytes(array))
    for i in range(0, len(names), together):
        yield from objects.get(
            array.store, [objects.join(array.path, k) for k in names[i : i + together]]
        )
