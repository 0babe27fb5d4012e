"""Passes that write nothing: the norms of all slices, counted."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from daskclip import journal, sketch, storage, tasks
from daskclip.errors import InvalidValueError
from daskclip.journal import Entry, Journal
from daskclip.passes import Passes
from daskclip.plan import ClipPlan
from daskclip.progress import Show, State
from daskclip.publish import JOURNAL
from daskclip.tasks import Job
from daskclip.workers import running


@contextmanager
def unkept(job: Job, how: dict[str, Any], stored: Any = None) -> Iterator[Passes]:
    """Passes whose journal is not kept."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / JOURNAL
        journal.begin(path, {})
        with Journal(path) as entries:
            yield Passes(job, how, entries, lambda *_: None, stored)


def measure(
    source: Any, plan: ClipPlan, policies: dict[str, str], stored: Any, display: Show
) -> Passes:
    """All norms of a source, collected; each byte that is stored is read once."""
    started = time.monotonic()
    job = Job(
        run=uuid4().hex,
        plan=plan,
        source=source,
        target=None,
        staged=None,
        in_place=False,
        clip_norm=sys.float_info.max,  # of infinity, NaN would not be refused
        nonfinite=policies["nonfinite"],
        missing=policies["missing"],
        collect=True,
    )
    with (
        running(plan.threads, partial(tasks.end, job.run)) as how,
        unkept(job, how, stored) as passes,
    ):
        passes.done = passes.skipped = passes.done // plan.passes  # it is one pass only

        def report(done: int, skipped: int, _: int) -> None:
            told: Any = {"done": done, "skipped": skipped, "seconds": time.monotonic() - started}
            display(State(total=plan.nbytes, pass_=1, passes=1, **told))

        passes.report = report
        passes.measure()
    return passes


def measure_quantile(
    percent: Fraction, source: Any, run: Entry, plan: ClipPlan, stored: Any, display: Show
) -> tuple[float, int]:
    """Norm that so many percent do not exceed, and the bytes that were read for it."""
    passes = measure(source, plan, run["parameters"], stored, display)
    total = passes.total
    if total.slices == total.nonfinite:
        raise InvalidValueError(
            f"source {storage.location(source)} has no finite slice, so that no norm is a limit; "
            "give clip_norm as a number"
        )
    norms = sketch.Norms(*total.norms)
    return sketch.quantile(norms, percent, total.smallest, total.largest), passes.read
