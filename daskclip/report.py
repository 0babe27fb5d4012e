"""Figures of a plan or of a run, as text and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from daskclip.group_plan import GroupPlan
from daskclip.plan import MIB, ClipPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipReport:
    """What a run did; ``print`` shows it for people, `to_json` for programs."""

    status: str
    """What this call did: 'clipped', 'nothing to clip' (in place) or 'up to date'."""
    source: str
    """Where the array was read."""
    target: str
    """Where the clipped one is."""
    clip_norm: float | None
    """The limit; None if each slice had its own."""
    ord: float
    """Which norm: 1, 2 or inf."""
    axes: tuple[int, ...] | None
    """Axes the norms were taken over; None for all axes of each array of a group."""
    arrays: int
    """Number of arrays that were clipped."""
    copied: int
    """Number of arrays of the group that were carried over as they are."""
    slices: int
    """Number of slices."""
    clipped: int
    """Finite slices whose norm was above the limit."""
    nonfinite: int
    """Slices with NaN that counts, or infinity."""
    smallest_norm: float | None
    """Smallest norm of a finite slice before clipping; None if there is none."""
    largest_norm: float | None
    """Largest norm of a finite slice before clipping; None if there is none."""
    bytes_read: int
    """Bytes of decoded chunks that this call read, over all passes."""
    bytes_written: int
    """Bytes of blocks that this call wrote, before encoding."""
    passes: int
    """How often the source was read."""
    blocks: int
    """Number of blocks."""
    seconds: float
    """From the first window to the renaming."""
    peak_memory: int
    """Bytes that the largest process which ran blocks grew by at its highest; more than the run
    needed if that process had been larger before."""
    projected_memory: int
    """Bytes that the plan foresaw for it."""
    run: str
    """Id of the run, over all calls that it took."""
    began: str
    """When its first call began, in UTC."""
    parameters: dict[str, Any]
    """The other arguments: nonfinite, missing, memory in bytes."""
    versions: dict[str, str]
    """Of Python and of the packages that read, clip and write."""
    source_fingerprint: str
    """Hash of the names, sizes and times or ETags of all that was stored for the source."""
    digest: str | None
    """Sum of digests of all that is stored for the target, metadata too; it does not depend on
    where that is or on how it got there. None if nothing was written."""

    def __str__(self) -> str:
        return as_text(self)

    def to_json(self) -> str:
        """One JSON document; an infinite figure is the string "inf"."""
        return as_document(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was found right; what is not raises."""

    target: str
    """Array that was verified."""
    source: str | None
    """Array that it was derived from once more, if that was asked for."""
    run: str
    """Id of the run that made it."""
    clip_norm: float | None
    """The limit; None if each slice had its own."""
    blocks: int
    """Blocks whose files are those that were written."""
    slices: int
    """Slices whose norm is within the limit, or that hold NaN or infinity."""
    nonfinite: int
    """Those that hold NaN or infinity."""
    largest_norm: float | None
    """Largest norm of a finite slice; None if there is none."""
    seconds: float
    """What it took."""

    def __str__(self) -> str:
        return as_text(self)


def as_document(figures: ClipReport | ClipPlan | GroupPlan) -> str:
    """One JSON document of all figures; JSON has no infinity, so it becomes a string."""
    fields = asdict(figures)
    if not isinstance(figures, ClipReport):
        derived = ("slices", "slabs", "blocks", "tasks", "bytes_read")
        fields |= {k: getattr(figures, k) for k in derived}
    plain = {
        k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()
    }
    return json.dumps(plain, indent=2, allow_nan=False)


def as_text(figures: ClipReport | ClipPlan | GroupPlan | VerifyReport) -> str:
    """The figures for people, a line each."""
    if isinstance(figures, VerifyReport):
        rows = {k: str(v) for k, v in asdict(figures).items() if v is not None}
    else:
        rows = _report(figures) if isinstance(figures, ClipReport) else _plan(figures)
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _report(done: ClipReport) -> dict[str, str]:
    share = 100 * done.clipped / done.slices if done.slices else 0.0
    norms, kind = "none finite", "" if done.ord == 2 else f", ord {done.ord:g}"
    if done.largest_norm is not None:
        norms = f"{done.smallest_norm:.6g} to {done.largest_norm:.6g}"
    limit = "a limit each" if done.clip_norm is None else f"{done.clip_norm:g}"
    passes = "1 pass" if done.passes == 1 else f"{done.passes} passes"
    arrays = {"arrays": f"{done.arrays:,}, {done.copied:,} more are copied"}
    return {
        "status": done.status,
        "source": done.source,
        "target": done.target,
        **(arrays if done.arrays + done.copied > 1 else {}),
        "clip_norm": f"{limit} over axes {_axes(done.axes)}{kind}",
        "slices": f"{done.slices:,}",
        "clipped": f"{done.clipped:,} ({share:.1f} %)",
        "non-finite": f"{done.nonfinite:,}",
        "norms": norms,
        "read": f"{_size(done.bytes_read)} in {passes}",
        "written": _size(done.bytes_written),
        "blocks": f"{done.blocks:,}",
        "digest": done.digest or "none",
        "time": f"{done.seconds:.2f} s",
        "peak memory": f"{_size(done.peak_memory)} of {_size(done.projected_memory)} projected",
    }


def _plan(plan: ClipPlan | GroupPlan) -> dict[str, str]:
    if isinstance(plan, GroupPlan):
        copied = len(plan.plans) - len(plan.clipped)
        rows = {
            "arrays": f"{len(plan.clipped):,}, {_size(plan.nbytes)}; {copied:,} more are copied",
            "slices": f"{plan.slices:,}",
            "blocks": f"{plan.blocks:,}, {plan.slabs:,} slabs",
        }
    else:
        rows = {
            "array": f"{plan.shape}, {_size(plan.nbytes)}, axes {_axes(plan.axes)}",
            "slices": f"{plan.slices:,}",
            "units": f"{plan.unit} written as one object",
            "blocks": f"{plan.blocks:,} of {plan.block}, {plan.slabs:,} slabs",
        }
    return rows | {
        "passes": str(plan.passes),
        "read": _size(plan.bytes_read),
        "written": _size(plan.nbytes),
        "tasks": f"{plan.tasks:,} in windows of {plan.window}",
        "threads": f"{plan.threads} a process, {plan.threads * plan.processes} in all",
        "memory": f"{_size(plan.projected_memory)} of {_size(plan.memory)} a process",
    }


def _axes(axes: tuple[int, ...] | None) -> str:
    return "all" if axes is None else ",".join(map(str, axes)) or "none"


def _size(size: int) -> str:
    return f"{size / MIB:,.1f} MiB"
