"""Windows of blocks: each is replayed from the journal or computed, then counted and shown.

`rounds` says in which order windows come. It is the same in every attempt at a run, since a
journal is replayed by position.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from daskclip.engine.cluster import ComputeKwargs, running
from daskclip.engine.saved_norms import SavedNorms
from daskclip.engine.window_graph import BlockId, Window, batch_small_blocks, compute
from daskclip.grid import grid_shape
from daskclip.numerics import NormHistogram, Partial, SliceCounts
from daskclip.plan import GroupPlan
from daskclip.report import ProgressState, Show, progress_printer
from daskclip.storage import StoredArray, durable
from daskclip.target import Arrays, Journal, RunRecord, WindowRecord
from daskclip.worker import ArrayTask

STATES = 200  # points of the curve of progress that are kept
HasStored = npt.NDArray[np.bool_] | None
"""For each block of an array, whether anything of it is stored; None if all blocks count."""


@dataclass(slots=True)
class Progress:
    """Progress of the passes over the arrays, shown after each window."""

    show: Show = field(default_factory=lambda: progress_printer(False))
    total: int = 0
    """Bytes to do, over all passes."""
    passes: int = 2
    """Number of times an array is read, at most."""
    began: float = field(default_factory=time.monotonic)
    states: list[ProgressState] = field(default_factory=list)
    """States that were shown, thinned out, from the first to the last."""

    def report(self, done: int, skipped: int, pass_: int) -> None:
        """Show the bytes done and skipped, and the pass of the last window."""
        state = ProgressState(
            done=min(done, self.total), skipped=skipped, total=self.total, pass_=pass_,
            passes=self.passes, seconds=time.monotonic() - self.began,
        )  # fmt: skip
        self.states.append(state)
        self.show(state)
        # every other one goes, so that they are spread over the whole run
        if len(self.states) > STATES:
            del self.states[1:-1:2]


@dataclass(slots=True)
class Passes:
    """The windows of a run, and the totals of those that are done."""

    arrays: Sequence[ArrayTask]
    """Tasks of all arrays; an array whose plan has no passes is only copied."""
    compute_kwargs: ComputeKwargs
    journal: Journal
    tasks_per_window: int
    has_stored: Sequence[HasStored]
    progress: Progress
    saved_norms: SavedNorms | None
    """Norms whose sums take the place of the first of two passes."""
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
    saved_windows: Iterator[WindowRecord] = field(init=False)
    """Records of the pass that took the saved norms, from the next one on."""
    _first: list[int] = field(init=False)
    """Number of the first block of each array among all, then of all blocks."""

    @classmethod
    @contextmanager
    def open(
        cls,
        arrays: Sequence[ArrayTask],
        plan: GroupPlan,
        journal: Journal,
        has_stored: Sequence[HasStored] = (),
        progress: Progress | None = None,
        saved_norms: SavedNorms | None = None,
    ) -> Iterator[Passes]:
        """Prepare to run blocks, by default all and silently; none is running afterwards."""
        # arrays of one attempt share its id, by which processes refuse tasks that come too late
        with running(plan.threads, arrays[0].attempt_id) as kwargs:
            stored, shown = has_stored or [None] * len(arrays), progress or Progress()
            yield cls(arrays, kwargs, journal, plan.window, stored, shown, saved_norms)

    def __post_init__(self) -> None:
        self.saved_windows = iter(()) if self.saved_norms is None else self.saved_norms.windows()
        self._first = [0]
        for array in self.arrays:
            self._first.append(self._first[-1] + array.plan.blocks)
        # what is not stored is done from the beginning
        self.bytes_done = sum(map(self._absent_nbytes, self.arrays, self.has_stored))
        self.bytes_skipped = self.bytes_done

    def _absent_nbytes(self, array: ArrayTask, has_stored: HasStored) -> int:
        """Bytes of blocks that no window will have, over all passes."""
        if has_stored is None:
            return 0
        plan = array.plan
        each = plan.blocks // plan.slabs
        present = (plan.nbytes_of(*divmod(int(n), each)) for n in np.flatnonzero(has_stored))
        return (plan.nbytes - sum(present)) * min(plan.passes, self.progress.passes)

    @property
    def is_shared(self) -> bool:
        """Whether all arrays share one slice."""
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

    def windows(self, blocks: Iterable[BlockId]) -> Iterator[list[list[BlockId]]]:
        """Batches of blocks of any arrays, as many as a window has tasks."""
        batches = batch_small_blocks(self.arrays, blocks)
        while window := list(islice(batches, self.tasks_per_window)):
            yield window

    def compute(self, function: Callable[..., Any], window: Window, **options: Any) -> list[Any]:
        """Compute ``function`` of all blocks of a window."""
        return compute(function, self.arrays, window, self.compute_kwargs, **options)

    def run(
        self, pass_: int, window: Window, make: Callable[[Window], WindowRecord]
    ) -> WindowRecord:
        """Take the next record of the journal, or make and append it; pass 0 reads nothing."""
        # a window counts by its blocks, whether it is replayed or made
        blocks = {self.number(block): block for block in blocks_of(window)}
        nbytes = {n: self.arrays[k].plan.nbytes_of(*at) for n, (k, *at) in blocks.items()}
        read = sum(nbytes.values()) if pass_ else 0
        self.bytes_done += read
        record = self.journal.replay()
        if record is not None:
            self.bytes_skipped += read
        else:
            record = make(window)
            self.journal.append(record)
            self.bytes_read += read
            self.bytes_written += sum(nbytes[n] for n in record.target or ())
        # an earlier attempt wrote to the same staging, so that its blocks count too
        for number, digest in (record.target or {}).items():
            self.digest += digest * _name_factor(self.arrays[blocks[number].array].name)
        self.blocks_written += len(record.target or ())
        if record.tally is not None:
            self.total = self.total.add(SliceCounts.from_json(record.tally))
        most = self.progress.passes
        self.progress.report(self.bytes_done, self.bytes_skipped, min(pass_ or most, most))
        return record

    def digest_with(self, metadata: int) -> str:
        """Digest of all that is stored for the target and of its metadata, in hexadecimal."""
        return f"{(self.digest + metadata) % durable.DIGESTS:016x}"

    def count_empty(self) -> None:
        """Count the slices of slabs that no window had: nothing is stored, or they are empty."""
        plans = [array.plan for array in self.arrays if array.plan.passes]
        # their norm is 0, which no limit clips
        rest = (1 if self.is_shared else sum(p.slices for p in plans)) - self.total.slices
        if rest:
            one = self.arrays[0]
            kept = () if one.name or one.shared else one.plan.kept.values()
            norms = NormHistogram.empty(kept, rest) if one.collect else None
            self.total = self.total.add(SliceCounts(rest, 0, 0, 0.0, 0.0, norms))


def find_stored(arrays: Sequence[ArrayTask], run: RunRecord) -> list[HasStored]:
    """For each block of each array, whether anything of it is stored; None if all blocks count."""
    units = sum(math.prod(grid_shape(a.plan.shape, a.plan.unit)) for a in arrays)
    # the fingerprint has counted chunks: if none is missing, nothing needs to be listed again
    if run.source.get("chunks", units) >= units:
        return [None] * len(arrays)
    return [
        None
        if (_needs_all(a) and a.plan.passes) or not a.plan.blocks
        else a.source.stored_blocks(a.plan.block, a.plan.block_strides, a.plan.blocks)
        for a in arrays
    ]


def _needs_all(array: ArrayTask) -> bool:
    """Whether blocks of which nothing is stored matter: each, or its stored limits, may be bad."""
    return array.missing == "error" or isinstance(array.limits, StoredArray)


def _name_factor(name: str) -> int:
    """Factor for the digests of an array, without which two arrays could trade places unseen."""
    # odd, and so invertible modulo a power of two: no bit of a digest is lost
    return durable.digest_entry(name, 0, 0) | 1 if name else 1


def save_sums(journal: Journal, name: str, sums: Iterable[Partial]) -> None:
    """Keep sums with a journal, as four arrays each."""
    arrays: Arrays = {}
    for i, p in enumerate(sums):
        arrays |= {f"limbs{i}": p.limbs, f"flags{i}": p.flags}
        arrays |= {f"rest{i}": np.array([p.low, p.terms]), f"ord{i}": np.array(p.ord)}
    journal.save(name, arrays)


def load_sums(journal: Journal, name: str) -> list[Partial]:
    """Load the sums that `save_sums` has kept."""
    arrays, sums = journal.load(name), []
    # limbs, flags, rest and ord of each
    for i in range(len(arrays) // 4):
        low, terms = arrays[f"rest{i}"].tolist()
        ord = arrays[f"ord{i}"].item()
        sums.append(Partial(arrays[f"limbs{i}"], low, arrays[f"flags{i}"], terms, ord))
    return sums


def blocks_of(window: Window) -> Iterator[BlockId]:
    """Blocks of a window, row by row."""
    return (block for row in window for batch in row for block in batch)
