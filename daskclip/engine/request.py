"""Arguments, checks and plans of a run: all that happens before a chunk is read."""

from __future__ import annotations

import json
import numbers
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from daskclip import arguments
from daskclip.arguments import Axes, Dim, NonFinite
from daskclip.engine.cluster import memory_of_workers, require_alike, require_shared, workers
from daskclip.engine.saved_norms import SavedNorms, open_norms
from daskclip.errors import (
    DaskClipError,
    InvalidValueError,
    MemoryBudgetError,
    SourceChangedError,
    short_repr,
)
from daskclip.grid import without_axes
from daskclip.numerics import require_limits, require_subnormals, state_nbytes
from daskclip.plan import GroupPlan, Layout, Machine, plan_group, sizing
from daskclip.report import Mode, Show, progress_printer
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
from daskclip.target import DirectoryTarget, Json, RunRecord, Target

Limits = npt.NDArray[np.float64] | StoredArray
LimitsByArray = dict[str, Limits]
"""NumPy or Zarr arrays by the name of the array that they limit; empty with one limit for all."""
Options = dict[str, Any] | None
Planned = GroupPlan | MemoryBudgetError


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipRequest:
    """Arguments of `clip_zarr`, checked as far as that can be without the source."""

    source: object
    target: object = None
    clip_norm: object = None
    axes: Axes = None
    ord: object = 2
    limits: object = None
    memory: str | int = "512MiB"
    nonfinite: NonFinite = "propagate"
    normalize: bool = False
    missing: Literal["fill", "error"] = "fill"
    overwrite: bool = False
    in_place: bool = False
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    global_norm: bool = False
    storage_options: dict[str, Any] | None = None
    progress: bool | Mode = False
    dim: Dim = None
    pictures: bool = False
    norms: object = None
    clips: bool = True
    """Whether anything is clipped; else norms are taken, and there is no limit."""
    wide: bool = False
    """Whether the plan must have room for the sums of values of any spread."""
    started: float = field(init=False, default_factory=time.monotonic)
    """When the call began, in seconds."""
    show: Show = field(init=False)
    """Function that shows progress."""
    limit: float | Fraction | None = field(init=False, default=None)
    """The limit, or the percentage of the norms that are within it; None with ``limits``."""
    memory_nbytes: int = field(init=False)
    """The budget in bytes."""

    def __post_init__(self) -> None:
        # limits are parsed in this thread, whatever thread computes
        require_subnormals()
        # the only way to set a field of a frozen dataclass
        object.__setattr__(self, "show", progress_printer(self.progress))
        if self.clips and self.limits is None:
            limit = arguments.parse_clip_norm_or_quantile(self.clip_norm)
            if isinstance(limit, float):
                require_limits(limit, "clip_norm")
            object.__setattr__(self, "limit", limit)
        arguments.check_nonfinite(self.nonfinite)
        arguments.check_flag(self.normalize, "normalize")
        if self.missing not in ("fill", "error"):
            raise InvalidValueError(
                f"missing={short_repr(self.missing)} is not a policy; use 'fill' or 'error'"
            )
        self._check_global_norm()
        self._check_target()
        object.__setattr__(self, "memory_nbytes", arguments.parse_memory(self.memory))

    def _check_global_norm(self) -> None:
        given = self.global_norm
        arguments.check_flag(given, "global_norm")
        if given and self.limits is not None and self.axes is self.dim is None:
            raise InvalidValueError("a global norm has one limit; give clip_norm, and no limits")

    def _check_target(self) -> None:
        if self.in_place and (self.overwrite or self.target is not None):
            raise InvalidValueError(
                "in place there is no target and nothing else to overwrite; leave out the target, "
                "and --overwrite"
            )
        if self.clips and not self.in_place and self.target is None:
            raise InvalidValueError(
                "there is no target; give its path, or clip in place (--in-place)"
            )

    @property
    def destination(self) -> object:
        """Target, or in place the source, as the caller named it."""
        return self.source if self.in_place else self.target

    @property
    def replaces(self) -> bool:
        """Whether the target takes the place of something."""
        return self.overwrite or self.in_place


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request whose source, limits and saved norms are open, with its plan."""

    request: ClipRequest
    source: Hierarchy
    planned: Planned
    """The plan of a new run, or why there is none; an unfinished run has its own plan."""
    limits_by_array: LimitsByArray
    saved_norms: SavedNorms | None
    parameters: Json
    """Arguments that the result depends on: a run is resumed only with equal ones."""

    @property
    def plan(self) -> GroupPlan:
        """The plan; raises if there is none."""
        if isinstance(self.planned, MemoryBudgetError):
            arguments.require_unit(self.request.memory)
            raise self.planned
        return self.planned

    def run_record(self, target: Target | None = None) -> RunRecord:
        """Record of a run to a target, up to what is known before it begins."""
        between = {} if target is None else {"source": str(self.source), "target": str(target)}
        # listed once, before anything is read: `require_unchanged` compares with this
        whole = self.request.clips and not self.request.in_place
        as_files = isinstance(target, DirectoryTarget)
        fingerprint = self.source.fingerprint(changes=True, whole=whole, as_files=as_files)
        return RunRecord(parameters=between | self.parameters, source=fingerprint)

    def require_alike_workers(self, *paths: str) -> None:
        """Refuse workers of other versions, or that do not see some paths, source or limits."""
        stored = [one for one in self.limits_by_array.values() if isinstance(one, StoredArray)]
        require_shared([self.source, *map(_hierarchy, stored)])
        limits = [path for one in stored for path in _hierarchy(one).paths]
        require_alike([*paths, *self.source.paths, *limits])

    def require_unchanged(self, run: RunRecord) -> None:
        """Require source and limits to be what they were when a run began."""
        now = self.source.reread().fingerprint(changes=True)
        if now != run.source:
            chunk = f" (chunk {now['newest']})" if now.get("newest") else ""
            raise SourceChangedError(
                f"source {self.source}{chunk} changed during the run; let nothing write to it and "
                "run again"
            )
        if limits_identity(self.limits_by_array) != run.parameters["limits"]:
            raise SourceChangedError("limits changed during the run; let nothing write to them")


def prepare(request: ClipRequest) -> Prepared:
    """Open what a request names, refuse what cannot be clipped correctly, and plan the run."""
    options = request.storage_options
    source, axes, dim = open_source(request.source, options), request.axes, request.dim
    names = select_arrays(source, request.include, request.exclude, arguments.DTYPES)
    if source.is_group and dim is not None:
        names, dim = _having(request, source, names)
        # no dimension is asked for: each element is a slice, as with axes=[]
        if not dim and axes is None:
            axes, dim = [], None
    clipped = {name: _layout(request, source, name, axes, dim) for name in names}
    if request.global_norm:
        clipped = _in_common(source, clipped, dim)
    axes_by_array = {name: layout.axes for name, layout in clipped.items()}
    limits_by_array = open_limits(
        request.limits, request.clip_norm, source, axes_by_array, options, request.global_norm
    )
    for name, limits in limits_by_array.items():
        # a NumPy array is sent to workers as a whole, a stored one is read chunk by chunk
        nbytes = limits.nbytes if isinstance(limits, np.ndarray) else limits.unit_nbytes
        clipped[name] = replace(clipped[name], limits_nbytes=nbytes)
    # -1 and 1 may be the same axis of an array; arrays of a group have any number of axes
    if not source.is_group:
        axes, dim = clipped[""].axes, None
    parameters = _parameters(request, axes, dim, limits_by_array)
    saved, plan = None, _plan(request, source, clipped)
    # saved sums belong to the blocks of an older plan, which this run then has to use
    if request.norms is not None:
        saved, plan = open_norms(request.norms, source, parameters, request.memory_nbytes, options)
    return Prepared(request, source, plan, limits_by_array, saved, parameters)


def _plan(request: ClipRequest, source: Hierarchy, clipped: dict[str, Layout]) -> Planned:
    copied = {
        name: Layout(shape=array.shape, unit=array.unit, itemsize=array.dtype.itemsize)
        for name, array in source.arrays.items()
        if name not in clipped
    }
    # sizes are looked up here and not imported by name, since tests replace them
    processes, threads, fewest = workers()
    smallest, left = memory_of_workers() or ("", request.memory_nbytes)
    memory = min(request.memory_nbytes, left)
    sizes = sizing.DEFAULT
    sizes = replace(sizes, usual_sum_nbytes=sys.maxsize) if request.wide else sizes
    machine = Machine(
        processes=processes, threads=threads, fewest=fewest, memory=memory, sizing=sizes
    )
    try:
        return plan_group(clipped, copied, machine, request.global_norm)
    except MemoryBudgetError as error:
        more = f" on workers with more than {smallest} has" * (memory < request.memory_nbytes)
        return MemoryBudgetError(f"{error}{more}", error.need)


def _parameters(
    request: ClipRequest, axes: Axes, dim: object, limits_by_array: LimitsByArray
) -> Json:
    # JSON types only, so that they equal those that are read back from a journal
    quantile = isinstance(request.limit, Fraction)
    return {
        "clip_norm": request.clip_norm if quantile else str(request.limit),
        "axes": arguments.axes_as_json(axes),
        "dim": dim,
        "ord": float(request.ord),  # type: ignore[arg-type]
        "limits": limits_identity(limits_by_array),
        "nonfinite": request.nonfinite,
        "normalize": request.normalize,
        "missing": request.missing,
        "include": parse_patterns(request.include, "include"),
        "exclude": parse_patterns(request.exclude, "exclude"),
        "global_norm": request.global_norm,
        "norms": None if request.norms is None else str(request.norms),
    }


def _having(request: ClipRequest, source: Hierarchy, names: list[str]) -> tuple[list[str], Dim]:
    """Arrays with any of the dimensions that are asked for, and these; all arrays if none is."""
    having = {k: source.dimension_names(k) or [None] * source.arrays[k].ndim for k in names}
    known = list(dict.fromkeys(d for named in having.values() for d in named if d is not None))
    wanted = arguments.parse_dim(request.dim, known)
    found = [name for name in names if not wanted or {*having[name]} & {*wanted}]
    if request.global_norm and wanted:
        # elements of arrays of just the dimensions that are kept are part of the slices
        kept = {*having[found[0]]} - {*wanted}
        found += [name for name in names if {*having[name]} == kept]
    return found, wanted


def _layout(request: ClipRequest, source: Hierarchy, name: str, axes: Axes, dim: Any) -> Layout:
    """Check an array that is clipped, and take what its plan depends on."""
    array = source.arrays[name]
    named = None if dim is None else source.dimension_names(name)
    if source.is_group and dim is not None and axes is None:
        dim, axes = None, [a for a, d in enumerate(named or ()) if d in dim]
    try:
        check_source(array, arguments.check_stored_dtype)
        arguments.parse_ord(request.ord, array.dtype)
        axes = arguments.axes_named(dim, named, axes)
        taken = arguments.parse_axes(axes, array.ndim, may_be_none=request.global_norm)
    except DaskClipError as error:
        # some messages have the path of the array already
        if name and f"/{name}" not in str(error):
            raise type(error)(f"array {name}: {error}") from error
        raise
    shape, unit, dtype = array.shape, array.unit, array.dtype
    most = sizing.DEFAULT.sum_nbytes or state_nbytes(dtype)
    return Layout(shape=shape, axes=taken, unit=unit, itemsize=dtype.itemsize, sum_nbytes=most)


def _in_common(source: Hierarchy, clipped: dict[str, Layout], dim: object) -> dict[str, Layout]:
    """Layouts of arrays that have norms in common; refuse those that keep different axes."""
    arguments.check_kept_shapes({f"array {k}": one.kept_shape for k, one in clipped.items()})
    if dim is not None:  # axes of equal lengths may be other dimensions
        names = {k: source.dimension_names(k) or () for k in clipped}
        kept = {f"array {k}": without_axes(names[k], one.axes) for k, one in clipped.items()}
        arguments.check_kept_shapes(kept, "dimensions")
    dtypes = len({source.arrays[name].dtype for name in clipped})
    return {name: replace(one, dtypes=dtypes) for name, one in clipped.items()}


# --- limits of each slice ------------------------------------------------------------------------


def open_limits(
    limits: object,
    clip_norm: object,
    source: Hierarchy,
    axes_by_array: Mapping[str, tuple[int, ...]],
    options: Options,
    in_common: bool,
) -> LimitsByArray:
    """Open the limits of the arrays that are clipped; reads metadata only.

    If these have their norms ``in_common``, they have one array of limits, of the kept shape.
    """
    if limits is None:
        return {}
    if in_common and isinstance(limits, Mapping):
        raise InvalidValueError(
            f"limits are given for {short_repr([*limits])}, and arrays that have norms in common "
            "have one array of limits; give that"
        )
    for one in limits.values() if isinstance(limits, Mapping) else [limits]:
        arguments.check_unit(one, "an array of limits")
    if isinstance(limits, Mapping):
        found = dict(limits)
    elif type(limits) is np.ndarray or isinstance(limits, numbers.Real):
        found = dict.fromkeys(axes_by_array, limits)
    else:
        opened = _open(limits, options)
        one = opened.arrays.get("")
        found = opened.arrays if one is None else dict.fromkeys(axes_by_array, one)
    for name in axes_by_array:
        if name not in found:
            raise InvalidValueError(
                f"limits are given for {short_repr([*found])} and not for {name or source}; give "
                "each array that is clipped its own, or one for all"
            )
    shapes = {name: source.arrays[name].shape for name in axes_by_array}
    normed = {
        name: (without_axes(shapes[name], axes), ()) if in_common else (shapes[name], axes)
        for name, axes in axes_by_array.items()
    }
    opened_by_array = {
        name: _open_array(found[name], clip_norm, *norms, options) for name, norms in normed.items()
    }
    for name, values in opened_by_array.items():
        if isinstance(values, np.ndarray):  # stored ones are checked where they are read
            require_limits(values, f"limits of {name}" if name else "limits")
    return opened_by_array


def _open_array(
    limits: Any, clip_norm: object, shape: tuple[int, ...], axes: tuple[int, ...], options: Options
) -> Limits:
    if isinstance(limits, numbers.Real):
        limits = np.asarray(limits, np.float64)
    if is_zarr_array(limits):
        limits = StoredArray(limits)
    # a subclass of ndarray, such as a masked array, is refused by `open_source`
    elif not isinstance(limits, StoredArray) and type(limits) is not np.ndarray:
        limits = _open(limits, options).arrays.get("")
        if limits is None:
            raise InvalidValueError("limits of an array are a group; give an array")
    arguments.check_limits_dtype(limits.dtype)
    if isinstance(limits, StoredArray):
        check_source(limits, arguments.check_limits_dtype)
    arguments.check_limits(limits.shape, clip_norm, shape, axes)
    # a copy: the caller may change the array while blocks are clipped
    return limits.astype(np.float64, order="C") if isinstance(limits, np.ndarray) else limits


def _open(limits: object, options: Options) -> Hierarchy:
    try:
        return open_source(limits, options)
    except DaskClipError as error:
        raise type(error)(f"limits: {error}") from error


def limits_identity(limits_by_array: LimitsByArray) -> Any:
    """Shape and digest of each array; for a stored one, of names, sizes and times of its chunks."""
    found = {name: _identity(limits) for name, limits in limits_by_array.items()}
    return found.get("", found) or None


def _identity(limits: Limits) -> str:
    data: Any = limits
    if isinstance(limits, StoredArray):  # without reading the values, as for the source
        data = json.dumps(_hierarchy(limits).fingerprint(changes=True)).encode()
    return f"of shape {limits.shape} and digest {durable.digest(data):08x}"


def _hierarchy(limits: StoredArray) -> Hierarchy:
    return Hierarchy.open(limits.array.store, limits.array.path)
