"""Choose blocks of one array: the largest that keep within the memory."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace

from daskclip.errors import MemoryBudgetError
from daskclip.grid import ceil_div, grid_shape
from daskclip.plan.plans import ClipPlan
from daskclip.plan.sizing import Layout, Machine, MemoryModel, Shape
from daskclip.report import MIB, format_size

Plans = dict[str, ClipPlan]
"""Plans by the path of the array in its group."""


def plan_each(
    layouts: Mapping[str, Layout], machine: Machine, make: Callable[[Layout, Machine], ClipPlan]
) -> Plans:
    """Plan arrays, all on the same number of threads."""
    plans = _plan_all(layouts, machine, make)
    fewest = fewest_threads(plans)
    # all arrays are clipped by the same threads, so the array that allows fewest decides
    if fewest < machine.threads:
        plans = _plan_all(layouts, replace(machine, threads=fewest), make)
    return plans


def _plan_all(
    layouts: Mapping[str, Layout], machine: Machine, make: Callable[[Layout, Machine], ClipPlan]
) -> Plans:
    plans, refused = {}, {}
    for name, layout in layouts.items():
        try:
            plans[name] = make(layout, machine)
        except MemoryBudgetError as error:
            refused[name] = error
    if refused:
        # the remedy of the array that needs most works for all
        name, most = max(refused.items(), key=lambda item: item[1].need)
        raise MemoryBudgetError(f"array {name}: {most}" if name else str(most), most.need) from most
    return plans


def make_plan(layout: Layout, machine: Machine) -> ClipPlan:
    """Choose blocks that keep within the memory of a machine.

    The plan has room for the exact sums of values of any spread, unless it would have fewer threads
    then. Otherwise it has room for usual sums, and the run begins again when one needs more.

    Parameters
    ----------
    layout : Layout
        The array.
    machine : Machine
        Processes, threads and memory for the blocks. The plan has fewer threads if a block for
        each would not fit.

    Returns
    -------
    ClipPlan

    Raises
    ------
    MemoryBudgetError
        If the smallest blocks do not fit the fewest threads; names the least memory that does.
    """

    def plan(sum_nbytes: int) -> Plans:
        return {"": plan_blocks(replace(layout, sum_nbytes=sum_nbytes), machine)}

    return with_room_for_sums(plan, layout.sum_nbytes, machine.sizing.usual_sum_nbytes)[""]


def with_room_for_sums(plan: Callable[[int], Plans], most: int, usual: int) -> Plans:
    """Plan for sums of at most so many bytes a slice, or only for the usual ones."""
    narrow = plan(min(most, usual))
    if most <= usual:
        return narrow
    with suppress(MemoryBudgetError):
        # fewer threads cost more time than the rare run that must begin again with more memory
        wide = plan(most)
        if fewest_threads(wide) == fewest_threads(narrow):
            return wide
    return {name: replace(one, state=usual) for name, one in narrow.items()}


def fewest_threads(plans: Mapping[str, ClipPlan]) -> int:
    """Threads of the plan that has fewest."""
    return min(plan.threads for plan in plans.values())


def plan_blocks(layout: Layout, machine: Machine) -> ClipPlan:
    """Plan for exact sums of the size that the layout has."""
    model = MemoryModel(layout, machine)
    # threads are given up before the run is refused, never to get larger blocks; a slab of one
    # block keeps no sums of slices, so that it may fit where a smaller block does not
    first = _first_blocks(model)

    def fitting(threads: int) -> list[Shape]:
        return [block for block in first if model.fits(block, threads)]

    threads = most_threads(machine, fitting)
    if not threads:
        need, block = min((model.peak(block, machine.fewest), block) for block in first)
        kind = "one chunk or shard" if block == layout.least_block else "a whole slab"
        raise too_little_memory(machine, need, f"{kind} {block}")
    block = fitting(threads)[0]
    # reduced axes first, so that fewer blocks share a slice; then the outer ones, along which the
    # chunks of a block are contiguous in its memory
    order = sorted(range(len(layout.shape)), key=lambda a: a not in layout.axes)
    if layout.kept_block is not None:
        order = order[: len(layout.axes)]
    most = layout.max_block(machine.sizing)
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


def _first_blocks(model: MemoryModel) -> list[Shape]:
    """Smallest blocks, the best first: a slab that is read once, if that is good, and a unit."""
    layout, machine = model.layout, model.machine
    if model.is_shared:
        return [layout.least_block]
    block = tuple(
        max(1, n) if a in layout.axes else u
        for a, (n, u) in enumerate(zip(layout.shape, layout.first_block, strict=True))
    )
    # one thread would read a large slab alone: two passes of all threads over it are faster
    is_busy = math.prod(grid_shape(layout.shape, block)) >= machine.processes * machine.threads
    is_small = math.prod(block) * layout.itemsize <= machine.sizing.block_nbytes
    return [block, layout.first_block] if is_small or is_busy else [layout.first_block]


def most_threads(machine: Machine, fits: Callable[[int], object]) -> int:
    """Most threads that fit; 0 if the fewest do not."""
    more = range(machine.fewest + 1, machine.threads + 1)
    threads = machine.fewest + bisect_left(more, True, key=lambda threads: not fits(threads))
    return threads if fits(threads) else 0


def too_little_memory(machine: Machine, need: int, blocks: str) -> MemoryBudgetError:
    """Return the refusal of a memory that is too small for the fewest threads."""
    threads = machine.fewest
    run = "1 thread needs" if threads == 1 else f"{threads} threads need"
    fewer = "" if threads == 1 else " or use workers of fewer threads"
    return MemoryBudgetError(
        f"memory {format_size(machine.memory)} is too small: {run} {format_size(need)} for "
        f"blocks of {blocks}; give memory='{ceil_div(need, MIB)}MiB'{fewer}",
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
