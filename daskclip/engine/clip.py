"""From storage to storage: plan, then window by window, then publish."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from daskclip.arguments import NonFinite, parse_clip_norm_or_quantile
from daskclip.engine.attempt import array_tasks, clip_passes
from daskclip.engine.cluster import require_alike
from daskclip.engine.measure import measure_quantile
from daskclip.engine.request import paths, prepare, require_unchanged
from daskclip.engine.run_record import (
    find_finished,
    find_unfinished,
    plan_from_json,
    run_identity,
    start_run,
)
from daskclip.errors import DaskClipError
from daskclip.report import ClipReport, Mode, progress_printer
from daskclip.storage import translating_storage_errors
from daskclip.target import open_target, refuse_existing

if TYPE_CHECKING:
    from daskclip.plan import ClipPlan, GroupPlan

log = logging.getLogger("daskclip")


def clip_zarr(
    source: Any,
    target: str | os.PathLike[str] | None,
    clip_norm: float | str | None = None,
    axes: Any = None,
    *,
    ord: float = 2,
    limits: Any = None,
    memory: str | int = "512MiB",
    nonfinite: NonFinite = "propagate",
    missing: Literal["fill", "error"] = "fill",
    overwrite: bool = False,
    in_place: bool = False,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    global_norm: bool = False,
    storage_options: dict[str, Any] | None = None,
    progress: bool | Mode = False,
    dim: Any = None,
    pictures: bool = False,
    norms: str | os.PathLike[str] | None = None,
) -> ClipReport:
    """Clip a Zarr array, or the arrays of a group, into a new one, in bounded memory.

    Parameters
    ----------
    source : str, path, zarr.Array or zarr.Group, of any shape
        Floating point or complex array to read; Zarr format 2 or 3, sharded or not. Of a group,
        every such array that is no coordinate is clipped by its own norms; all else that is in it
        is carried over as it is, byte for byte. Refused where attributes say that integers are
        packed or that numbers stand for missing values.
    target : str, path, zarr store or None
        Where the clipped array will be: a path in an existing folder of a local file system, a
        URL, or a store and path of zarr; None with ``in_place``. Chunks, shards, codecs, fill
        value, attributes and dimension names are those of the source.
    clip_norm : float or str
        See `clip_by_norm`; or ``'p99'``, for the quantile of 99 % of the norms of finite slices.
    axes : None, int or sequence of int
        Axes over which the norm is taken; None takes all.
    ord, limits
        See `clip_by_norm`; limits are a NumPy array, or stored as ``source`` and read by region.
        Of a group, they are those of each array, or a group or dict with limits by name.
    memory : str or int
        Budget of each process that runs blocks, in bytes above its imports, shared by its threads.
    nonfinite : {'propagate', 'omit', 'raise'}
        See `clip_by_norm`.
    missing : {'fill', 'error'}
        Whether chunks that are not stored count as the fill value, or stop the run.
    overwrite : bool
        Replace an array at ``target``, which stays until the new one is complete.
    in_place : bool
        Replace the source, which stays until the clipped one is complete; nothing is written if
        there is nothing to clip.
    include, exclude : str or sequence of str, optional
        Names of arrays of a group, or patterns such as ``'layers/*'``: only those that match
        ``include`` and not ``exclude`` are clipped.
    global_norm : bool
        All arrays are clipped by one factor, that of their common norm, as
        `clip_by_global_norm` does; without ``axes``.
    storage_options : dict, optional
        Options of fsspec for a source, a target and limits that are given as URLs.
    progress : bool or {'auto', 'bar', 'lines', 'json', 'none'}
        What is shown on stderr; True is ``'auto'``.
    dim : str or sequence of str, optional
        Dimensions over which the norm is taken, by the names that are stored with the array;
        instead of ``axes``. Of a group, arrays without any of them are carried over.
    pictures : bool
        Collect what the pictures of the report in a notebook show.
    norms : str or path, optional
        Norms of the same source that `stats_zarr` has saved, over the same axes: none is taken
        again, and each byte is read once.

    Returns
    -------
    ClipReport
        Counts, norms, bytes, seconds and memory.

    Raises
    ------
    DaskClipError
        Or one of its kinds, each a builtin error too, before any chunk is read: a parameter or
        the source is rejected (TypeError, ValueError, FileNotFoundError), ``memory`` is too small
        (ValueError), the target exists, is being written or has an unfinished run with other
        parameters (FileExistsError) or cannot be written (PermissionError). While running:
        FloatingPointError under ``nonfinite='raise'`` and ValueError where the source changes,
        then nothing is left behind; OSError where storage fails, then the same call resumes.

    See Also
    --------
    plan_zarr : What the call would do.
    clip_by_norm : For arrays of NumPy, Dask or Zarr.

    Notes
    -----
    Runs on the active distributed Client if there is one, else on Dask's scheduler for threads.
    Each byte is read once if all blocks that share slices fit the budget together (and there are
    as many such slabs as threads, or they are small), else twice.
    Each write unit (shard, else chunk) is written by one task only. The target appears by one
    renaming when it is complete and on disk.

    A run can be killed anywhere: the same call resumes it from the journal in the hidden folder
    ``.NAME.daskclip`` beside the target, and repeats one window of blocks at most. A call that is
    already done reads nothing. Beside the budget, the journal takes 5 bytes a block. Limits are
    within the 48 bytes that the plan has for a slice, and a chunk of them, or a NumPy array, is
    counted as one more chunk. Stored ones are told from others as the source is.

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
    display = progress_printer(progress)
    started = time.monotonic()
    with translating_storage_errors("looking at source and target"):
        opened, plan, each, saved, parameters = prepare(
            source, clip_norm, axes, dim,
            memory=memory, nonfinite=nonfinite, missing=missing, include=include, exclude=exclude,
            global_norm=global_norm, ord=ord, limits=limits, storage_options=storage_options,
            norms=norms,
        )  # fmt: skip
        place = open_target(target, opened, storage_options, overwrite=overwrite, in_place=in_place)
        run = run_identity(opened, place, **parameters)
    with translating_storage_errors(f"writing {place}"), place.locked() as work:
        report = find_finished(work, run)
        if report is not None:
            seconds = time.monotonic() - started
            return replace(
                report, status="up to date", bytes_read=0, bytes_written=0, seconds=seconds
            )
        if not (overwrite or in_place):
            refuse_existing(place)
        if saved:  # not before: after a run in place its source is gone
            saved.require_of(opened)
        require_alike([*work.files, *opened.paths, *paths(each)])
        old = find_unfinished(work, opened, run, plan.memory)
        limit, measured = parameters["clip_norm"], 0
        if limit.startswith("p") and not old:
            percent = parse_clip_norm_or_quantile(limit)
            run["limit"], measured = measure_quantile(percent, opened, run, plan, display, saved)
        run = old or start_run(work, opened, run, plan)
        plan = plan_from_json(run)
        doing = "resuming" if old else "beginning"
        log.info("%s run %s, %s to %s", doing, run["run"], opened, place)
        staged, folder = work.staging(opened, run["run"])
        jobs = array_tasks(
            plan, opened, staged, f"{run['run']}-{uuid4().hex}", each,
            staged=folder, in_place=in_place, ord=float(ord),
            clip_norm=None if each else float(run.get("limit", limit)), nonfinite=nonfinite,
            missing=missing, collect=pictures,
        )  # fmt: skip
        try:
            report = clip_passes(
                jobs, plan, opened, staged, work, display, started, run, measured, saved
            )
            require_unchanged(opened, each, run)
        except DaskClipError as error:
            if not error.resumable:
                work.clear()
            raise
        if report.status == "clipped":
            work.publish(opened, staged, overwrite or in_place)
        else:
            work.clear()
    log.info("%s: %d of %d slices clipped", report.status, report.clipped, report.slices)
    return report


def plan_zarr(
    source: Any,
    target: str | os.PathLike[str] | None,
    clip_norm: float | str | None = None,
    axes: Any = None,
    *,
    ord: float = 2,
    limits: Any = None,
    memory: str | int = "512MiB",
    nonfinite: NonFinite = "propagate",
    missing: Literal["fill", "error"] = "fill",
    overwrite: bool = False,
    in_place: bool = False,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    global_norm: bool = False,
    storage_options: dict[str, Any] | None = None,
    progress: bool | Mode = False,
    dim: Any = None,
    pictures: bool = False,
    norms: str | os.PathLike[str] | None = None,
) -> ClipPlan | GroupPlan:
    """Plan what `clip_zarr` would do with the same arguments; reads metadata, writes nothing.

    Parameters
    ----------
    source, target, clip_norm, axes, ord, limits, memory, nonfinite, missing
        See `clip_zarr`.
    overwrite, in_place, include, exclude, global_norm, storage_options, progress, dim, pictures
        See `clip_zarr`.
    norms
        See `clip_zarr`.

    Returns
    -------
    ClipPlan or GroupPlan
        Blocks, windows, passes, bytes and projected memory; for a group of all its arrays.

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
    progress_printer(progress)
    with translating_storage_errors("looking at source and target"):
        opened, plan, _, saved, _ = prepare(
            source, clip_norm, axes, dim,
            memory=memory, nonfinite=nonfinite, missing=missing, include=include, exclude=exclude,
            global_norm=global_norm, ord=ord, limits=limits, storage_options=storage_options,
            norms=norms,
        )  # fmt: skip
        place = open_target(target, opened, storage_options, overwrite=overwrite, in_place=in_place)
        if not (overwrite or in_place):
            refuse_existing(place)
        if saved:
            saved.require_of(opened)
    return plan if opened.is_group else plan.plans[""]
