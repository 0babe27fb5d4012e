"""From storage to storage: plan, then block by block, then publish."""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal, ParamSpec, TypeVar

from daskclip.arguments import Axes, Dim, NonFinite
from daskclip.engine.attempt import measure, run_attempt, with_room_for_sums
from daskclip.engine.cluster import leaving_worker_pool
from daskclip.engine.request import ClipRequest, Prepared, prepare
from daskclip.engine.run_record import (
    find_finished,
    find_unfinished,
    replan,
    stage_run,
    start_journal,
)
from daskclip.errors import DaskClipError, InvalidValueError, interrupts_first
from daskclip.plan import ClipPlan, GroupPlan
from daskclip.report import ClipReport, Mode
from daskclip.storage import translating_storage_errors
from daskclip.target import RunRecord, Target, open_target

log = logging.getLogger("daskclip")
P = ParamSpec("P")
R = TypeVar("R")


@interrupts_first()
@leaving_worker_pool()
def clip_zarr(
    source: object,
    target: str | os.PathLike[str] | None,
    clip_norm: float | str | None = None,
    axes: Axes = None,
    *,
    ord: float = 2,
    limits: object = None,
    memory: str | int = "512MiB",
    nonfinite: NonFinite = "propagate",
    normalize: bool = False,
    missing: Literal["fill", "error"] = "fill",
    overwrite: bool = False,
    in_place: bool = False,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    global_norm: bool = False,
    storage_options: dict[str, Any] | None = None,
    progress: bool | Mode = False,
    dim: Dim = None,
    pictures: bool = False,
    norms: object = None,
) -> ClipReport:
    """Clip a Zarr array, or the arrays of a group, into a new one in bounded memory.

    Parameters
    ----------
    source : str, path, zarr.Array, zarr.Group, zarr store or NumPy array, of any shape
        Floating point or complex array to read, in Zarr format 2 or 3, sharded or not, in a
        ``.npy`` or ``.safetensors`` file (see `open_flat`), or in memory. In a group, every such
        array except coordinates is clipped by its own norms, and everything else is copied byte for
        byte. Arrays whose attributes say that integers are packed, or that numbers stand for
        missing values, are refused.
    target : str, path, zarr store or None
        Where to write the clipped array: a path in an existing local folder, a URL, or a zarr
        store and path; None with ``in_place``. Chunks, shards, codecs, fill value, attributes and
        dimension names are those of the source; of one that is not Zarr, format 3 with chunks of
        about 4 MiB, compressed with zstd.
    clip_norm : float or str
        See `clip_by_norm`. A string such as ``'p99'`` is a percentile of the norms of the source:
        the norm that 99 % of the finite slices do not exceed. Here a limit below 0 or NaN is
        refused, since it would destroy the data.
    axes : None, int, sequence of int or slice
        Axes over which the norm is taken; None takes all. A slice is taken of the axes of each
        array: ``slice(1, None)`` leaves out the first.
    ord, limits
        See `clip_by_norm`. Limits are a NumPy array, or an array in storage that is read by
        region; for a group, one array for all, or a group or dict with limits by name.
    memory : str or int
        Memory budget of each worker process in bytes, beyond its imports, shared by its threads.
    nonfinite : {'propagate', 'omit', 'raise', 'zero'}
        See `clip_by_norm`.
    normalize : bool
        See `clip_by_norm` and, with ``global_norm``, `clip_by_global_norm`.
    missing : {'fill', 'error'}
        Treat chunks that are not stored as the fill value, or stop the run.
    overwrite : bool
        Replace an array at ``target``, which is kept until the new one is complete.
    in_place : bool
        Replace the source, which is kept until the clipped one is complete. Nothing is written if
        there is nothing to clip.
    include, exclude : str or sequence of str, optional
        Names of arrays in a group, or patterns such as ``'layers/*'``. Only arrays that match
        ``include`` and not ``exclude`` are clipped.
    global_norm : bool
        Clip all arrays by one factor, that of their common norm, as `clip_by_global_norm` does;
        with ``axes`` or ``dim``, by one for each kept position. Kept axes have the same lengths in
        all arrays, and limits the shape of the norms.
    storage_options : dict, optional
        Options that fsspec gets for sources, targets, limits and norms given as URLs.
    progress : bool or {'auto', 'bar', 'lines', 'json', 'none'}
        Progress on stderr; True is ``'auto'``.
    dim : str or sequence of str, optional
        Dimensions over which the norm is taken, by the names stored with the array; instead of
        ``axes``. Arrays in a group that have none of them are copied; with ``global_norm``, those
        with just the dimensions that are kept are clipped too.
    pictures : bool
        Collect the data for the report's pictures.
    norms : str, path or zarr store, optional
        Norms that `stats_zarr` saved for the same source, axes and arrays. They are not computed
        again, so that each byte is read once.

    Returns
    -------
    ClipReport
        Counts, norms, bytes, seconds and memory.

    Raises
    ------
    DaskClipError
        Or a subclass, which is a builtin error too. Before any chunk is read: a parameter or the
        source is rejected (TypeError, ValueError, FileNotFoundError), ``memory`` is too small
        (ValueError), the target exists, is being written or has an unfinished run with other
        parameters (FileExistsError), or cannot be written (PermissionError). During the run:
        FloatingPointError under ``nonfinite='raise'`` and ValueError if the source changes, which
        leave nothing behind, and OSError if storage fails, after which the same call resumes.

    See Also
    --------
    plan_zarr : Plan without reading a chunk.
    clip_by_norm : Clip arrays of NumPy, Dask or Zarr.

    Notes
    -----
    Blocks run on the active distributed Client, or else on Dask's threads. A cluster without
    workers is waited for as long as it lives, with a line in the log each minute. A task can call
    this too: blocks use its thread meanwhile, as in `distributed.worker_client`. Each byte is read
    once if the blocks that share slices, with ``global_norm`` those of all arrays, fit the budget
    together, and there are as many such slabs as threads or they are small; otherwise each byte is
    read twice. Each chunk or shard is written
    by one task only. The target appears by one rename when it is complete and on disk.

    A run can be killed anywhere. The same call resumes it from the journal in the hidden folder
    ``.NAME.daskclip`` beside the target, and repeats the blocks that were under way: at most two
    windows of the plan. A call whose run is complete reads nothing, if the store of the source has
    versions of what it holds: times of files, ETags, snapshots. From another store, such as memory
    or a web server, the source is read once more before and once after a run. The client needs 5
    bytes a block for the journal beside the budget. The budget has room for limits: one more chunk,
    or the whole NumPy array.

    References
    ----------
    `tf.clip_by_norm <https://www.tensorflow.org/api_docs/python/tf/clip_by_norm>`_

    Examples
    --------
    >>> import tempfile, numpy as np, zarr
    >>> folder = tempfile.mkdtemp()
    >>> x = zarr.create_array(f"{folder}/x", shape=(2, 2), chunks=(1, 2), dtype="float32")
    >>> x[:] = [[3, 4], [0.3, 0.4]]
    >>> report = clip_zarr(f"{folder}/x", f"{folder}/y", 1.0, axes=1)
    >>> report.slices, report.clipped, report.largest_norm
    (2, 1, 5.0)
    >>> zarr.open_array(f"{folder}/y")[0]
    array([0.59999996, 0.79999995], dtype=float32)
    """
    request = ClipRequest(
        source=source, target=target, clip_norm=clip_norm, axes=axes, ord=ord, limits=limits,
        memory=memory, nonfinite=nonfinite, normalize=normalize, missing=missing,
        overwrite=overwrite, in_place=in_place, include=include, exclude=exclude,
        global_norm=global_norm, storage_options=storage_options, progress=progress, dim=dim,
        pictures=pictures, norms=norms,
    )  # fmt: skip
    return with_room_for_sums(_clip, request)


def _clip(request: ClipRequest) -> ClipReport:
    prepared, opened = _open(request)
    # before the lock is taken, since listing the source can take minutes
    with translating_storage_errors("looking at source and target"):
        run = prepared.run_record(opened)
    with translating_storage_errors(f"writing {opened}"), opened.locked() as transaction:
        report = find_finished(transaction, run, in_place=request.in_place)
        if report is not None:
            took = time.monotonic() - request.started
            return replace(report, status="up to date", bytes_read=0, bytes_written=0, seconds=took)
        # not before: a run in place that has ended has changed its own source
        _require_free(prepared, opened)
        prepared.require_alike_workers(*transaction.files)
        # a run that is resumed keeps its blocks, even if another budget would give others
        old = find_unfinished(transaction, prepared.source, run)
        # a run that is resumed has its limit in the journal
        measured = 0
        if old is not None:
            run, prepared = old, replace(prepared, planned=replan(old, request.memory_nbytes))
        else:
            plan = prepared.plan  # raises before anything is staged if it does not fit
            # before the norms are measured, which reads all chunks
            run = stage_run(transaction, prepared.source, run)
            if isinstance(request.limit, Fraction):
                limit, measured = _measure_quantile(prepared, run, request.limit)
                run = replace(run, limit=limit)
            run = start_journal(transaction, run, plan)
        doing = "resuming" if old else "beginning"
        log.info("%s run %s, %s to %s", doing, run.id, prepared.source, opened)
        try:
            report = run_attempt(prepared, run, transaction, measured)
        except DaskClipError as error:
            # the journal would stand in the way of the next call, which has to begin again
            if not error.resumable:
                transaction.clear()
            raise
    log.info("%s: %d of %d slices clipped", report.status, report.clipped, report.slices)
    return report


def _open(request: ClipRequest) -> tuple[Prepared, Target]:
    with translating_storage_errors("looking at source and target"):
        prepared = prepare(request)
        target = open_target(
            request.destination, prepared.source, request.storage_options,
            overwrite=request.overwrite, in_place=request.in_place,
        )  # fmt: skip
        # before the source is listed; a run that has ended or begun needs no new plan
        if not (target.exists() or target.unfinished()):
            _ = prepared.plan
    return prepared, target


def _require_free(prepared: Prepared, target: Target) -> None:
    """Refuse a target whose place is taken, and saved norms of another source."""
    # again, under the lock: another run may have made the target since it was checked
    if not prepared.request.replaces:
        target.require_free(prepared.source)
    if prepared.saved_norms is not None:
        prepared.saved_norms.require_of(prepared.source)


def _measure_quantile(prepared: Prepared, run: RunRecord, percent: Fraction) -> tuple[float, int]:
    """Norm that so many percent of the norms do not exceed, and the bytes read for it."""
    # their histogram is saved too, so that nothing is read
    if prepared.saved_norms is not None:
        total, read = prepared.saved_norms.total, 0
    else:
        passes = measure(prepared, run, None, {})
        total, read = passes.total, passes.bytes_read
    if total.histogram is None or total.slices == total.nonfinite:
        raise InvalidValueError(
            f"source {prepared.source} has no finite slice, so that no norm is a limit; give "
            "clip_norm as a number"
        )
    return total.histogram.quantile(percent, total.smallest, total.largest), read


def _with_arguments_of(
    function: Callable[P, object],
) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Show the arguments of a function as those of another one, to people and to type checkers."""

    def decorate(other: Callable[..., R]) -> Callable[P, R]:
        returned = inspect.signature(other).return_annotation
        # `inspect.signature` and documentation tools look for this attribute
        signature = inspect.signature(function).replace(return_annotation=returned)
        vars(other)["__signature__"] = signature
        return other

    return decorate


@_with_arguments_of(clip_zarr)
def plan_zarr(
    source: object,
    target: object,
    clip_norm: object = None,
    axes: Axes = None,
    **options: Any,  # those of `clip_zarr`, as the decorator says
) -> ClipPlan | GroupPlan:
    """Plan what `clip_zarr` would do with the same arguments; reads metadata, writes nothing.

    Parameters
    ----------
    source, target, clip_norm, axes, ord, limits, memory, nonfinite, normalize, missing
        See `clip_zarr`.
    overwrite, in_place, include, exclude, global_norm, storage_options, progress, dim, pictures
        See `clip_zarr`.
    norms
        See `clip_zarr`.

    Returns
    -------
    ClipPlan or GroupPlan
        Blocks, passes, bytes and projected memory; for a group of all its arrays.

    Raises
    ------
    DaskClipError
        What `clip_zarr` would raise before it reads a chunk.

    See Also
    --------
    clip_zarr : Does it.

    Notes
    -----
    Costs the same for any size of the array. What is read before for a quantile is not in it.

    Examples
    --------
    >>> import tempfile, zarr
    >>> folder = tempfile.mkdtemp()
    >>> x = zarr.create_array(f"{folder}/x", shape=(100, 64), chunks=(10, 64), dtype="float32")
    >>> plan = plan_zarr(x, f"{folder}/y", 1.0, axes=1)
    >>> plan.passes, plan.block
    (1, (100, 64))
    """
    request = ClipRequest(source=source, target=target, clip_norm=clip_norm, axes=axes, **options)
    prepared, opened = _open(request)
    with translating_storage_errors("looking at source and target"):
        _require_free(prepared, opened)
    return prepared.plan if prepared.source.is_group else prepared.plan.plans[""]
