"""What slices are multiplied by: made from their sums, counted by their norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce

from daskclip import tally, tasks
from daskclip.factor import Scale, finalize
from daskclip.journal import Journal
from daskclip.tally import Tally
from daskclip.tasks import Job


@dataclass(slots=True)
class Scales:
    """What the slices of some slabs are multiplied by; made from their sums when it is needed."""

    job: Job
    journal: Journal
    name: str
    """Of their sums in the journal."""
    slabs: Sequence[int]
    _made: list[Scale] = field(default_factory=list)

    def load(self) -> list[Scale]:
        if not self._made:
            limit, dtype = self.job.clip_norm, self.job.source.dtype
            terms = tasks.terms(self.job, self.job.plan.shape)  # of what is not stored too
            sums = (p._replace(terms=terms) for p in self.journal.load(self.name))
            self._made = [finalize(p, limit, dtype) for p in sums]
        return self._made

    def tally(self) -> Tally:
        regions = (self.job.plan.region(int(slab), 0) for slab in self.slabs)
        pairs = zip(self.load(), regions, strict=True)
        return reduce(tally.add, (tasks.tally(self.job, *pair) for pair in pairs))
