"""Plans of an array and of a group, in integers.

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

A *window* is the number of blocks that may be under way at a time: others begin as some end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from daskclip.grid import Box, box_at, grid_shape
from daskclip.plan.sizing import in_pages
from daskclip.report import as_text, format_axes, format_size, fragment


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ClipPlan:
    """Blocks and slabs of a run over an array, and the memory it needs."""

    shape: tuple[int, ...]
    """Shape of the array."""
    axes: tuple[int, ...]
    """Axes the norms are taken over."""
    unit: tuple[int, ...]
    """Shape of the part that is written as one object: a shard, else a chunk."""
    itemsize: int
    """Bytes of an element."""
    block: tuple[int, ...]
    """Shape of a block."""
    window: int
    """Blocks under way at a time, at most."""
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
    """Bytes that the exact sum of a slice may take; 0 if the plan fits values of any spread."""
    derived: ClassVar = (
        "slices", "slabs", "blocks", "tasks", "passes", "bytes_read",
        "processes", "threads", "memory", "projected_memory",
    )  # fmt: skip
    """Properties that JSON has beside the fields."""

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of blocks along each axis."""
        return _grid(self.shape, self.block, self.axes)[0]

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
    def slab_blocks(self) -> int:
        """Number of blocks of a slab."""
        return _grid(self.shape, self.block, self.axes)[2]

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
    def buffer_nbytes(self) -> int:
        """Bytes of a block in memory, in whole pages."""
        return in_pages(math.prod(self.block) * self.itemsize)

    @property
    def bytes_read(self) -> int:
        """Bytes to read, decoded, over all passes."""
        return self.nbytes * self.passes

    @property
    def tasks(self) -> int:
        """Blocks to run, over all passes; combining norms takes some more."""
        return self.blocks * self.passes

    def rows(self) -> dict[str, str]:
        """Figures as text, by their names."""
        return {
            "array": f"{self.shape}, {format_size(self.nbytes)}, {format_axes(self.axes)}",
            "slices": f"{self.slices:,}",
            "units": f"{self.unit} written as one object",
            "blocks": f"{self.blocks:,} of {self.block}, {self.slabs:,} slabs",
        } | _shared_rows(self)

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return fragment("daskclip plan", self.rows())

    def region(self, slab: int, block: int) -> Box:
        """Region of the array that a block of a slab covers."""
        # computed, not looked up: a petabyte has 10**9 blocks
        number = self.number(slab, block)
        pairs = zip(self.block_strides, self.grid, strict=True)
        return box_at([number // stride % n for stride, n in pairs], self.block, self.shape)

    def number(self, slab: int, block: int) -> int:
        """Number of a block of a slab among all blocks of the array."""
        return slab * self.slab_blocks + block

    def nbytes_of(self, slab: int, block: int) -> int:
        """Bytes of a block, decoded."""
        grid, strides, slab_blocks = _grid(self.shape, self.block, self.axes)
        number, size = slab * slab_blocks + block, self.itemsize
        for stride, n, side, end in zip(strides, grid, self.block, self.shape, strict=True):
            size *= min(side, end - number // stride % n * side)
        return size

    @property
    def block_strides(self) -> tuple[int, ...]:
        """Strides of the number of a block along each axis."""
        return _grid(self.shape, self.block, self.axes)[1]


@cache
def _grid(
    shape: tuple[int, ...], block: tuple[int, ...], axes: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Number of blocks along each axis, strides of their numbers, and blocks of a slab."""
    # reduced axes first: the numbers of the blocks of a slab then follow one another, and a number
    # can be split into those of the slab and of the block in it
    grid, strides, stride = grid_shape(shape, block), [0] * len(shape), 1
    for a in sorted(range(len(grid)), key=lambda a: (a not in axes, -a)):
        strides[a] = stride
        stride *= grid[a]
    return grid, tuple(strides), math.prod(grid[a] for a in axes)


class _Over:
    """Figure of a group: the sum, minimum or maximum of the same figure of its arrays."""

    def __init__(self, combine: Callable[[Iterator[int]], int]) -> None:
        self.combine = combine

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    # not cached: an instance with slots has no place for another value
    def __get__(self, group: GroupPlan, owner: type) -> int:
        return self.combine(getattr(plan, self.name) for plan in group.plans.values())


@dataclass(frozen=True, slots=True, repr=False)
class GroupPlan:
    """Plans of all arrays of a group, and the memory the run needs."""

    plans: dict[str, ClipPlan]
    """Plans by the path of the array in the group; a plan without passes copies its array."""
    global_norm: bool
    """Whether the arrays have their norms in common."""
    derived: ClassVar = ClipPlan.derived
    """Properties that JSON has beside the fields."""

    blocks = _Over(sum)
    """Number of blocks, including copied ones."""
    tasks = _Over(sum)
    """Blocks to run, over all passes; combining norms takes some more."""
    bytes_read = _Over(sum)
    """Bytes to read, decoded, over all passes."""
    passes = _Over(max)
    """Times an array is read, at most."""
    window = _Over(min)
    """Blocks under way at a time, at most."""
    # all arrays run on the same processes and threads, so that min only picks one of equal numbers
    processes = _Over(min)
    """Processes that run blocks."""
    threads = _Over(min)
    """Threads of each process."""
    memory = _Over(min)
    """Budget of each process, in bytes above its imports."""
    projected_memory = _Over(max)
    """Peak memory of each process, in bytes above its imports."""

    @property
    def thread_window(self) -> int:
        """Blocks under way at a time for each thread, at most."""
        return max(1, self.window // (self.processes * self.threads))

    @property
    def clipped(self) -> dict[str, ClipPlan]:
        """Plans of the arrays that are clipped."""
        return {name: plan for name, plan in self.plans.items() if plan.passes}

    @property
    def kept(self) -> dict[int, int]:
        """Lengths of the axes that the norms have; empty for a group of which each has its own."""
        if self.global_norm:
            return dict(enumerate(self._normed[0].kept.values()))
        return self.plans[""].kept if "" in self.plans else {}

    @property
    def _normed(self) -> list[ClipPlan]:
        """Plans of arrays with norms of their own, or one of those that have theirs in common."""
        return [*self.clipped.values()][: 1 if self.global_norm else None]

    @property
    def slices(self) -> int:
        """Number of slices."""
        return sum(plan.slices for plan in self._normed)

    @property
    def slabs(self) -> int:
        """Number of slabs."""
        return sum(plan.slabs for plan in self._normed)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that are clipped, decoded."""
        return sum(p.nbytes for p in self.clipped.values())

    def rows(self) -> dict[str, str]:
        """Figures as text, by their names."""
        # the size is that of clipped arrays: copied ones are never decoded
        copied = len(self.plans) - len(self.clipped)
        return {
            "arrays": f"{len(self.clipped):,}, {format_size(self.nbytes)}; {copied:,} more copied",
            "slices": f"{self.slices:,}",
            "blocks": f"{self.blocks:,}, {self.slabs:,} slabs",
        } | _shared_rows(self)

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return fragment("daskclip plan", self.rows())


def _shared_rows(plan: ClipPlan | GroupPlan) -> dict[str, str]:
    """Figures that plans of an array and of a group both have."""
    return {
        "passes": str(plan.passes),
        "read": format_size(plan.bytes_read),
        "written": format_size(plan.nbytes),
        "tasks": f"{plan.tasks:,} {plan.window} at a time",
        "threads": f"{plan.threads} a process, {plan.threads * plan.processes} in all",
        "memory": f"{format_size(plan.projected_memory)} of {format_size(plan.memory)} a process",
    }
