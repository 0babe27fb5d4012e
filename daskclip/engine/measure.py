"""Passes that write nothing: the norms of all slices, counted."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from daskclip.engine.attempt import array_tasks, stored_of
from daskclip.engine.cluster import running
from daskclip.engine.passes import Passes
from daskclip.engine.saved_norms import SUMS, SavedNorms
from daskclip.errors import InvalidValueError
from daskclip.report import ProgressState, Show
from daskclip.target import JOURNAL, Entry, Journal, journal
from daskclip.worker import ArrayTask, drain

if TYPE_CHECKING:
    from daskclip.plan import GroupPlan
    from daskclip.storage import Hierarchy


@contextmanager
def scratch_passes(
    jobs: list[ArrayTask], how: dict[str, Any], window: int, stored: Any = (), norms: Any = None
) -> Iterator[Passes]:
    """Passes whose journal is not kept, but for one in an array of norms."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / JOURNAL
        if norms is None:
            journal.begin(path, {})
        else:
            path = norms.folder / SUMS / JOURNAL
        with Journal(path) as entries:
            passes = Passes(jobs, how, entries, lambda *_: None, window, stored)
            yield passes
            if norms is not None:
                entries.append({"total": passes.total})


def measure(
    source: Hierarchy,
    plan: GroupPlan,
    run: Entry,
    display: Show,
    norms: Hierarchy | None = None,
) -> Passes:
    """All norms of a source, collected; each byte that is stored is read once.

    They are written to ``norms``, if that is given, with what they were made from.
    """
    started, parameters = time.monotonic(), run["parameters"]
    common = {"in_place": False, "clip_norm": None, "collect": True}
    common |= {k: parameters[k] for k in ("ord", "nonfinite", "missing")}
    staged = None if norms is None else str(norms)
    jobs = array_tasks(plan, source, norms, uuid4().hex, {}, staged=staged, **common)
    with (
        running(plan.threads, partial(drain, jobs[0].attempt_id)) as how,
        scratch_passes(jobs, how, plan.window, stored_of(jobs, run), norms) as passes,
    ):
        passes.done = passes.skipped = passes.done // plan.passes  # it is one pass only

        def report(done: int, skipped: int, _: int) -> None:
            told: Any = {"done": done, "skipped": skipped, "seconds": time.monotonic() - started}
            display(ProgressState(total=plan.nbytes, pass_=1, passes=1, **told))

        passes.report = report
        passes.measure()
    return passes


def measure_quantile(
    percent: Any,
    source: Hierarchy,
    run: Entry,
    plan: GroupPlan,
    display: Show,
    saved: SavedNorms | None,
) -> tuple[float, int]:
    """Norm that so many percent do not exceed, and the bytes that were read for it."""
    if saved is not None:
        total, read = saved.total, 0
    else:
        passes = measure(source, plan, run, display)
        total, read = passes.total, passes.read
    if total.histogram is None or total.slices == total.nonfinite:
        raise InvalidValueError(
            f"source {source} has no finite slice, so that no norm is a limit; give clip_norm as "
            "a number"
        )
    return total.histogram.quantile(percent, total.smallest, total.largest), read
