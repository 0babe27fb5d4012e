"""Everything that can be refused, and all that is planned, before a chunk is read."""

from __future__ import annotations

import json
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from daskclip.arguments import (
    DTYPES,
    axes_named,
    check_dtype,
    check_limits,
    check_limits_dtype,
    check_nonfinite,
    parse_axes,
    parse_clip_norm_or_quantile,
    parse_dim,
    parse_memory,
    parse_ord,
)
from daskclip.engine.cluster import workers
from daskclip.engine.saved_norms import SavedNorms, open_norms
from daskclip.errors import (
    DaskClipError,
    InvalidTypeError,
    InvalidValueError,
    SourceChangedError,
    short_repr,
)
from daskclip.plan import GroupPlan, Layout, Machine, plan_group, sizing
from daskclip.storage import (
    Hierarchy,
    StoredArray,
    check_source,
    durable,
    is_zarr_array,
    open_source,
    parse_patterns,
    select_arrays,
)

if TYPE_CHECKING:
    from daskclip.target import Entry

# bytes that the exact sum of a slice may take, by the size of an element
STATE = {2: 24, 4: 80, 8: 544}


def prepare(
    source: Any,
    clip_norm: Any,
    axes: Any,
    dim: Any,
    *,
    memory: Any,
    nonfinite: Any,
    missing: Any,
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    global_norm: Any,
    ord: Any,
    limits: Any,
    storage_options: dict[str, Any] | None,
    norms: Any = None,
) -> tuple[Hierarchy, GroupPlan, dict[str, Any], SavedNorms | None, dict[str, Any]]:
    """What is at a source, how it will be clipped, by which limits, and what tells runs apart."""
    limit = parse_clip_norm_or_quantile(clip_norm) if limits is None else None
    check_nonfinite(nonfinite)
    if missing not in ("fill", "error"):
        raise InvalidValueError(
            f"missing={short_repr(missing)} is not a policy; use 'fill' or 'error'"
        )
    if not isinstance(global_norm, bool):
        raise InvalidTypeError(
            f"global_norm {short_repr(global_norm)} is a {type(global_norm).__name__}; give a bool"
        )
    if global_norm and not (axes is None and dim is None):
        raise InvalidValueError(
            f"a global norm has no axes, and {short_repr(axes if dim is None else dim)} is given; "
            "leave out one of them"
        )
    if global_norm and limits is not None:
        raise InvalidValueError("a global norm has one limit, and limits are given; give clip_norm")
    budget = parse_memory(memory)
    opened = open_source(source, storage_options)
    names = select_arrays(opened, include, exclude, DTYPES)
    if opened.is_group and dim is not None:
        names, dim = _having(opened, names, dim)
        if not dim and axes is None:
            axes, dim = [], None
    clipped = {name: _clipped(opened, name, axes, dim, ord) for name in names}
    over = {name: layout.axes for name, layout in clipped.items()}
    each = open_limits(limits, clip_norm, opened, over, storage_options)
    for name, one in each.items():
        clipped[name] = replace(clipped[name], limits_nbytes=nbytes(one))
    copied = {
        name: Layout(shape=array.shape, unit=array.unit, itemsize=array.dtype.itemsize)
        for name, array in opened.arrays.items()
        if name not in clipped
    }
    processes, threads, fewest = workers()
    machine = Machine(processes=processes, threads=threads, fewest=fewest, memory=budget)
    plan = plan_group(clipped, copied, machine, sizing.DEFAULT, global_norm=global_norm)
    taken = axes if opened.is_group else plan.plans[""].axes
    parameters = {
        "clip_norm": clip_norm if isinstance(limit, Fraction) else str(limit),
        "axes": None if taken is None else [int(a) for a in np.atleast_1d(taken)],
        "dim": dim if opened.is_group else None,
        "ord": float(ord),
        "limits": limits_identity(each),
        "nonfinite": nonfinite,
        "missing": missing,
        "include": parse_patterns(include, "include"),
        "exclude": parse_patterns(exclude, "exclude"),
        "global_norm": global_norm,
        "norms": None if norms is None else str(norms),
    }
    saved = None
    if norms is not None:
        saved, plan = open_norms(norms, opened, parameters, budget)
    return opened, plan, each, saved, parameters


def _having(source: Hierarchy, names: list[str], dim: Any) -> tuple[list[str], list[str]]:
    """Those of the arrays that have any of the dimensions, all if there are none, and these."""
    having = {name: source.arrays[name].dimension_names or [] for name in names}
    known = list(dict.fromkeys(d for named in having.values() for d in named if d is not None))
    wanted = parse_dim(dim, known)
    return [name for name in names if not wanted or {*having[name]} & {*wanted}], wanted


def _clipped(source: Hierarchy, name: str, axes: Any, dim: Any, ord: Any) -> Layout:
    """Layout of an array to clip."""
    array = source.arrays[name]
    named = array.dimension_names
    if source.is_group and dim is not None and axes is None:
        dim, axes = None, [a for a, d in enumerate(named or ()) if d in dim]
    try:
        check_source(array, check_dtype)
        parse_ord(ord, array.dtype)
        taken = parse_axes(axes_named(dim, named, axes), array.ndim)
    except DaskClipError as error:
        if name and name not in str(error):
            raise type(error)(f"array {name}: {error}") from error
        raise
    itemsize = array.dtype.itemsize
    return Layout(
        shape=array.shape,
        axes=taken,
        unit=array.unit,
        itemsize=itemsize,
        sum_nbytes=sizing.DEFAULT.sum_nbytes
        or STATE[itemsize // (2 if array.dtype.kind == "c" else 1)],
    )


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
                f"limits are given for {short_repr([*found])} and not for {name or source}; give "
                "each array that is clipped its own, or one for all"
            )
    return {
        name: _usable(found[name], clip_norm, source.arrays[name].shape, axes, options)
        for name, axes in over.items()
    }


def _usable(limits: Any, clip_norm: Any, shape: Any, axes: Any, options: Any) -> Any:
    if isinstance(limits, numbers.Real):
        limits = np.asarray(limits, np.float64)
    if is_zarr_array(limits):
        limits = StoredArray(limits)
    elif not isinstance(limits, StoredArray) and type(limits) is not np.ndarray:
        limits = _opened(limits, options).arrays.get("")
        if limits is None:
            raise InvalidValueError("limits of an array are a group; give an array")
    check_limits_dtype(limits.dtype)
    if isinstance(limits, StoredArray):
        check_source(limits, check_limits_dtype)
    check_limits(limits.shape, clip_norm, shape, axes)
    return limits.astype(np.float64, order="C") if isinstance(limits, np.ndarray) else limits


def _opened(limits: Any, options: Any) -> Hierarchy:
    try:
        return open_source(limits, options)
    except DaskClipError as error:
        raise type(error)(f"limits: {error}") from error


def limits_identity(limits: Mapping[str, Any]) -> Any:
    """Shapes and digests; of what is stored by its names, sizes and times, without reading it."""
    found = {name: _limits_identity(one) for name, one in limits.items()}
    return found.get("", found) or None


def _limits_identity(limits: Any) -> str:
    numpy = isinstance(limits, np.ndarray)
    found = limits if numpy else json.dumps(_there(limits).fingerprint(changes=True)).encode()
    return f"of shape {limits.shape} and digest {durable.digest(found):08x}"


def paths(limits: Mapping[str, Any]) -> list[str]:
    """Files that whoever reads them must see."""
    return [p for one in limits.values() if isinstance(one, StoredArray) for p in _there(one).paths]


def _there(limits: Any) -> Hierarchy:
    return Hierarchy.open(limits.array.store, limits.array.path)


def nbytes(limits: Any) -> int:
    """Bytes of what is held of limits at a time, beside those of a region."""
    if limits is None:
        return 0
    return limits.nbytes if isinstance(limits, np.ndarray) else limits.unit_nbytes


def require_unchanged(source: Hierarchy, limits: dict[str, Any], run: Entry) -> None:
    """Require source and limits to be what they were when the run began."""
    now = source.reread().fingerprint(changes=True)
    if now != run["source"]:
        raise SourceChangedError(
            f"source {source} (chunk {now.get('newest')}) changed during the run; "
            "let nothing write to it and run again"
        )
    if limits_identity(limits) != run["parameters"]["limits"]:
        raise SourceChangedError("limits changed during the run; let nothing write to them")
