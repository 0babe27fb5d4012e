"""From storage to storage: plan, then window by window, then publish."""

from __future__ import annotations

import math
import os
import time
from functools import partial, reduce
from typing import Any, Literal
from uuid import uuid4

import dask
import dask.array as da

from daskclip import storage, tasks
from daskclip.errors import InvalidValueError, shown
from daskclip.factor import finalize
from daskclip.norms import no_block, tree
from daskclip.parameters import (
    NonFinite,
    check_nonfinite,
    parse_axes,
    parse_clip_norm,
    parse_memory,
)
from daskclip.partials import combine
from daskclip.plan import ClipPlan, make_plan
from daskclip.progress import Mode, State, show
from daskclip.publish import check_target, staging
from daskclip.recipes import Constant
from daskclip.report import ClipReport
from daskclip.tasks import Job, Tally
from daskclip.workers import memory_used, running, workers

# bytes that the exact sum of a slice may take; float64 data that spans more than 10**80 takes more
STATE = {2: 24, 4: 80, 8: 80}


def clip_zarr(
    source: Any,
    target: str | os.PathLike[str],
    clip_norm: float,
    axes: Any = None,
    *,
    memory: str | int = "512MiB",
    nonfinite: NonFinite = "propagate",
    missing: Literal["fill", "error"] = "fill",
    storage_options: dict[str, Any] | None = None,
    progress: bool | Mode = False,
) -> ClipReport:
    """Clip a Zarr array into a new one, in bounded memory.

    Parameters
    ----------
    source : str, path or zarr.Array, of any shape
        Floating point or complex array to read; Zarr format 2 or 3, sharded or not.
    target : str or path
        Where the clipped array will be: absent, in an existing folder of a local file system.
        Chunks, shards, codecs, fill value, attributes and dimension names are those of the source.
    clip_norm : float
        See `clip_by_norm`.
    axes : None, int or sequence of int
        Axes over which the norm is taken; None takes all.
    memory : str or int
        Budget of each process that runs blocks, in bytes above its imports, shared by its threads.
    nonfinite : {'propagate', 'omit', 'raise'}
        See `clip_by_norm`.
    missing : {'fill', 'error'}
        Whether chunks that are not stored count as the fill value, or stop the run.
    storage_options : dict, optional
        For a source given as URL.
    progress : bool or {'auto', 'bar', 'lines', 'json', 'none'}
        What is shown on stderr; True is ``'auto'``.

    Returns
    -------
    ClipReport
        Counts, norms, bytes, seconds and memory.

    Raises
    ------
    DaskClipError
        Or one of its kinds, each a builtin error too, before any chunk is read: a parameter or
        the source is rejected (TypeError, ValueError, FileNotFoundError), ``memory`` is too small
        (ValueError), the target exists (FileExistsError) or cannot be written (PermissionError).
        While running: FloatingPointError under ``nonfinite='raise'``, OSError where storage
        fails; then nothing is left behind.

    See Also
    --------
    plan_zarr : What the call would do.
    clip_by_norm : For arrays of NumPy, Dask or Zarr.

    Notes
    -----
    Runs on the active distributed Client if there is one, else on Dask's scheduler for threads.
    Each byte is read once if all blocks that share slices fit the budget together, else twice.
    Each write unit (shard, else chunk) is written by one task only. The target appears by one
    renaming when it is complete.

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
    array, plan, limit = _prepare(
        source, clip_norm, axes, memory, nonfinite, missing, storage_options
    )
    path = check_target(target, storage.local_path(array))
    started = time.monotonic()
    before = memory_used()
    ended = partial(tasks.wait_until_idle, str(path))
    with staging(path) as staged, running(plan.threads, ended) as how:
        job = Job(
            run=str(path),
            plan=plan,
            source=array,
            target=storage.create_like(array, staged),
            clip_norm=limit,
            nonfinite=nonfinite,
            missing=missing,
        )
        total = _run(
            job,
            how,
            lambda done, at: display(
                State(
                    done=done,
                    total=plan.bytes_read,
                    pass_=at,
                    passes=plan.passes,
                    seconds=time.monotonic() - started,
                )
            ),
        )
    after = memory_used()
    grown = [after[k][1] - before.get(k, after[k])[0] for k in after]
    return ClipReport(
        source=storage.location(array),
        target=str(path),
        clip_norm=limit,
        axes=plan.axes,
        slices=total.slices,
        clipped=total.clipped,
        nonfinite=total.nonfinite,
        smallest_norm=total.smallest if total.slices > total.nonfinite else None,
        largest_norm=total.largest if total.slices > total.nonfinite else None,
        bytes_read=plan.bytes_read,
        bytes_written=plan.nbytes,
        passes=plan.passes,
        blocks=plan.blocks,
        seconds=time.monotonic() - started,
        peak_memory=max(grown),
        projected_memory=plan.projected_memory,
    )


def plan_zarr(
    source: Any,
    target: str | os.PathLike[str],
    clip_norm: float,
    axes: Any = None,
    *,
    memory: str | int = "512MiB",
    nonfinite: NonFinite = "propagate",
    missing: Literal["fill", "error"] = "fill",
    storage_options: dict[str, Any] | None = None,
    progress: bool | Mode = False,
) -> ClipPlan:
    """Plan what `clip_zarr` would do with the same arguments; reads metadata, writes nothing.

    Parameters
    ----------
    source, target, clip_norm, axes, memory, nonfinite, missing, storage_options, progress
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
    Costs the same for any size of the array.

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
    array, plan, _ = _prepare(source, clip_norm, axes, memory, nonfinite, missing, storage_options)
    check_target(target, storage.local_path(array))
    return plan


def _prepare(
    source: Any,
    clip_norm: Any,
    axes: Any,
    memory: Any,
    nonfinite: Any,
    missing: Any,
    storage_options: dict[str, Any] | None,
) -> tuple[Any, ClipPlan, float]:
    """Everything that can be refused without reading a chunk."""
    limit = parse_clip_norm(clip_norm)
    check_nonfinite(nonfinite)
    if missing not in ("fill", "error"):
        raise InvalidValueError(f"missing={shown(missing)} is not a policy; use 'fill' or 'error'")
    array = storage.open_source(source, storage_options)
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


def _run(job: Job, how: dict[str, Any], report: Any) -> Tally:
    """All windows, slab by slab; returns the tally of all slices."""
    plan = job.plan
    name = f"daskclip-{uuid4().hex}"
    total = Tally(0, 0, 0, math.inf, -math.inf)
    if not plan.blocks and plan.slices:
        total = Tally(plan.slices, 0, 0, 0.0, 0.0)
    done = 0

    for slabs, windows in plan.windows():
        if plan.passes == 1:
            blocks = next(iter(windows))
            tallies = _compute(job, how, name, tasks.clip_slab, slabs, blocks)
            total = reduce(tasks.add, tallies, total)
            done += plan.window_nbytes(slabs, blocks)
            report(done, 1)
            continue
        sums: list[Any] = []
        for blocks in windows:
            parts = _compute(job, how, name, tasks.sum_block, slabs, blocks, combined=True)
            sums = [combine(pair) for pair in zip(sums, parts, strict=True)] if sums else parts
            done += plan.window_nbytes(slabs, blocks)
            report(done, 1)
        scales = [finalize(p, job.clip_norm, job.source.dtype) for p in sums]
        total = reduce(tasks.add, map(tasks.count, scales), total)
        for blocks in windows:
            _compute(job, how, name, tasks.rescale_block, slabs, blocks, scales)
            done += plan.window_nbytes(slabs, blocks)
            report(done, 2)
    return total


def _compute(
    job: Job,
    how: dict[str, Any],
    name: str,
    function: Any,
    slabs: range,
    blocks: range,
    scales: Any = None,
    combined: bool = False,
) -> list[Any]:
    """One window: ``function`` of every block as one graph; combined to one result a slab."""
    full = f"{function.__name__}-{name}-{slabs.start}-{blocks.start}"
    graph: dict[Any, Any] = {f"job-{full}": (Constant(job),)}
    for i, slab in enumerate(slabs):
        extra: tuple[Any, ...] = ()
        if scales is not None:
            extra = (f"scale-{i}-{full}",)
            graph[extra[0]] = (Constant(scales[i]),)
        for b, index in enumerate(blocks):
            graph[(full, i, b)] = (function, f"job-{full}", slab, index, *extra)
    chunks = ((1,) * len(slabs), (1,) * len(blocks))
    results = da.Array(graph, full, chunks, meta=no_block(2))
    if combined:
        results = tree(results, (1,))
    return list(dask.compute(*results.to_delayed().ravel(), **how))
