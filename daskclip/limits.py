"""A limit for every slice: checked, read for a region, and told from others."""

from __future__ import annotations

import json
import numbers
from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from daskclip import files, regions, storage
from daskclip.attempts import attempting
from daskclip.blocks import Box, box, box_shape, ceil_div, index
from daskclip.errors import DaskClipError, InvalidValueError, shown
from daskclip.hierarchy import Hierarchy, at_place
from daskclip.parameters import check_limits, check_limits_dtype
from daskclip.sources import check_source, open_source


def open_limits(
    limits: Any, clip_norm: Any, source: Hierarchy, over: Mapping[str, Any], options: Any
) -> dict[str, Any]:
    """Limits of stored arrays, by their names: NumPy or Zarr arrays; reads metadata only.

    ``over`` holds the axes of each array.
    """
    if limits is None:
        return {}
    if isinstance(limits, Mapping):
        found = dict(limits)
    elif type(limits) is np.ndarray or isinstance(limits, numbers.Real):
        found = dict.fromkeys(over, limits)
    else:
        opened = _opened(limits, options)
        found = opened.arrays if opened.is_group else dict.fromkeys(over, opened.arrays[""])
    for name in over:
        if name not in found:
            raise InvalidValueError(
                f"limits are given for {shown([*found])} and not for {name or source}; give each "
                "array that is clipped its own, or one for all"
            )
    return {
        name: _usable(found[name], clip_norm, source.arrays[name].shape, axes, options)
        for name, axes in over.items()
    }


def _usable(limits: Any, clip_norm: Any, shape: Any, axes: Any, options: Any) -> Any:
    if isinstance(limits, numbers.Real):
        limits = np.asarray(limits, np.float64)
    if type(limits) is not np.ndarray and not storage.is_array(limits):
        limits = _opened(limits, options).arrays.get("")
        if limits is None:
            raise InvalidValueError("limits of an array are a group; give an array")
    check_limits_dtype(limits.dtype)
    if storage.is_array(limits):
        check_source(limits, check_limits_dtype)
    check_limits(limits, clip_norm, shape, axes)
    return limits.astype(np.float64, order="C") if isinstance(limits, np.ndarray) else limits


def _opened(limits: Any, options: Any) -> Hierarchy:
    try:
        return open_source(limits, options)
    except DaskClipError as error:
        raise type(error)(f"limits: {error}") from error


def limits_at(limits: Any, region: Box, missing: str) -> Any:
    """Limits of the slices of a region, read one chunk or shard at a time."""
    behind = zip(limits.shape, region[len(region) - limits.ndim :], strict=True)
    own = tuple(slice(0, 1) if n == 1 else s for n, s in behind)
    if isinstance(limits, np.ndarray):
        return limits[index(own)]
    values = np.empty(box_shape(own))
    unit = storage.write_unit(limits)
    steps = (range(s.start // u, ceil_div(s.stop, u)) for s, u in zip(own, unit, strict=True))
    for cell in product(*steps):
        whole = box(cell, unit, limits.shape)
        read = partial(regions.read, limits, missing=missing)
        with attempting("reading", limits, whole, read) as reading:
            found = reading(whole)
        values[_shared(whole, own)] = found[_shared(own, whole)]
    return values


def described(limits: Mapping[str, Any]) -> Any:
    """Shapes and digests; of what is stored by its names, sizes and times, without reading it."""
    found = {name: _described(one) for name, one in limits.items()}
    return found.get("", found) or None


def _described(limits: Any) -> str:
    numpy = isinstance(limits, np.ndarray)
    found = limits if numpy else json.dumps(_there(limits).fingerprint(changes=True)).encode()
    return f"of shape {limits.shape} and digest {files.digest(found):08x}"


def paths(limits: Mapping[str, Any]) -> list[str]:
    """Files that whoever reads them must see."""
    return [p for one in limits.values() if storage.is_array(one) for p in _there(one).paths]


def _there(limits: Any) -> Hierarchy:
    return at_place(limits.store, limits.path)


def nbytes(limits: Any) -> int:
    """Bytes of what is held of limits at a time, beside those of a region."""
    if limits is None:
        return 0
    return limits.nbytes if isinstance(limits, np.ndarray) else storage.unit_nbytes(limits)


def _shared(other: Box, region: Box) -> Any:
    """Index in a region of what another one has of it too."""
    pairs = zip(other, region, strict=True)
    return index(
        tuple(slice(max(a.start - b.start, 0), min(a.stop, b.stop) - b.start) for a, b in pairs)
    )
