"""What a worker does with one block. Every function can run twice and does the same again."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from threading import Condition, get_ident
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from daskclip import files, regions, storage
from daskclip.attempts import attempting, shown_region
from daskclip.blocks import Box, box_shape, boxes, index, shift
from daskclip.errors import SourceChangedError, StorageError, VerificationError
from daskclip.exact import partial_norm
from daskclip.factor import Scale, finalize
from daskclip.numerics import clip_block, require_finite, rescale
from daskclip.partials import Partial, combine
from daskclip.plan import ClipPlan
from daskclip.tally import Tally, collect, count

EMPTY = 0  # digest of a block of which nothing is stored


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Job:
    """What all blocks of a run have in common."""

    run: str
    """Name of this attempt at the run."""
    plan: ClipPlan
    """Where the blocks are."""
    source: Any
    """Zarr array to read."""
    target: Any
    """Zarr array to write, or to compare with; None if only norms are wanted."""
    staged: str | None
    """Folder of the target, for a run that writes to files."""
    in_place: bool
    """Whether blocks that stay as they are need not be written at once."""
    clip_norm: float
    """The limit."""
    nonfinite: str
    """Policy for NaN and infinity."""
    missing: str
    """Policy for chunks that are not stored."""
    collect: bool = False
    """Whether the norms are counted by their size too, and the largest kept."""


class Sums(NamedTuple):
    """What the first pass knows of some blocks of a slab."""

    partial: Partial
    """Their exact sums."""
    digests: dict[int, int]
    """Digests of what was read, by block."""


def add_sums(parts: list[Sums]) -> Sums:
    """Sums of all the blocks."""
    digests = {block: d for p in parts for block, d in p.digests.items()}
    return Sums(combine([p.partial for p in parts]), digests)


_rooms: WeakKeyDictionary[Job, dict[int, Any]] = WeakKeyDictionary()
_blocks: Counter[str] = Counter()
_ended: set[str] = set()
_changed = Condition()


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Count the blocks under way in this process; none begins after the end of its run."""

    @wraps(function)
    def counted(job: Job, *args: Any) -> Any:
        with _changed:
            if job.run in _ended:
                raise StorageError("the run was stopped")
            _blocks[job.run] += 1
        try:
            return function(job, *args)
        finally:
            with _changed:
                _blocks[job.run] -= 1
                _changed.notify_all()

    return counted


def end(run: str) -> None:
    """Let no block of ``run`` begin in this process, and return once none is under way."""
    with _changed:
        _ended.add(run)
        _changed.wait_for(lambda: not _blocks[run])


@_counted
def sum_block(job: Job, slab: int, block: int) -> Sums:
    """First pass: read a block, return its exact sums."""
    region = job.plan.region(slab, block)
    if _is_empty(job, region):
        return Sums(_no_sums(job, region), {job.plan.number(slab, block): EMPTY})
    x = _read_first(job, region)
    partial = partial_norm(x, job.plan.axes, omit_nan=job.nonfinite == "omit")
    return Sums(partial, {job.plan.number(slab, block): files.digest(x)})


@_counted
def rescale_block(job: Job, slab: int, block: int, scale: Scale, expected: int) -> int | None:
    """Second pass: read a block again, write it rescaled; returns the digest of its files."""
    region = job.plan.region(slab, block)
    empty = _stays_empty(job, region, expected)
    if _untouched(job, scale, empty):
        return _keep(job, region, empty)
    x = _read_same(job, region, expected, empty)
    rescale(x, scale, x)
    return _write(job, region, x)


@_counted
def clip_slab(job: Job, slab: int, block: int) -> tuple[Tally, int | None]:
    """One pass: read a block that is a whole slab, write it clipped."""
    region = job.plan.region(slab, block)
    x, scale = _clipped(job, region)
    counted = tally(job, scale, region)
    if _untouched(job, scale, x is None):
        return counted, _keep(job, region, x is None)
    if x is None:
        x = rescale(_read_first(job, region), scale)
    return counted, _write(job, region, x)


@_counted
def count_slab(job: Job, slab: int, block: int) -> Tally:
    """One pass that writes nothing: read a block that is a whole slab."""
    region = job.plan.region(slab, block)
    return tally(job, _clipped(job, region)[1], region)


@_counted
def copy_block(job: Job, slab: int, block: int) -> int:
    """Last pass, in place: copy the files of a block that stays as it is."""
    return _copy(job, job.plan.region(slab, block))


@_counted
def check_block(job: Job, slab: int, block: int, expected: int) -> None:
    """Compare the files of a block with the digest they had when they were written."""
    region = job.plan.region(slab, block)

    def digest(part: Box) -> int:
        return storage.digest_stored(job.source, regions.keys(job.source, part))

    with attempting("reading", job.source, region, digest) as digested:
        if digested(region) != expected:
            key = regions.last_changed(job.source, region)
            raise VerificationError(
                f"block {shown_region(region)} of {storage.location(job.source)} (chunk {key}) is "
                "not what was written; clip it again"
            )


@_counted
def compare_block(job: Job, slab: int, block: int, scale: Scale, expected: int) -> None:
    """Second pass of a verification: rescale a block again and compare it with what is there."""
    region = job.plan.region(slab, block)
    x = _read_same(job, region, expected, _stays_empty(job, region, expected))
    rescale(x, scale, x)
    for inside in boxes(box_shape(region), job.plan.unit):
        part = shift(inside, region)
        read = partial(regions.read, job.target, missing="fill")
        with attempting("reading", job.target, part, read) as reading:
            same = reading(part).tobytes() == x[index(inside)].tobytes()
        if not same:
            raise VerificationError(
                f"{shown_region(part)} of {storage.location(job.target)} is not what clipping "
                f"{storage.location(job.source)} gives; clip it again"
            )


def tally(job: Job, scale: Scale, region: Box) -> Tally:
    """What is counted of the slices that meet a region."""
    start = [s.start for s in region]
    return collect(scale, job.plan.axes, start, job.plan.shape) if job.collect else count(scale)


def _clipped(job: Job, region: Box) -> tuple[Any, Scale]:
    """Values of a block that is a whole slab, clipped; None if nothing is stored of it."""
    if _is_empty(job, region):
        return None, finalize(_no_sums(job, region), job.clip_norm, job.source.dtype)
    x = _read_first(job, region)
    omit = job.nonfinite == "omit"
    return clip_block(x, job.clip_norm, job.plan.axes, omit_nan=omit, out=x)


def _is_empty(job: Job, region: Box) -> bool:
    """Whether a block is all zeros because nothing is stored."""
    return job.missing == "fill" and regions.is_empty(job.source, region)


def _stays_empty(job: Job, region: Box, expected: int) -> bool:
    """Whether a block that was empty in the first pass is so still."""
    return expected == EMPTY and _is_empty(job, region)


def _no_sums(job: Job, region: Box) -> Partial:
    """The exact sums of zeros."""
    shape = box_shape(region)
    kept = tuple(1 if k in job.plan.axes else n for k, n in enumerate(shape))
    flags = np.zeros(kept, np.uint8)
    return Partial(np.zeros((0, *kept), np.uint32), 0, flags, terms(job, shape))


def terms(job: Job, shape: tuple[int, ...]) -> int:
    """Squares in the sum of each slice of a region."""
    number = math.prod(shape[a] for a in job.plan.axes)
    return number * (2 if job.source.dtype.kind == "c" else 1)


def _untouched(job: Job, scale: Scale, empty: bool) -> bool:
    """Whether the files of a block may stay as they are."""
    return bool((np.isfinite(scale.factor) if empty else scale.factor == 1.0).all())


def _keep(job: Job, region: Box, empty: bool) -> int | None:
    """Copy a block; in place only once it is known that there is something to clip."""
    if job.in_place:
        return None
    return EMPTY if empty else _copy(job, region)


def _copy(job: Job, region: Box) -> int:
    return _synced(job, region, lambda part: regions.copy(job.source, job.target, part))


def _write(job: Job, region: Box, x: Any) -> int:
    def write(part: Box) -> int:
        inside = shift(part, tuple(slice(-s.start, None) for s in region))
        return regions.write(job.target, part, x[index(inside)])

    return _synced(job, region, write)


def _synced(job: Job, region: Box, write: Callable[[Box], int]) -> int:
    """Digest of what ``write`` stores, once it is there to stay."""

    def checked(part: Box) -> int:
        if job.staged and not os.path.exists(job.staged):
            raise StorageError(f"the run that wrote to {job.staged} has ended; run again")
        return write(part)

    with attempting("writing", job.target, region, checked) as written:
        digest: int = written(region)
        if job.staged:
            files.sync(Path(job.staged))
        return digest


def _read_same(job: Job, region: Box, expected: int, empty: bool) -> Any:
    """Read a second time what was read before."""
    x = _read(job, region)
    if not empty and files.digest(x) != expected:
        key = regions.last_changed(job.source, region)
        raise SourceChangedError(
            f"block {shown_region(region)} of {storage.location(job.source)} (chunk {key}) changed "
            "between the passes; let nothing write to it and run again"
        )
    return x


def _read_first(job: Job, region: Box) -> Any:
    """Read for the first time: the second pass has nothing left to refuse."""
    x = _read(job, region)
    if job.nonfinite == "raise" and job.clip_norm != math.inf:
        unit = job.plan.unit
        require_finite(
            x,
            job.plan.axes,
            [s.start for s in region],
            lambda place: [i // u for i, u in zip(place, unit, strict=True)],
        )
    return x


def _read(job: Job, region: Box) -> Any:
    """Values of a block, in memory that the next block of this thread takes."""
    rooms, me = _rooms.setdefault(job, {}), get_ident()
    if me not in rooms:
        size = math.prod(job.plan.block) * job.source.dtype.itemsize
        rooms[me] = np.frombuffer(files.memory(size), job.source.dtype)
        # glibc keeps for the next chunk what is as large as what it once had to take from the
        # system; fresh pages for all that codecs return would cost a third of their time
        np.empty(2 * storage.unit_nbytes(job.source), np.uint8)
    room = rooms[me]

    def read(part: Box) -> Any:
        values = room[: math.prod(box_shape(part))].reshape(box_shape(part))
        return regions.read(job.source, part, job.missing, values)

    with attempting("reading", job.source, region, read) as reading:
        return reading(region)
