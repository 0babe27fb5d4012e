"""Figures of a plan or of a run, as text and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from daskclip.report.html import format_axes, format_size, fragment, page


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
    """Seconds from the start of the call until the result was complete, before it is published."""
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
    """Other arguments that differ from their defaults, and always nonfinite, missing and memory, in
    bytes; clip_norm as it was given if that was a quantile."""
    versions: dict[str, str]
    """Of Python and of the packages that read, clip and write."""
    source_fingerprint: str
    """Hash of the names, sizes and times or ETags of all that was stored for the source."""
    digest: str | None
    """Sum of digests of all that is stored for the target, metadata too; it does not depend on
    where that is or on how it got there. None if nothing was written."""
    pictures: dict[str, Any] | None = None
    """What the pictures of the page show, if that was collected."""

    def rows(self) -> dict[str, str]:
        """The figures for people."""
        share = 100 * self.clipped / self.slices if self.slices else 0.0
        norms = "none finite"
        if self.largest_norm is not None:
            norms = f"{self.smallest_norm:.6g} to {self.largest_norm:.6g}"
        passes = "1 pass" if self.passes == 1 else f"{self.passes} passes"
        peak, projected = format_size(self.peak_memory), format_size(self.projected_memory)
        arrays = {"arrays": f"{self.arrays:,}, {self.copied:,} more are copied"}
        kind = "" if self.ord == 2 else f", ord {self.ord:g}"
        over = format_axes(self.axes, self.parameters.get("dim"))
        over = "all arrays" if self.parameters.get("global_norm") else over
        return {
            "status": self.status,
            "source": self.source,
            "target": self.target,
            **(arrays if self.arrays + self.copied > 1 else {}),
            "clip_norm": f"{self._limit} over {over}{kind}",
            "slices": f"{self.slices:,}",
            "clipped": f"{self.clipped:,} ({share:.1f} %)",
            "non-finite": f"{self.nonfinite:,}",
            "norms": norms,
            "read": f"{format_size(self.bytes_read)} in {passes}",
            "written": format_size(self.bytes_written),
            "blocks": f"{self.blocks:,}",
            "digest": self.digest or "none",
            "time": f"{self.seconds:.2f} s",
            "peak memory": f"{peak} of {projected} projected",
        }

    @property
    def _limit(self) -> str:
        return "a limit each" if self.clip_norm is None else f"{self.clip_norm:g}"

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        title = f"{self.source} clipped to {self._limit}"
        return fragment(title, self.rows(), self.pictures, self.clip_norm)

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

    def rows(self) -> dict[str, str]:
        """The figures for people."""
        return {k: str(v) for k, v in asdict(self).items() if v is not None}

    def __str__(self) -> str:
        return as_text(self)


def as_document(figures: Any) -> str:
    """One JSON document of all figures; JSON has no infinity, so it becomes a string."""
    fields = asdict(figures) | {k: getattr(figures, k) for k in getattr(figures, "derived", ())}
    return json.dumps(_plain(fields), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    """Value without infinities and NaN in it."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def as_page(figures: Any) -> str:
    """An HTML document with the figures, and with pictures where there is something to show."""
    return page("daskclip", figures._repr_html_())


def as_text(figures: Any) -> str:
    """The figures for people, a line each."""
    rows = figures.rows()
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
