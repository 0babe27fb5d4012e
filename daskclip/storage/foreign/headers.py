"""Headers of .npy and .safetensors files: where each array begins, checked before it is read."""

import json
import os
import stat
import warnings
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np

from daskclip.errors import SourceError, error_text, short_repr
from daskclip.storage.files import DOCUMENTS, OURS
from daskclip.storage.foreign.arrays import FileArray, check_layout, layout

INDEX = "model.safetensors.index.json"
NPY_HEADER = 10_000  # bytes, as numpy.load allows: what is evaluated is not trusted
JSON_HEADER = 1 << 24  # bytes, of some 100,000 tensors
JSON_PER_BRACKET = 16  # bytes for each bracket that opens, at least: a tensor has three in fifty
# float8 is copied and not clipped
TENSORS = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "U16": ("uint16", 2),
    "I16": ("int16", 2), "U32": ("uint32", 4), "I32": ("int32", 4), "U64": ("uint64", 8),
    "I64": ("int64", 8), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "F32": ("float32", 4),
    "F64": ("float64", 8), "C64": ("complex64", 8), "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E8M0": ("float8_e8m0fnu", 1),
}  # fmt: skip
"""Name of each dtype in Zarr, and its bytes."""
Tensors = tuple[dict[str, FileArray], dict[str, str]]
"""Arrays by name, and the metadata of the file."""


def read_npy(path: str) -> FileArray:
    """The array of a .npy file."""
    with _opened(path) as file:
        try:
            shape, fortran, dtype = _npy_header(file)
        except Exception as error:  # the header is a Python expression, which may be anything
            raise _unreadable(path, "a .npy file", error) from error
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
    about = layout(f"source {path}", shape, dtype, fortran)
    array = FileArray(path=path, offset=offset, **about)
    if min(shape, default=0) < 0 or offset + array.nbytes > size:
        why = ValueError(f"its {size} bytes do not hold the shape {short_repr(shape)}")
        raise _unreadable(path, "a .npy file", why)
    return array


def _npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    start = file.read(12)
    if not start.startswith(np.lib.format.MAGIC_PREFIX):
        raise ValueError("its first bytes are not those of one")
    # NumPy reads a header before it looks at its length, which takes 4 bytes since format 2
    if int.from_bytes(start[8 : 12 if start[6:7] > b"\1" else 10], "little") > NPY_HEADER:
        raise ValueError(f"its header has more than {NPY_HEADER} bytes")
    file.seek(0)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"its format {version} is not known")
    # format 3 differs from 2 in the names of fields only
    read = getattr(np.lib.format, f"read_array_header_{min(version[0], 2)}_0")
    with warnings.catch_warnings(action="ignore"):
        found: tuple[tuple[int, ...], bool, np.dtype[Any]] = read(file, NPY_HEADER)
    return found


def read_safetensors(path: str) -> Tensors:
    """The arrays of a .safetensors file, and its metadata."""
    try:
        with _opened(path) as file:
            size, width = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
            if size < 8 or width > min(size - 8, JSON_HEADER):
                raise ValueError(f"its header would have {width} bytes, and the file has {size}")
            header = _parse(file.read(width))
        about = header.pop("__metadata__", {})
        if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
            raise ValueError("its __metadata__ is no texts by name")
        _check_names(header)
        arrays = {name: _tensor(path, name, header[name], 8 + width) for name in header}
        end = 8 + width
        # neither holes nor shared bytes, as the format says
        for array in sorted(arrays.values(), key=lambda x: (x.offset, x.nbytes)):
            if array.offset != end:
                raise ValueError(f"a tensor begins at byte {array.offset} and not at {end}")
            end += array.nbytes
        if end != size:
            raise ValueError(f"its {size} bytes are not the {end} that its header says")
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, "a .safetensors file", error) from error
    return arrays, about


def _tensor(path: str, name: str, about: Any, start: int) -> FileArray:
    try:
        dtype, itemsize = TENSORS[about["dtype"]]
        shape, (begin, end) = tuple(about["shape"]), about["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{short_repr(name)} is no tensor: {short_repr(about)}") from None
    known = "uint8" if dtype.startswith("float8") else dtype
    check_layout(f"source {path}: tensor {short_repr(name)}", shape, known)
    array = FileArray(path=path, offset=start + begin, shape=shape, dtype=dtype, itemsize=itemsize)
    if end - begin != array.nbytes:
        raise ValueError(f"tensor {short_repr(name)} does not have {array.nbytes} bytes")
    return array


def read_shards(folder: str) -> Tensors:
    """The arrays of all .safetensors files that the index in a folder names."""
    arrays: dict[str, FileArray] = {}
    about: dict[str, str] = {}
    index = os.path.join(folder, INDEX)
    try:
        with _opened(index) as file:
            places = _parse(file.read(JSON_HEADER)).get("weight_map")
        shards = {*places.values()} if isinstance(places, dict) else set[Any]()
        if not places or not all(_is_name(shard) and "/" not in shard for shard in shards):
            raise ValueError("its weight_map does not name a file in the folder for each tensor")
        for shard in sorted(shards):
            if not os.path.exists(os.path.join(folder, shard)):
                raise ValueError(f"file {shard} is missing")
            found, own = read_safetensors(os.path.join(folder, shard))
            for name in found.keys() ^ {name for name in places if places[name] == shard}:
                raise ValueError(f"tensor {short_repr(name)} and file {shard} do not agree")
            arrays, about = arrays | found, about | own
        _check_names(arrays)
    except (ValueError, TypeError, RecursionError) as error:
        raise _unreadable(index, "an index of .safetensors files", error) from error
    return arrays, about


def _parse(data: bytes) -> dict[str, Any]:
    """JSON object of a header or an index."""
    # empty lists and objects would take fifty times as much memory as their text
    if len(data) > 1 << 16 and data.count(b"[") + data.count(b"{") > len(data) // JSON_PER_BRACKET:
        raise ValueError("it holds more lists and objects than tensors have")
    found = json.loads(data)
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")
    return found


def _check_names(names: Iterable[str]) -> None:
    """Refuse names that cannot be those of arrays in a group."""
    names = {*names}
    for name in names:
        parts = name.split("/")
        if not all(map(_is_name, parts)):
            raise ValueError(f"{short_repr(name)} cannot be the name of an array")
        if not names.isdisjoint("/".join(parts[:i]) for i in range(1, len(parts))):
            raise ValueError(f"tensor {short_repr(name)} would be inside another")


def _is_name(part: object) -> bool:
    """Whether a folder of an array or a file can have a name."""
    if not isinstance(part, str) or part in ("", ".", "..", *DOCUMENTS) or OURS.fullmatch(part):
        return False
    return part.isprintable() and len(part.encode()) <= 255


def _opened(path: str) -> BinaryIO:
    """A regular file; others might never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise SourceError(f"source {path} is not a regular file; give the path of one")
    return open(path, "rb")


def _unreadable(path: str, what: str, error: Exception) -> SourceError:
    """The error for a file that is not what its name says."""
    if isinstance(error, SourceError):
        return error
    return SourceError(
        f"source {path} is not {what} that can be read ({error_text(error)}); check the file"
    )
