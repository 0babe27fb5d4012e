"""One attempt at a run, or at taking norms: tasks for each array, all passes, and the report."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from fractions import Fraction
from functools import partial
from pathlib import Path
from uuid import uuid4

from daskclip.engine import rounds
from daskclip.engine.cluster import memory_used, running, versions
from daskclip.engine.passes import HasStored, Passes, Progress
from daskclip.engine.request import LimitsByArray, Prepared
from daskclip.engine.saved_norms import journal_of_norms
from daskclip.errors import InvalidValueError
from daskclip.grid import grid_shape
from daskclip.plan import GroupPlan
from daskclip.report import ClipReport, format_size
from daskclip.storage import Hierarchy, durable
from daskclip.target import FinalRecord, Journal, Json, RunRecord, Transaction, journal
from daskclip.worker import ArrayTask, drain

REPORTED = ("dim", "nonfinite", "missing", "include", "exclude", "global_norm", "norms")


def array_tasks(
    plan: GroupPlan,
    source: Hierarchy,
    target: Hierarchy | None,
    attempt_id: str,
    limits_by_array: LimitsByArray,
    parameters: Json,
    *,
    clip_norm: float | None,
    staged: str | None = None,
    in_place: bool = False,
    collect: bool = False,
) -> list[ArrayTask]:
    """What the tasks of each array share."""
    return [
        ArrayTask(
            attempt_id=attempt_id,
            number=i,
            name=name,
            plan=one,
            source=source.arrays[name],
            target=None if target is None else target.arrays[name],
            staged=staged,
            shared=plan.global_norm,
            in_place=in_place,
            clip_norm=clip_norm,
            ord=parameters["ord"],
            nonfinite=parameters["nonfinite"],
            missing=parameters["missing"],
            limits=limits_by_array.get(name),
            collect=collect,
        )
        for i, (name, one) in enumerate(plan.plans.items())
    ]


def find_stored(arrays: Sequence[ArrayTask], run: RunRecord) -> list[HasStored]:
    """Whether anything of each block of each array is stored; None to look at all blocks."""
    units = sum(math.prod(grid_shape(a.plan.shape, a.plan.unit)) for a in arrays)
    # the fingerprint has counted chunks: if none is missing, there is nothing to look up
    if run.source.get("chunks", units) >= units:
        return [None] * len(arrays)
    return [
        None
        if (_needs_all(array) and array.plan.passes) or not array.plan.blocks
        else array.source.stored_blocks(
            array.plan.block, array.plan.block_strides, array.plan.blocks
        )
        for array in arrays
    ]


def _needs_all(array: ArrayTask) -> bool:
    """Whether blocks of which nothing is stored matter: a missing chunk, or a limit of NaN."""
    may_be_nan = array.limits is not None or math.isnan(array.clip_norm or 0.0)
    return array.missing == "error" or may_be_nan


def run_attempt(
    prepared: Prepared,
    run: RunRecord,
    transaction: Transaction,
    started: float,
    measured: int,
) -> ClipReport:
    """Do all passes and publish; ``measured`` bytes were read before, for a quantile."""
    request, plan, source = prepared.request, prepared.plan, prepared.source
    staged, folder = transaction.stage(source, run.id)
    attempt_id = f"{run.id}-{uuid4().hex}"
    arrays = array_tasks(
        plan, source, staged, attempt_id, prepared.limits_by_array, run.parameters,
        clip_norm=run.clip_norm, staged=folder, in_place=request.in_place,
        collect=request.pictures,
    )  # fmt: skip
    before = memory_used()
    progress = Progress(request.show, plan.bytes_read, plan.passes)
    with (
        transaction.open_journal() as entries,
        running(plan.threads, partial(drain, attempt_id)) as compute_kwargs,
    ):
        passes = Passes(
            arrays, compute_kwargs, entries, plan.window, find_stored(arrays, run), progress,
            prepared.saved_norms,
        )  # fmt: skip
        rounds.clip(passes)
        peak = _growth(before)
        is_written = not request.in_place or passes.blocks_written > 0
        made: Json = {}
        if is_written:
            made = transaction.finish(staged)
        digest = (passes.digest + made.get("metadata", 0)) % durable.DIGESTS
        report = ClipReport(
            status="clipped" if is_written else "nothing to clip",
            target=str(transaction.target),
            bytes_read=passes.bytes_read + measured,
            digest=f"{digest:016x}" if is_written else None,
            peak_memory=peak,
            pictures=_pictures(passes, plan, peak),
            seconds=time.monotonic() - started,
            **_figures(prepared, run, passes),
        )
        if is_written:
            entries.end(FinalRecord(report=asdict(report), made=made))
    prepared.require_unchanged(run)
    if is_written:
        transaction.publish(source, staged, request.replaces)
    else:
        transaction.clear()
    return report


def _growth(before: dict[str, tuple[int, int]]) -> int:
    """Bytes that the largest process grew by at its highest."""
    after = memory_used()
    return max((after[k][1] - before.get(k, after[k])[0] for k in after), default=0)


def _figures(prepared: Prepared, run: RunRecord, passes: Passes) -> Json:
    """Fields of a report that do not depend on how the attempt ended."""
    plan, total, parameters = prepared.plan, passes.total, run.parameters
    finite, axes = total.slices > total.nonfinite, parameters["axes"]
    reported = (*REPORTED, *(() if run.limit is None else ("clip_norm",)))
    measured = run.limit is not None and prepared.saved_norms is None
    return {
        "source": str(prepared.source),
        "clip_norm": run.clip_norm,
        "ord": parameters["ord"],
        "axes": None if axes is None else tuple(axes),
        "arrays": len(plan.clipped),
        "copied": len(plan.plans) - len(plan.clipped),
        "slices": total.slices,
        "clipped": total.clipped,
        "nonfinite": total.nonfinite,
        "smallest_norm": total.smallest if finite else None,
        "largest_norm": total.largest if finite else None,
        "bytes_written": passes.bytes_written,
        "passes": plan.passes + measured,
        "blocks": plan.blocks,
        "projected_memory": plan.projected_memory,
        "run": run.id,
        "began": run.began,
        "parameters": {k: parameters[k] for k in reported if parameters[k]}
        | {"memory": plan.memory},
        "versions": versions(),
        "source_fingerprint": run.source.get("hash", "unknown"),
    }


def _pictures(passes: Passes, plan: GroupPlan, peak: int) -> Json | None:
    """What pictures of a run show, if that was collected."""
    norms = passes.total.histogram
    if norms is None or passes.progress is None:
        return None
    states = passes.progress.states
    expected = f"{states[0].seconds + states[0].left:.2f} s" if states else ""
    taken = f"{states[-1].seconds:.2f} s" if states else ""
    read, written = passes.bytes_read, passes.bytes_written
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


@contextmanager
def scratch_journal(run: RunRecord) -> Iterator[Journal]:
    """A journal that is not kept."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, journal.JOURNAL)
        journal.begin(path, run)
        with Journal(path) as entries:
            yield entries


def measure(prepared: Prepared, run: RunRecord, norms: Hierarchy | None = None) -> Passes:
    """Count all slices of a source by their norms; each byte that is stored is read once.

    They are written to ``norms``, if that is given, with the sums they are made from.
    """
    plan, attempt_id = prepared.plan, uuid4().hex
    arrays = array_tasks(
        plan, prepared.source, norms, attempt_id, {}, run.parameters, collect=True,
        staged=None if norms is None else str(norms), clip_norm=None,
    )  # fmt: skip
    # it is one pass, also where clipping takes two
    progress = Progress(prepared.request.show, plan.nbytes, passes=1)
    kept = None if norms is None else Journal(journal_of_norms(Path(str(norms))))
    with (
        running(plan.threads, partial(drain, attempt_id)) as compute_kwargs,
        kept or scratch_journal(run) as entries,
    ):
        passes = Passes(
            arrays, compute_kwargs, entries, plan.window, find_stored(arrays, run), progress
        )
        rounds.measure(passes)
        if norms is not None:
            entries.end(FinalRecord(total=passes.total))
    return passes


def measure_quantile(prepared: Prepared, run: RunRecord, percent: Fraction) -> tuple[float, int]:
    """Norm that so many percent of the norms do not exceed, and the bytes read for it."""
    if prepared.saved_norms is not None:
        total, read = prepared.saved_norms.total, 0
    else:
        passes = measure(prepared, run)
        total, read = passes.total, passes.bytes_read
    if total.histogram is None or total.slices == total.nonfinite:
        raise InvalidValueError(
            f"source {prepared.source} has no finite slice, so that no norm is a limit; give "
            "clip_norm as a number"
        )
    return total.histogram.quantile(percent, total.smallest, total.largest), read
