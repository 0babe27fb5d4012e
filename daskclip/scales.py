"""What slices are multiplied by: made from their sums, counted by their norms."""

from __future__ import annotations

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
    _made: list[Scale] = field(default_factory=list)

    def load(self) -> list[Scale]:
        if not self._made:
            limit, dtype = self.job.clip_norm, self.job.source.dtype
            terms = tasks.terms(self.job, self.job.plan.shape)  # of what is not stored too
            sums = (p._replace(terms=terms) for p in self.journal.load(self.name))
            self._made = [finalize(p, limit, dtype) for p in sums]
        return self._made

    def tally(self) -> Tally:
        return reduce(tally.add, map(tally.count, self.load()))
