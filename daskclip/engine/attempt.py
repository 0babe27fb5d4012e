"""One attempt at a run, or at taking norms: the tasks, all passes, and the report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TypeVar
from uuid import uuid4

from daskclip.engine import stages
from daskclip.engine.cluster import memory_used, versions
from daskclip.engine.passes import HasStored, Passes
from daskclip.engine.request import ClipRequest, LimitsByArray, Prepared
from daskclip.errors import MemoryBudgetError
from daskclip.grid import grid_shape
from daskclip.plan import GroupPlan
from daskclip.report import ClipReport, Progress, format_size
from daskclip.storage import Hierarchy, StoredArray
from daskclip.target import FinalRecord, Journal, Json, RunRecord, Transaction
from daskclip.worker import ArrayTask, memory_growth

R = TypeVar("R")
REPORTED = (
    "dim", "nonfinite", "normalize", "missing", "include", "exclude", "global_norm", "norms",
)  # fmt: skip


def with_room_for_sums(do: Callable[[ClipRequest], R], request: ClipRequest) -> R:
    """Do what is requested; again with a wider plan if exact sums take more than was planned."""
    try:
        return do(request)
    except MemoryBudgetError as error:
        # a plan or an older run that does not fit is known by what it needs
        if error.need:
            raise
    return do(replace(request, wide=True))


def array_tasks(
    run: RunRecord,
    plan: GroupPlan,
    source: Hierarchy,
    target: Mapping[str, StoredArray],
    limits_by_array: LimitsByArray,
    *,
    staged: str | None = None,
    in_place: bool = False,
    collect: bool = False,
) -> list[ArrayTask]:
    """Return the fields that the tasks of each array share, in a new attempt at a run."""
    attempt_id = f"{run.id}-{uuid4().hex}"
    policies = {name: run.parameters[name] for name in ("ord", "nonfinite", "missing")}
    dtypes = {name: array.dtype for name, array in source.arrays.items()}
    shared = tuple(dtypes[name] for name in plan.clipped) if plan.global_norm else ()
    return [
        ArrayTask(
            attempt_id=attempt_id, number=i, name=name, plan=one, source=source.arrays[name],
            target=target.get(name), staged=staged,
            shared=plan.global_norm, in_place=in_place, clip_norm=run.clip_norm,
            limits=limits_by_array.get(name), collect=collect,
            normalize=(shared or (dtypes[name],)) * run.parameters["normalize"], **policies,
        )
        for i, (name, one) in enumerate(plan.plans.items())
    ]  # fmt: skip


def run_attempt(
    prepared: Prepared, run: RunRecord, transaction: Transaction, measured: int
) -> ClipReport:
    """Do all passes and publish; ``measured`` bytes were read before, for a quantile."""
    request, plan, source = prepared.request, prepared.plan, prepared.source
    staged, folder = transaction.stage(source, run.id)
    arrays = array_tasks(
        run, plan, source, staged.arrays, prepared.limits_by_array,
        staged=folder, in_place=request.in_place, collect=request.pictures,
    )  # fmt: skip
    before = memory_used(reset=True)
    progress = Progress(request.show, plan.bytes_read, plan.passes)
    has_stored = _find_stored(arrays, run)
    saved = prepared.saved_norms
    with transaction.open_journal() as journal:
        # once it ends, no repetition of a late task replaces a file by an equal one any more
        with Passes.open(arrays, plan, journal, has_stored, progress, saved) as passes:
            stages.clip(passes)
            peak = memory_growth(before, memory_used())
        # in place, a source without a slice above its limit stays as it is
        is_written = not request.in_place or passes.blocks_written > 0
        ended, others, made = journal.ended(), 0, None
        if is_written:
            others = ended.others or 0 if ended else source.copy_others(staged)
            made = transaction.finish(staged)
        report = _report(prepared, run, passes, made, others, peak, measured)
        if made is not None and ended is None:
            journal.append(FinalRecord(report=asdict(report), made=made, others=others or None))
    # the last look at the source, before anything replaces it or appears beside it
    prepared.require_unchanged(run)
    if is_written:
        transaction.publish(source, staged, request.replaces)
    else:
        transaction.clear()
    return report


def measure(
    prepared: Prepared, run: RunRecord, journal: Journal | None, norms: Mapping[str, StoredArray]
) -> Passes:
    """Count all slices of a source by their norms, and write those to ``norms``, where given.

    Each byte that is stored is read once, since sums are not followed by a second pass.
    """
    plan, first = prepared.plan, next(iter(norms.values()), None)
    staged = str(first.folder) if first and first.folder else None
    arrays = array_tasks(run, plan, prepared.source, norms, {}, staged=staged, collect=True)
    progress = Progress(prepared.request.show, plan.nbytes, passes=1)
    with Passes.open(
        arrays, plan, journal, _find_stored(arrays, run), progress, keeps_sums=bool(norms)
    ) as passes:
        stages.measure(passes)
        if journal:
            journal.append(FinalRecord(total=passes.total))
    return passes


def _find_stored(arrays: Sequence[ArrayTask], run: RunRecord) -> list[HasStored]:
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


def _report(
    prepared: Prepared,
    run: RunRecord,
    passes: Passes,
    made: Json | None,
    others: int,
    peak: int | None,
    measured: int,
) -> ClipReport:
    """Report of an attempt that is complete; ``made`` is None if nothing was written."""
    plan, total, parameters = prepared.plan, passes.total, run.parameters
    finite, axes = total.slices > total.nonfinite, parameters["axes"]
    # of a quantile the report has the limit, and among its parameters what was given
    reported = REPORTED if run.limit is None else (*REPORTED, "clip_norm")
    return ClipReport(
        status="nothing to clip" if made is None else "clipped",
        source=str(prepared.source),
        target=parameters["target"],
        clip_norm=run.clip_norm,
        ord=parameters["ord"],
        axes=tuple(axes) if isinstance(axes, list) else axes,
        arrays=len(plan.clipped),
        copied=len(plan.plans) - len(plan.clipped),
        slices=total.slices,
        clipped=total.clipped,
        nonfinite=total.nonfinite,
        zeros=total.zeros,
        zeroed=total.zeroed,
        smallest_norm=total.smallest if finite else None,
        largest_norm=total.largest if finite else None,
        largest_norm_after=total.largest_after,
        bytes_read=passes.bytes_read + measured,
        bytes_written=passes.bytes_written,
        passes=plan.passes + (run.limit is not None and prepared.saved_norms is None),
        blocks=plan.blocks,
        seconds=time.monotonic() - prepared.request.started,
        peak_memory=peak,
        projected_memory=plan.projected_memory,
        run=run.id,
        began=run.began,
        parameters={k: parameters[k] for k in reported if parameters[k]} | {"memory": plan.memory},
        versions=versions(),
        source_fingerprint=run.source.get("hash", "unknown"),
        digest=None if made is None else passes.digest_with(made.get("metadata", 0) + others),
        pictures=_pictures(prepared, passes, peak),
    )


def _pictures(prepared: Prepared, passes: Passes, peak: int | None) -> Json | None:
    """Numbers for the pictures of a run, if they were collected."""
    plan, norms, states = prepared.plan, passes.total.histogram, passes.progress.states
    if norms is None:
        return None
    # the first with a rate: what an earlier call has done comes before
    left = ((s.seconds + s.left) for s in states if s.left is not None)
    expected = next((f"{seconds:.2f} s" for seconds in left), "")
    taken = f"{states[-1].seconds:.2f} s" if states else ""
    read, written = passes.bytes_read, passes.bytes_written
    memory = "unknown" if peak is None else format_size(peak)
    return norms.figures(plan.kept) | {
        "slices": plan.slices,
        "throughput": [(0.0, 0), *((s.seconds, s.done - s.skipped) for s in states)],
        "plan": [
            ("memory", format_size(plan.projected_memory), memory),
            ("bytes read", format_size(plan.bytes_read), format_size(read)),
            ("bytes written", format_size(plan.nbytes), format_size(written)),
            ("time of the passes", expected, taken),
        ],
    }
