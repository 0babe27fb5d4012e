"""Everything that can be refused, and all that is planned, before a chunk is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from daskclip.errors import DaskClipError, InvalidTypeError, InvalidValueError, shown
from daskclip.group_plan import GroupPlan, plan_group
from daskclip.hierarchy import Hierarchy
from daskclip.members import members, patterns
from daskclip.parameters import check_nonfinite, parse_axes, parse_clip_norm, parse_memory
from daskclip.sources import check_source, open_source
from daskclip.storage import write_unit
from daskclip.workers import workers

# bytes that the exact sum of a slice may take; float64 data that spans more than 10**80 takes more
STATE = {2: 24, 4: 80, 8: 80}


def prepare(
    source: Any,
    clip_norm: Any,
    axes: Any,
    *,
    memory: Any,
    nonfinite: Any,
    missing: Any,
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    global_norm: Any,
    storage_options: dict[str, Any] | None,
) -> tuple[Hierarchy, GroupPlan, dict[str, Any]]:
    """What is at a source, how it will be clipped, and what tells this from another run of it."""
    limit = parse_clip_norm(clip_norm)
    check_nonfinite(nonfinite)
    if missing not in ("fill", "error"):
        raise InvalidValueError(f"missing={shown(missing)} is not a policy; use 'fill' or 'error'")
    if not isinstance(global_norm, bool):
        raise InvalidTypeError(
            f"global_norm {shown(global_norm)} is a {type(global_norm).__name__}; give a bool"
        )
    if global_norm and axes is not None:
        raise InvalidValueError(
            f"a global norm has no axes, and axes {shown(axes)} are given; leave out one of them"
        )
    budget = parse_memory(memory)
    opened = open_source(source, storage_options)
    clipped = {name: _clipped(opened, name, axes) for name in members(opened, include, exclude)}
    copied = {
        name: {"shape": array.shape, "unit": write_unit(array), "itemsize": array.dtype.itemsize}
        for name, array in opened.arrays.items()
        if name not in clipped
    }
    processes, threads, fewest = workers()
    common = {"memory": budget, "processes": processes, "fewest": fewest}
    plan = plan_group(clipped, copied, threads, global_norm, **common)
    taken = axes if opened.is_group else plan.plans[""].axes
    parameters = {
        "clip_norm": str(limit),
        "axes": None if taken is None else [int(a) for a in np.atleast_1d(taken)],
        "nonfinite": nonfinite,
        "missing": missing,
        "include": patterns(include, "include"),
        "exclude": patterns(exclude, "exclude"),
        "global_norm": global_norm,
    }
    return opened, plan, parameters


def _clipped(source: Hierarchy, name: str, axes: Any) -> dict[str, Any]:
    """What the plan of an array has to know."""
    array = source.arrays[name]
    try:
        check_source(array)
        taken = parse_axes(axes, array.ndim)
    except DaskClipError as error:
        if name and name not in str(error):
            raise type(error)(f"array {name}: {error}") from error
        raise
    itemsize = array.dtype.itemsize
    return {
        "shape": array.shape,
        "axes": taken,
        "unit": write_unit(array),
        "itemsize": itemsize,
        "state": STATE[itemsize // (2 if array.dtype.kind == "c" else 1)],
    }
