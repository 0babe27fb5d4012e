"""The arguments of the operation as NumPy arrays, Dask arrays and floats."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask import config
from dask.base import tokenize

from daskclip import arguments
from daskclip.errors import DTypeError, InvalidTypeError, InvalidValueError, short_repr
from daskclip.lazy.indexed_slices import values_of
from daskclip.storage import StoredArray, is_zarr_array

Limit = float | da.Array | npt.NDArray[np.float64]
"""One limit, or limits with as many axes as the array."""


@dataclass(frozen=True, slots=True)
class Operation:
    """Parameters of the operation, without its limits."""

    axes: tuple[int, ...]
    """Axes of the norm, sorted and not negative."""
    ord: float = 2.0
    """Key of `ORDERS`."""
    nonfinite: arguments.NonFinite = "propagate"
    """Policy for NaN and infinity."""

    @property
    def omit_nan(self) -> bool:
        """Whether NaN elements do not count."""
        return self.nonfinite == "omit"


def check_name(name: object) -> None:
    """Refuse a layer name that is not a string."""
    if name is not None and not isinstance(name, str):
        kind = f"is a {type(name).__name__}; give a string or None"
        raise InvalidTypeError.about("name", name, kind)


def as_array(t: object, check: arguments.Check = arguments.check_dtype) -> Any:
    """Return ``t`` as a NumPy or Dask array whose dtype and blocks can be clipped."""
    if is_zarr_array(t):
        # before Dask sees the array: it does not know every dtype that Zarr can store
        check(t.dtype)
        t = _from_zarr(t)
    x = t if isinstance(t, da.Array) else _as_numpy(t)
    # an array that is an expression has no layers, from which recipes are made
    if isinstance(x, da.Array) and config.get("array.query-planning", None):
        raise InvalidTypeError(
            "dask arrays made under array.query-planning are not supported; "
            "set array.query-planning to False before importing dask.array"
        )
    check(x.dtype)
    block = x._meta if isinstance(x, da.Array) else x
    if not isinstance(block, np.ndarray) or isinstance(block, np.ma.MaskedArray):
        raise DTypeError(
            f"blocks of type {type(block).__module__}.{type(block).__name__} cannot be clipped; "
            "convert them to numpy.ndarray, masked ones with .filled(numpy.nan)"
        )
    return x


def as_arrays(t_list: object) -> list[Any]:
    """Return the arrays of a list, without those that are None."""
    # an array is not a Sequence: as a list it would be clipped row by row
    if not isinstance(t_list, Sequence) or isinstance(t_list, str | bytes):
        raise InvalidTypeError(f"t_list is a {type(t_list).__name__}; give a list of arrays")
    return [as_array(values_of(t)) for t in t_list if t is not None]


def is_lazy(arrays: Iterable[object]) -> bool:
    """Whether any array is a Dask array."""
    return any(isinstance(x, da.Array) for x in arrays)


def normalize_clip_norm(clip_norm: object, what: str = "clip_norm") -> float | da.Array:
    """Return a limit as a float; a lazy number stays lazy."""
    if isinstance(clip_norm, da.Array):
        arguments.check_scalar(clip_norm.dtype, clip_norm.shape, what)
        return clip_norm
    return arguments.parse_clip_norm(clip_norm, what)


def normalize_limit(
    clip_norm: object, limits: object, x: arguments.Array | da.Array, axes: tuple[int, ...]
) -> Limit:
    """Return ``clip_norm``, or ``limits`` with as many axes as ``x``."""
    if limits is None:
        return normalize_clip_norm(clip_norm)
    array = as_array(limits, arguments.check_limits_dtype)
    arguments.check_limits(array.shape, clip_norm, x.shape, axes)
    # the leading axes that broadcasting lets limits leave out
    limits_of_x: Limit = array.astype(np.float64)[(None,) * (x.ndim - array.ndim) + (...,)]
    return limits_of_x


def _as_numpy(t: object) -> arguments.Array:
    if hasattr(t, "__dask_graph__"):
        raise InvalidTypeError(
            f"{type(t).__module__}.{type(t).__name__} is not an array of numpy, dask or zarr; "
            "pass its .data, or use daskclip.xarray"
        )
    # kept for the check of blocks: numpy.asarray would drop the mask, and masked elements count
    if isinstance(t, np.ma.MaskedArray):
        return t
    try:
        return np.asarray(t)
    except ValueError:
        raise InvalidValueError(f"{short_repr(t)} is ragged; give an array") from None


def _from_zarr(array: Any) -> da.Array:
    """Lazy array with one chunk for each stored object."""
    # named by what is stored, not by the object that opened it: equal calls give equal keys
    token = tokenize(
        str(array.store), array.path, array.metadata.to_dict(), ensure_deterministic=True
    )
    # whole shards, which da.from_zarr would split: a result stored in its chunks is then written
    # a shard at a time
    chunks = StoredArray(array).unit
    lazy: da.Array = da.from_array(array, chunks=chunks, name=f"zarr-{token}")
    return lazy
