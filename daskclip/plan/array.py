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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from daskclip.errors import MemoryBudgetError
from daskclip.grid import Box, Spans, box, box_shape, ceil_div, grid
from daskclip.plan.sizing import Layout, Machine, MemoryModel, Shape, Sizing
from daskclip.report import MIB, format_axes, format_size, fragment

Numbers = Sequence[int] | npt.NDArray[np.intp]
"""Numbers of some slabs, or of some blocks of a slab."""
Windows = Spans | Sequence[npt.NDArray[np.intp]]
"""Numbers of the blocks of each window of a slab."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipPlan:
    """Blocks, slabs and windows of a run over an array, and the memory it needs."""

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
    """Times the array is read: 0 copied as it is, 1 if norms are saved or a block holds its slices
    whole, else 2."""
    processes: int
    """Processes that run blocks."""
    threads: int
    """Threads of each process; fewer than it has if blocks of all would not fit."""
    memory: int
    """Budget of each process, in bytes above its imports."""
    projected_memory: int
    """Peak memory of each process, in bytes above its imports."""
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
        return grid(self.shape, self.block)

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
        """Bytes to read, decoded, over all passes."""
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

    def region(self, slab: int, block: int) -> Box:
        """Region of the array that a block of a slab covers."""
        coords = []
        for a in reversed(range(len(self.shape))):
            n = self.grid[a]
            if a in self.axes:
                block, i = divmod(block, n)
            else:
                slab, i = divmod(slab, n)
            coords.append(i)
        return box(coords[::-1], self.block, self.shape)

    def number(self, slab: int, block: int) -> int:
        """Number of a block of a slab among all blocks of the array."""
        return slab * (self.blocks // self.slabs) + block

    def nbytes_of(self, slab: int, block: int) -> int:
        """Bytes of a block, decoded."""
        return math.prod(box_shape(self.region(slab, block))) * self.itemsize

    @property
    def block_strides(self) -> tuple[int, ...]:
        """Strides of the number of a block along each axis."""
        strides, reduced, kept = [], 1, self.blocks // self.slabs
        for a in reversed(range(len(self.shape))):
            if a in self.axes:
                strides.append(reduced)
                reduced *= self.grid[a]
            else:
                strides.append(kept)
                kept *= self.grid[a]
        return tuple(strides[::-1])

    @property
    def spans(self) -> Spans:
        """Ranges of all blocks of a slab, a window each."""
        length = self.blocks // self.slabs
        return Spans(length, min(length, max(1, self.window)))

    def windows(
        self, stored: npt.NDArray[np.bool_] | None = None
    ) -> Iterator[tuple[Numbers, Windows]]:
        """Yield slabs that are finished together, with the blocks of each of their windows.

        Parameters
        ----------
        stored : ndarray of bool of shape (blocks,), optional
            Which blocks to yield; slabs without any are left out. All by default.

        Yields
        ------
        slabs : sequence of int
            Several only if all their blocks are one window.
        windows : Spans or sequence of ndarray
            Numbers of blocks in a slab, a window each.
        """
        if not self.blocks:
            return
        spans = self.spans
        step = max(1, self.window // spans.n)
        if stored is None:
            for first in range(0, self.slabs, step):
                yield range(first, min(first + step, self.slabs)), spans
            return
        stored = stored.reshape(self.slabs, spans.n)
        slabs = np.flatnonzero(stored.any(axis=1))
        for i in range(0, len(slabs), step):
            if step > 1:
                yield slabs[i : i + step], spans
            else:
                blocks = np.flatnonzero(stored[slabs[i]])
                parts = [blocks[j : j + spans.step] for j in range(0, len(blocks), spans.step)]
                yield slabs[i : i + 1], parts


class Totals(Protocol):
    """Figures that plans of an array and of a group both have; see `ClipPlan`."""

    @property
    def nbytes(self) -> int: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def passes(self) -> int: ...
    @property
    def tasks(self) -> int: ...
    @property
    def window(self) -> int: ...
    @property
    def processes(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def memory(self) -> int: ...
    @property
    def projected_memory(self) -> int: ...


def shared_rows(plan: Totals) -> dict[str, str]:
    """Rows of the figures that plans of an array and of a group both have."""
    return {
        "passes": str(plan.passes),
        "read": format_size(plan.bytes_read),
        "written": format_size(plan.nbytes),
        "tasks": f"{plan.tasks:,} in windows of {plan.window}",
        "threads": f"{plan.threads} a process, {plan.threads * plan.processes} in all",
        "memory": f"{format_size(plan.projected_memory)} of {format_size(plan.memory)} a process",
    }


def make_plan(
    layout: Layout, machine: Machine, sizing: Sizing, *, is_shared: bool = False
) -> ClipPlan:
    """Choose blocks that keep within the memory of a machine.

    There is room for exact sums of values of any spread unless that takes threads away. Then there
    is room for usual ones, and a run that needs more is refused when it does.

    Parameters
    ----------
    layout : Layout
        The array.
    machine : Machine
        What runs the blocks. The plan has fewer threads if more blocks at a time would not fit.
    sizing : Sizing
        Sizes of blocks and windows.
    is_shared : bool
        Whether the only slice goes on in other arrays.

    Returns
    -------
    ClipPlan

    Raises
    ------
    MemoryBudgetError
        If blocks of one unit do not fit the fewest threads.
    """

    def plan(sum_nbytes: int) -> ClipPlan:
        return _plan(
            MemoryModel(
                layout=layout, machine=machine, sizing=sizing, sum_nbytes=sum_nbytes,
                is_shared=is_shared,
            )
        )  # fmt: skip

    usual = plan(min(layout.sum_nbytes, sizing.usual_sum_nbytes))
    if layout.sum_nbytes <= sizing.usual_sum_nbytes:
        return usual
    with suppress(MemoryBudgetError):
        wide = plan(layout.sum_nbytes)
        if wide.threads == usual.threads:
            return wide
    return replace(usual, state=sizing.usual_sum_nbytes)


def _plan(model: MemoryModel) -> ClipPlan:
    """Plan for exact sums of a fixed size."""
    layout, machine = model.layout, model.machine
    block, threads = layout.first_block, machine.threads
    while threads > machine.fewest and not model.fits(block, threads):
        threads -= 1
    slab = _slab_of_one_block(model, threads)
    if slab is not None:
        block = slab
    elif not model.fits(block, threads):
        raise _too_little_memory(model, threads)
    # reduced axes first, so that fewer blocks share a slice; then the slowest ones: the chunks of a
    # block lie one after the other in its memory
    order = sorted(range(len(layout.shape)), key=lambda a: a not in layout.axes)
    most = layout.max_block(model.sizing)
    block = grown(block, layout.shape, order, most, lambda block: model.fits(block, threads))
    return ClipPlan(
        shape=layout.shape,
        axes=layout.axes,
        unit=layout.first_block,
        itemsize=layout.itemsize,
        block=block,
        window=model.window(block, threads) * machine.processes,
        passes=1 if model.is_whole(block) else 2,
        processes=machine.processes,
        threads=threads,
        memory=machine.memory,
        projected_memory=model.peak(block, threads),
    )


def _slab_of_one_block(model: MemoryModel, threads: int) -> Shape | None:
    """Shape of a slab that is one block and read once; None where two passes are better."""
    layout, machine = model.layout, model.machine
    if model.is_shared:
        return None
    block = tuple(
        max(1, n) if a in layout.axes else u
        for a, (n, u) in enumerate(zip(layout.shape, layout.first_block, strict=True))
    )
    # a slab that a single thread would read for long is faster in two passes of all threads
    is_busy = math.prod(grid(layout.shape, block)) >= machine.processes * machine.threads
    is_small = math.prod(block) * layout.itemsize <= model.sizing.block_nbytes
    return block if (is_small or is_busy) and model.fits(block, threads) else None


def _too_little_memory(model: MemoryModel, threads: int) -> MemoryBudgetError:
    unit = model.layout.first_block
    need = model.peak(unit, threads)
    run = "1 thread needs" if threads == 1 else f"{threads} threads need"
    fewer = "" if threads == 1 else " or use workers of fewer threads"
    return MemoryBudgetError(
        f"memory {format_size(model.machine.memory)} is too small: {run} {format_size(need)} for "
        f"blocks of one chunk or shard {unit}; give memory='{ceil_div(need, MIB)}MiB'{fewer}",
        need,
    )


def grown(
    block: Shape,
    shape: Shape,
    order: Iterable[int],
    size: int,
    fits: Callable[[Shape], bool] = lambda _: True,
) -> Shape:
    """Double ``block`` along the axes of ``order`` while it has at most ``size`` elements."""
    for a in order:
        while block[a] < shape[a]:
            wider = (*block[:a], min(2 * block[a], shape[a]), *block[a + 1 :])
            if math.prod(wider) > size or not fits(wider):
                break
            block = wider
    return block
