"""One attempt at a run: its jobs, all passes, and the report at the end of the journal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from daskclip.engine.cluster import memory_used, running, versions
from daskclip.engine.passes import Passes
from daskclip.engine.run_record import Transaction, close_journal
from daskclip.engine.saved_norms import SavedNorms
from daskclip.grid import grid_shape
from daskclip.numerics import NormHistogram
from daskclip.plan import GroupPlan
from daskclip.report import ClipReport, ProgressState, format_size
from daskclip.storage import Hierarchy, durable
from daskclip.target import JOURNAL, Entry, Journal
from daskclip.worker import ArrayTask, drain

if TYPE_CHECKING:
    from daskclip.engine.saved_norms import SavedNorms
    from daskclip.numerics import NormHistogram
    from daskclip.plan import GroupPlan

STATES = 200  # points of the curve of progress that are kept
OTHERS = ("dim", "nonfinite", "missing", "include", "exclude", "global_norm", "norms")


def array_tasks(
    plan: GroupPlan,
    source: Hierarchy,
    target: Hierarchy | None,
    attempt_id: str,
    limits: dict[str, Any],
    **common: Any,
) -> list[ArrayTask]:
    """What tasks share, for each array of a plan."""
    return [
        ArrayTask(
            attempt_id=attempt_id,
            number=i,
            name=name,
            plan=one,
            source=source.arrays[name],
            target=None if target is None else target.arrays[name],
            shared=plan.global_norm,
            limits=limits.get(name),
            **common,
        )
        for i, (name, one) in enumerate(plan.plans.items())
    ]


def clip_passes(
    jobs: list[ArrayTask],
    plan: GroupPlan,
    source: Hierarchy,
    staged: Hierarchy,
    work: Transaction,
    display: Callable[[ProgressState], None],
    started: float,
    run: Entry,
    measured: int,
    saved: SavedNorms | None,
) -> ClipReport:
    """All passes, up to the end of the journal; ``measured`` bytes were read before."""
    first, parameters = jobs[0], run["parameters"]
    before = memory_used()

    states: list[ProgressState] = []
    begun = time.monotonic()

    def progress(done: int, skipped: int, at: int) -> None:
        seconds, total = time.monotonic() - begun, plan.bytes_read
        at = min(at, plan.passes)
        figures = {"done": min(done, total), "skipped": skipped, "total": total, "pass_": at}
        states.append(ProgressState(passes=plan.passes, seconds=seconds, **figures))
        display(states[-1])
        del states[1 : -1 if len(states) > STATES else 1 : 2]  # the rest says enough

    with (
        Journal(work.folder / JOURNAL, work.mirror) as entries,
        running(plan.threads, partial(drain, first.attempt_id)) as how,
    ):
        passes = Passes(jobs, how, entries, progress, plan.window, stored_of(jobs, run))
        if saved is not None:
            passes.saved = saved.entries()
        written = passes.clip()
        after = memory_used()
        total = passes.total
        made = {}
        if written:
            work.remove_stray_files(staged)
            made = work.fingerprint_staged(source, staged)
        digest = (passes.digest + made.get("metadata", 0)) % durable.DIGESTS
        axes, asked = parameters["axes"], (*OTHERS, *(["clip_norm"] if "limit" in run else []))
        peak = max((after[k][1] - before.get(k, after[k])[0] for k in after), default=0)
        report = ClipReport(
            status="clipped" if written else "nothing to clip",
            source=str(source),
            target=str(work.target),
            clip_norm=first.clip_norm,
            ord=first.ord,
            axes=None if axes is None else tuple(axes),
            arrays=len(plan.clipped),
            copied=len(plan.plans) - len(plan.clipped),
            slices=total.slices,
            clipped=total.clipped,
            nonfinite=total.nonfinite,
            smallest_norm=total.smallest if total.slices > total.nonfinite else None,
            largest_norm=total.largest if total.slices > total.nonfinite else None,
            bytes_read=passes.read + measured,
            bytes_written=passes.written,
            passes=plan.passes + ("limit" in run and saved is None),
            blocks=plan.blocks,
            seconds=time.monotonic() - started,
            peak_memory=peak,
            projected_memory=plan.projected_memory,
            run=run["run"],
            began=run["began"],
            parameters={k: parameters[k] for k in asked if parameters[k]} | {"memory": plan.memory},
            versions=versions(),
            source_fingerprint=run["source"].get("hash", "unknown"),
            digest=f"{digest:016x}" if written else None,
            pictures=run_pictures(total.histogram, plan, states, peak, passes.read, passes.written),
        )
        if written:
            close_journal(entries, made, report)
    return report


def stored_of(jobs: list[ArrayTask], run: Entry) -> list[Any]:
    """Whether anything of each block is stored; None to look at all: a limit may be NaN."""
    parameters = run["parameters"]
    everything = parameters["missing"] == "error" or parameters["clip_norm"] in ("nan", "None")
    units = sum(math.prod(grid_shape(job.plan.shape, job.plan.unit)) for job in jobs)
    if run["source"].get("chunks", units) >= units:
        return [None] * len(jobs)
    return [
        None
        if (everything and job.plan.passes) or not job.plan.blocks
        else job.source.stored_blocks(job.plan.block, job.plan.block_strides, job.plan.blocks)
        for job in jobs
    ]


def run_pictures(
    norms: NormHistogram | None,
    plan: GroupPlan,
    states: list[ProgressState],
    peak: int,
    read: int,
    written: int,
) -> dict[str, Any] | None:
    """What pictures of a run show; it took so many bytes of memory, read and written."""
    if norms is None:
        return None
    expected = f"{states[0].seconds + states[0].left:.2f} s" if states else ""
    taken = f"{states[-1].seconds:.2f} s" if states else ""
    return norms.figures(plan.kept) | {
        "slices": plan.slices,
        "throughput": [(0.0, 0), *((s.seconds, s.done - s.skipped) for s in states)],
        "plan": [
            ("memory", format_size(plan.projected_memory), format_size(peak)),
            ("bytes read", format_size(plan.bytes_read), format_size(read)),
            ("bytes written", format_size(plan.nbytes), format_size(written)),
            ("time of the passes", expected, taken),
        ],
    }
