"""Zarr arrays as they are stored: regions read, written and copied, whole objects at a time."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Self, TypeGuard, TypeVar

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store
from zarr.storage import LocalStore

from daskclip.errors import DaskClipError, SourceError, error_text
from daskclip.grid import Box, all_coords, box_shape, boxes, grid_shape, offset_box
from daskclip.storage import object_store
from daskclip.storage.codecs import Chain, chain, decode, encode, memory_of
from daskclip.storage.durable import DIGESTS
from daskclip.storage.files import CHUNK, DOCUMENTS, ChunkFiles, Stored, copy_files
from daskclip.storage.foreign.chunks import FlatChunks
from daskclip.storage.foreign.store import FlatStore
from daskclip.storage.object_store import ChunkObjects
from daskclip.storage.retry import kind_and_remedy, retrying

Array = npt.NDArray[Any]
T = TypeVar("T")

V2_NAMES = "_ARRAY_DIMENSIONS"  # where xarray keeps dimension names in format 2
NUMBER = re.compile(r"\d+")


def is_zarr_array(x: object) -> TypeGuard[zarr.Array[Any]]:
    """Whether ``x`` is a Zarr array."""
    return isinstance(x, zarr.Array)


@dataclass(frozen=True, eq=False)
class StoredArray:
    """A Zarr array in a local folder or in an object store.

    A *unit* is what is stored as one object: a shard, else a chunk. Regions consist of whole
    units, which are cut off at the edge of the array.
    """

    array: zarr.Array[Any]

    # what is cached on the instance stays out of pickles: a worker computes it again
    def __reduce__(self) -> tuple[type[Self], tuple[zarr.Array[Any]]]:
        return type(self), (self.array,)

    def __str__(self) -> str:
        return self.location

    @staticmethod
    def create(
        folder: Path,
        *,
        shape: tuple[int, ...],
        chunks: tuple[int, ...],
        names: list[str | None] | None,
        attributes: dict[str, Any],
    ) -> None:
        """Create a float64 array without chunks in a folder."""
        zarr.create_array(
            LocalStore(folder), shape=shape, chunks=chunks, dtype="float64", fill_value=0.0,
            zarr_format=3, dimension_names=names, attributes=attributes,
        )  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.array.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the elements."""
        return self.array.dtype

    @cached_property
    def unit(self) -> tuple[int, ...]:
        """Shape of what is stored as one object."""
        return self.array.shards or self.array.chunks

    @property
    def unit_nbytes(self) -> int:
        """Decoded bytes of what is stored as one object."""
        return math.prod(self.unit) * self.dtype.itemsize

    @cached_property
    def attributes(self) -> dict[str, Any]:
        """User attributes; empty where the metadata has something else in their place."""
        found: object = self.array.metadata.attributes
        return dict(found) if isinstance(found, dict) else {}

    @property
    def dimension_names(self) -> list[str | None] | None:
        """Names of the dimensions; in format 2 those that xarray stores as an attribute."""
        names = getattr(self.array.metadata, "dimension_names", None)
        names = names or self.attributes.get(V2_NAMES)
        return list(names) if isinstance(names, list | tuple) and len(names) == self.ndim else None

    @cached_property
    def folder(self) -> Path | None:
        """Folder of the array, if it is on a local file system."""
        return local_folder(self.array.store, self.array.path)

    @property
    def is_flat(self) -> bool:
        """Whether it is a flat array, whose units are encoded otherwise in a target."""
        return isinstance(self.array.store, FlatStore)

    @cached_property
    def location(self) -> str:
        """Path or URL, for messages."""
        return location(self.array.store, self.array.path)

    def describe(self, region: Box) -> str:
        """Name of a region, for messages: ``[0:2, 4:8] of x.zarr``."""
        return f"[{', '.join(f'{s.start}:{s.stop}' for s in region)}] of {self.location}"

    @cached_property
    def _chunks(self) -> ChunkFiles | ChunkObjects:
        """The encoded units, in files or in objects."""
        if self.folder is not None:
            return ChunkFiles(self.folder, self._key((0,) * self.ndim).count("/") + 1)
        kind = FlatChunks if self.is_flat else ChunkObjects
        return kind(self.array.store, self.array.path, self.unit_nbytes)

    @cached_property
    def _codecs(self) -> Chain:
        return chain(self.array)

    @cached_property
    def _key(self) -> Callable[[tuple[int, ...]], str]:
        return self.array.metadata.encode_chunk_key

    def _units(self, region: Box) -> list[tuple[str, tuple[Any, ...]]]:
        """Key of each unit of a region, and its index in the values of the region."""
        # the position in the grid is computed for each axis, not for each unit
        axes = zip(region, self.unit, strict=True)
        coords = product(*(range(s.start // u, -(-s.stop // u)) for s, u in axes))
        inside = boxes(box_shape(region), self.unit)
        return [(self._key(c), (*box, ...)) for c, box in zip(coords, inside, strict=True)]

    def keys(self, region: Box) -> list[str]:
        """Keys of the units of a region, stored or not."""
        return [key for key, _ in self._units(region)]

    def read(self, region: Box, missing: str = "fill", out: Array | None = None) -> Array:
        """Decode a region, one unit after the other.

        Parameters
        ----------
        region : Box
            Of whole units.
        missing : {'fill', 'error'}
            Whether units that are not stored count as the fill value, or raise SourceError.
        out : ndarray, optional
            Of the shape of the region and the dtype of the array.

        Returns
        -------
        ndarray
            ``out``, or a new array.
        """
        units, codecs = self._units(region), self._codecs
        # not zeros: every element is written below, or an error is raised
        values = np.empty(box_shape(region), self.dtype) if out is None else out
        parts = [values[index] for _, index in units]
        # an uncompressed unit is read to where its values belong
        buffers = memory_of(codecs, parts)
        keys = [key for key, _ in units]
        stored = self._chunks.read(keys, buffers)
        for key, part, buffer, data in zip(keys, parts, buffers, stored, strict=True):
            if data is None:
                if missing == "error":
                    raise SourceError(
                        f"chunk {key} of {self.location} is missing; restore it, or use "
                        "missing='fill' to take it for the fill value"
                    )
                part[...] = codecs.fill
            elif data is not buffer:
                decode(codecs, data, part)
        return values

    def write(self, region: Box, values: Array) -> int:
        """Encode and store a region, and return the digest of what is stored.

        Units that equal the fill value bit for bit are not stored.
        """
        units, codecs = self._units(region), self._codecs
        # a generator: one encoded unit is held at a time
        return self._chunks.write((key, encode(codecs, values[index])) for key, index in units)

    def copy_to(self, target: Self, region: Box) -> int:
        """Copy what is stored of a region without decoding it, and return its digest."""
        if self.is_flat:
            parts = (offset_box(inside, region) for inside in boxes(box_shape(region), self.unit))
            return sum(target.write(part, self.read(part)) for part in parts) % DIGESTS
        keys, source = self.keys(region), self._chunks
        # between folders, files are copied in pieces and never held whole
        if self.folder is not None and target.folder is not None:
            return copy_files(self.folder, target.folder, keys)
        return target._chunks.write(zip(keys, source.read(keys), strict=True))

    def digest(self, region: Box) -> int:
        """Digest of what is stored of a region."""
        return self._chunks.digest(self.keys(region))

    @property
    def _fills_zeros(self) -> bool:
        """Whether what is not stored is 0.0, bit for bit, as what a zeroed slice has; not -0.0."""
        # None, which format 2 allows, is read as zero
        fill = self.array.fill_value
        return fill is None or (not fill and not any(np.array(fill).tobytes()))

    def is_empty(self, region: Box) -> bool:
        """Whether a region is known to be all zeros because nothing of it is stored."""
        return self._fills_zeros and self._chunks.are_absent(self.keys(region))

    def last_changed(self, region: Box) -> str:
        """Key of the unit of a region that changed last, or of the first unit in a store."""
        return self._chunks.last_changed(self.keys(region))

    def listed(self, *, changes: bool = False) -> Iterator[Stored]:
        """Everything stored for the array except hidden files; see `ChunkFiles.listed`."""
        return self._chunks.listed(changes)

    def versioned(self, *, changes: bool) -> Iterator[Stored]:
        """Stored keys, with versions that differ when their bytes do; see `ChunkFiles.listed`."""
        if isinstance(self._chunks, ChunkFiles):
            return self._chunks.listed(changes)
        grid = all_coords(grid_shape(self.shape, self.unit))
        return self._chunks.versioned(map(self._key, grid))

    def chunk_coords(self) -> Iterator[tuple[str, tuple[int, ...] | None]]:
        """Key of everything stored, and its grid coordinates if it is a unit of the array."""
        ndim, ends = self.ndim, grid_shape(self.shape, self.unit)
        for key, *_ in self.listed():
            # the last numbers of a key are the coordinates in any encoding; other files may have
            # numbers in their names too, so the key is encoded again
            numbers = [int(i) for i in NUMBER.findall(key)]
            coords = tuple(numbers[-ndim:] if ndim else ())
            inside = len(coords) == ndim and all(i < n for i, n in zip(coords, ends, strict=True))
            yield key, coords if inside and key == self._key(coords) else None

    def stray_keys(self) -> Iterator[str]:
        """Keys of stored things that are neither metadata nor units of the array."""
        return (k for k, coords in self.chunk_coords() if coords is None and k not in DOCUMENTS)

    def stored_blocks(
        self, block: tuple[int, ...], strides: tuple[int, ...], blocks: int
    ) -> npt.NDArray[np.bool_] | None:
        """Whether any unit of each block is stored; None if absent units are not zeros, or unknown.

        Parameters
        ----------
        block : tuple of int
            Shape of a block, of whole units.
        strides : tuple of int
            Difference of the numbers of neighbouring blocks along each axis.
        blocks : int
            Number of blocks.
        """
        if not self._fills_zeros:
            return None
        found = np.zeros(blocks, np.bool_)
        try:
            for _, coords in self.chunk_coords():
                if coords is not None:
                    steps = (i * u // n for i, u, n in zip(coords, self.unit, block, strict=True))
                    found[sum(i * stride for i, stride in zip(steps, strides, strict=True))] = True
        except Exception as error:
            if not object_store.cannot_list(error):
                raise
            return None
        return found


def is_part(key: str) -> bool:
    """Whether a key in the folder of an array belongs to metadata or a chunk."""
    return key in DOCUMENTS or CHUNK.fullmatch(key) is not None


def local_folder(store: Store, path: str) -> Path | None:
    """Folder of a path in a store, or None if the store is not local."""
    return Path(store.root, path).absolute() if isinstance(store, LocalStore) else None


def location(store: Store, path: str) -> str:
    """Path or URL of a path in a store, for messages."""
    if isinstance(store, FlatStore):
        return object_store.join(str(store), path)
    return str(local_folder(store, path) or object_store.url(store, path))


def retrying_block(doing: str, array: StoredArray, region: Box, operation: Callable[[Box], T]) -> T:
    """Result of an operation on a block, retried after transient errors.

    Other errors are raised as StorageError with the first chunk on which the operation fails.
    """
    try:
        return retrying(operation, region)
    except DaskClipError:
        raise
    except Exception as error:
        chunk, cause = _culprit(array, region, operation, error)
        kind, remedy = kind_and_remedy(cause)
        why = f"{type(cause).__name__}: {error_text(cause)}; {remedy}"
        raise kind(f"{doing} block {array.describe(region)} failed{chunk}: {why}") from error


def _culprit(
    array: StoredArray, region: Box, operation: Callable[[Box], object], error: Exception
) -> tuple[str, Exception]:
    """The first chunk of a block on which the operation fails, and the error."""
    # once more, chunk by chunk: the error of the block does not say where it came from
    for inside in boxes(box_shape(region), array.unit):
        part = offset_box(inside, region)
        try:
            operation(part)
        except Exception as own:
            return f" at chunk {array.keys(part)[0]}", own
    return "", error
