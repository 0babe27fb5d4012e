"""The passes over an array, window by window; what the journal holds is not done again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any
from uuid import uuid4

import dask
import dask.array as da
import numpy as np

from daskclip import sketch, storage, tally, tasks
from daskclip.attempts import shown_region
from daskclip.factor import Scale
from daskclip.files import DIGESTS
from daskclip.journal import Entry, Journal
from daskclip.norms import no_block, tree
from daskclip.numerics import warm_up
from daskclip.partials import NAN, combine
from daskclip.progress import State
from daskclip.publish import JOURNAL
from daskclip.recipes import Constant
from daskclip.report import ClipReport, run_pictures
from daskclip.resume import Work, record
from daskclip.scales import Scales
from daskclip.tally import Tally
from daskclip.tasks import Job
from daskclip.workers import gathered, memory_used, running, surviving, versions

Row = Sequence[tuple[int, int]]  # slab and number in it, of some blocks


@dataclass(slots=True)
class Passes:
    """The passes of a run, and what they have come to."""

    job: Job
    how: dict[str, Any]
    """Arguments of ``dask.compute``."""
    journal: Journal
    report: Callable[[int, int, int], None]
    """Told the bytes done, those skipped, and the pass, after each window."""
    stored: Any = None
    """Whether anything of each block is stored; None if all have to be looked at."""
    total: Tally = tally.NONE
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

    def __post_init__(self) -> None:
        plan = self.job.plan
        if self.stored is not None:
            there = np.flatnonzero(self.stored)
            each = plan.blocks // plan.slabs
            looked_at = sum(plan.nbytes_of(*divmod(int(n), each)) for n in there)
            self.done = self.skipped = plan.bytes_read - looked_at * plan.passes

    def clip(self) -> bool:
        """Write the clipped array; returns whether there is one: in place there may be no need."""
        plan, in_place = self.job.plan, self.job.in_place
        second = tasks.rescale_block
        outputs = self._one_pass(self._clip) if plan.passes == 1 else self._two_passes(second)
        waiting = bytearray(b"\1") * (plan.blocks if in_place else 0)
        written = not in_place
        for entry in outputs:
            for number in entry["target"] if in_place else ():
                waiting[int(number)] = 0
                written = True
        self._count_empty()
        if not written:
            return False
        for slabs, windows in plan.windows(self.stored) if any(waiting) else ():
            for blocks in windows:
                cells = [cell for row in _rows(slabs, blocks) for cell in row]
                cells = [c for c in cells if waiting[plan.number(*c)]]
                if cells:
                    self._window(0, [cells], partial(self._copy, cells))
        return True

    def _count_empty(self) -> None:
        """Count the slices of slabs that were not looked at, or have no elements."""
        rest = self.job.plan.slices - self.total.slices
        if rest:
            norms = sketch.nothing(self.job.plan.kept.values(), rest) if self.job.collect else None
            self.total = tally.add(self.total, Tally(rest, 0, 0, 0.0, 0.0, norms))

    def _two_passes(self, second: Any) -> Iterator[Entry]:
        """Sum the blocks of some slabs, then do with each what ``second`` does, if anything."""
        seen = np.zeros(self.job.plan.blocks, np.uint32)
        for slabs, windows in self.job.plan.windows(self.stored):
            name, spoilt = "", False
            for blocks in windows:
                rows = _rows(slabs, blocks)
                entry = self._window(1, rows, partial(self._sum, rows, name))
                self.journal.forget(name)
                name, spoilt = entry["sums"], entry["nan"]
                for number, digest in entry["source"].items():
                    seen[int(number)] = digest
            scales = Scales(self.job, self.journal, name, slabs)
            if second is None:
                self.total = tally.add(self.total, scales.tally())
            elif self.stored is not None and spoilt:
                windows = self.job.plan.spans  # what is not stored becomes NaN
            # what was read last may still be in memory
            for i, blocks in enumerate(reversed(windows) if second else ()):
                rows, last = _rows(slabs, blocks), i + 1 == len(windows)
                make = partial(self._second, second, rows, scales, seen, i == 0, last)
                yield self._window(2, rows, make)
            self.journal.forget(name)

    def measure(self) -> None:
        """Count all slices by their norms."""

        def count(rows: list[Row]) -> Entry:
            return {"tally": reduce(tally.add, self._compute(tasks.count_slab, rows))}

        for _ in self._one_pass(count) if self.job.plan.passes == 1 else self._two_passes(None):
            pass
        self._count_empty()

    def compare(self) -> None:
        """Clip once more, and compare with what is there."""
        for _ in self._two_passes(tasks.compare_block):
            pass

    def check(self, digests: Any) -> None:
        """Compare the files of all blocks with their digests."""
        for slabs, windows in self.job.plan.windows():
            for blocks in windows:
                self._compute(tasks.check_block, _rows(slabs, blocks), digests=digests)

    def _one_pass(self, make: Callable[[list[Row]], Entry]) -> Iterator[Entry]:
        for slabs, windows in self.job.plan.windows(self.stored):
            for blocks in windows:
                rows = _rows(slabs, blocks)
                yield self._window(1, rows, partial(make, rows))

    def _window(self, pass_: int, rows: list[Row], make: Callable[[], Entry]) -> Entry:
        """Next entry of the journal; made if there is none."""
        plan = self.job.plan
        entry = self.journal.replay()
        size = {plan.number(*c): plan.nbytes_of(*c) for row in rows for c in row}
        looked_at = sum(size.values()) if pass_ else 0
        self.done += looked_at
        if entry is not None:
            self.skipped += looked_at
        else:
            entry = make()
            self.journal.append(entry)
            self.read += looked_at
            self.written += sum(size[n] for n in entry.get("target", ()))
        self.digest += sum(entry.get("target", {}).values())
        if "tally" in entry:
            self.total = tally.add(self.total, Tally(*entry["tally"]))
        self.report(self.done, self.skipped, pass_ or plan.passes)
        return entry

    def _clip(self, rows: list[Row]) -> Entry:
        results = self._compute(tasks.clip_slab, rows)
        return {
            "tally": reduce(tally.add, [counted for counted, _ in results]),
            "target": self._numbered(rows, [digest for _, digest in results]),
        }

    def _sum(self, rows: list[Row], before: str) -> Entry:
        found = self._compute(tasks.sum_block, rows, combined=True)
        sums = [f.partial for f in found]
        if before:
            sums = [combine(pair) for pair in zip(self.journal.load(before), sums, strict=True)]
        name = f"sums-{rows[0][0][0]}-{rows[0][0][1]}.npz"
        self.journal.save(name, sums)
        digests = {n: d for f in found for n, d in f.digests.items()}
        nan = any(bool((p.flags & NAN).any()) for p in sums)
        return {"sums": name, "nan": nan, "source": digests}

    def _second(
        self, function: Any, rows: list[Row], scales: Scales, seen: Any, first: bool, last: bool
    ) -> Entry:
        results = self._compute(function, rows, scales.load(), seen)
        entry: Entry = {"target": self._numbered(rows, results)}
        if first:
            entry["tally"] = scales.tally()
        if not last:
            entry["sums"] = scales.name  # there is more to do that needs them
        return entry

    def _copy(self, cells: Row) -> Entry:
        return {"target": self._numbered([cells], self._compute(tasks.copy_block, [cells]))}

    def _numbered(self, rows: list[Row], digests: list[Any]) -> dict[int, int]:
        """Digests by the number of their block, of those that were written."""
        numbers = [self.job.plan.number(*cell) for row in rows for cell in row]
        return {n: d for n, d in zip(numbers, digests, strict=True) if d is not None}

    def _compute(
        self,
        function: Any,
        rows: list[Row],
        scales: Sequence[Scale] = (),
        digests: Any = None,
        combined: bool = False,
    ) -> list[Any]:
        """``function`` of every block as one graph; combined to one result a row."""
        name = f"{function.__name__}-{uuid4().hex}"
        graph: dict[Any, Any] = {f"job-{name}": (Constant(self.job),)}
        for i, row in enumerate(rows):
            if scales:
                graph[f"scale-{i}-{name}"] = (Constant(scales[i]),)
            for j, cell in enumerate(row):
                more: tuple[Any, ...] = (f"scale-{i}-{name}",) if scales else ()
                more += (int(digests[self.job.plan.number(*cell)]),) if digests is not None else ()
                graph[(name, i, j)] = (function, f"job-{name}", *cell, *more)
        chunks = ((1,) * len(rows), (1,) * len(rows[0]))
        results = da.Array(graph, name, chunks, meta=no_block(2))
        if combined:
            results = tree(results, (1,), tasks.add_sums)

        def block_of(key: Any) -> str:
            row, place = key[1:] if isinstance(key, tuple) else (0, 0)
            region = self.job.plan.region(*rows[row][place])
            return f"block {shown_region(region)} of {storage.location(self.job.source)}"

        # nothing to fuse; and Dask remembers the names of what it looked at for that
        with surviving(block_of), dask.config.set({"optimization.fuse.active": False}):
            return gathered(results.to_delayed().ravel(), self.how)


def clip_passes(
    job: Job,
    work: Work,
    display: Callable[[State], None],
    started: float,
    stored: Any,
    run: Entry,
    measured: int,
) -> ClipReport:
    """All passes, up to the end of the journal; ``measured`` bytes were read before."""
    plan = job.plan
    states: list[State] = []
    size = plan.nbytes_of(0, 0) if plan.blocks else 0
    before, begun = memory_used(partial(warm_up, job.source.dtype, size)), time.monotonic()

    def progress(done: int, skipped: int, at: int) -> None:
        seconds, total = time.monotonic() - begun, plan.bytes_read
        figures = {"done": min(done, total), "skipped": skipped, "total": total, "pass_": at}
        states.append(State(passes=plan.passes, seconds=seconds, **figures))
        display(states[-1])
        del states[1 : -1 if len(states) > sketch.PLACES else 1 : 2]  # the rest says enough

    with (
        Journal(work.folder / JOURNAL, work.mirror) as entries,
        running(plan.threads, partial(tasks.end, job.run)) as how,
    ):
        passes = Passes(job, how, entries, progress, stored)
        written = passes.clip()
        after = memory_used()
        total = passes.total
        made = work.made(job.source, job.target) if written else {}
        digest = (passes.digest + made.get("metadata", 0)) % DIGESTS
        asked = ("nonfinite", "missing", *(["clip_norm"] if "limit" in run else []))
        policies = {k: run["parameters"][k] for k in asked}
        peak = max((after[k][1] - before.get(k, after[k])[0] for k in after), default=0)
        seconds = time.monotonic() - started
        actual = peak, passes.read, passes.written, seconds
        report = ClipReport(
            status="clipped" if written else "nothing to clip",
            source=storage.location(job.source),
            target=str(work.target),
            clip_norm=job.clip_norm,
            axes=plan.axes,
            slices=total.slices,
            clipped=total.clipped,
            nonfinite=total.nonfinite,
            smallest_norm=total.smallest if total.slices > total.nonfinite else None,
            largest_norm=total.largest if total.slices > total.nonfinite else None,
            bytes_read=passes.read + measured,
            bytes_written=passes.written,
            passes=plan.passes + ("limit" in run),
            blocks=plan.blocks,
            seconds=seconds,
            peak_memory=peak,
            projected_memory=plan.projected_memory,
            run=run["run"],
            began=run["began"],
            parameters=policies | {"memory": plan.memory},
            versions=versions(),
            source_fingerprint=run["source"].get("hash", "unknown"),
            digest=f"{digest:016x}" if written else None,
            pictures=run_pictures(total.norms, plan, states, actual),
        )
        if written:
            record(entries, made, report)
    return report


def _rows(slabs: Iterable[int], blocks: Iterable[int]) -> list[Row]:
    """A row of blocks for each slab."""
    return [[(int(slab), int(block)) for block in blocks] for slab in slabs]
