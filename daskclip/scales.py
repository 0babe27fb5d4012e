"""What slices are multiplied by: made from their sums, counted by their norms."""

from __future__ import annotations

from collections.abc import Iterable
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
    slabs: Iterable[int]
    _made: list[Scale] = field(default_factory=list)

    def load(self) -> list[Scale]:
        if not self._made:
            job = self.job
            terms = tasks.terms(job, job.plan.shape)  # of what is not stored too
            for p, slab in zip(self.journal.load(self.name), self.slabs, strict=True):
                limit = tasks.limit_of(job, job.plan.region(int(slab), 0))
                self._made.append(finalize(p._replace(terms=terms), limit, job.source.dtype))
        return self._made

    def tally(self) -> Tally:
        return reduce(tally.add, map(tally.count, self.load()))
