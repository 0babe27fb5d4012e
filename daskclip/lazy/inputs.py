"""The arguments of the operation as NumPy arrays, Dask arrays and floats."""

import io
import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask import config
from dask.base import tokenize

from daskclip import arguments
from daskclip.errors import (
    DaskClipError,
    DTypeError,
    InvalidTypeError,
    InvalidValueError,
    error_text,
    short_repr,
)
from daskclip.lazy.indexed_slices import is_indexed, values_of
from daskclip.numerics import without_axes
from daskclip.storage import StoredArray, check_source, is_zarr_array, retrying_block

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
    normalize: bool = False
    """Whether slices below their limit are brought to it too."""

    @property
    def omit_nan(self) -> bool:
        """Whether NaN elements do not count."""
        return self.nonfinite == "omit"

    @property
    def zero(self) -> bool:
        """Whether slices with NaN or infinity become zeros."""
        return self.nonfinite == "zero"


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
    _as_ndarray(x._meta if isinstance(x, da.Array) else x)
    return x


def check_block(block: object, meta: arguments.Array) -> arguments.Array:
    """Return a block of a Dask array; refuse what the array, by its meta, does not hold.

    Only the block itself can tell: Dask takes the dtype of what other functions return on trust.
    """
    # a block of shape () may be a number
    x = _as_ndarray(np.asarray(block) if np.isscalar(block) else block)
    if x.dtype != meta.dtype:
        if not np.can_cast(x.dtype, meta.dtype, "equiv"):
            raise DTypeError(
                f"a block of dtype {x.dtype} is in an array of dtype {meta.dtype}; "
                "give the array the dtype of its blocks, or cast them"
            )
        x = x.astype(meta.dtype)  # the byte order alone
    if x.ndim != meta.ndim:
        raise InvalidValueError(
            f"a block of shape {x.shape} is in an array of {meta.ndim} dimensions; "
            "give the array the shape of its blocks, or reshape them"
        )
    return x


def _as_ndarray(block: object) -> arguments.Array:
    if isinstance(block, np.ndarray) and not isinstance(block, np.ma.MaskedArray):
        return block
    raise DTypeError(
        f"blocks of type {type(block).__module__}.{type(block).__name__} cannot be clipped; "
        "convert them to numpy.ndarray, masked ones with .filled(numpy.nan)"
    )


def as_arrays(t_list: object) -> list[Any]:
    """Return the arrays of a list, without those that are None."""
    # an array is not a Sequence: as a list it would be clipped row by row
    if not isinstance(t_list, Sequence) or isinstance(t_list, str | bytes):
        raise InvalidTypeError(f"t_list is a {type(t_list).__name__}; give a list of arrays")
    return [as_array(values_of(t)) for t in t_list if t is not None]


def reduced_axes(
    t_list: Sequence[object], arrays: Sequence[Any], axes: arguments.Axes
) -> list[tuple[int, ...]]:
    """Axes of each array of a list; refuse arrays that have no norms in common."""
    numbers = [i for i, t in enumerate(t_list) if t is not None]
    if axes is None:
        return [tuple(range(x.ndim)) for x in arrays]
    for i in numbers:
        if is_indexed(t_list[i]):
            raise InvalidTypeError(
                f"t_list[{i}] is IndexedSlices, whose rows are not those of other arrays; give a "
                "dense array, for example with .to_dense(), or leave out axes"
            )
    taken = [arguments.parse_axes(axes, x.ndim, may_be_none=True) for x in arrays]
    both = zip(numbers, arrays, taken, strict=True)
    arguments.check_kept_shapes({f"t_list[{i}]": without_axes(x.shape, own) for i, x, own in both})
    return taken


def normalize_use_norm(use_norm: object, kept: tuple[int, ...]) -> Limit:
    """Return norms that are known: one number, or an array of the kept shape."""
    if not kept or not (isinstance(use_norm, list | tuple) or getattr(use_norm, "ndim", False)):
        return normalize_clip_norm(use_norm, "use_norm")
    arguments.check_unit(use_norm, "use_norm")
    known = as_array(use_norm, partial(arguments.check_scalar, shape=(), what="use_norm"))
    if known.shape != kept:
        text = f"has shape {known.shape}; give one number, or norms of shape {kept}"
        raise InvalidValueError(f"use_norm {text}")
    if isinstance(known, da.Array):
        return _checked_limit(known, "use_norm")
    norms: npt.NDArray[Any] = known
    return norms if norms.dtype.name in arguments.DTYPES else norms.astype(np.float64)


def is_lazy(arrays: Iterable[object]) -> bool:
    """Whether any array is a Dask array."""
    return any(isinstance(x, da.Array) for x in arrays)


def normalize_clip_norm(clip_norm: object, what: str = "clip_norm") -> float | da.Array:
    """Return a limit as a float; a lazy number stays lazy."""
    if isinstance(clip_norm, da.Array):
        arguments.check_scalar(clip_norm.dtype, clip_norm.shape, what)
        return _checked_limit(clip_norm, what)
    return arguments.parse_clip_norm(clip_norm, what)


def normalize_limit(
    clip_norm: object, limits: object, x: arguments.Array | da.Array, axes: tuple[int, ...]
) -> Limit:
    """Return ``clip_norm``, or ``limits`` with as many axes as ``x``."""
    if limits is None:
        return normalize_clip_norm(clip_norm)
    arguments.check_unit(limits, "an array of limits")
    array = as_array(limits, arguments.check_limits_dtype)
    arguments.check_limits(array.shape, clip_norm, x.shape, axes)
    if isinstance(array, da.Array):
        array = _checked_limit(array, "an array of limits")
    # the leading axes that broadcasting lets limits leave out
    limits_of_x: Limit = array.astype(np.float64)[(None,) * (x.ndim - array.ndim) + (...,)]
    return limits_of_x


def _checked_limit(limit: da.Array, what: str) -> da.Array:
    """Limits whose blocks are checked before they are used."""
    arguments.check_unit(limit._meta, what)
    check = partial(_check_limit_block, meta=limit._meta, what=what)
    name = f"checked-limit-{tokenize(limit, limit.chunks, what)}"
    checked: da.Array = da.map_blocks(check, limit, name=name, dtype=limit.dtype, meta=limit._meta)
    return checked


def _check_limit_block(
    block: object, meta: arguments.Array, what: str, block_info: Any = None
) -> arguments.Array:
    arguments.check_unit(block, what)
    x = check_block(block, meta)
    # Dask fills in block_info; None is the result
    stated = block_info[None]["chunk-shape"]
    # an unknown size is NaN; any other size would be broadcast
    if any(n != m and m == m for n, m in zip(x.shape, stated, strict=True)):
        raise InvalidValueError(
            f"a block of shape {x.shape} is in a chunk of shape {stated}; "
            f"give {what} the shapes of its blocks"
        )
    return x


def _as_numpy(t: object) -> arguments.Array:
    masked = arguments.masked_in(t)
    if masked is not None:
        return _as_ndarray(masked)  # which refuses it
    reason = ""
    try:
        x = None if _is_no_array(t) else np.asarray(t)
    except Exception as error:
        if isinstance(t, list | tuple) and isinstance(error, ValueError):
            raise InvalidValueError(f"{short_repr(t)} is ragged; give an array") from None
        x, reason = None, f" ({error_text(error)})"
    # numpy makes an array of shape () of an object that it does not know
    if x is None or (x.dtype == object and x.ndim == 0 and not isinstance(t, np.ndarray)):
        kind = f"{type(t).__module__}.{type(t).__name__}".removeprefix("builtins.")
        raise InvalidTypeError(
            f"an object of type {kind} is not an array of numpy, dask or zarr{reason}; {_remedy(t)}"
        )
    return x


def _is_no_array(t: object) -> bool:
    """Whether numpy would make something of ``t`` that it is not."""
    # of a group it makes an array of names; what is lazy it computes, which may take hours
    is_group = hasattr(t, "keys") and not hasattr(t, "__array__")
    return is_group or isinstance(t, str | bytes) or hasattr(t, "__dask_graph__")


def _remedy(t: Any) -> str:
    """Remedy for what is no array: how to make one of it."""
    # by names, since the packages need not be installed
    package, name = type(t).__module__.partition(".")[0], type(t).__qualname__
    if isinstance(t, str | bytes | os.PathLike):
        return "open it with zarr.open_array, or use clip_zarr"
    if package == "zarr" and name.startswith("Async"):
        return f"make a zarr.{name.removeprefix('Async')} of it"
    if package == "zarr":
        return "pass one of its arrays, or use clip_zarr"
    if package == "xarray":
        remedies = {
            "DataArray": "pass its .data, or use daskclip.xarray",
            "DataTree": "use daskclip.xarray",
            "Dataset": "use daskclip.xarray",
        }
        return remedies.get(name, "pass its .data")
    if package == "dask_array":
        return "make it with dask.array"
    if type(t).__module__ == "dask.delayed" or name == "Future":
        return "make an array of it with dask.array.from_delayed"
    if package == "torch":
        steps = ".detach()" if getattr(t, "requires_grad", False) else ""
        steps += "" if str(getattr(t, "device", "cpu")).startswith("cpu") else ".cpu()"
        steps += ".float()" if str(getattr(t, "dtype", "")).endswith("bfloat16") else ""
        if steps:
            return f"pass its {steps}.numpy()"
    return "convert it to one"


def _from_zarr(array: Any) -> da.Array:
    """Lazy array with one chunk for each stored object."""
    # equal calls give equal keys: named by what is stored, not by the object that opened it
    identity = _identity(array.store), array.path, array.metadata.to_dict()
    token = tokenize(identity, ensure_deterministic=True)
    stored = StoredArray(array)
    # whole shards, which da.from_zarr would split: a result stored in its chunks is then written
    # a shard at a time
    options = {"chunks": stored.unit, "name": f"zarr-{token}"}
    lazy: da.Array
    if _can_read(stored):
        # zarr takes longer. Dask fuses cuts with functions of its own, which this one is not
        meta = np.empty((0,) * stored.ndim, stored.dtype)
        lazy = da.from_array(stored, getitem=_read_chunk, meta=meta, **options)
    else:
        lazy = da.from_array(array, **options)
    return lazy


def _can_read(stored: StoredArray) -> bool:
    """Whether chunks are files whose codecs we know; zarr knows more, and other stores."""
    if stored.folder is None or os.name != "posix":
        return False
    try:
        check_source(stored, arguments.check_dtype)
    except DaskClipError:
        return False
    return True


def _read_chunk(stored: StoredArray, region: tuple[slice, ...]) -> arguments.Array:
    return retrying_block("reading", stored, region, stored.read)


class _EqualPickler(pickle.Pickler):
    """Pickler that gives equal bytes for equal stores in every process, if it is ``fast``.

    Else they depend on which of equal texts are one object.
    """

    def reducer_override(self, obj: object) -> Any:
        # the pickle of a path has the parts that it was made of
        return (str, (os.fspath(obj),)) if isinstance(obj, os.PathLike) else NotImplemented


def _identity(store: object) -> object:
    """Identity of a store among those of the same text; unique if it is not known."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = io.BytesIO()
    pickler = _EqualPickler(pickled, 5, buffer_callback=buffers.append)
    pickler.fast = True
    try:
        # not left to Dask, which unpickles it too: that would empty a zip file opened for writing
        pickler.dump(store)
        return pickled.getvalue(), [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]
    except Exception:
        return uuid4().hex
