"""Figures of a plan or of a run, as text and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from daskclip.plan import MIB, ClipPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipReport:
    """What a run did."""

    source: str
    """Where the array was read."""
    target: str
    """Where the clipped one is."""
    clip_norm: float
    """The limit."""
    axes: tuple[int, ...]
    """Axes the norms were taken over."""
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
    """Bytes of decoded chunks that were read, over all passes."""
    bytes_written: int
    """Bytes of blocks that were written, before encoding."""
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

    def to_json(self) -> str:
        """One JSON document; an infinite figure is the string "inf"."""
        return as_json(self)

    def __str__(self) -> str:
        share = 100 * self.clipped / self.slices if self.slices else 0.0
        norms = "none finite"
        if self.largest_norm is not None:
            norms = f"{self.smallest_norm:.6g} to {self.largest_norm:.6g}"
        rows = {
            "source": self.source,
            "target": self.target,
            "clip_norm": f"{self.clip_norm:g} over axes {_axes(self.axes)}",
            "slices": f"{self.slices:,}",
            "clipped": f"{self.clipped:,} ({share:.1f} %)",
            "non-finite": f"{self.nonfinite:,}",
            "norms": norms,
            "read": f"{_size(self.bytes_read)} in {self.passes} pass{'es'[: 2 * self.passes - 2]}",
            "written": _size(self.bytes_written),
            "time": f"{self.seconds:.2f} s, {self.blocks:,} blocks",
            "peak memory": f"{_size(self.peak_memory)} of {_size(self.projected_memory)} projected",
        }
        return _table(rows)


def plan_text(plan: ClipPlan) -> str:
    """A plan for people."""
    return _table(
        {
            "array": f"{plan.shape}, {_size(plan.nbytes)}, axes {_axes(plan.axes)}",
            "slices": f"{plan.slices:,}",
            "units": f"{plan.unit} written as one object",
            "blocks": f"{plan.blocks:,} of {plan.block}, {plan.slabs:,} slabs",
            "passes": str(plan.passes),
            "read": _size(plan.bytes_read),
            "written": _size(plan.nbytes),
            "tasks": f"{plan.tasks:,} in windows of {plan.window}",
            "workers": f"{plan.processes} processes of {plan.threads} threads",
            "memory": f"{_size(plan.projected_memory)} of {_size(plan.memory)} a process",
        }
    )


def plan_json(plan: ClipPlan) -> str:
    """A plan as one JSON document."""
    derived = ("slices", "slabs", "blocks", "tasks", "bytes_read")
    return as_json({**asdict(plan), **{k: getattr(plan, k) for k in derived}})


def as_json(figures: Any) -> str:
    """One JSON document of a dataclass or a dict; JSON has no infinity, so it becomes a string."""
    fields = figures if isinstance(figures, dict) else asdict(figures)
    plain = {
        k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()
    }
    return json.dumps(plain, indent=2, allow_nan=False)


def _axes(axes: tuple[int, ...]) -> str:
    return ",".join(map(str, axes)) or "none"


def _size(size: int) -> str:
    return f"{size / MIB:,.1f} MiB"


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
