"""The state of a run: which blocks are done, by its journal and since; totals and progress.

`stages` says what is done in which order. A journal may have its records in any order: they say
what is done, and what is left is run again.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
import numpy.typing as npt

from daskclip.engine.cluster import running
from daskclip.engine.front import BlockId, Blocks, Front
from daskclip.engine.saved_norms import SavedNorms
from daskclip.numerics import NormHistogram, SliceCounts
from daskclip.plan import GroupPlan, sizing
from daskclip.report import Progress
from daskclip.storage import durable
from daskclip.target import BlocksRecord, Journal
from daskclip.worker import ArrayTask, Sums, kept_sums, tasks

RECORD_S = 1.0  # seconds after which what is done is journalled
PIECE = 1 << 16  # blocks whose state is looked at together
DONE, WRITTEN, SUMMED = 1, 2, 4
"""State of a block: done by the last pass over it, written, read by the first of two."""
HasStored = npt.NDArray[np.bool_] | None
"""For each block of an array, whether anything of it is stored; None if all blocks count."""


@dataclass(slots=True)
class SlabState:
    """State of a slab, by the journal."""

    sums: str = ""
    """Name of its sums so far."""
    is_counted: bool = False
    """Whether its norms are known and its slices are in the totals."""
    has_nan: bool = False
    """Whether a slice becomes NaN."""


@dataclass(slots=True)
class Passes:
    """The blocks of a run and their state, and the totals of those that are done."""

    arrays: Sequence[ArrayTask]
    """Tasks of all arrays; an array whose plan has no passes is only copied."""
    front: Front
    journal: Journal | None
    """None if nothing can be resumed."""
    has_stored: Sequence[HasStored]
    progress: Progress
    saved_norms: SavedNorms | None
    """Norms whose sums take the place of the first of two passes."""
    keeps_sums: bool
    """Whether the sums of every slab are kept, for other runs."""
    total: SliceCounts = field(default_factory=SliceCounts.empty)
    """Counts over all slices."""
    bytes_done: int = 0
    """Bytes of blocks, over all passes."""
    bytes_skipped: int = 0
    """Bytes of blocks that are not stored, or that an earlier attempt has done."""
    bytes_read: int = 0
    """Bytes of blocks that this attempt read."""
    bytes_written: int = 0
    """Bytes of blocks that this attempt wrote."""
    blocks_written: int = 0
    """Number of blocks written, over all attempts."""
    digest: int = 0
    """Sum of digests of all that is stored for the target, over all attempts."""
    slabs: dict[str, SlabState] = field(default_factory=dict)
    """Slabs of two passes that the journal names."""
    state: npt.NDArray[np.uint8] = field(init=False)
    """State of each block, by its number."""
    source_digests: npt.NDArray[np.uint32] = field(init=False)
    """Digest of the values that the first of two passes read, by the number of the block."""
    shared: list[object] = field(init=False)
    """The tasks of all arrays, as arguments for many calls."""
    _first: list[int] = field(init=False)
    """Number of the first block of each array among all, then of all blocks."""
    _results: list[tuple[int, tasks.BlockResult]] = field(default_factory=list)
    """Numbers and results of blocks that are done and not journalled yet."""
    _counted: dict[str, tuple[bool, SliceCounts]] = field(default_factory=dict)
    """Whether a slice becomes NaN, and counts, of slabs of two passes; not journalled yet."""
    _recorded: float = field(default_factory=time.monotonic)
    """When the last record was made."""

    @classmethod
    @contextmanager
    def open(
        cls,
        arrays: Sequence[ArrayTask],
        plan: GroupPlan,
        journal: Journal | None = None,
        has_stored: Sequence[HasStored] = (),
        progress: Progress | None = None,
        saved_norms: SavedNorms | None = None,
        keeps_sums: bool = False,
    ) -> Iterator[Passes]:
        """Prepare to run blocks, by default all and silently; none is running afterwards."""
        # arrays of one attempt share its id, by which processes refuse tasks that come too late
        with running(plan.threads, arrays[0].attempt_id) as pool:
            front = Front(pool, arrays, plan.thread_window, sizing.DEFAULT.task_nbytes)
            stored, shown = has_stored or [None] * len(arrays), progress or Progress()
            passes = cls(arrays, front, journal, stored, shown, saved_norms, keeps_sums)
            try:
                yield passes
            finally:
                front.cancel()
                # what is done need not be done again; an error must not hide the one before
                with suppress(Exception):
                    passes.flush()

    def __post_init__(self) -> None:
        self._first = [0]
        for array in self.arrays:
            self._first.append(self._first[-1] + array.plan.blocks)
        self.state = np.zeros(self.blocks, np.uint8)
        self.source_digests = np.zeros(self.blocks, np.uint32)
        self.shared = [self.front.pool.share(array) for array in self.arrays]
        # what is not stored is done from the beginning
        self.bytes_done = sum(map(self._absent_nbytes, self.arrays, self.has_stored))
        for record in self.journal.replay() if self.journal else ():
            self._take(record)
        self.bytes_skipped = self.bytes_done
        if self.bytes_done and self.journal:
            self._report(1)

    def _absent_nbytes(self, array: ArrayTask, has_stored: HasStored) -> int:
        """Bytes of blocks that no pass will have, over all passes."""
        if has_stored is None:
            return 0
        plan = array.plan
        numbers = np.flatnonzero(has_stored).tolist()
        present = (plan.nbytes_of(*divmod(n, plan.slab_blocks)) for n in numbers)
        return (plan.nbytes - sum(present)) * min(plan.passes, self.progress.passes)

    @property
    def is_shared(self) -> bool:
        """Whether the arrays have their slices in common."""
        return self.arrays[0].shared

    @property
    def clipped(self) -> list[int]:
        """Numbers of the arrays that are clipped."""
        return [k for k, array in enumerate(self.arrays) if array.plan.passes]

    @property
    def copied(self) -> list[int]:
        """Numbers of the arrays that are only copied."""
        return [k for k, array in enumerate(self.arrays) if not array.plan.passes]

    @property
    def blocks(self) -> int:
        """Number of blocks of all arrays."""
        return self._first[-1]

    def number(self, block: BlockId) -> int:
        """Number of a block among those of all arrays."""
        return self._first[block.array] + self.arrays[block.array].plan.number(*block[1:])

    def block(self, number: int) -> BlockId:
        """The block of a number."""
        array = bisect_right(self._first, number) - 1
        plan = self.arrays[array].plan
        return BlockId(array, *divmod(number - self._first[array], plan.slab_blocks))

    def left(
        self,
        array: int,
        done: int,
        slab: int | None = None,
        *,
        everything: bool = False,
        backwards: bool = False,
    ) -> Blocks:
        """Blocks of an array, or of a slab of it, that are stored and lack a state.

        Parameters
        ----------
        array : int
            Number of the array.
        done : int
            State of the blocks to leave out.
        slab : int, optional
            Number of the slab; all by default.
        everything : bool
            Whether blocks of which nothing is stored are taken too.
        backwards : bool
            Whether the last block comes first.
        """
        plan, first = self.arrays[array].plan, self._first[array]
        each = plan.slab_blocks
        start, stop = (0, plan.blocks) if slab is None else (each * slab, each * (slab + 1))
        stored = None if everything else self.has_stored[array]
        state = self.state[first:]

        def some(begin: int) -> npt.NDArray[np.intp]:
            end = min(begin + PIECE, stop)
            wanted = state[begin:end] & done == 0
            if stored is not None:
                wanted &= stored[begin:end]
            return np.flatnonzero(wanted) + begin

        def found() -> Iterator[BlockId]:
            begins = range(start, stop, PIECE)
            for begin in reversed(begins) if backwards else begins:
                numbers = some(begin).tolist()
                for number in reversed(numbers) if backwards else numbers:
                    yield BlockId(array, *divmod(number, each))

        return Blocks(found(), sum(some(begin).size for begin in range(start, stop, PIECE)))

    def nbytes_of(self, blocks: Iterable[BlockId]) -> int:
        """Bytes of blocks, decoded."""
        return sum(self.arrays[k].plan.nbytes_of(*at) for k, *at in blocks)

    # --- sums of slabs ---------------------------------------------------------------------------

    def is_left(self, blocks: Sequence[BlockId]) -> bool:
        """Whether anything of some blocks, which are done together, is stored and left to do."""
        numbers = {b: self.number(b) for b in blocks}
        stored = ((self.has_stored[b.array], n - self._first[b.array]) for b, n in numbers.items())
        is_stored = any(each is None or each[n] for each, n in stored)
        return is_stored and not all(self.state[n] & DONE for n in numbers.values())

    def kept_sums(self, slab: str, state: int) -> Sums | None:
        """Sums of a slab that an earlier attempt, or another run, has kept."""
        if self.saved_norms is not None:
            saved = self.saved_norms.sums(slab, state)
            if saved is None:
                return None
            sums, digests = saved
            for number, digest in digests.items():
                self.source_digests[number] = digest
                self.state[number] |= SUMMED
            return sums
        known = self.slabs.get(slab)
        if known and known.sums and self.journal:
            # what was lost is summed again; numpy and zipfile raise errors of any kind
            with suppress(Exception):
                return kept_sums(self.journal.arrays, known.sums, state)
        return None

    def clear_summed(self, array: int, slab: int) -> None:
        """Let the blocks of a slab be summed again."""
        each = self.arrays[array].plan.slab_blocks
        start = self._first[array] + each * slab
        self.state[start : start + each] &= 0xFF ^ SUMMED

    def forget(self, slab: str) -> None:
        """Remove the sums of a slab that has ended, unless they are kept for other runs."""
        known = self.slabs.pop(slab, SlabState())
        if known.sums and self.journal and not self.keeps_sums:
            # the record of its last blocks has to be on disk
            self.flush()
            self.journal.arrays.forget(known.sums)

    # --- records ---------------------------------------------------------------------------------

    def sum(self, slab: str, digests: dict[tuple[int, int, int], int], sums: str | None) -> None:
        """Take the digests of blocks whose sums were added; journalled if the sums are kept."""
        blocks = [BlockId(*block) for block in digests]
        source = {
            self.number(b): digest for b, digest in zip(blocks, digests.values(), strict=True)
        }
        old = self.slabs.get(slab, SlabState()).sums
        record = BlocksRecord(slab=slab, sums=sums, source=source)
        if self.journal and sums:
            self.journal.append(record)
            # the new sums include the old ones, and the record that names them is on disk
            if old:
                self.journal.arrays.forget(old)
        self.bytes_read += self.nbytes_of(blocks)
        self._take(record)
        self._report(1)

    def count(self, slab: str, counts: SliceCounts, has_nan: bool) -> None:
        """Take the counts of the slices of a slab, once."""
        if not self.slabs.setdefault(slab, SlabState()).is_counted:
            self._counted[slab] = has_nan, counts
            self._flush_in_time()

    def done(
        self, blocks: Sequence[BlockId], results: Sequence[tasks.BlockResult], reads: bool
    ) -> None:
        """Take the results of the last pass over some blocks, and journal them soon."""
        # counts are taken from these: an interrupt must not come between a block and its counts
        self._results += zip(map(self.number, blocks), results, strict=True)
        self.bytes_read += self.nbytes_of(blocks) if reads else 0
        self._flush_in_time()

    def _flush_in_time(self) -> None:
        late = time.monotonic() - self._recorded > RECORD_S
        if late or 2 * len(self._results) >= self.front.window:
            self.flush()

    def flush(self) -> None:
        """Journal the blocks that are done, and the counts of slices."""
        if not (self._results or self._counted):
            return
        results, counted = self._results, self._counted
        self._results, self._counted = [], {}
        counts = [r.counts for _, r in results if r.counts is not None]
        counts += [own for _, own in counted.values()]
        written = {n: r.digest for n, r in results if r.digest is not None}
        self.bytes_written += self.nbytes_of(map(self.block, written))
        record = BlocksRecord(
            tally=reduce(SliceCounts.add, counts) if counts else None,
            target=written or None,
            kept=[n for n, r in results if r.digest is None] or None,
            counted={slab: has_nan for slab, (has_nan, _) in counted.items()} or None,
        )
        if self.journal:
            self.journal.append(record)
        self._recorded = time.monotonic()
        self._take(record)
        self._report(self.progress.passes)

    def _report(self, pass_: int) -> None:
        self.progress.report(self.bytes_done, self.bytes_skipped, min(pass_, self.progress.passes))

    def _take(self, record: BlocksRecord) -> None:
        """Take a record of this attempt or of an earlier one."""
        written = record.target or {}
        for number in (*written, *(record.kept or ())):
            array = self.arrays[self.block(number).array]
            # a block that is copied in the end, after it was kept in place, has been counted
            if array.plan.passes and not self.state[number] & DONE:
                self.bytes_done += self.nbytes_of([self.block(number)])
            if number in written and not self.state[number] & WRITTEN:
                self.digest += written[number] * _name_factor(array.name)
                self.blocks_written += 1
            self.state[number] |= DONE | (WRITTEN if number in written else 0)
        for number, digest in (record.source or {}).items():
            self.source_digests[number] = digest
            self.state[number] |= SUMMED
            self.bytes_done += self.nbytes_of([self.block(number)])
        if record.slab is not None:
            slab = self.slabs.setdefault(record.slab, SlabState())
            slab.sums = record.sums or slab.sums
        for name, has_nan in (record.counted or {}).items():
            slab = self.slabs.setdefault(name, SlabState())
            slab.is_counted, slab.has_nan = True, has_nan
        if record.tally is not None:
            self.total = self.total.add(SliceCounts.from_json(record.tally))

    def digest_with(self, metadata: int) -> str:
        """Digest of all that is stored for the target and of its metadata, in hexadecimal."""
        return f"{(self.digest + metadata) % durable.DIGESTS:016x}"

    def count_empty(self) -> None:
        """Count the slices of slabs that no pass had: nothing is stored, or they are empty."""
        plans = [array.plan for array in self.arrays if array.plan.passes]
        # their norm is 0, which no limit clips
        rest = sum(p.slices for p in plans[: 1 if self.is_shared else None]) - self.total.slices
        if rest:
            one = self.arrays[0]
            kept = plans[0].kept.values() if one.shared or not one.name else ()
            norms = NormHistogram.empty(kept, rest) if one.collect else None
            self.total = self.total.add(SliceCounts(rest, 0, 0, rest, 0, 0.0, 0.0, 0.0, norms))


def _name_factor(name: str) -> int:
    """Factor for the digests of an array, without which two arrays could trade places unseen."""
    # odd, and so invertible modulo a power of two: no bit of a digest is lost
    return durable.digest_entry(name, 0, 0) | 1 if name else 1
