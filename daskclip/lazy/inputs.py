"""What may be given as an array, a list of arrays, a limit or a name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
from dask import config
from dask.base import tokenize

from daskclip.arguments import (
    Check,
    check_dtype,
    check_limits,
    check_limits_dtype,
    check_scalar,
    parse_clip_norm,
)
from daskclip.errors import DTypeError, InvalidTypeError, InvalidValueError, short_repr
from daskclip.lazy.indexed_slices import is_indexed
from daskclip.storage import StoredArray, is_zarr_array


def check_name(name: Any) -> None:
    """Refuse a layer name that is no string."""
    if name is not None and not isinstance(name, str):
        raise InvalidTypeError(
            f"name {short_repr(name)} is a {type(name).__name__}; give a string or None"
        )


def as_array(t: Any, check: Check = check_dtype) -> Any:
    """``t`` as a NumPy or Dask array of a dtype and of blocks that can be clipped."""
    if is_zarr_array(t):
        check(t.dtype)
        t = _as_dask(t)
    if isinstance(t, da.Array):
        if config.get("array.query-planning", None):
            raise InvalidTypeError(
                "dask arrays made under array.query-planning are not supported; "
                "set array.query-planning to False before importing dask.array"
            )
    elif hasattr(t, "__dask_graph__"):
        raise InvalidTypeError(
            f"{type(t).__module__}.{type(t).__name__} is not an array of numpy, dask or zarr; "
            "pass its .data, or use daskclip.xarray"
        )
    elif not isinstance(t, np.ma.MaskedArray):
        try:
            t = np.asarray(t)
        except ValueError:
            raise InvalidValueError(f"{short_repr(t)} is ragged; give an array") from None
    check(t.dtype)
    blocks = t._meta if isinstance(t, da.Array) else t
    if not isinstance(blocks, np.ndarray) or isinstance(blocks, np.ma.MaskedArray):
        raise DTypeError(
            f"blocks of type {type(blocks).__module__}.{type(blocks).__name__} cannot be clipped; "
            "convert them to numpy.ndarray, masked ones with .filled(numpy.nan)"
        )
    return t


def normalize_clip_norm(clip_norm: Any, what: str = "clip_norm") -> Any:
    """A limit as a float, or as it is if it is a lazy number."""
    if isinstance(clip_norm, da.Array):
        check_scalar(clip_norm.ndim, clip_norm.dtype, clip_norm.shape, what)
        return clip_norm
    return parse_clip_norm(clip_norm, what)


def normalize_limits(limits: Any, clip_norm: Any, x: Any, axes: tuple[int, ...]) -> Any:
    """Limits for a NumPy or Dask array, of as many axes."""
    limits = as_array(limits, check_limits_dtype)
    check_limits(limits, clip_norm, x.shape, axes)
    return limits.astype(np.float64)[(None,) * (x.ndim - limits.ndim) + (...,)]


def as_arrays(t_list: Any, is_lazy: bool = False) -> tuple[list[Any], bool]:
    """Arrays of a list, all of them Dask arrays if one is; the second result says so."""
    if not isinstance(t_list, Sequence) or isinstance(t_list, str | bytes):
        raise InvalidTypeError(f"t_list is a {type(t_list).__name__}; give a list of arrays")
    arrays = [None if t is None else as_array(t.values if is_indexed(t) else t) for t in t_list]
    is_lazy = is_lazy or any(isinstance(x, da.Array) for x in arrays)
    if is_lazy:
        arrays = [da.from_array(x, chunks=-1) if isinstance(x, np.ndarray) else x for x in arrays]
    return arrays, is_lazy


def _as_dask(array: Any) -> da.Array:
    """Lazy array with one chunk for each stored object."""
    token = tokenize(
        str(array.store), array.path, array.metadata.to_dict(), ensure_deterministic=True
    )
    chunks = StoredArray(array).unit
    lazy: da.Array = da.from_array(array, chunks=chunks, name=f"zarr-{token}")
    return lazy
