"""The passes over arrays, window by window; what the journal holds is not done again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from daskclip.engine.saved_norms import arrays_of, partials_of, saved_sums
from daskclip.engine.scales import Scales
from daskclip.engine.window_graph import Batch, BlockId, batch_small_blocks, compute
from daskclip.numerics import NAN, NormHistogram, SliceCounts, combine
from daskclip.storage import durable
from daskclip.worker import ArrayTask, tasks

if TYPE_CHECKING:
    from daskclip.target import Entry, Journal


@dataclass(slots=True)
class Passes:
    """The passes of a run, and what they have come to."""

    jobs: Sequence[ArrayTask]
    """One for each array; those whose plan has no passes are only copied."""
    how: dict[str, Any]
    """Arguments of ``dask.compute``."""
    journal: Journal
    report: Callable[[int, int, int], None]
    """Told the bytes done, those skipped, and the pass, after each window."""
    window: int
    """Tasks of a window: of a block each, or of some small ones."""
    stored: Sequence[Any] = ()
    """Whether anything of each block of a job is stored; None if all have to be looked at."""
    saved: Iterator[Entry] = field(default_factory=lambda: iter(()))
    """Entries that take the place of those of the first pass."""
    total: SliceCounts = field(default_factory=SliceCounts.empty)
    """Of all slices."""
    done: int = 0
    """Bytes of blocks, over all passes."""
    skipped: int = 0
    """Those that this attempt had nothing to do for: not stored, or done before."""
    read: int = 0
    """Those that this attempt read."""
    written: int = 0
    """Bytes of blocks that this attempt wrote."""
    digest: int = 0
    """Of all that is stored for the target, over all attempts."""
    first: list[int] = field(default_factory=list)
    """Number of the first block of each job among all."""

    def __post_init__(self) -> None:
        self.stored = self.stored or [None] * len(self.jobs)
        ends = np.cumsum([0, *(job.plan.blocks for job in self.jobs)])
        self.first = [int(n) for n in ends]
        for job, stored in zip(self.jobs, self.stored, strict=True):
            if stored is not None:
                plan, there = job.plan, np.flatnonzero(stored)
                each = plan.blocks // plan.slabs
                looked_at = sum(plan.nbytes_of(*divmod(int(n), each)) for n in there)
                self.done += plan.bytes_read - looked_at * plan.passes
        self.skipped = self.done

    def clip(self) -> bool:
        """Write what is clipped; returns whether anything is: in place there may be no need."""
        in_place = self.jobs[0].in_place
        waiting = bytearray(b"\1") * (self.first[-1] if in_place else 0)
        written = not in_place
        for entry in self._all(self._clip, tasks.rescale_block):
            for number in entry["target"] if in_place else ():
                waiting[int(number)] = 0
                written = True
        self._count_empty()
        jobs = range(len(self.jobs)) if any(waiting) else self.copied
        left = (c for c in self._cells(jobs) if not waiting or waiting[self.number(c)])
        for row in self._windows(left) if written else ():
            self._window(0, [row], partial(self._copy, row))
        return written

    @property
    def _shared(self) -> bool:
        """Whether all arrays share one slice."""
        return self.jobs[0].shared

    @property
    def copied(self) -> list[int]:
        """Numbers of the jobs that are only copied."""
        return [k for k, job in enumerate(self.jobs) if not job.plan.passes]

    def _all(self, make: Callable[[Batch], Entry], second: Any) -> Iterator[Entry]:
        """Entries of all windows: by ``make`` where one pass is enough, else by two."""
        if self._shared:
            yield from self._two_passes(second, self._clipped)
            return
        small = self._cells(k for k in self._clipped if self.jobs[k].plan.is_whole)
        for row in self._windows(small):
            yield self._window(1, [row], partial(make, row))
        for k in self._clipped:
            if not self.jobs[k].plan.is_whole:
                yield from self._two_passes(second, [k])

    @property
    def _clipped(self) -> list[int]:
        return [k for k, job in enumerate(self.jobs) if job.plan.passes]

    def _cells(
        self, jobs: Iterable[int], backwards: bool = False, everything: bool = False
    ) -> Iterator[BlockId]:
        """Blocks of which anything is stored, or all."""
        for k in jobs:
            stored = None if everything else self.stored[k]
            for slabs, windows in self.jobs[k].plan.windows(stored):
                for blocks in reversed(windows) if backwards else windows:
                    yield from (cell for row in _rows(k, slabs, blocks) for cell in row)

    def _count_empty(self) -> None:
        """Count the slices of slabs that were not looked at, or have no elements."""
        plans = [job.plan for job in self.jobs if job.plan.passes]
        rest = (1 if self._shared else sum(p.slices for p in plans)) - self.total.slices
        if rest:
            one = self.jobs[0]
            kept = () if one.name or one.shared else one.plan.kept.values()
            norms = NormHistogram.empty(kept, rest) if one.collect else None
            self.total = self.total.add(SliceCounts(rest, 0, 0, 0.0, 0.0, norms))

    def _two_passes(self, second: Any, jobs: Sequence[int]) -> Iterator[Entry]:
        """Sum the blocks of some slabs, then do with each what ``second`` does, if anything."""
        seen = np.zeros(self.first[-1], np.uint32)
        for slabs, forth, back in self._rounds(jobs):
            name, spoilt, keep = "", False, False
            for rows in forth():
                if (saved := next(self.saved, None)) is not None:
                    entry = self._window(0, rows, partial(self._take, saved))
                else:
                    entry = self._window(1, rows, partial(self._sum, rows, name))
                self.journal.forget(name)
                name, spoilt = entry["sums"], entry["nan"]
                for number, digest in entry["source"].items():
                    seen[int(number)] = digest
            if not name:  # nothing is stored
                continue
            some = [self.jobs[k] for k in jobs if self.jobs[k].plan.blocks]  # else no region
            scales = Scales(some, self.journal, name, slabs, self._shared)
            if second is None:
                self.total = self.total.add(scales.tally())
                keep = scales.save()
            for rows, first, last in _marked(back(spoilt)) if second else ():
                make = partial(self._second, second, rows, scales, seen, first, last)
                yield self._window(2, rows, make)
            if not keep:
                self.journal.forget(name)

    def _rounds(self, jobs: Sequence[int]) -> Iterator[tuple[Any, Any, Any]]:
        """Some slabs, their windows, and these backwards: they may still be in memory.

        Backwards, if NaN was met, with the blocks of which nothing is stored: they become NaN.
        """
        if self._shared:

            def forth() -> Iterator[list[Batch]]:
                return ([row] for row in self._windows(self._cells(jobs)))

            def back(spoilt: bool) -> Iterator[list[Batch]]:
                cells = self._cells(reversed(jobs), backwards=True, everything=spoilt)
                return ([row] for row in self._windows(cells))

            yield [0], forth, back
            return
        (k,) = jobs
        plan, stored = self.jobs[k].plan, self.stored[k]
        for slabs, windows in plan.windows(stored):
            again = partial(map, partial(_rows, k, slabs))
            whole = plan.spans if stored is not None else windows

            def once_more(spoilt: bool, again: Any = again, both: Any = (windows, whole)) -> Any:
                return again(reversed(both[spoilt]))

            yield slabs, partial(again, windows), once_more

    def measure(self) -> None:
        """Count all slices by their norms."""
        for _ in self._all(self._count, None):
            pass
        self._count_empty()

    def compare(self) -> None:
        """Clip once more, and compare with what is there."""
        if self._shared:
            list(self._two_passes(tasks.compare_block, self._clipped))
        else:
            for k in self._clipped:
                list(self._two_passes(tasks.compare_block, [k]))

    def check(self, digests: Any, jobs: Sequence[int]) -> None:
        """Compare the files of all blocks of some arrays with their digests."""
        for k in jobs:
            for slabs, windows in self.jobs[k].plan.windows():
                for blocks in windows:
                    rows = _rows(k, slabs, blocks)
                    expected = partial(self._of, digests)
                    compute(tasks.check_block, self.jobs, rows, self.how, expected=expected)

    def _windows(self, cells: Iterable[BlockId]) -> Iterator[Batch]:
        """Blocks of any arrays, as many as ``window`` tasks do."""
        some = batch_small_blocks(self.jobs, cells)
        while row := list(chain.from_iterable(islice(some, self.window))):
            yield row

    def number(self, cell: BlockId) -> int:
        """Number of a block among those of all arrays."""
        return self.first[cell.job] + self.jobs[cell.job].plan.number(cell.slab, cell.block)

    def _of(self, digests: Any, cell: BlockId) -> int:
        return int(digests[self.number(cell)])

    def _window(self, pass_: int, rows: list[Batch], make: Callable[[], Entry]) -> Entry:
        """Next entry of the journal; made if there is none."""
        entry = self.journal.replay()
        cells = {self.number(cell): cell for row in rows for cell in row}
        size = {n: self.jobs[k].plan.nbytes_of(*at) for n, (k, *at) in cells.items()}
        looked_at = sum(size.values()) if pass_ else 0
        self.done += looked_at
        if entry is not None:
            self.skipped += looked_at
        else:
            entry = make()
            self.journal.append(entry)
            self.read += looked_at
            self.written += sum(size[n] for n in entry.get("target", ()))
        for number, digest in entry.get("target", {}).items():
            self.digest += digest * weight(self.jobs[cells[int(number)].job].name)
        if "tally" in entry:
            self.total = self.total.add(SliceCounts.from_json(entry["tally"]))
        self.report(self.done, self.skipped, pass_ or max(j.plan.passes for j in self.jobs))
        return entry

    def _clip(self, row: Batch) -> Entry:
        results = compute(tasks.clip_slab, self.jobs, [row], self.how)
        return {
            "tally": reduce(SliceCounts.add, [r.counts for r in results]),
            "target": self._numbered([row], results),
        }

    def _count(self, row: Batch) -> Entry:
        results = compute(tasks.count_slab, self.jobs, [row], self.how)
        return {"tally": reduce(SliceCounts.add, [r.counts for r in results])}

    def _take(self, saved: Entry) -> Entry:
        """An entry of the first pass of another run."""
        sums = saved_sums(saved)
        if sums is not None:
            self.journal.save(saved["sums"], arrays_of(sums))
        return {k: saved[k] for k in ("sums", "nan", "source")}

    def _sum(self, rows: list[Batch], before: str) -> Entry:
        found = compute(tasks.sum_block, self.jobs, rows, self.how, combined=True)
        sums = [f.partial for f in found]
        if before:
            sums = [
                combine(pair)
                for pair in zip(partials_of(self.journal.load(before)), sums, strict=True)
            ]
        name = f"sums-{'-'.join(map(str, rows[0][0]))}.npz"
        self.journal.save(name, arrays_of(sums))
        digests = {self.number(BlockId(*c)): d for f in found for c, d in f.digests.items()}
        # an infinite norm of several arrays is as good as NaN
        nan = any(bool((p.flags if self._shared else p.flags & NAN).any()) for p in sums)
        return {"sums": name, "nan": nan, "source": digests}

    def _second(
        self, function: Any, rows: list[Batch], scales: Scales, seen: Any, first: bool, last: bool
    ) -> Entry:
        how: Any = {"scales": scales.of, "expected": partial(self._of, seen)}
        results = compute(function, self.jobs, rows, self.how, **how)
        entry: Entry = {"target": self._numbered(rows, results)}
        if first:
            entry["tally"] = scales.tally()
        if not last:
            entry["sums"] = scales.name  # there is more to do that needs them
        return entry

    def _copy(self, row: Batch) -> Entry:
        results = compute(tasks.copy_block, self.jobs, [row], self.how)
        return {"target": self._numbered([row], results)}

    def _numbered(self, rows: list[Batch], results: list[tasks.BlockResult]) -> dict[int, int]:
        """Digests by the number of their block, of those that were written."""
        numbers = [self.number(cell) for row in rows for cell in row]
        digests = [result.digest for result in results]
        return {n: d for n, d in zip(numbers, digests, strict=True) if d is not None}


def weight(name: str) -> int:
    """What digests of an array count in a sum over arrays, so that no two may change places."""
    return durable.digest_entry(name, 0) | 1 if name else 1


def _rows(job: int, slabs: Iterable[int], blocks: Iterable[int]) -> list[Batch]:
    """A row of blocks for each slab."""
    return [[BlockId(job, int(slab), int(block)) for block in blocks] for slab in slabs]


def _marked(items: Iterable[Any]) -> Iterator[tuple[Any, bool, bool]]:
    """Each item, with whether it is the first and whether it is the last."""
    items, first = iter(items), True
    item = next(items, None)
    while item is not None:
        following = next(items, None)
        yield item, first, following is None
        item, first = following, False
