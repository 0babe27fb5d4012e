"""What a run will do, in integers, before it does anything.

A *block* is a box of whole write units (shards, else chunks) that one task reads and writes. All
blocks that share their slices are a *slab*:

    axes = (0,), the reduced one             a block that covers its slab: one pass, read once
                                             else two: norms first, then read again and rescale
     slab 0   slab 1
    +-------+-------+
    | 0     | 0     |  blocks of a slab
    +-------+-------+
    | 1     | 1     |
    +-------+-------+

A *window* is one Dask graph: all blocks of a few slabs, or a few blocks of one slab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from daskclip.errors import MemoryBudgetError
from daskclip.grid import Box, Spans, box_at, box_shape, ceil_div, grid_shape
from daskclip.report import MIB, format_axes, format_size, fragment, shared_rows

BLOCK = 16 * MIB  # bytes of a block beyond which batching gains nothing
CALL = 1024  # units of a block
FIXED = 16 * MIB  # graph, scheduler, zarr's threads
SCRATCH = 8 * MIB  # numerics, pages to write from, and what the allocator keeps; per thread
SLICE = 36  # limit, norm, factor and flags of a slice of a block, and what counts them
WINDOW = 16  # blocks of a window per thread
USUAL = 80  # bytes of the exact sum of a slice that are enough unless values span 10**80


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipPlan:
    """Blocks, slabs and windows of a run, and the memory it will need."""

    shape: tuple[int, ...]
    """Shape of the array."""
    axes: tuple[int, ...]
    """Axes the norms are taken over."""
    unit: tuple[int, ...]
    """Shape of what is written as one object: a shard, else a chunk."""
    itemsize: int
    """Bytes of an element."""
    block: tuple[int, ...]
    """Shape of a block."""
    window: int
    """Blocks of a window, at most."""
    passes: int
    """How often it is read: 1 if norms are saved or a block holds its slices, else 2; 0 copied."""
    processes: int
    """Processes that run blocks."""
    threads: int
    """Threads of each of them; fewer than there are if blocks of more would not fit."""
    memory: int
    """Budget of each of them, in bytes above its imports."""
    projected_memory: int
    """What each of them will need at most, in bytes."""
    state: int = 0
    """Bytes that the exact sum of a slice may take; 0 if there is room for values of any spread."""
    derived: ClassVar = (
        "slices", "slabs", "blocks", "tasks", "passes", "bytes_read",
        "processes", "threads", "memory", "projected_memory",
    )  # fmt: skip
    """Properties that JSON has beside the fields."""

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of blocks along each axis."""
        return grid_shape(self.shape, self.block)

    @property
    def is_whole(self) -> bool:
        """Whether a block holds its slices whole."""
        return all(self.block[a] >= self.shape[a] for a in self.axes)

    @property
    def slabs(self) -> int:
        """Number of slabs."""
        return math.prod(n for a, n in enumerate(self.grid) if a not in self.axes)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return math.prod(self.grid)

    @property
    def slices(self) -> int:
        """Number of slices."""
        return math.prod(self.kept.values())

    @property
    def kept(self) -> dict[int, int]:
        """Lengths of the axes that are not reduced."""
        return {a: n for a, n in enumerate(self.shape) if a not in self.axes}

    @property
    def nbytes(self) -> int:
        """Bytes of the array, decoded."""
        return math.prod(self.shape) * self.itemsize

    @property
    def bytes_read(self) -> int:
        """Bytes that will be read, decoded."""
        return self.nbytes * self.passes

    @property
    def tasks(self) -> int:
        """Blocks to run, over all passes; combining norms takes some more."""
        return self.blocks * self.passes

    def rows(self) -> dict[str, str]:
        """The figures for people."""
        return {
            "array": f"{self.shape}, {format_size(self.nbytes)}, {format_axes(self.axes)}",
            "slices": f"{self.slices:,}",
            "units": f"{self.unit} written as one object",
            "blocks": f"{self.blocks:,} of {self.block}, {self.slabs:,} slabs",
        } | shared_rows(self)

    def _repr_html_(self) -> str:
        return fragment("daskclip plan", self.rows(), None)

    def region(self, slab: int, index: int) -> Box:
        """Where a block of a slab lies in the array."""
        place = []
        for a in reversed(range(len(self.shape))):
            n = self.grid[a]
            if a in self.axes:
                index, i = divmod(index, n)
            else:
                slab, i = divmod(slab, n)
            place.append(i)
        return box_at(place[::-1], self.block, self.shape)

    def number(self, slab: int, block: int) -> int:
        """Number of a block among all."""
        return slab * (self.blocks // self.slabs) + block

    def nbytes_of(self, slab: int, block: int) -> int:
        """Bytes of a block, decoded."""
        return math.prod(box_shape(self.region(slab, block))) * self.itemsize

    @property
    def block_strides(self) -> tuple[int, ...]:
        """What one block more along each axis adds to the number of a block."""
        weights, inside, slab = [], 1, self.blocks // self.slabs
        for a in reversed(range(len(self.shape))):
            if a in self.axes:
                weights.append(inside)
                inside *= self.grid[a]
            else:
                weights.append(slab)
                slab *= self.grid[a]
        return tuple(weights[::-1])

    @property
    def spans(self) -> Spans:
        """Ranges of all blocks of a slab, a window each."""
        each = self.blocks // self.slabs
        return Spans(each, min(each, max(1, self.window)))

    def windows(self, stored: Any = None) -> Iterator[tuple[Any, Any]]:
        """Slabs that are finished together, and their blocks, a window each.

        With ``stored``, those of the blocks where that is true; slabs without any are left out.
        """
        if not self.blocks:
            return
        spans = self.spans
        each, step = spans.n, spans.step
        together = max(1, self.window // each)
        if stored is None:
            for first in range(0, self.slabs, together):
                yield range(first, min(first + together, self.slabs)), spans
            return
        stored = np.reshape(stored, (self.slabs, each))
        slabs = np.flatnonzero(stored.any(axis=1))
        for i in range(0, len(slabs), together):
            some = slabs[i : i + together]
            if together > 1:
                yield some, spans
            else:
                there = np.flatnonzero(stored[some[0]])
                yield some, [there[j : j + step] for j in range(0, len(there), step)]


def make_plan(*, state: int, **sizes: Any) -> ClipPlan:
    """Choose blocks that keep within ``memory``.

    Parameters
    ----------
    state : int
        Bytes that the exact sum of a slice takes at most, for values of any spread. The plan has
        room for them unless that takes threads away: then for `USUAL` ones, and a run that needs
        more is refused when it does.
    **sizes
        See `_plan`.

    Returns
    -------
    ClipPlan

    Raises
    ------
    MemoryBudgetError
        If blocks of one unit do not fit the fewest threads.
    """
    plan = _plan(state=min(state, USUAL), **sizes)
    if state <= USUAL:
        return plan
    with suppress(MemoryBudgetError):
        wide = _plan(state=state, **sizes)
        if wide.threads == plan.threads:
            return wide
    return replace(plan, state=USUAL)


def _plan(
    *,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    unit: tuple[int, ...],
    itemsize: int,
    state: int,
    memory: int,
    processes: int,
    threads: int,
    fewest: int,
    shared: bool = False,
    beside: int = 0,
) -> ClipPlan:
    """`make_plan` for sums of ``state`` bytes a slice.

    Parameters
    ----------
    shape, axes, unit, itemsize
        See `ClipPlan`.
    state : int
        Bytes that the exact sum of a slice may take.
    memory, processes
        See `ClipPlan`.
    threads, fewest : int
        Threads of each process, and to how many of them the plan may go down.
    shared : bool
        Whether the one slice goes on in other arrays, so that no block holds it whole.
    beside : int
        Bytes of a chunk that is read beside those of the array.
    """
    stored = math.prod(unit) * itemsize  # a chunk is decoded whole, beyond the shape too
    unit = tuple(max(1, min(u, n)) for u, n in zip(unit, shape, strict=True))
    units = CALL * math.prod(unit)

    def is_whole(block: tuple[int, ...]) -> bool:
        return not shared and all(block[a] >= shape[a] for a in axes)

    def projected(block: tuple[int, ...], threads: int) -> tuple[int, int]:
        """Bytes of one process, and blocks of a window."""
        size = math.prod(block) * itemsize
        # a chunk on its way is there as read, decoded, encoded, and once more in the allocator
        thread = size + 4 * (stored + beside) + SCRATCH
        window = WINDOW * threads
        slices = math.prod(n for a, n in enumerate(block) if a not in axes)
        if is_whole(block):
            return FIXED + threads * (thread + SLICE * slices), window * processes
        sums = state * slices
        # a thread puts its result together from parts
        base = FIXED + threads * (thread + 2 * sums)
        room = (memory - base) // max(1, sums) - 1
        window = max(threads, min(window, room))
        return base + (window + 1) * sums, window * processes

    def fits(block: tuple[int, ...]) -> bool:
        return projected(block, threads)[0] <= memory

    at_once = processes * threads
    while threads > fewest and not fits(unit):
        threads -= 1

    # along the first axes first: the chunks of a block lie in its memory one after the other
    order = sorted(range(len(shape)), key=lambda a: a not in axes)
    whole = tuple(
        max(1, n) if a in axes else u for a, (n, u) in enumerate(zip(shape, unit, strict=True))
    )
    # a slab that a single thread would read for long is faster in two passes of all threads
    few = math.prod(grid_shape(shape, whole)) < at_once
    small = math.prod(whole) * itemsize <= BLOCK
    block = whole if fits(whole) and (small or not few) and not shared else unit
    if not fits(block):
        need = projected(block, threads)[0]
        run = "1 thread needs" if threads == 1 else f"{threads} threads need"
        fewer = "" if threads == 1 else " or use workers of fewer threads"
        raise MemoryBudgetError(
            f"memory {format_size(memory)} holds less than the {format_size(need)} that {run} "
            f"for blocks of one chunk or shard {unit}; "
            f"give memory='{ceil_div(need, MIB)}MiB'{fewer}",
            need,
        )
    block = grown(block, shape, order, min(BLOCK // itemsize, units), fits)
    need, window = projected(block, threads)
    return ClipPlan(
        shape=shape,
        axes=axes,
        unit=unit,
        itemsize=itemsize,
        block=block,
        window=window,
        passes=1 if is_whole(block) else 2,
        processes=processes,
        threads=threads,
        memory=memory,
        projected_memory=need,
    )


def grown(
    block: tuple[int, ...],
    shape: tuple[int, ...],
    order: Iterable[int],
    size: int,
    fits: Callable[[tuple[int, ...]], bool] = lambda _: True,
) -> tuple[int, ...]:
    """Double ``block`` along the axes of ``order`` while it has at most ``size`` elements."""
    for a in order:
        while block[a] < shape[a]:
            wider = (*block[:a], min(2 * block[a], shape[a]), *block[a + 1 :])
            if math.prod(wider) > size or not fits(wider):
                break
            block = wider
    return block
