"""Choose blocks of arrays that have norms in common.

Blocks of all arrays have the same kept positions, so that the blocks of a slab, of all arrays, are
summed and rescaled together: by one task where they fit into its memory, else in two passes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from daskclip.errors import MemoryBudgetError
from daskclip.grid import grid_shape, joined_axes
from daskclip.plan.choose import (
    Plans,
    fewest_threads,
    grown,
    most_threads,
    plan_blocks,
    plan_each,
    too_little_memory,
    with_room_for_sums,
)
from daskclip.plan.plans import ClipPlan
from daskclip.plan.sizing import Layout, Machine, Shape, in_pages


def plan_joint(layouts: Mapping[str, Layout], machine: Machine) -> Plans:
    """Plan arrays of the same kept shape; raises if they do not fit."""

    def plan(sum_nbytes: int) -> Plans:
        alike = {name: replace(one, sum_nbytes=sum_nbytes) for name, one in layouts.items()}
        return _plan(JointModel(alike, machine))

    most = max(layout.sum_nbytes for layout in layouts.values())
    return with_room_for_sums(plan, most, machine.sizing.usual_sum_nbytes)


@dataclass(frozen=True, slots=True)
class JointModel:
    """Memory of a process that runs whole slabs of several arrays."""

    layouts: Mapping[str, Layout]
    machine: Machine

    @property
    def first(self) -> Layout:
        """One of the arrays."""
        return next(iter(self.layouts.values()))

    @property
    def least(self) -> Shape:
        """Smallest lengths along the kept axes of which each array has whole units."""
        units = zip(*(layout.kept_unit for layout in self.layouts.values()), strict=True)
        longest = (max(1, n) for n in self.first.kept_shape)
        return tuple(min(n, math.lcm(*u)) for n, u in zip(longest, units, strict=True))

    def block(self, layout: Layout, kept: Shape) -> Shape:
        """Block of an array that holds all of its part of a slab."""
        return joined_axes(kept, [max(1, n) for n in layout.shape], layout.axes)

    def nbytes(self, kept: Shape) -> int:
        """Bytes of a slab, decoded."""
        sizes = (math.prod(self.block(one, kept)) * one.itemsize for one in self.layouts.values())
        return sum(map(in_pages, sizes))

    def units(self, kept: Shape) -> int:
        """Units of a slab."""
        blocks = ((self.block(one, kept), one.first_block) for one in self.layouts.values())
        return sum(math.prod(grid_shape(block, unit)) for block, unit in blocks)

    def window(self, threads: int) -> int:
        """Blocks under way in one process."""
        return self.machine.sizing.window_blocks * threads * len(self.layouts)

    def peak(self, kept: Shape, threads: int) -> int:
        """Bytes at most."""
        sizing, sums = self.machine.sizing, self.first.sum_nbytes
        transit = max(4 * (one.unit_nbytes + one.limits_nbytes) for one in self.layouts.values())
        # sums of an array are added to those of others; factors differ by dtype
        each = 3 * sums + self.first.dtypes * sizing.slice_nbytes
        size = self.nbytes(kept) + transit + sizing.thread_nbytes + each * math.prod(kept)
        # verifying, and taking norms, hold the sums of all arrays of a slab
        held = (1 + min(self.window(threads), len(self.layouts))) * sums * math.prod(kept)
        return sizing.process_nbytes + threads * size + held

    def fits(self, kept: Shape, threads: int) -> bool:
        """Whether slabs of these lengths keep within the budget."""
        return self.peak(kept, threads) <= self.machine.memory

    @property
    def is_good(self) -> bool:
        """Whether slabs are small, or as many as keep all threads busy."""
        machine, slabs = self.machine, math.prod(grid_shape(self.first.kept_shape, self.least))
        is_small = self.nbytes(self.least) <= machine.sizing.block_nbytes
        return is_small or slabs >= machine.processes * machine.threads


def _plan(model: JointModel) -> Plans:
    """Plan for exact sums of the size that the layouts have: one pass if that takes no threads."""
    layouts, machine, least = model.layouts, model.machine, model.least
    threads = 0
    if model.is_good:
        threads = most_threads(machine, lambda threads: model.fits(least, threads))
    parts = {name: replace(one, kept_block=least) for name, one in layouts.items()}
    try:
        two = plan_each(parts, machine, plan_blocks)
    except MemoryBudgetError as error:
        if threads:
            return _whole(model, threads)
        need = model.peak(least, machine.fewest)
        if model.is_good and need < error.need:
            raise too_little_memory(machine, need, f"a whole slab {least} of all arrays") from error
        raise
    return _whole(model, threads) if threads >= fewest_threads(two) else two


def _whole(model: JointModel, threads: int) -> Plans:
    """Plan of one pass."""
    machine, least = model.machine, model.least

    def fits(kept: Shape) -> bool:
        is_small = model.nbytes(kept) <= machine.sizing.block_nbytes
        few = model.units(kept) <= machine.sizing.block_units
        return is_small and few and model.fits(kept, threads)

    shape = model.first.kept_shape
    kept = grown(least, shape, range(len(shape)), math.prod(shape), fits)
    return {
        name: ClipPlan(
            shape=one.shape,
            axes=one.axes,
            unit=one.first_block,
            itemsize=one.itemsize,
            block=model.block(one, kept),
            window=model.window(threads) * machine.processes,
            passes=1,
            processes=machine.processes,
            threads=threads,
            memory=machine.memory,
            projected_memory=model.peak(kept, threads),
        )
        for name, one in model.layouts.items()
    }
