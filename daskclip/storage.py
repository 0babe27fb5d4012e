"""Zarr arrays: opening, checking, reading and writing. The only file that imports zarr."""

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
from daskclip.chunks import codec_name
from daskclip.errors import DTypeError, SourceError, SourceNotFoundError, StorageError, reason
from daskclip.parameters import check_dtype

Array = npt.NDArray[Any]

# codecs that give back every bit; a lossy one could lift a clipped slice above the limit again
LOSSLESS = {
    "bytes", "endian", "transpose", "sharding_indexed", "crc32c",
    "blosc", "gzip", "zstd", "zlib", "lz4", "bz2", "lzma", "shuffle", "pcodec",
    "crc32", "adler32", "fletcher32", "jenkins_lookup3",
}  # fmt: skip
METADATA = ("zarr.json", ".zarray", ".zattrs")
METADATA_SIZE = 1 << 24  # bytes of JSON: what decodes it takes many times as much
UNITS = 10**10  # more than any file system holds
NUMBER = re.compile(r"\d+")
GETS = 1 << 22  # bytes of chunks that are fetched together


def is_array(x: Any) -> TypeGuard[zarr.Array[Any]]:
    """Whether ``x`` is a Zarr array."""
    return isinstance(x, zarr.Array)


def write_unit(array: zarr.Array[Any]) -> tuple[int, ...]:
    """Shape of what is stored as one object."""
    return array.shards or array.chunks


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


def open_source(source: Any, storage_options: dict[str, Any] | None = None) -> zarr.Array[Any]:
    """Open an array for reading, or say why it is none; reads metadata only."""
    array = source if is_array(source) else _open(source, storage_options)
    check_dtype(array.dtype)
    where = f"source {location(array)}"
    try:
        unit = write_unit(array)
    except NotImplementedError as error:
        raise SourceError(
            f"{where} has chunks of uneven sizes; store it with a regular grid"
        ) from error
    for codec in _codecs(array):
        if codec not in LOSSLESS:
            raise SourceError(
                f"{where} is stored with {codec}, which is not known to be "
                "lossless, so that the bound could not hold; store it with another codec"
            )
    if min((*array.shape, 0)) < 0 or min((*unit, *array.chunks, 1)) < 1:
        raise SourceError(
            f"{where} has shape {array.shape} in chunks of {array.chunks}; "
            "store it with chunks of at least one element"
        )
    if math.prod(grid(array.shape, unit)) > UNITS:
        raise SourceError(
            f"{where} has more than the {UNITS:.0e} chunks or shards that can be stored; "
            "check its metadata"
        )
    try:
        chunks.chain(array)
    except Exception as error:  # zarr looks at some codecs only when it reads
        raise SourceError(
            f"{where} has codecs that do not fit it ({reason(error)}); check its metadata"
        ) from error
    return array


def _open(source: Any, storage_options: dict[str, Any] | None) -> zarr.Array[Any]:
    if not isinstance(source, str | os.PathLike):
        raise SourceError(
            f"source is a {type(source).__name__}; give a path, a URL or a zarr array"
        )
    name = os.fspath(source)
    if "://" not in name:
        if not os.path.exists(name):
            raise SourceNotFoundError(f"source {name} does not exist; check the path")
        name = os.path.realpath(name)
        _check_files(Path(name))
    try:
        opened = zarr.open(name, mode="r", storage_options=storage_options)
    except Exception as error:  # broken metadata makes zarr raise anything
        if "data type" in str(error):
            raise DTypeError(
                f"source {name} has a dtype that cannot be clipped ({reason(error)}); store it "
                "as floating point or complex"
            ) from error
        raise SourceError(
            f"source {name} is not a zarr array ({reason(error)}); give the path of one"
        ) from error
    if isinstance(opened, zarr.Group):
        arrays = ", ".join(sorted(opened.array_keys())[:5]) or "none"
        raise SourceError(f"source {name} is a group; give one of its arrays ({arrays})")
    return opened


def _check_files(folder: Path) -> None:
    """Refuse metadata that leads elsewhere, or that is too large to be taken in."""
    for path in (folder / name for name in METADATA):
        if path.is_symlink():
            raise SourceError(f"{path} is a symbolic link; copy what it leads to")
        if path.exists() and not path.is_file():
            raise SourceError(f"{path} is not a regular file; move it away")
        if path.is_file() and path.stat().st_size > METADATA_SIZE:
            raise SourceError(
                f"{path} has {path.stat().st_size} bytes, above the {METADATA_SIZE} of metadata "
                "that are read; move large attributes elsewhere"
            )


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
        largest = 2 * math.prod(write_unit(array)) * array.dtype.itemsize + (1 << 24)
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


def _codecs(array: zarr.Array[Any]) -> list[str]:
    """Names of all codecs, those inside shards too, without the prefix of their library."""
    document: dict[str, Any] = dict(array.metadata.to_dict())
    if document["zarr_format"] == 2:
        used = [*(document.get("filters") or ()), document.get("compressor")]
        return [codec["id"] for codec in used if codec]
    names = []
    queue: list[Any] = list(document["codecs"])
    while queue:
        codec = queue.pop()
        names.append(codec_name(codec["name"]))
        configuration = codec.get("configuration", {})
        queue += [*configuration.get("codecs", ()), *configuration.get("index_codecs", ())]
    return names


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
    folder, unit = local_path(array), write_unit(array)
    if folder is None or array.fill_value:
        return None
    found = np.zeros(blocks, bool)
    for key, _ in files.scan(folder, depth(array)):
        place = cell(array, key)
        if place is not None:
            steps = (i * u // n for i, u, n in zip(place, unit, block, strict=True))
            found[sum(i * w for i, w in zip(steps, weights, strict=True))] = True
    return found


def cell(array: zarr.Array[Any], key: str) -> tuple[int, ...] | None:
    """Place of a chunk or shard in the grid; None if ``key`` is not the one of any."""
    numbers = [int(i) for i in NUMBER.findall(key)]
    place = tuple(numbers[-array.ndim :] if array.ndim else ())
    inside = len(place) == array.ndim and all(
        i < n for i, n in zip(place, grid(array.shape, write_unit(array)), strict=True)
    )
    return place if inside and key == array.metadata.encode_chunk_key(place) else None


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
    together = max(1, GETS // (math.prod(write_unit(array)) * array.dtype.itemsize))
    for i in range(0, len(names), together):
        for found in sync(_get_all(array, names[i : i + together])):
            yield None if found is None else found.as_numpy_array()


async def _get_all(array: zarr.Array[Any], names: Iterable[str]) -> list[Any]:
    prototype = default_buffer_prototype()
    places = (f"{array.path}/{key}".lstrip("/") for key in names)
    return await asyncio.gather(*(array.store.get(place, prototype) for place in places))
