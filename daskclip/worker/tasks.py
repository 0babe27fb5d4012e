"""Tasks of a worker for one block. Every function may run twice, with the same result."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from daskclip.errors import SourceChangedError, StorageError, VerificationError
from daskclip.grid import Box, box_shape, boxes, common_index, offset_box, without_axes
from daskclip.numerics import (
    Array,
    Partial,
    Scale,
    SliceCounts,
    clip_block,
    combine,
    finalize,
    kept_shape,
    nan_if_infinite,
    no_sums,
    partial_norm,
    require_finite,
    rescale,
    term_count,
)
from daskclip.storage import durable, retrying_block, translating_storage_errors
from daskclip.worker.context import PROCESS, ArrayTask
from daskclip.worker.slices import block_limit, count_region, slices_of
from daskclip.worker.sums import SavedSums, Sums, add_sums, loaded

EMPTY = 0  # digest of a block without stored chunks


class BlockResult(NamedTuple):
    """Result of a task for one block."""

    digest: int | None = None
    """Digest of what was stored; None if nothing was written."""
    counts: SliceCounts | None = None
    """Counts over the slices of the block, if it holds them whole."""


def scale_of(task: ArrayTask, slab: int, sums: Sums | SavedSums, terms: int) -> Scale:
    """Scale of the slices of a slab, which have so many terms, by their whole sums."""
    # the sums lack blocks that are not stored, whose zeros are terms all the same
    partial = loaded(sums).partial._replace(terms=terms)
    # tf.clip_by_global_norm makes everything NaN if the norm is infinite
    if task.shared:
        partial = nan_if_infinite(partial)
    limit, zero = block_limit(task, task.plan.region(slab, 0)), task.nonfinite == "zero"
    return finalize(partial, limit, task.source.dtype, zero=zero, normalize=task.normalize)


def count_scale(task: ArrayTask, slab: int, scale: Scale) -> tuple[SliceCounts, bool]:
    """Count the slices of a slab, and tell whether one becomes NaN; writes norms where wanted."""
    # the first block of a slab meets all its slices
    region = task.plan.region(slab, 0)
    if task.only_measures:
        save_norms(task, scale, region)
    limit, is_nan = block_limit(task, region), np.isnan(scale.factor)
    return count_region(task, scale, limit, region), bool(is_nan.any())


def run_batch(
    function: Callable[..., BlockResult],
    tasks: Sequence[ArrayTask],
    blocks: Sequence[tuple[int, ...]],
    scales: Sequence[Scale],
) -> list[BlockResult]:
    """Run a function of this module on some blocks, one after the other.

    ``blocks`` has slab and number of each and, for some functions, a digest that is expected;
    ``scales`` has a scale of each, or nothing. What they write has been synced to disk on return.
    No block starts once the attempt has been drained in this process.
    """
    first, results = tasks[0], []
    # functions of one pass take no scale
    extra: Sequence[tuple[Scale, ...]] = [(scale,) for scale in scales] or [()] * len(tasks)
    for task, (slab, block, *expected), scale in zip(tasks, blocks, extra, strict=True):
        with PROCESS.running_block(first.attempt_id):
            results.append(function(task, slab, block, *scale, *expected))
    with PROCESS.running_block(first.attempt_id):
        _sync(first, results)
    return results


def _sync(task: ArrayTask, results: Sequence[BlockResult]) -> None:
    """Sync what some blocks have written to disk."""
    # once for all: each call waits for what all threads have written until then
    if task.staged and any(result.digest is not None for result in results):
        with translating_storage_errors(f"writing {task.target}"):
            durable.sync_filesystem(Path(task.staged))


def sum_batch(
    function: Callable[..., Sums], tasks: Sequence[ArrayTask], blocks: Sequence[tuple[int, ...]]
) -> Sums:
    """Run `sum_block` on some blocks of a slab, and combine their sums; see `run_batch`."""
    parts = []
    for task, at in zip(tasks, blocks, strict=True):
        with PROCESS.running_block(task.attempt_id):
            parts.append(function(task, *at))
    return add_sums(parts)


def sum_block(task: ArrayTask, slab: int, block: int) -> Sums:
    """First pass: read a block, return its exact sums."""
    region = task.plan.region(slab, block)
    x = None if _is_empty(task, region) else _read_first(task, region)
    digest = EMPTY if x is None else durable.digest(x)
    return Sums(_sums(task, region, x), {(task.number, slab, block): digest}, task.plan.state)


def _sums(task: ArrayTask, region: Box, x: Array | None) -> Partial:
    """Exact sums of the values of a block; None if nothing of it is stored."""
    plan, omit = task.plan, task.nonfinite == "omit"
    if x is None:
        sums = _zero_sums(task, region)
    else:
        sums = partial_norm(x, plan.axes, omit_nan=omit, ord=task.ord, max_nbytes=plan.state)
    # the arrays that share slices may have different dimensions
    return sums.reshape(box_shape(slices_of(task, region))) if task.shared else sums


def rescale_block(
    task: ArrayTask, slab: int, block: int, scale: Scale, expected: int
) -> BlockResult:
    """Second pass: read a block again, write it rescaled."""
    region = task.plan.region(slab, block)
    empty = _stays_empty(task, region, expected)
    if _is_unchanged(scale, empty):
        return BlockResult(_keep(task, region, empty))
    x = _read_same(task, region, expected, empty)
    _rescale(task, x, scale)
    return BlockResult(_write(task, region, x))


def _rescale(task: ArrayTask, x: Array, scale: Scale) -> None:
    """Rescale the values of a block in place."""
    # factors that arrays share have no reduced axes
    rescale(x, scale.reshape(kept_shape(x.shape, task.plan.axes)) if task.shared else scale, x)


def clip_together(tasks: Sequence[ArrayTask], slab: int) -> list[BlockResult]:
    """One pass: read the blocks of all arrays that are a slab together, write them clipped."""
    first, nbytes = tasks[0], [task.plan.buffer_nbytes for task in tasks]
    with PROCESS.running_block(first.attempt_id):
        buffer, _ = PROCESS.buffer(first.attempt_id, sum(nbytes))
        total, blocks = no_sums(box_shape(slices_of(first, first.plan.region(slab, 0)))), []
        for task, end, size in zip(tasks, accumulate(nbytes), nbytes, strict=True):
            block = _read_part(task, slab, buffer[end - size : end])
            # at once, while the values are in the cache
            parts = [_sums(task, block.region, None if block.is_empty else block.x), total]
            total = combine(parts, max_nbytes=task.plan.state)
            blocks.append(block)
        terms = sum(term_count(t.plan.shape, t.plan.axes, t.source.dtype) for t in tasks)
        sums = Sums(total, {}, first.plan.state)
        one_each = {task.source.dtype.str: task for task in tasks}
        scales = {name: scale_of(task, slab, sums, terms) for name, task in one_each.items()}
        results = [_write_rescaled(block, scales[block.task.source.dtype.str]) for block in blocks]
        counts, _ = count_scale(first, slab, scales[first.source.dtype.str])
        _sync(first, results)
        return [results[0]._replace(counts=counts), *results[1:]]


class HeldBlock(NamedTuple):
    """Values of a block, held with those of other arrays; empty ones are zeros, not stored."""

    task: ArrayTask
    region: Box
    x: Array
    is_empty: bool


def _read_part(task: ArrayTask, slab: int, buffer: Array) -> HeldBlock:
    """Read the block of an array that is its part of a slab."""
    region = task.plan.region(slab, 0)
    is_empty = _is_empty(task, region)
    read = _read if is_empty else _read_first
    return HeldBlock(task, region, read(task, region, buffer), is_empty)


def _write_rescaled(block: HeldBlock, scale: Scale) -> BlockResult:
    """Write the values of a block rescaled."""
    task, region, x, is_empty = block
    if _is_unchanged(scale, is_empty):
        return BlockResult(_keep(task, region, is_empty))
    _rescale(task, x, scale)
    return BlockResult(_write(task, region, x))


def clip_slab(task: ArrayTask, slab: int, block: int) -> BlockResult:
    """One pass: read a block that is a whole slab, write it clipped."""
    region = task.plan.region(slab, block)
    x, limit, scale = _clipped(task, region)
    counts = count_region(task, scale, limit, region)
    if x is None or _is_unchanged(scale, empty=False):
        return BlockResult(_keep(task, region, x is None), counts)
    return BlockResult(_write(task, region, x), counts)


def count_slab(task: ArrayTask, slab: int, block: int) -> BlockResult:
    """One pass that clips nothing: read a block that is a whole slab, count its slices."""
    region = task.plan.region(slab, block)
    _, limit, scale = _clipped(task, region)
    return BlockResult(save_norms(task, scale, region), count_region(task, scale, limit, region))


def save_norms(task: ArrayTask, scale: Scale, region: Box) -> int | None:
    """Write the norms of the slices that meet a region, if there is an array for them."""
    if task.target is None:
        return None
    kept = without_axes(region, task.plan.axes)
    return _write(task, kept, scale.norm.reshape(box_shape(kept)))


def copy_block(task: ArrayTask, slab: int, block: int) -> BlockResult:
    """Last pass, in place: copy the files of a block that stays as it is."""
    return BlockResult(_copy(task, task.plan.region(slab, block)))


def check_block(task: ArrayTask, slab: int, block: int, expected: int) -> BlockResult:
    """Compare the files of a block with the digest they had when they were written."""
    region, source = task.plan.region(slab, block), task.source
    if source.is_flat:
        # its files are not those of the target, to which it was copied
        for part in _units(task, region):
            _require_same(task, part, retrying_block("reading", source, part, source.read))
    elif retrying_block("reading", source, region, source.digest) != expected:
        raise VerificationError(
            f"block {source.describe(region)} (chunk {source.last_changed(region)}) is not what "
            "was written; clip it again"
        )
    return BlockResult()


def compare_block(
    task: ArrayTask, slab: int, block: int, scale: Scale, expected: int
) -> BlockResult:
    """Second pass of a verification: rescale a block again, compare it with the target."""
    region = task.plan.region(slab, block)
    x = _read_same(task, region, expected, _stays_empty(task, region, expected))
    _rescale(task, x, scale)
    return _compare(task, region, x)


def compare_slab(task: ArrayTask, slab: int, block: int) -> BlockResult:
    """Verification in one pass: clip a block that is a whole slab again, and compare it."""
    region = task.plan.region(slab, block)
    x, *_ = _clipped(task, region)
    return _compare(task, region, _read(task, region) if x is None else x)


def _compare(task: ArrayTask, region: Box, x: Array) -> BlockResult:
    for part in _units(task, region):
        _require_same(task, part, x[common_index(part, region)])
    return BlockResult()


def _units(task: ArrayTask, region: Box) -> Iterator[Box]:
    """Units of a region: compared one at a time, so that memory is as planned."""
    return (offset_box(inside, region) for inside in boxes(box_shape(region), task.plan.unit))


def _require_same(task: ArrayTask, part: Box, x: Array) -> None:
    """Require the values of a unit in the target."""
    target = task.written
    stored = retrying_block("reading", target, part, target.read)
    # as bytes: NaN does not equal itself, and -0.0 equals 0.0
    if stored.tobytes() != x.tobytes():
        raise VerificationError(
            f"{target.describe(part)} is not what clipping {task.source} gives; clip it again"
        )


def _clipped(task: ArrayTask, region: Box) -> tuple[Array | None, float | Array, Scale]:
    """Clipped values of a block that is a whole slab, its limit and its scale.

    The values are None if nothing of it is stored.
    """
    limit = block_limit(task, region)
    if _is_empty(task, region):
        return None, limit, finalize(_zero_sums(task, region), limit, task.source.dtype)
    x, policy = _read_first(task, region), task.nonfinite
    x, scale = clip_block(
        x, limit, task.plan.axes, omit_nan=policy == "omit", zero=policy == "zero",
        normalize=bool(task.normalize), ord=task.ord, out=x,
    )  # fmt: skip
    return x, limit, scale


def _is_empty(task: ArrayTask, region: Box) -> bool:
    """Whether a block is all zeros because nothing of it is stored."""
    return task.missing == "fill" and task.source.is_empty(region)


def _stays_empty(task: ArrayTask, region: Box, expected: int) -> bool:
    """Whether a block that was empty in the first pass still is."""
    return expected == EMPTY and _is_empty(task, region)


def _zero_sums(task: ArrayTask, region: Box) -> Partial:
    """The exact sums of zeros."""
    shape, axes = box_shape(region), task.plan.axes
    kept, terms = kept_shape(shape, axes), term_count(shape, axes, task.source.dtype)
    return no_sums(kept)._replace(terms=terms, ord=task.ord)


def _is_unchanged(scale: Scale, empty: bool) -> bool:
    """Whether clipping leaves the files of a block as they are."""
    return bool((np.isfinite(scale.factor) if empty else scale.factor == 1.0).all())


def _keep(task: ArrayTask, region: Box, empty: bool) -> int | None:
    """Copy an unchanged block, except in place."""
    # in place, blocks are copied last, and only if another block was clipped
    if task.in_place:
        return None
    return EMPTY if empty else _copy(task, region)


def _copy(task: ArrayTask, region: Box) -> int:
    # here and before writing: a file written late would make the folder of an ended run again
    _require_staged(task)
    copy = partial(task.source.copy_to, task.written)
    return retrying_block("writing", task.written, region, copy)


def _write(task: ArrayTask, region: Box, x: Array) -> int:
    """Write the values of a region, and return the digest of what is stored."""
    _require_staged(task)
    target = task.written

    def write(part: Box) -> int:
        return target.write(part, x[common_index(part, region)])

    return retrying_block("writing", target, region, write)


def _require_staged(task: ArrayTask) -> None:
    """Refuse to write for a run that has ended, which this process may not know."""
    if task.staged and not os.path.exists(task.staged):
        raise StorageError(f"the run that wrote to {task.staged} has ended; run again")


def _read_same(task: ArrayTask, region: Box, expected: int, empty: bool) -> Array:
    """Read a block again, and require the values of the first pass."""
    x, source = _read(task, region), task.source
    if not empty and durable.digest(x) != expected:
        raise SourceChangedError(
            f"block {source.describe(region)} (chunk {source.last_changed(region)}) changed "
            "between the passes; let nothing write to it and run again"
        )
    return x


def _read_first(task: ArrayTask, region: Box, buffer: Array | None = None) -> Array:
    """Read a block for the first time: the second pass has nothing left to refuse."""
    x, unit = _read(task, region, buffer), task.plan.unit
    if task.nonfinite == "raise":
        # an infinite limit exempts slices, but not if they are only measured
        limit = 0.0 if task.only_measures else block_limit(task, region)
        start = [s.start for s in region]
        if task.shared:
            slices = np.broadcast_to(limit, box_shape(slices_of(task, region)))
            limit = slices.reshape(kept_shape(x.shape, task.plan.axes))

        def chunk_at(element: Sequence[int]) -> list[int]:
            return [i // u for i, u in zip(element, unit, strict=True)]

        require_finite(x, task.plan.axes, limit, start, chunk_at)
    return x


def _read(task: ArrayTask, region: Box, buffer: Array | None = None) -> Array:
    """Read a block into a buffer, by default that of this thread, which its next block reuses."""
    source, new = task.source, True
    nbytes = math.prod(task.plan.block) * source.dtype.itemsize
    if buffer is None:
        buffer, new = PROCESS.buffer(task.attempt_id, nbytes)
    if new:
        # Once it has freed an allocation of this size, glibc keeps such memory for later ones.
        # Otherwise each codec decodes to fresh pages, which takes a third of its time.
        np.empty(2 * source.unit_nbytes, np.uint8)
    elements = buffer[:nbytes].view(source.dtype)

    def read(part: Box) -> Array:
        shape = box_shape(part)
        return source.read(part, task.missing, elements[: math.prod(shape)].reshape(shape))

    return retrying_block("reading", source, region, read)
