"""Input of a plan: sizes of the array, the processes and the blocks, and the memory they take.

A thread holds one block, and one chunk in several stages of decoding or encoding:

    process = fixed + threads * (block + 4 chunks + scratch) + sums that wait to be combined
"""

import math
from dataclasses import dataclass

from daskclip.grid import ceil_div, joined_axes, without_axes
from daskclip.report import MIB

Shape = tuple[int, ...]
PAGE = 4096  # bytes


def in_pages(nbytes: int) -> int:
    """Bytes that so many take in whole pages."""
    return ceil_div(nbytes, PAGE) * PAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """Constants of the memory model, and limits of blocks.

    They do not depend on the array or on the machine; tests reduce them.
    """

    block_nbytes: int = 16 * MIB
    """Bytes of a block, decoded, at most: larger ones are not faster."""
    block_units: int = 1024
    """Units (chunks or shards) of a block, at most."""
    process_nbytes: int = 16 * MIB
    """Bytes a process needs beside its threads: graph, scheduler, threads of zarr."""
    thread_nbytes: int = 8 * MIB
    """Bytes a thread needs beside its block: arithmetic, pages to write from, the allocator."""
    slice_nbytes: int = 36
    """Bytes of the limit, norm, factor, flags and counters of a slice."""
    window_blocks: int = 64
    """Blocks under way at a time for each thread, if their sums are small."""
    window_sums: int = 16
    """Blocks under way at a time for each thread, if the sums of more would be large."""
    usual_sum_nbytes: int = 80
    """Bytes that hold the exact sum of a slice unless its values span 10**80."""
    sum_nbytes: int | None = None
    """Bytes of the exact sum of a slice; None for the maximum of its dtype."""

    @property
    def task_nbytes(self) -> int:
        """Bytes of the small blocks that one task runs together."""
        return self.block_nbytes // 4


DEFAULT = Sizing()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Shape and storage units of an array, and the axes of its norms."""

    shape: Shape
    """Shape of the array."""
    unit: Shape
    """Shape of the part that is written as one object: a shard, else a chunk."""
    itemsize: int
    """Bytes of an element."""
    axes: tuple[int, ...] = ()
    """Axes the norms are taken over."""
    sum_nbytes: int = 0
    """Bytes that the exact sum of a slice may take, for values of any spread."""
    limits_nbytes: int = 0
    """Bytes of a chunk of limits, which is read beside the array."""
    kept_block: Shape | None = None
    """Lengths of a block along the kept axes if other arrays share its slices; else None."""
    dtypes: int = 1
    """Number of dtypes of the arrays that share its slices, each of which has its own factors."""

    @property
    def least_block(self) -> Shape:
        """The smallest block: one unit, or as many as the arrays that share slices have to have."""
        if self.kept_block is None:
            return self.first_block
        return joined_axes(self.kept_block, self.first_block, self.axes)

    @property
    def kept_unit(self) -> Shape:
        """Lengths of a unit along the kept axes."""
        return without_axes(self.first_block, self.axes)

    @property
    def kept_shape(self) -> Shape:
        """Lengths of the kept axes."""
        return without_axes(self.shape, self.axes)

    @property
    def first_block(self) -> Shape:
        """A block of one unit, cut off at the edge of the array."""
        # at least 1, also along an axis of length 0: a size of 0 cannot divide a shape into a grid
        return tuple(max(1, min(u, n)) for u, n in zip(self.unit, self.shape, strict=True))

    @property
    def unit_nbytes(self) -> int:
        """Bytes of a unit, decoded whole, beyond the edge of the array too."""
        return math.prod(self.unit) * self.itemsize

    def max_block(self, sizing: Sizing) -> int:
        """Elements of a block, at most, unless it holds its slices whole."""
        # limited in units too: each is a file to open, however few bytes it has
        units = sizing.block_units * math.prod(self.first_block)
        return min(sizing.block_nbytes // self.itemsize, units)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Processes and threads that run blocks, their budget and the sizes of their work."""

    processes: int
    """Number of processes."""
    threads: int
    """Threads of each process."""
    fewest: int
    """Threads of each process that a plan may go down to."""
    memory: int
    """Budget of each process, in bytes above its imports."""
    sizing: Sizing = DEFAULT
    """Sizes of blocks."""


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """Memory of a process that runs blocks of an array."""

    layout: Layout
    machine: Machine

    @property
    def is_shared(self) -> bool:
        """Whether slices continue in other arrays, so that no block holds a slice whole."""
        return self.layout.kept_block is not None

    def is_whole(self, block: Shape) -> bool:
        """Whether a block holds its slices whole, so that no sums are kept."""
        layout = self.layout
        return not self.is_shared and all(block[a] >= layout.shape[a] for a in layout.axes)

    def slices(self, block: Shape) -> int:
        """Slices that a block has a part of."""
        return math.prod(without_axes(block, self.layout.axes))

    def sums(self, block: Shape) -> int:
        """Bytes of the exact sums of a block."""
        return self.layout.sum_nbytes * self.slices(block)

    def base(self, block: Shape, threads: int) -> int:
        """Bytes without the sums that wait to be combined."""
        layout, sizing = self.layout, self.machine.sizing
        size = math.prod(block) * layout.itemsize
        # a chunk in transit exists as read, as decoded, as encoded, and once more in the allocator,
        # which keeps what was freed last
        size += 4 * (layout.unit_nbytes + layout.limits_nbytes) + sizing.thread_nbytes
        if self.is_whole(block):
            size += sizing.slice_nbytes * self.slices(block)
        else:
            size += 2 * self.sums(block)  # a thread adds up its result from parts
        # the factors of other dtypes wait as long as those of the array
        more = (layout.dtypes - 1) * sizing.slice_nbytes * self.slices(block)
        return sizing.process_nbytes + more + threads * size

    def window(self, block: Shape, threads: int) -> int:
        """Blocks under way in one process: fewer where their sums leave little memory."""
        sizing = self.machine.sizing
        most = sizing.window_blocks * threads
        if self.is_whole(block):
            return most
        # more than a few for each thread only if all take no more than a block
        few = max(sizing.window_sums * threads, sizing.block_nbytes // max(1, self.sums(block)))
        most = min(most, few)
        left = self.machine.memory - self.base(block, threads)
        # fewer blocks than threads would leave threads idle: then the plan does not fit
        return max(threads, min(most, left // max(1, self.sums(block)) - 1))

    def peak(self, block: Shape, threads: int) -> int:
        """Bytes at most, with the sums that wait and the one they are added to."""
        kept = 0 if self.is_whole(block) else self.window(block, threads) + 1
        return self.base(block, threads) + kept * self.sums(block)

    def fits(self, block: Shape, threads: int) -> bool:
        """Whether blocks of this shape keep within the budget."""
        return self.peak(block, threads) <= self.machine.memory
