"""Choose blocks: the largest that keep within the memory."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from daskclip.errors import MemoryBudgetError
from daskclip.grid import ceil_div, grid_shape
from daskclip.plan.plans import ClipPlan, GroupPlan
from daskclip.plan.sizing import Layout, Machine, MemoryModel, Shape, Sizing
from daskclip.report import MIB, format_size


def plan_group(
    clipped: Mapping[str, Layout],
    copied: Mapping[str, Layout],
    machine: Machine,
    global_norm: bool,
) -> GroupPlan:
    """Plan all arrays of a group, on as many threads as the array that needs most memory allows.

    Parameters
    ----------
    clipped, copied : mapping of str to Layout
        Arrays to clip and arrays to copy as they are, by their paths.
    machine : Machine
        Processes, threads and memory for the blocks of all arrays.
    global_norm : bool
        Whether all arrays are one slice.

    Returns
    -------
    GroupPlan

    Raises
    ------
    MemoryBudgetError
        If an array does not fit; names the one that needs most.
    """
    plans = _plan_each(clipped, machine, global_norm)
    fewest = min(p.threads for p in plans.values())
    # all arrays are clipped by the same threads, so the array that allows fewest decides
    if fewest < machine.threads:
        plans = _plan_each(clipped, replace(machine, threads=fewest), global_norm)
    window = min(p.window for p in plans.values())
    like = replace(next(iter(plans.values())), window=window)
    copies = {name: _plan_copy(like, layout, machine.sizing) for name, layout in copied.items()}
    return GroupPlan(plans | copies, global_norm)


def _plan_each(
    layouts: Mapping[str, Layout], machine: Machine, global_norm: bool
) -> dict[str, ClipPlan]:
    plans, refused = {}, {}
    for name, layout in layouts.items():
        try:
            plans[name] = make_plan(layout, machine, is_shared=global_norm)
        except MemoryBudgetError as error:
            refused[name] = error
    if refused:
        # the remedy of the array that needs most works for all
        name, most = max(refused.items(), key=lambda item: item[1].need)
        raise MemoryBudgetError(f"array {name}: {most}" if name else str(most), most.need) from most
    return plans


def _plan_copy(like: ClipPlan, layout: Layout, sizing: Sizing) -> ClipPlan:
    """Plan of an array that is not decoded: files are copied in pieces, objects a few at a time."""
    # only the limits of size apply: a copied block is never in memory as a whole
    shape, unit = layout.shape, layout.first_block
    block = grown(unit, shape, range(len(shape)), layout.max_block(sizing))
    like = replace(like, passes=0, projected_memory=0, axes=())
    return replace(like, shape=shape, unit=unit, itemsize=layout.itemsize, block=block)


def make_plan(layout: Layout, machine: Machine, *, is_shared: bool = False) -> ClipPlan:
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
    is_shared : bool
        Whether the array is part of a slice that all arrays of a group form.

    Returns
    -------
    ClipPlan

    Raises
    ------
    MemoryBudgetError
        If the smallest blocks do not fit the fewest threads; names the least memory that does.
    """

    def plan(sum_nbytes: int) -> ClipPlan:
        return _plan(MemoryModel(replace(layout, sum_nbytes=sum_nbytes), machine, is_shared))

    enough = machine.sizing.usual_sum_nbytes
    usual = plan(min(layout.sum_nbytes, enough))
    if layout.sum_nbytes <= enough:
        return usual
    with suppress(MemoryBudgetError):
        # fewer threads cost more time than the rare run that must begin again with more memory
        wide = plan(layout.sum_nbytes)
        if wide.threads == usual.threads:
            return wide
    return replace(usual, state=enough)


def _plan(model: MemoryModel) -> ClipPlan:
    """Plan for exact sums of the size that the layout of the model has."""
    layout, machine = model.layout, model.machine
    # threads are given up before the run is refused, never to get larger blocks; a slab of one
    # block keeps no sums of slices, so that it may fit where a smaller block does not
    first = _first_blocks(model)

    def fitting(threads: int) -> list[Shape]:
        return [block for block in first if model.fits(block, threads)]

    more = range(machine.fewest + 1, machine.threads + 1)
    threads = machine.fewest + bisect_left(more, True, key=lambda threads: not fitting(threads))
    if not fitting(threads):
        raise _too_little_memory(model, first, threads)
    block = fitting(threads)[0]
    # reduced axes first, so that fewer blocks share a slice; then the outer ones, along which the
    # chunks of a block are contiguous in its memory
    order = sorted(range(len(layout.shape)), key=lambda a: a not in layout.axes)
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
        return [layout.first_block]
    block = tuple(
        max(1, n) if a in layout.axes else u
        for a, (n, u) in enumerate(zip(layout.shape, layout.first_block, strict=True))
    )
    # one thread would read a large slab alone: two passes of all threads over it are faster
    is_busy = math.prod(grid_shape(layout.shape, block)) >= machine.processes * machine.threads
    is_small = math.prod(block) * layout.itemsize <= machine.sizing.block_nbytes
    return [block, layout.first_block] if is_small or is_busy else [layout.first_block]


def _too_little_memory(
    model: MemoryModel, blocks: Sequence[Shape], threads: int
) -> MemoryBudgetError:
    need, block = min((model.peak(block, threads), block) for block in blocks)
    kind = "one chunk or shard" if block == model.layout.first_block else "a whole slab"
    run = "1 thread needs" if threads == 1 else f"{threads} threads need"
    fewer = "" if threads == 1 else " or use workers of fewer threads"
    return MemoryBudgetError(
        f"memory {format_size(model.machine.memory)} is too small: {run} {format_size(need)} for "
        f"blocks of {kind} {block}; give memory='{ceil_div(need, MIB)}MiB'{fewer}",
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
