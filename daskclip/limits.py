"""A limit for every slice: checked, read for a region, and told from others."""

from __future__ import annotations

import json
from functools import partial
from itertools import product
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt

from daskclip import files, regions, storage
from daskclip.arrays import as_array
from daskclip.attempts import attempting
from daskclip.blocks import Box, box, box_shape, ceil_div, index
from daskclip.errors import DaskClipError, InvalidValueError, shown
from daskclip.parameters import check_scalar
from daskclip.sources import open_source

Array = npt.NDArray[Any]


def as_limits(limits: Any, clip_norm: Any, x: Any, axes: tuple[int, ...]) -> Any:
    """Limits for a NumPy or Dask array, of as many axes; as Dask array in its chunks if lazy."""
    limits = as_array(limits, _check_dtype)
    _check(limits, clip_norm, x.shape, axes)
    limits = limits.astype(np.float64)[(None,) * (x.ndim - limits.ndim) + (...,)]
    if not isinstance(x, da.Array) and not isinstance(limits, da.Array):
        return limits
    of_x = x.chunks if isinstance(x, da.Array) else tuple((n,) for n in x.shape)
    chunks = tuple((1,) if n == 1 else c for n, c in zip(limits.shape, of_x, strict=True))
    return da.asarray(limits).rechunk(chunks)


def open_limits(
    limits: Any, clip_norm: Any, shape: Any, axes: tuple[int, ...], options: Any
) -> Any:
    """Limits for a stored array: a NumPy or Zarr array; reads metadata only."""
    if type(limits) is not np.ndarray:
        try:
            limits = open_source(limits, options, _check_dtype)
        except DaskClipError as error:
            raise type(error)(f"limits: {error}") from error
    _check_dtype(limits.dtype)
    _check(limits, clip_norm, shape, axes)
    return limits


def limits_at(limits: Any, region: Box, missing: str) -> Array:
    """Limits of the slices of a region, read one chunk or shard at a time."""
    behind = region[len(region) - limits.ndim :]
    own = tuple(slice(0, 1) if n == 1 else s for n, s in zip(limits.shape, behind, strict=True))
    if isinstance(limits, np.ndarray):
        return np.asarray(limits[index(own)], np.float64)
    values = np.empty(box_shape(own))
    unit = storage.write_unit(limits)
    steps = (range(s.start // u, ceil_div(s.stop, u)) for s, u in zip(own, unit, strict=True))
    for cell in product(*steps):
        whole = box(cell, unit, limits.shape)
        read = partial(regions.read, limits, missing=missing)
        with attempting("reading", limits, whole, read) as reading:
            found = reading(whole)
        both = [
            (max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(own, whole, strict=True)
        ]
        values[_inside(both, own)] = found[_inside(both, whole)]
    return values


def described(limits: Any) -> str | None:
    """Shape and digest; of what is stored by its names, sizes and times, without reading it."""
    if limits is None:
        return None
    if isinstance(limits, np.ndarray):
        data: Any = np.ascontiguousarray(limits, np.float64)
    else:
        data = json.dumps(storage.fingerprint(limits, changes=True)).encode()
    return f"of shape {tuple(limits.shape)} and digest {files.digest(data):08x}"


def nbytes(limits: Any) -> int:
    """Bytes of what is held of limits at a time, beside those of a region."""
    if limits is None:
        return 0
    return limits.nbytes if isinstance(limits, np.ndarray) else storage.unit_nbytes(limits)


def _check_dtype(dtype: Any) -> None:
    check_scalar(0, dtype, (), "an array of limits")


def _check(limits: Any, clip_norm: Any, shape: Any, axes: tuple[int, ...]) -> None:
    """Refuse limits beside a clip_norm, and those that are not for the norms."""
    if clip_norm is not None:
        raise InvalidValueError(
            f"clip_norm {shown(clip_norm)} and limits are both given; leave one of them out"
        )
    kept = tuple(1 if k in axes else n for k, n in enumerate(shape))
    pairs = zip(limits.shape[::-1], kept[::-1], strict=False)
    if limits.ndim > len(kept) or any(n not in (1, m) for n, m in pairs):
        raise InvalidValueError(
            f"limits of shape {tuple(limits.shape)} do not broadcast against norms of shape "
            f"{kept}; give each axis that size, or 1"
        )


def _inside(both: list[tuple[int, int]], region: Box) -> Any:
    """Index of a box in a region."""
    return index(
        tuple(slice(a - s.start, b - s.start) for (a, b), s in zip(both, region, strict=True))
    )
