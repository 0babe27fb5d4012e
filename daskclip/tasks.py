"""What a worker does with one block. Every function can run twice and does the same again."""

from __future__ import annotations

import ctypes
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, wraps
from threading import Condition
from typing import Any, NamedTuple

from daskclip import storage
from daskclip.blocks import Box
from daskclip.errors import DaskClipError, StorageError, reason
from daskclip.exact import partial_norm
from daskclip.factor import Scale
from daskclip.numerics import clip_block, require_finite, rescale
from daskclip.partials import Partial
from daskclip.plan import ClipPlan

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all blocks of a run have in common."""

    run: str
    """Name of the run."""
    plan: ClipPlan
    """Where the blocks are."""
    source: Any
    """Zarr array to read."""
    target: Any
    """Zarr array to write, in staging."""
    clip_norm: float
    """The limit."""
    nonfinite: str
    """Policy for NaN and infinity."""
    missing: str
    """Policy for chunks that are not stored."""


class Tally(NamedTuple):
    """Counts over slices."""

    slices: int
    """Slices seen."""
    clipped: int
    """Finite ones that were above the limit."""
    nonfinite: int
    """Those with NaN that counts, or infinity."""
    smallest: float
    """Smallest finite norm."""
    largest: float
    """Largest finite norm."""


def count(scale: Scale) -> Tally:
    """Tally of the slices of ``scale``."""
    finite = scale.flags == 0
    norm = scale.norm[finite]
    return Tally(
        scale.norm.size,
        int((scale.factor[finite] != 1.0).sum()),
        scale.norm.size - norm.size,
        float(norm.min(initial=math.inf)),
        float(norm.max(initial=-math.inf)),
    )


def add(a: Tally, b: Tally) -> Tally:
    """Tally of disjoint sets of slices."""
    return Tally(
        a.slices + b.slices,
        a.clipped + b.clipped,
        a.nonfinite + b.nonfinite,
        min(a.smallest, b.smallest),
        max(a.largest, b.largest),
    )


_blocks: Counter[str] = Counter()
_changed = Condition()


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Count the blocks under way in this process."""

    @wraps(function)
    def counted(job: Job, *args: Any) -> Any:
        with _changed:
            _blocks[job.run] += 1
        try:
            return function(job, *args)
        finally:
            with _changed:
                _blocks[job.run] -= 1
                _changed.notify_all()

    return counted


def wait_until_idle(run: str) -> None:
    """Return once no block of ``run`` is under way in this process."""
    with _changed:
        _changed.wait_for(lambda: not _blocks[run])


@_counted
def sum_block(job: Job, slab: int, index: int) -> Partial:
    """First pass: read a block, return its exact sums."""
    region = job.plan.region(slab, index)
    x = _read_checked(job, region)
    return partial_norm(x, job.plan.axes, omit_nan=job.nonfinite == "omit")


@_counted
def rescale_block(job: Job, slab: int, index: int, scale: Scale) -> None:
    """Second pass: read a block again, write it rescaled."""
    region = job.plan.region(slab, index)
    x = _read(job, region)
    rescale(x, scale, x)
    with _named("writing", region, job.target):
        storage.write(job.target, region, x, job.plan.gulp)


@_counted
def clip_slab(job: Job, slab: int, index: int) -> Tally:
    """One pass: read a block that is a whole slab, write it clipped."""
    region = job.plan.region(slab, index)
    x = _read_checked(job, region)
    x, scale = clip_block(x, job.clip_norm, job.plan.axes, omit_nan=job.nonfinite == "omit", out=x)
    with _named("writing", region, job.target):
        storage.write(job.target, region, x, job.plan.gulp)
    return count(scale)


def _read(job: Job, region: Box) -> Any:
    with _named("reading", region, job.source):
        return storage.read(job.source, region, job.plan.gulp, job.missing)


def _read_checked(job: Job, region: Box) -> Any:
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


@contextmanager
def _named(doing: str, region: Box, array: Any) -> Iterator[None]:
    """Say which block of which array an error of the storage is about."""
    return_freed_memory()
    try:
        yield
    except DaskClipError:
        raise
    except Exception as error:
        storage.wait_until_idle()
        block = ", ".join(f"{s.start}:{s.stop}" for s in region)
        raise StorageError(
            f"{doing} block [{block}] of {storage.location(array)} failed: "
            f"{type(error).__name__}: {reason(error)}; mend the cause and run again"
        ) from error


@cache
def return_freed_memory() -> None:
    """Let the allocator give large buffers back to the system once they are freed.

    By default glibc raises its threshold after the first of them and keeps what the decoding
    threads free in their heaps, so that a run grows with its length.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**18)
