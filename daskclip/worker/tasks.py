"""What a worker does with one block. Every function can run twice and does the same again."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from daskclip.errors import SourceChangedError, StorageError, VerificationError
from daskclip.grid import Box, box_shape, boxes, index, shift
from daskclip.numerics import (
    Partial,
    Scale,
    SliceCounts,
    clip_block,
    combine,
    count_slices,
    count_with_histogram,
    finalize,
    partial_norm,
    require_finite,
    rescale,
)
from daskclip.storage import array as storage
from daskclip.storage import durable, format_region, regions, retrying_block
from daskclip.worker.context import ArrayTask, block_buffer, running_block
from daskclip.worker.limits import read_limits

EMPTY = 0  # digest of a block of which nothing is stored


class Sums(NamedTuple):
    """What the first pass knows of some blocks of a slab."""

    partial: Partial
    """Their exact sums."""
    digests: dict[tuple[int, int, int], int]
    """Digests of what was read, by number of the job, slab, and block in it."""
    state: int
    """Bytes of the sum of a slice that are planned for; 0 for any number."""


def add_sums(parts: list[Sums]) -> Sums:
    """Sums of all the blocks."""
    digests = {block: d for p in parts for block, d in p.digests.items()}
    state = parts[0].state
    return Sums(combine([p.partial for p in parts], max_nbytes=state), digests, state)


def run_batch(
    function: Callable[..., Any],
    jobs: Sequence[ArrayTask],
    cells: Sequence[tuple[int, ...]],
    scales: Sequence[Scale],
) -> list[Any]:
    """``function`` of some blocks, one after the other; what they write is there to stay then.

    None begins in this process after the end of its run.
    """
    folder = jobs[0].staged
    with running_block(jobs[0].run):
        more: list[tuple[Any, ...]] = [(scale,) for scale in scales] or [()] * len(jobs)
        done = [
            function(job, cell[0], cell[1], *scale, *cell[2:])
            for job, cell, scale in zip(jobs, cells, more, strict=True)
        ]
        if folder and function is not sum_block and any(map(_is_written, done)):
            region = jobs[0].plan.region(*cells[0][:2])
            with retrying_block("writing", jobs[0].target, region, lambda _: None):
                durable.sync_filesystem(Path(folder))
        return done


def _is_written(result: Any) -> bool:
    return (result[1] if isinstance(result, tuple) else result) is not None


def sum_block(job: ArrayTask, slab: int, block: int) -> Sums:
    """First pass: read a block, return its exact sums."""
    region, place = job.plan.region(slab, block), (job.number, slab, block)
    if _is_empty(job, region):
        sums, digest = _no_sums(job, region), EMPTY
    else:
        x = _read_first(job, region)
        omit = job.nonfinite == "omit"
        sums = partial_norm(x, job.plan.axes, omit_nan=omit, ord=job.ord, max_nbytes=job.plan.state)
        digest = durable.digest(x)
    if job.shared:  # with arrays of other dimensions
        sums = sums._replace(limbs=sums.limbs.reshape(-1), flags=sums.flags.reshape(()))
    return Sums(sums, {place: digest}, job.plan.state)


def rescale_block(job: ArrayTask, slab: int, block: int, scale: Scale, expected: int) -> int | None:
    """Second pass: read a block again, write it rescaled; returns the digest of its files."""
    region = job.plan.region(slab, block)
    empty = _stays_empty(job, region, expected)
    if _untouched(job, scale, empty):
        return _keep(job, region, empty)
    x = _read_same(job, region, expected, empty)
    rescale(x, scale, x)
    return _write(job, region, x)


def clip_slab(job: ArrayTask, slab: int, block: int) -> tuple[SliceCounts, int | None]:
    """One pass: read a block that is a whole slab, write it clipped."""
    region = job.plan.region(slab, block)
    x, scale = _clipped(job, region)
    counted = count_region(job, scale, region)
    if _untouched(job, scale, x is None):
        return counted, _keep(job, region, x is None)
    if x is None:
        x = rescale(_read_first(job, region), scale)
    return counted, _write(job, region, x)


def count_slab(job: ArrayTask, slab: int, block: int) -> tuple[SliceCounts, int | None]:
    """One pass that clips nothing: read a block that is a whole slab."""
    region = job.plan.region(slab, block)
    scale = _clipped(job, region)[1]
    return count_region(job, scale, region), save_norms(job, scale, region)


def save_norms(job: ArrayTask, scale: Scale, region: Box) -> int | None:
    """Write the norms of the slices that meet a region, if they are wanted."""
    if job.target is None:
        return None
    kept = tuple(s for a, s in enumerate(region) if a not in job.plan.axes)
    return _write(job, kept, scale.norm.reshape(box_shape(kept)))


def copy_block(job: ArrayTask, slab: int, block: int) -> int:
    """Last pass, in place: copy the files of a block that stays as it is."""
    return _copy(job, job.plan.region(slab, block))


def check_block(job: ArrayTask, slab: int, block: int, expected: int) -> None:
    """Compare the files of a block with the digest they had when they were written."""
    region = job.plan.region(slab, block)

    def digest(part: Box) -> int:
        return storage.digest_stored(job.source, regions.keys(job.source, part))

    with retrying_block("reading", job.source, region, digest) as digested:
        if digested(region) != expected:
            key = regions.last_changed(job.source, region)
            raise VerificationError(
                f"block {format_region(region)} of {storage.location(job.source)} (chunk {key}) is "
                "not what was written; clip it again"
            )


def compare_block(job: ArrayTask, slab: int, block: int, scale: Scale, expected: int) -> None:
    """Second pass of a verification: rescale a block again and compare it with what is there."""
    region = job.plan.region(slab, block)
    x = _read_same(job, region, expected, _stays_empty(job, region, expected))
    rescale(x, scale, x)
    for inside in boxes(box_shape(region), job.plan.unit):
        part = shift(inside, region)
        read = partial(regions.read, job.target, missing="fill")
        with retrying_block("reading", job.target, part, read) as reading:
            same = reading(part).tobytes() == x[index(inside)].tobytes()
        if not same:
            raise VerificationError(
                f"{format_region(part)} of {storage.location(job.target)} is not what clipping "
                f"{storage.location(job.source)} gives; clip it again"
            )


def count_region(job: ArrayTask, scale: Scale, region: Box) -> SliceCounts:
    """What is counted of the slices that meet a region."""
    if not job.collect:
        return count_slices(scale)
    if job.shared:
        return count_with_histogram(scale, (), (), ())
    found = count_with_histogram(scale, job.plan.axes, [s.start for s in region], job.plan.shape)
    if not job.name or found.histogram is None:
        return found
    # axes of other arrays are others
    worst = [(norm, [job.name, *place]) for norm, place in found.histogram.largest_slices]
    histogram = found.histogram._replace(largest_slices=worst, clipped=[], largest=[])
    return found._replace(histogram=histogram)


def _clipped(job: ArrayTask, region: Box) -> tuple[Any, Scale]:
    """Values of a block that is a whole slab, clipped; None if nothing is stored of it."""
    limit = block_limit(job, region)
    if _is_empty(job, region):
        return None, finalize(_no_sums(job, region), limit, job.source.dtype)
    x, omit = _read_first(job, region), job.nonfinite == "omit"
    return clip_block(x, limit, job.plan.axes, omit_nan=omit, ord=job.ord, out=x)


def _is_empty(job: ArrayTask, region: Box) -> bool:
    """Whether a block is all zeros because nothing is stored."""
    return job.missing == "fill" and regions.is_empty(job.source, region)


def _stays_empty(job: ArrayTask, region: Box, expected: int) -> bool:
    """Whether a block that was empty in the first pass is so still."""
    return expected == EMPTY and _is_empty(job, region)


def _no_sums(job: ArrayTask, region: Box) -> Partial:
    """The exact sums of zeros."""
    shape = box_shape(region)
    kept = tuple(1 if k in job.plan.axes else n for k, n in enumerate(shape))
    flags = np.zeros(kept, np.uint8)
    return Partial(np.zeros((0, *kept), np.uint32), 0, flags, terms(job, shape), job.ord)


def block_limit(job: ArrayTask, region: Box) -> Any:
    """The limit of the slices of a region, or those of each."""
    return job.clip_norm if job.limits is None else read_limits(job.limits, region, job.missing)


def terms(job: ArrayTask, shape: tuple[int, ...]) -> int:
    """Terms of the sum of each slice of a region."""
    number = math.prod(shape[a] for a in job.plan.axes)
    return number * (2 if job.source.dtype.kind == "c" else 1)


def _untouched(job: ArrayTask, scale: Scale, empty: bool) -> bool:
    """Whether the files of a block may stay as they are."""
    return bool((np.isfinite(scale.factor) if empty else scale.factor == 1.0).all())


def _keep(job: ArrayTask, region: Box, empty: bool) -> int | None:
    """Copy a block; in place only once it is known that there is something to clip."""
    if job.in_place:
        return None
    return EMPTY if empty else _copy(job, region)


def _copy(job: ArrayTask, region: Box) -> int:
    return _stored(job, region, lambda part: regions.copy(job.source, job.target, part))


def _write(job: ArrayTask, region: Box, x: Any) -> int:
    def write(part: Box) -> int:
        inside = shift(part, tuple(slice(-s.start, None) for s in region))
        return regions.write(job.target, part, x[index(inside)])

    return _stored(job, region, write)


def _stored(job: ArrayTask, region: Box, write: Callable[[Box], int]) -> int:
    """Digest of what ``write`` stores."""

    def checked(part: Box) -> int:
        if job.staged and not os.path.exists(job.staged):
            raise StorageError(f"the run that wrote to {job.staged} has ended; run again")
        return write(part)

    with retrying_block("writing", job.target, region, checked) as written:
        digest: int = written(region)
        return digest


def _read_same(job: ArrayTask, region: Box, expected: int, empty: bool) -> Any:
    """Read a second time what was read before."""
    x = _read(job, region)
    if not empty and durable.digest(x) != expected:
        key = regions.last_changed(job.source, region)
        raise SourceChangedError(
            f"block {format_region(region)} of {storage.location(job.source)} (chunk {key}) "
            "changed between the passes; let nothing write to it and run again"
        )
    return x


def _read_first(job: ArrayTask, region: Box) -> Any:
    """Read for the first time: the second pass has nothing left to refuse."""
    x = _read(job, region)
    if job.nonfinite == "raise":
        unit = job.plan.unit
        require_finite(
            x,
            job.plan.axes,
            block_limit(job, region),
            [s.start for s in region],
            lambda place: [i // u for i, u in zip(place, unit, strict=True)],
        )
    return x


def _read(job: ArrayTask, region: Box) -> Any:
    """Values of a block, in memory that the next block of this thread takes."""
    size = math.prod(job.plan.block) * job.source.dtype.itemsize
    room, new = block_buffer(job.run, size)
    if new:
        # glibc keeps for the next chunk what is as large as what it once had to take from the
        # system; fresh pages for all that codecs return would cost a third of their time
        np.empty(2 * storage.unit_nbytes(job.source), np.uint8)
    room = room.view(job.source.dtype)

    def read(part: Box) -> Any:
        values = room[: math.prod(box_shape(part))].reshape(box_shape(part))
        return regions.read(job.source, part, job.missing, values)

    with retrying_block("reading", job.source, region, read) as reading:
        return reading(region)
