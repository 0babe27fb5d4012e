"""From storage to storage: plan, then window by window, then publish."""

from __future__ import annotations

import logging
import math
import os
import time
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal
from uuid import uuid4

from daskclip import storage
from daskclip.blocks import grid
from daskclip.errors import DaskClipError, InvalidValueError, SourceChangedError, shown
from daskclip.journal import Entry
from daskclip.measure import measure_quantile
from daskclip.parameters import (
    NonFinite,
    check_nonfinite,
    parse_axes,
    parse_limit,
    parse_memory,
)
from daskclip.passes import clip_passes
from daskclip.plan import ClipPlan, make_plan
from daskclip.progress import Mode, show
from daskclip.publish import refuse_existing
from daskclip.report import ClipReport
from daskclip.resume import begun, describe, finished, plan_of, resumed
from daskclip.retries import failing
from daskclip.sources import open_source
from daskclip.targets import open_target
from daskclip.tasks import Job
from daskclip.workers import require_alike, workers

log = logging.getLogger("daskclip")
# bytes that the exact sum of a slice may take; float64 data that spans more than 10**80 takes more
STATE = {2: 24, 4: 80, 8: 80}


def clip_zarr(
    source: Any,
    target: str | os.PathLike[str] | None,
    clip_norm: float | str,
    axes: Any = None,
    *,
    memory: str | int = "512MiB",
    nonfinite: NonFinite = "propagate",
    missing: Literal["fill", "error"] = "fill",
    overwrite: bool = False,
    in_place: bool = False,
    storage_options: dict[str, Any] | None = None,
    progress: bool | Mode = False,
    pictures: bool = False,
) -> ClipReport:
    """Clip a Zarr array into a new one, in bounded memory.

    Parameters
    ----------
    source : str, path or zarr.Array, of any shape
        Floating point or complex array to read; Zarr format 2 or 3, sharded or not.
    target : str, path or None
        Where the clipped array will be, in an existing folder of a local file system; None with
        ``in_place``. Chunks, shards, codecs, fill value, attributes and dimension names are those
        of the source.
    clip_norm : float or str
        See `clip_by_norm`; or ``'p99'``, for the quantile of 99 % of the norms of finite slices.
    axes : None, int or sequence of int
        Axes over which the norm is taken; None takes all.
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
    storage_options : dict, optional
        For a source given as URL.
    progress : bool or {'auto', 'bar', 'lines', 'json', 'none'}
        What is shown on stderr; True is ``'auto'``.
    pictures : bool
        Collect what the report shows in notebooks and on its page: histogram, largest norms.

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
    as many such slabs as threads, or they are small), else twice; once more before, if
    ``clip_norm`` is a quantile, which is then told to within 1/512 and kept for a run that resumes.
    Each write unit (shard, else chunk) is written by one task only. The target appears by one
    renaming when it is complete and on disk.

    A run can be killed anywhere: the same call resumes it from the journal in the hidden folder
    ``.NAME.daskclip`` beside the target, and repeats one window of blocks at most. A call that is
    already done reads nothing. Beside the budget, the journal takes 5 bytes a block.

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
    display = show(progress)
    started = time.monotonic()
    with failing("looking at source and target"):
        array, plan, limit = prepare(
            source, clip_norm, axes, memory, nonfinite, missing, storage_options
        )
        place = open_target(target, array, storage_options, overwrite=overwrite, in_place=in_place)
        run = describe(
            array,
            place,
            clip_norm=clip_norm if isinstance(limit, Fraction) else str(limit),
            axes=list(plan.axes),
            nonfinite=nonfinite,
            missing=missing,
        )
    with failing(f"writing {place}"), place.locked() as work:
        report = finished(work, run)
        if report is not None:
            seconds = time.monotonic() - started
            return replace(
                report, status="up to date", bytes_read=0, bytes_written=0, seconds=seconds
            )
        if not (overwrite or in_place):
            refuse_existing(place)
        require_alike([*work.files, *storage.local_paths(array)])
        old = resumed(work, array, run, plan.memory)
        measured = 0
        if isinstance(limit, Fraction) and not old:
            stored = stored_blocks(array, run, plan)
            run["limit"], measured = measure_quantile(limit, array, run, plan, stored, display)
        run = old or begun(work, array, run, plan)
        doing = "resuming" if old else "beginning"
        log.info("%s run %s, %s to %s", doing, run["run"], storage.location(array), place)
        staged, folder = work.staging(array, run["run"])
        job = Job(
            run=f"{run['run']}-{uuid4().hex}",
            plan=plan_of(run),
            source=array,
            target=staged,
            staged=folder,
            in_place=in_place,
            clip_norm=run.get("limit", limit),
            nonfinite=nonfinite,
            missing=missing,
            collect=pictures,
        )
        try:
            stored = stored_blocks(array, run, job.plan)
            report = clip_passes(job, work, display, started, stored, run, measured)
            now = storage.fingerprint(array, changes=True)
            if now != run["source"]:
                key = now.get("newest")
                raise SourceChangedError(
                    f"source {storage.location(array)} (chunk {key}) changed during the run; "
                    "let nothing write to it and run again"
                )
        except DaskClipError as error:
            if error.exit_code == 3:  # the source will not do: there is nothing to resume
                work.clear()
            raise
        if report.status == "clipped":
            work.publish(array, staged, overwrite or in_place)
        else:
            work.clear()
    log.info("%s: %d of %d slices clipped", report.status, report.clipped, report.slices)
    return report


def plan_zarr(
    source: Any,
    target: str | os.PathLike[str] | None,
    clip_norm: float | str,
    axes: Any = None,
    *,
    memory: str | int = "512MiB",
    nonfinite: NonFinite = "propagate",
    missing: Literal["fill", "error"] = "fill",
    overwrite: bool = False,
    in_place: bool = False,
    storage_options: dict[str, Any] | None = None,
    progress: bool | Mode = False,
    pictures: bool = False,
) -> ClipPlan:
    """Plan what `clip_zarr` would do with the same arguments; reads metadata, writes nothing.

    Parameters
    ----------
    source, target, clip_norm, axes, memory, nonfinite, missing
        See `clip_zarr`.
    overwrite, in_place, storage_options, progress, pictures
        See `clip_zarr`.

    Returns
    -------
    ClipPlan
        Blocks, windows, passes, bytes and projected memory.

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
    show(progress)
    with failing("looking at source and target"):
        array, plan, _ = prepare(
            source, clip_norm, axes, memory, nonfinite, missing, storage_options
        )
        place = open_target(target, array, storage_options, overwrite=overwrite, in_place=in_place)
        if not (overwrite or in_place):
            refuse_existing(place)
    return plan


def prepare(
    source: Any,
    clip_norm: Any,
    axes: Any,
    memory: Any,
    nonfinite: Any,
    missing: Any,
    storage_options: dict[str, Any] | None,
) -> tuple[Any, ClipPlan, float | Fraction]:
    """Everything that can be refused without reading a chunk."""
    limit = parse_limit(clip_norm)
    check_nonfinite(nonfinite)
    if missing not in ("fill", "error"):
        raise InvalidValueError(f"missing={shown(missing)} is not a policy; use 'fill' or 'error'")
    array = open_source(source, storage_options)
    processes, threads, fewest = workers()
    real = array.dtype.itemsize // (2 if array.dtype.kind == "c" else 1)
    plan = make_plan(
        shape=array.shape,
        axes=parse_axes(axes, array.ndim),
        unit=storage.write_unit(array),
        itemsize=array.dtype.itemsize,
        state=STATE[real],
        memory=parse_memory(memory),
        processes=processes,
        threads=threads,
        fewest=fewest,
    )
    return array, plan, limit


def stored_blocks(array: Any, run: Entry, plan: ClipPlan) -> Any:
    """Whether anything of each block is stored; None if all of them have to be looked at."""
    units = math.prod(grid(plan.shape, plan.unit))
    parameters = run["parameters"]
    everything = parameters["missing"] == "error" or parameters["clip_norm"] == "nan"
    if everything or run["source"].get("chunks", units) >= units:
        return None
    return storage.stored_blocks(array, plan.block, plan.weights, plan.blocks)
