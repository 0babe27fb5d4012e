"""Arrays whose elements lie side by side, in a file or in memory, cut into chunks."""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from daskclip.errors import DTypeError, SourceChangedError, SourceError
from daskclip.grid import Box, box_at, box_index, box_shape, grid_shape, tile_shape

Bytes = npt.NDArray[np.uint8]

CHUNK_NBYTES = 1 << 22
LARGEST = 1 << 62  # elements without axes of length 0: no address space holds more
MOST_AXES = 64  # of NumPy's arrays
NAMES = {"bool", "float16", "float32", "float64", "complex64", "complex128", "bfloat16"}
NAMES |= {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
"""Dtypes that Zarr and NumPy name alike."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FlatArray(ABC):
    """Elements that lie side by side, as chunks of a Zarr array that are contiguous too."""

    shape: tuple[int, ...]
    dtype: str
    """Name of the dtype in Zarr."""
    itemsize: int
    """Bytes of an element."""
    big_endian: bool = False
    fortran: bool = False
    """Whether the first axis is the contiguous one, and not the last."""

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.itemsize

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Lengths of the axes, the contiguous one last."""
        return self.shape[::-1] if self.fortran else self.shape

    @property
    def tile(self) -> tuple[int, ...]:
        """Shape of a chunk, the contiguous axis last."""
        return tile_shape(self.stored_shape, CHUNK_NBYTES // self.itemsize)

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of a chunk."""
        return math.prod(self.tile) * self.itemsize

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along each axis."""
        grid = grid_shape(self.stored_shape, self.tile)
        return grid[::-1] if self.fortran else grid

    def document(self) -> dict[str, Any]:
        """Metadata of the Zarr array."""
        codecs: list[dict[str, Any]] = [{"name": "bytes"}]
        chunk, axes = self.tile, [*range(len(self.shape))]
        if self.itemsize > 1:
            endian = "big" if self.big_endian else "little"
            codecs[0]["configuration"] = {"endian": endian}
        if self.fortran:
            chunk = chunk[::-1]
            codecs.insert(0, {"name": "transpose", "configuration": {"order": axes[::-1]}})
        zeros = {"bool": False, "complex64": [0.0, 0.0], "complex128": [0.0, 0.0]}
        return {
            "zarr_format": 3, "node_type": "array", "shape": [*self.shape],
            "data_type": self.dtype, "fill_value": zeros.get(self.dtype, 0), "codecs": codecs,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [*chunk]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "attributes": {},
        }  # fmt: skip

    def read(self, coords: Sequence[int], buffer: Bytes) -> Bytes:
        """Read the bytes of a whole chunk into ``buffer``, with zeros beyond the edge."""
        at = coords[::-1] if self.fortran else coords
        box = box_at(at, self.tile, self.stored_shape)
        # a part that is cut off at the edge is still the beginning of its chunk
        used = math.prod(box_shape(box)) * self.itemsize
        whole = buffer[: self.chunk_nbytes]
        self._fill(box, whole[:used])
        whole[used:] = 0
        return whole

    @abstractmethod
    def _fill(self, box: Box, buffer: Bytes) -> None:
        """Read the elements of a box, the contiguous axis last."""


@dataclass(frozen=True, kw_only=True)
class FileArray(FlatArray):
    """An array in a range of a file."""

    path: str
    offset: int
    """Bytes before the first element."""

    def _fill(self, box: Box, buffer: Bytes) -> None:
        first = 0
        for s, n in zip(box, self.stored_shape, strict=True):
            first = first * n + s.start
        if read_range(self.path, self.offset + first * self.itemsize, buffer) < len(buffer):
            raise SourceChangedError(
                f"source {self.path} has become shorter; let nothing write to it and run again"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryArray(FlatArray):
    """A NumPy array, of which chunks are copied when they are read."""

    values: npt.NDArray[Any]
    """With the contiguous axis last, if there is one."""

    def _fill(self, box: Box, buffer: Bytes) -> None:
        part = np.ascontiguousarray(self.values[box_index(box)])
        buffer[:] = part.reshape(-1).view(np.uint8)


def read_range(path: str, offset: int, buffer: Bytes) -> int:
    """Read bytes of a file from ``offset`` on; returns how many there were."""
    file, at = os.open(path, os.O_RDONLY), 0
    try:
        while at < len(buffer) and (n := os.preadv(file, [buffer[at:].data], offset + at)):
            at += n
    finally:
        os.close(file)
    return at


def check_layout(where: str, shape: Sequence[int], dtype: object) -> None:
    """Refuse what no array can be, and dtypes that Zarr has no name for."""
    if getattr(dtype, "name", dtype) not in NAMES:
        raise DTypeError(
            f"{where} has dtype {dtype}, which cannot be clipped; store it as floating point or "
            "complex, for example with .astype('float32')"
        )
    if len(shape) > MOST_AXES or math.prod(n for n in shape if n) > LARGEST:
        raise SourceError(f"{where} has a shape that no array has; check its header")


def layout(where: str, shape: Sequence[int], dtype: np.dtype[Any], fortran: bool) -> dict[str, Any]:
    """Fields of a flat array, but the place of its elements."""
    check_layout(where, shape, dtype)
    return {
        "shape": tuple(map(int, shape)), "dtype": dtype.name, "itemsize": dtype.itemsize,
        "big_endian": dtype.newbyteorder("=") != dtype, "fortran": fortran and len(shape) > 1,
    }  # fmt: skip


def in_memory(x: npt.NDArray[Any]) -> FlatArray:
    """An array in memory, or the range of the file that it maps."""
    fortran = x.flags.f_contiguous and not x.flags.c_contiguous
    about = layout("source", x.shape, x.dtype, fortran)
    # read from the file, it takes no memory of this process, and can be read by others
    mapped = _mapped_range(x) if isinstance(x, np.memmap) and x.nbytes else None
    if mapped is not None:
        return FileArray(path=mapped[0], offset=mapped[1], **about)
    return MemoryArray(values=x.T if fortran else x, **about)


def _mapped_range(x: np.memmap[Any, Any]) -> tuple[str, int] | None:
    """File and offset of the memory of an array, if it is a range of a file that still exists."""
    if not (x.flags.c_contiguous or x.flags.f_contiguous):
        return None
    # what is written later changes the time of the file, which tells that it has changed
    x.flush()
    with suppress(OSError), open("/proc/self/maps") as maps:
        for line in maps:
            span, kind, offset, _, inode, *path = line.rstrip("\n").split(maxsplit=5)
            first, last = (int(address, 16) for address in span.split("-"))
            start = x.ctypes.data - first
            # pages that are private may differ from the file
            if 0 <= start <= last - first - x.nbytes and kind[3] == "s" and path:
                # another file may have taken its place
                is_same = os.stat(path[0]).st_ino == int(inode)
                return (path[0], int(offset, 16) + start) if is_same else None
    return None
