"""What slices are multiplied by: made from their sums, counted by their norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING

from daskclip.engine.saved_norms import partials_of
from daskclip.numerics import Scale, SliceCounts, finalize, nan_if_infinite
from daskclip.worker import ArrayTask, tasks

if TYPE_CHECKING:
    from daskclip.target import Journal


@dataclass(slots=True)
class Scales:
    """What the slices of some slabs are multiplied by; made from their sums when it is needed.

    The slabs are those of one array, or the only one that several arrays share.
    """

    jobs: Sequence[ArrayTask]
    journal: Journal
    name: str
    """Of their sums in the journal."""
    slabs: Sequence[int]
    """Of the first of the arrays."""
    shared: bool
    """Whether the arrays share their one slice."""
    _made: dict[tuple[int, str], Scale] = field(default_factory=dict)

    def of(self, row: int, job: ArrayTask) -> tuple[str, Scale]:
        """Scale of the slices of a slab, with a name for it."""
        kind = row, job.source.dtype.str
        if kind not in self._made:
            # of what is not stored too
            terms = sum(tasks.terms(job, job.plan.shape) for job in self.jobs)
            sums = partials_of(self.journal.load(self.name))[row]._replace(terms=terms)
            if self.shared:  # as clip_by_global_norm has it
                sums = nan_if_infinite(sums)
            limit = tasks.block_limit(job, job.plan.region(int(self.slabs[row]), 0))
            self._made[kind] = finalize(sums, limit, job.source.dtype)
        return "-".join(map(str, kind)), self._made[kind]

    def save(self) -> bool:
        """Write the norms to where they are wanted, if they are."""
        job = self.jobs[0]
        for i, slab in enumerate(self.slabs):
            tasks.save_norms(job, self.of(i, job)[1], job.plan.region(int(slab), 0))
        return job.target is not None

    def tally(self) -> SliceCounts:
        """Counts over all slices."""
        job = self.jobs[0]
        regions = (job.plan.region(int(slab), 0) for slab in self.slabs)
        found = (tasks.count_region(job, self.of(i, job)[1], r) for i, r in enumerate(regions))
        return reduce(SliceCounts.add, found)
