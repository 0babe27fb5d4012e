"""The order of a run: which blocks are done in which pass.

An array whose blocks hold their slices takes one pass over its blocks. Else each slab takes two: a
first pass sums its blocks, and a second one, backwards, rescales them by the norms of the sums, so
that few sums are held and blocks may still be in memory. While the last blocks of a slab are under
way, the first ones of the next begin. Of arrays that have norms in common, a slab has the blocks
of all; where these fit into the memory of one task together, it does them in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from daskclip.engine.front import BlockId, Blocks, Task, reduce_sums
from daskclip.engine.passes import DONE, SUMMED, WRITTEN, Passes, SlabState
from daskclip.grid import without_axes
from daskclip.numerics import SliceCounts, term_count
from daskclip.worker import ArrayTask, SavedSums, add_and_keep, add_sums, keep_sums, tasks

SUMS_NBYTES = 32 << 20  # of a window that are sent to this process, at most
SUM_NBYTES = 80  # of a slice, usually
ACTIVE = 1000  # slabs that are begun and not ended, at most
Digests = npt.NDArray[np.unsignedinteger[Any]]
BlockFunction = Callable[..., tasks.BlockResult]
"""Function of `tasks` for one block."""


def clip(passes: Passes) -> None:
    """Write what is clipped, then copy the rest; in place only if anything is clipped."""
    in_place = passes.arrays[0].in_place
    _all(passes, tasks.clip_slab, tasks.rescale_block)
    passes.count_empty()
    if in_place and not passes.blocks_written:
        return
    # in place, unchanged blocks are copied only now that some block is known to change
    arrays = range(len(passes.arrays)) if in_place else passes.copied
    _each(passes, tasks.copy_block, arrays, done=WRITTEN, reads=False)


def measure(passes: Passes) -> None:
    """Count all slices by their norms."""
    _all(passes, tasks.count_slab, None)
    passes.count_empty()


def compare(passes: Passes) -> None:
    """Clip once more, and compare with the target."""
    _each_or_two(passes, tasks.compare_slab, tasks.compare_block)


def check(passes: Passes, digests: Digests, arrays: Sequence[int]) -> None:
    """Compare the files of all blocks of some arrays with their digests."""
    left = [passes.left(k, 0, everything=True) for k in arrays]
    queue = Blocks.chained(left)

    def next_task() -> Task | None:
        blocks = passes.front.take(queue)
        extra = [(int(digests[passes.number(block)]),) for block in blocks]
        return _task(passes, tasks.check_block, blocks, lambda _: None, extra) if blocks else None

    passes.front.run(next_task)


def _all(passes: Passes, one_pass: BlockFunction, second: BlockFunction | None) -> None:
    """Run ``one_pass`` where that is enough, else two passes, of which the second may be none."""
    is_single = passes.is_shared and passes.arrays[passes.clipped[0]].plan.passes == 1
    # sums that are saved take the place of the first of two passes
    if is_single and second and passes.saved_norms is None:
        _together(passes)
    else:
        _each_or_two(passes, one_pass, second)


def _each_or_two(passes: Passes, one_pass: BlockFunction, second: BlockFunction | None) -> None:
    """Run ``one_pass`` of the blocks that hold their slices, and two passes of others."""
    # no block holds a whole slice that several arrays share
    whole = [k for k in passes.clipped if passes.arrays[k].plan.is_whole and not passes.is_shared]
    _each(passes, one_pass, whole, done=DONE, reads=True)
    _two_passes(passes, second, [k for k in passes.clipped if k not in whole])


def _together(passes: Passes) -> None:
    """Clip the blocks of all arrays that are a slab together, each slab in a task."""
    some = [k for k in passes.clipped if passes.arrays[k].plan.blocks]
    slabs = range(passes.arrays[some[0]].plan.slabs if some else 0)
    every = ([BlockId(k, slab, 0) for k in some] for slab in slabs)
    upcoming = (blocks for blocks in every if passes.is_left(blocks))

    def next_task() -> Task | None:
        blocks = next(upcoming, None)
        if blocks is None:
            return None
        args = [passes.shared[k] for k in some], blocks[0].slab
        nbytes = passes.nbytes_of(blocks)
        then = partial(passes.done, blocks, reads=True)
        return Task(tasks.clip_together, args, then, blocks, nbytes)

    passes.front.run(next_task)
    passes.flush()


def _each(
    passes: Passes, function: BlockFunction, arrays: Sequence[int], *, done: int, reads: bool
) -> None:
    """Run a function of all blocks of some arrays that lack a state."""
    queue = Blocks.chained([passes.left(k, done) for k in arrays])

    def next_task() -> Task | None:
        blocks = passes.front.take(queue)
        if not blocks:
            return None
        return _task(passes, function, blocks, lambda found: passes.done(blocks, found, reads))

    passes.front.run(next_task)
    passes.flush()


def _task(
    passes: Passes,
    function: BlockFunction,
    blocks: Sequence[BlockId],
    then: Callable[[list[tasks.BlockResult]], None],
    extra: Sequence[tuple[int, ...]] = (),
    scales: Sequence[object] = (),
) -> Task:
    """Task of a function of some blocks; ``extra`` has more arguments of each."""
    more = extra or [()] * len(blocks)
    given = [(b.slab, b.block, *own) for b, own in zip(blocks, more, strict=True)]
    args = function, [passes.shared[b.array] for b in blocks], given, list(scales)
    return Task(tasks.run_batch, args, then, blocks, passes.nbytes_of(blocks))


# --- two passes ----------------------------------------------------------------------------------


def _two_passes(passes: Passes, function: BlockFunction | None, arrays: Sequence[int]) -> None:
    """Sum the blocks of each slab, then run ``function`` of them; without it, count the slices."""
    upcoming = _slabs(passes, function, arrays)
    active: list[Slab] = []

    def next_task() -> Task | None:
        while True:
            for slab in active:
                if (task := slab.next_task()) is not None:
                    return task
            active[:] = [slab for slab in active if not slab.is_done]
            # sums of many slices are held for one slab only
            if not all(slab.is_small or slab.second for slab in active):
                return None
            following = next(upcoming, None) if len(active) < ACTIVE else None
            if following is None:
                return None
            active.append(following)
            following.advance()

    passes.front.run(next_task)
    if not all(slab.is_done for slab in active):
        raise RuntimeError("blocks are left over; this is a defect of daskclip, please report it")
    passes.flush()


def _slabs(passes: Passes, function: BlockFunction | None, arrays: Sequence[int]) -> Iterator[Slab]:
    """Slabs of which anything is stored, up to those that are done."""
    some = [k for k in arrays if passes.arrays[k].plan.blocks]
    # all arrays that share slices have the same slabs
    together = [some] if passes.is_shared and some else [[k] for k in some]
    every = (
        Slab(passes, f"{ks[0]}-{slab}", ks, slab, function)
        for ks in together
        for slab in range(passes.arrays[ks[0]].plan.slabs)
    )
    return (slab for slab in every if not slab.is_done)


@dataclass(slots=True)
class Slab:
    """A slab whose blocks are summed in a first pass, and rescaled by their norms in a second.

    Sums of few slices are sent to this process. Others stay where they are, on the workers of a
    cluster, and are combined and saved there.
    """

    passes: Passes
    name: str
    arrays: Sequence[int]
    """The array of the slab, or all that share its slices."""
    slab: int
    """Number of the slab in its arrays."""
    function: BlockFunction | None
    """Second pass of a block; None if slices are only counted."""
    is_done: bool = False
    is_small: bool = field(init=False)
    """Whether sums are sent to this process."""
    first: Blocks = field(init=False)
    """Blocks that the first pass has left."""
    second: Blocks | None = None
    """Blocks that the second pass has left, once the norms are known."""
    _most: int = field(init=False)
    """Blocks whose sums fit into this process."""
    _under_way: int = 0
    """Blocks of tasks."""
    _parts: list[Any] = field(default_factory=list)
    """Sums: those of all blocks that were combined, then those of some more."""
    _added: int = 0
    """Blocks whose sums are there and not combined yet."""
    _has_total: bool = False
    """Whether the first of the sums is that of all blocks before."""
    _is_waiting: bool = False
    """Whether sums are being combined, or the norms computed from them."""
    _scales: dict[str, Any] = field(default_factory=dict)
    """Scales by dtype, as arguments of tasks."""

    def __post_init__(self) -> None:
        passes, state = self.passes, self.passes.slabs.get(self.name, SlabState())
        plan = self.task.plan
        sums = max(1, math.prod(without_axes(plan.block, plan.axes))) * SUM_NBYTES
        self._most = SUMS_NBYTES // sums
        self.is_small = self._most >= passes.front.window
        if state.is_counted and not (self.function and self._second_left(state.has_nan).left):
            self.is_done = True
            return
        kept = passes.kept_sums(self.name, plan.state)
        self._has_total = kept is not None
        if kept is None:
            for k in self.arrays:
                passes.clear_summed(k, self.slab)
        else:
            share = passes.front.pool.share
            self._parts = [kept if self.is_small else self._saved(state.sums) or share(kept)]
        self.first = Blocks.chained([passes.left(k, SUMMED, self.slab) for k in self.arrays])
        self.is_done = not self.first.left and kept is None

    @property
    def task(self) -> ArrayTask:
        """The first array."""
        return self.passes.arrays[self.arrays[0]]

    def next_task(self) -> Task | None:
        """Task of some blocks, of the pass that it is in."""
        front = self.passes.front
        if self.second is not None:
            blocks = front.take(self.second)
            return self._rescaling(blocks) if blocks else None
        room = (2 * self._most if self.is_small else front.window) - self._under_way - self._added
        if room <= 0:
            self.advance()  # there may be fewer threads than when a sum was added
            return None
        blocks = front.take(self.first, room)
        return self._summing(blocks) if blocks else None

    def _summing(self, blocks: Sequence[BlockId]) -> Task:
        def then(part: Any) -> None:
            self._under_way -= len(blocks)
            self._added += len(blocks)
            self._parts.append(part)
            self.advance()

        self._under_way += len(blocks)
        given = [(block.slab, block.block) for block in blocks]
        args = tasks.sum_block, [self.passes.shared[block.array] for block in blocks], given
        nbytes = self.passes.nbytes_of(blocks)
        keeps = not self.is_small
        return Task(tasks.sum_batch, args, then, blocks, nbytes, keeps=keeps, can_repeat=keeps)

    def _rescaling(self, blocks: Sequence[BlockId]) -> Task:
        passes = self.passes

        def then(found: list[tasks.BlockResult]) -> None:
            self._under_way -= len(blocks)
            passes.done(blocks, found, True)
            if not self._under_way and not (self.second and self.second.left):
                self._end()

        self._under_way += len(blocks)
        extra = [(int(passes.source_digests[passes.number(block)]),) for block in blocks]
        scales = [self._scales[passes.arrays[b.array].source.dtype.str] for b in blocks]
        assert self.function is not None
        return _task(passes, self.function, blocks, then, extra, scales)

    def advance(self) -> None:
        """Combine sums where it is time; after the last ones, compute the norms."""
        if self._is_waiting or self.second is not None or self.is_done:
            return
        is_last = not self.first.left and not self._under_way
        window = self.passes.front.window
        most = min(window, self._most) if self.is_small else window
        if self._added and (is_last or 2 * self._added >= most):
            self._is_waiting = True
            parts, self._parts = self._parts, []
            self._combine(parts, self._added)
        elif is_last:
            self._is_waiting = True
            self._scale()

    def _call(
        self, function: Callable[..., Any], *args: Any, then: Callable[[Any], None], keeps: bool
    ) -> None:
        """Call a function here if sums are small, else in a task."""
        if self.is_small:
            then(function(*args))
        else:
            self.passes.front.submit(Task(function, args, then, keeps=keeps))

    def _combine(self, parts: Sequence[Any], added: int) -> None:
        """Combine sums of some more blocks; save them if doing all so far again would take long."""
        passes, name = self.passes, f"sums-{self.name}-{uuid4().hex[:8]}"
        blocks = sum(passes.arrays[k].plan.slab_blocks for k in self.arrays)
        is_long = passes.keeps_sums or 2 * blocks >= passes.front.window
        store = passes.journal.arrays if passes.journal and is_long else None
        known, self._has_total = int(self._has_total), True

        def kept(sums: Any, digests: dict[tuple[int, int, int], int]) -> None:
            passes.sum(self.name, digests, name if store else None)
            self._parts.insert(0, sums)
            self._added -= added
            self._is_waiting = False
            self.advance()

        def combined(sums: Any) -> None:
            self._call(keep_sums, sums, store, name, then=partial(kept, sums), keeps=False)

        def last(parts: Sequence[Any], known: int) -> None:
            if saved := self._saved(name if store else ""):
                args, then = (parts, known, store, name), partial(kept, saved)
                self._call(add_and_keep, *args, then=then, keeps=False)
            else:
                self._call(add_sums, parts, known, then=combined, keeps=True)

        if self.is_small or not passes.front.pool.is_cluster:
            last(parts, known)
        else:
            reduce_sums(passes.front, parts, known, last)

    def _saved(self, name: str) -> SavedSums | None:
        """Saved sums as an argument of tasks, which load them: no worker has to be there for it."""
        passes = self.passes
        if self.is_small or not (name and passes.journal and passes.front.pool.is_cluster):
            return None
        return SavedSums(passes.journal.arrays, name, self.task.plan.state)

    def _scale(self) -> None:
        """Compute the norms of the slices, count these, and begin the second pass."""
        passes, (total,) = self.passes, self._parts
        every = [passes.arrays[k] for k in self.arrays]
        terms = sum(term_count(a.plan.shape, a.plan.axes, a.source.dtype) for a in every)
        by_dtype = {passes.arrays[k].source.dtype.str: k for k in self.arrays}
        made: dict[str, Any] = {}

        def scaled(dtype: str, scale: Any) -> None:
            made[dtype] = scale
            if len(made) == len(by_dtype):
                one = made[self.task.source.dtype.str]
                self._call(
                    tasks.count_scale, self._argument(self.arrays[0]), self.slab, one,
                    then=partial(self._begin_second, made), keeps=False,
                )  # fmt: skip

        for dtype, k in by_dtype.items():
            self._call(
                tasks.scale_of, self._argument(k), self.slab, total, terms,
                then=partial(scaled, dtype), keeps=True,
            )  # fmt: skip

    def _argument(self, array: int) -> Any:
        """An array, as an argument of `_call`."""
        return self.passes.arrays[array] if self.is_small else self.passes.shared[array]

    def _begin_second(self, scales: dict[str, Any], found: tuple[SliceCounts, bool]) -> None:
        counts, has_nan = found
        self.passes.count(self.name, counts, has_nan)
        self._is_waiting = False
        self._parts = []
        if self.function is not None:
            share = self.passes.front.pool.share
            self._scales = {k: share(s) for k, s in scales.items()} if self.is_small else scales
            # NaN spreads to blocks of which nothing is stored
            self.second = self._second_left(has_nan)
        if self.second is None or not self.second.left:
            self._end()

    def _second_left(self, everything: bool) -> Blocks:
        passes, order = self.passes, reversed(self.arrays)
        return Blocks.chained(
            [passes.left(k, DONE, self.slab, everything=everything, backwards=True) for k in order]
        )

    def _end(self) -> None:
        self.is_done = True
        self.passes.forget(self.name)
