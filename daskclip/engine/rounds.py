"""The order of windows: which blocks, in which pass.

An array whose blocks hold their slices takes one pass over its blocks. Else some slabs make a
*round*: a first pass sums their blocks, and a second one, backwards, uses the scales of the sums,
so that sums are held for one round only and blocks may still be in memory. Arrays that share one
slice are one round. What is replayed from a journal is known by its position: the order depends
on nothing but the plan and what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Reversible, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from daskclip.engine.passes import Passes, blocks_of, load_sums, save_sums
from daskclip.engine.window_graph import Batch, BlockId, Window, batch_small_blocks
from daskclip.numerics import (
    NAN,
    Scale,
    SliceCounts,
    combine,
    finalize,
    nan_if_infinite,
    term_count,
)
from daskclip.target import WindowRecord
from daskclip.worker import ArrayTask, tasks

Digests = npt.NDArray[np.unsignedinteger[Any]]
OnePass = Callable[[Passes, Window], WindowRecord]
BlockFunction = Callable[..., tasks.BlockResult]
"""Function of `tasks` that the second pass calls for each block."""


def clip(passes: Passes) -> None:
    """Write what is clipped, then copy the rest; in place only if anything is clipped."""
    in_place = passes.arrays[0].in_place
    waiting = bytearray(b"\1") * (passes.blocks if in_place else 0)
    for record in _all(passes, _clip_slabs, tasks.rescale_block):
        for number in (record.target or ()) if in_place else ():
            waiting[number] = 0
    passes.count_empty()
    if in_place and not passes.blocks_written:
        return
    # in place, unchanged blocks are copied only now that some block is known to change
    arrays = range(len(passes.arrays)) if any(waiting) else passes.copied
    left = (b for b in _blocks(passes, arrays) if not waiting or waiting[passes.number(b)])
    for batches in passes.windows(left):
        passes.run(0, [batches], partial(_copy, passes))


def measure(passes: Passes) -> None:
    """Count all slices by their norms."""
    for _ in _all(passes, _count_slabs, None):
        pass
    passes.count_empty()


def compare(passes: Passes) -> None:
    """Clip once more, and compare with the target."""
    for _ in _two_passes(passes, tasks.compare_block, passes.clipped):
        pass


def check(passes: Passes, digests: Digests, arrays: Iterable[int]) -> None:
    """Compare the files of all blocks of some arrays with their digests."""
    for k in arrays:
        for slabs, windows in passes.arrays[k].plan.windows():
            for blocks in windows:
                window = _rows(passes, k, slabs, blocks)
                passes.compute(
                    tasks.check_block, window, expected=lambda b: int(digests[passes.number(b)])
                )


def _all(passes: Passes, one_pass: OnePass, second: BlockFunction | None) -> Iterator[WindowRecord]:
    """Records of all windows: by ``one_pass`` where that is enough, else of the second pass."""
    # no block holds a whole slice that several arrays share
    whole = {k for k in passes.clipped if passes.arrays[k].plan.is_whole and not passes.is_shared}
    for batches in passes.windows(_blocks(passes, sorted(whole))):
        yield passes.run(1, [batches], partial(one_pass, passes))
    yield from _two_passes(passes, second, [k for k in passes.clipped if k not in whole])


def _clip_slabs(passes: Passes, window: Window) -> WindowRecord:
    results = passes.compute(tasks.clip_slab, window)
    counts = _add(result.counts for result in results)
    return WindowRecord(tally=counts, target=_digests(passes, window, results))


def _count_slabs(passes: Passes, window: Window) -> WindowRecord:
    results = passes.compute(tasks.count_slab, window)
    return WindowRecord(tally=_add(result.counts for result in results))


def _copy(passes: Passes, window: Window) -> WindowRecord:
    results = passes.compute(tasks.copy_block, window)
    return WindowRecord(target=_digests(passes, window, results))


def _add(counts: Iterable[SliceCounts]) -> SliceCounts:
    """Counts over disjoint sets of slices."""
    return reduce(SliceCounts.add, counts)


# --- two passes ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Round:
    """Slabs whose blocks are summed in a first pass, and rescaled by their norms in a second."""

    passes: Passes
    arrays: Sequence[ArrayTask]
    """The array of the slabs, or all that share one slice; each has blocks."""
    slabs: Sequence[int]
    windows: Callable[[bool, bool], Iterator[Window]]
    """Windows of a pass, given whether it is the second, which goes backwards, and whether it
    takes all blocks, and not only those of which anything is stored."""
    digests: Digests
    """Digests of the values that the first pass read, by the number of their block."""
    sums: str = ""
    """Name of the sums in the journal; empty before the first window."""
    _made: dict[tuple[int, str], Scale] = field(default_factory=dict)

    def first_pass(self) -> bool:
        """Sum all blocks; returns whether a sum is not finite."""
        passes, has_nonfinite = self.passes, False
        for window in self.windows(False, False):
            saved = next(passes.saved_windows, None)
            if saved is not None:
                record = passes.run(0, window, partial(_take_saved, passes, saved))
            else:
                record = passes.run(1, window, self._sum)
            # the new sums include the old ones, and the record that names them is on disk
            passes.journal.forget(self.sums)
            self.sums, has_nonfinite = record.sums or "", bool(record.nan)
            for number, digest in (record.source or {}).items():
                self.digests[number] = digest
        return has_nonfinite

    def second_pass(self, function: BlockFunction, everything: bool) -> Iterator[WindowRecord]:
        """Records of its windows, of all blocks or of those of which anything is stored."""
        for window, first, last in _marked(self.windows(True, everything)):
            yield self.passes.run(2, window, partial(self._rescale, function, first, last))

    def _sum(self, window: Window) -> WindowRecord:
        """Add the blocks of a window to the sums of the windows before."""
        passes = self.passes
        found: list[tasks.Sums] = passes.compute(tasks.sum_block, window, combined=True)
        sums = [f.partial for f in found]
        if self.sums:
            both = zip(load_sums(passes.journal, self.sums), sums, strict=True)
            sums = [combine(pair) for pair in both]
        name = f"sums-{'-'.join(map(str, window[0][0][0]))}.npz"
        save_sums(passes.journal, name, sums)
        digests = {passes.number(BlockId(*b)): d for f in found for b, d in f.digests.items()}
        # an infinite norm of several arrays is as good as NaN
        flags = [(nan_if_infinite(p) if passes.is_shared else p).flags & NAN for p in sums]
        return WindowRecord(sums=name, nan=any(bool(f.any()) for f in flags), source=digests)

    def _rescale(
        self, function: BlockFunction, first: bool, last: bool, window: Window
    ) -> WindowRecord:
        """Do the second pass of a window; the first one counts the slices of all."""
        passes = self.passes
        results = passes.compute(function, window, scales=self.scale, expected=self.expected)
        return WindowRecord(
            tally=self.count() if first else None,
            target=_digests(passes, window, results),
            # without a name, `cut_torn_end` does not look for sums, which the last one removes
            sums=None if last else self.sums,
        )

    def expected(self, block: BlockId) -> int:
        """Digest of the values of a block in the first pass."""
        return int(self.digests[self.passes.number(block)])

    def scale(self, row: int, array: ArrayTask) -> tuple[str, Scale]:
        """Name and scale of the slices of a slab."""
        kind = row, array.source.dtype.str
        if kind not in self._made:
            # the sums lack blocks that are not stored, whose zeros are terms all the same
            terms = sum(term_count(a.plan.shape, a.plan.axes, a.source.dtype) for a in self.arrays)
            sums = load_sums(self.passes.journal, self.sums)[row]._replace(terms=terms)
            # tf.clip_by_global_norm makes everything NaN if the norm is infinite
            if self.passes.is_shared:
                sums = nan_if_infinite(sums)
            limit = tasks.block_limit(array, array.plan.region(self.slabs[row], 0))
            self._made[kind] = finalize(sums, limit, array.source.dtype)
        return "-".join(map(str, kind)), self._made[kind]

    def save_norms(self) -> bool:
        """Write the norms to where they are wanted; returns whether they are."""
        array = self.arrays[0]
        for row, slab in enumerate(self.slabs):
            tasks.save_norms(array, self.scale(row, array)[1], array.plan.region(slab, 0))
        return array.target is not None

    def count(self) -> SliceCounts:
        """Counts over all slices."""
        array = self.arrays[0]
        # the first block of a slab meets all its slices
        regions = [array.plan.region(slab, 0) for slab in self.slabs]
        scales = [self.scale(row, array)[1] for row in range(len(regions))]
        return _add(map(partial(tasks.count_region, array), scales, regions))


def _rounds(passes: Passes, arrays: Sequence[int]) -> Iterator[Round]:
    digests = np.zeros(passes.blocks, np.uint32)
    if passes.is_shared:
        some = [passes.arrays[k] for k in arrays if passes.arrays[k].plan.blocks]
        yield Round(passes, some, (0,), partial(_global_windows, passes, arrays), digests)
        return
    for k in arrays:
        for slabs, stored in passes.arrays[k].plan.windows(passes.has_stored[k]):
            # plain integers: JSON and the names of sums take no integers of NumPy
            numbers = [int(slab) for slab in slabs]
            windows = partial(_slab_windows, passes, k, numbers, stored)
            yield Round(passes, [passes.arrays[k]], numbers, windows, digests)


def _slab_windows(
    passes: Passes,
    array: int,
    slabs: Sequence[int],
    stored: Reversible[Iterable[int]],
    second: bool,
    everything: bool,
) -> Iterator[Window]:
    """Windows of some slabs of an array, a row of blocks for each slab."""
    windows: Reversible[Iterable[int]] = passes.arrays[array].plan.spans if everything else stored
    for blocks in reversed(windows) if second else windows:
        yield _rows(passes, array, slabs, blocks)


def _global_windows(
    passes: Passes, arrays: Sequence[int], second: bool, everything: bool
) -> Iterator[Window]:
    """Windows of arrays that share one slice, one row of blocks of any of them."""
    order = reversed(arrays) if second else arrays
    blocks = _blocks(passes, order, backwards=second, everything=everything)
    return ([batches] for batches in passes.windows(blocks))


def _two_passes(
    passes: Passes, second: BlockFunction | None, arrays: Sequence[int]
) -> Iterator[WindowRecord]:
    """Records of the second pass, which does ``second``; without it norms are counted and saved."""
    for one in _rounds(passes, arrays):
        has_nonfinite = one.first_pass()
        # if nothing is stored, `count_empty` counts the slices
        if not one.sums:
            continue
        if second is None:
            passes.total = passes.total.add(one.count())
            # sums are saved with their norms, for the second pass of another run
            if one.save_norms():
                continue
        else:
            # NaN spreads to blocks of which nothing is stored
            yield from one.second_pass(second, has_nonfinite)
        passes.journal.forget(one.sums)


def _take_saved(passes: Passes, saved: WindowRecord, _: Window) -> WindowRecord:
    """Take a record of the first pass, and its sums, from saved norms."""
    if passes.saved_norms is not None and saved.sums is not None:
        arrays = passes.saved_norms.sums(saved.sums)
        if arrays is not None:
            passes.journal.save(saved.sums, arrays)
    return saved


# --- blocks --------------------------------------------------------------------------------------


def _blocks(
    passes: Passes, arrays: Iterable[int], *, backwards: bool = False, everything: bool = False
) -> Iterator[BlockId]:
    """Blocks of which anything is stored, or all."""
    for k in arrays:
        has_stored = None if everything else passes.has_stored[k]
        for slabs, windows in passes.arrays[k].plan.windows(has_stored):
            for blocks in reversed(windows) if backwards else windows:
                yield from (BlockId(k, int(slab), int(b)) for slab in slabs for b in blocks)


def _rows(
    passes: Passes, array: int, slabs: Iterable[int], blocks: Iterable[int]
) -> list[list[Batch]]:
    """A row of batches for each slab; rows are alike, since a Dask array is a rectangle."""
    numbers = [int(b) for b in blocks]
    rows: list[list[Batch]] = []
    for slab in slabs:
        row = [BlockId(array, int(slab), number) for number in numbers]
        if not rows:
            rows.append([*batch_small_blocks(passes.arrays, row)])
            continue
        left = iter(row)
        rows.append([[next(left) for _ in batch] for batch in rows[0]])
    return rows


def _digests(
    passes: Passes, window: Window, results: Iterable[tasks.BlockResult]
) -> dict[int, int]:
    """Digests of the blocks that were written, by the number of the block."""
    both = zip(blocks_of(window), results, strict=True)
    return {passes.number(b): r.digest for b, r in both if r.digest is not None}


def _marked(windows: Iterator[Window]) -> Iterator[tuple[Window, bool, bool]]:
    """Each window, with whether it is the first and whether it is the last."""
    first, window = True, next(windows, None)
    while window is not None:
        following = next(windows, None)
        yield window, first, following is None
        first, window = False, following
