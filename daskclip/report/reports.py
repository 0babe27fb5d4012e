"""Reports of finished calls: a run, the norms of an array or group, a verification."""

import math
from dataclasses import Field, asdict, dataclass
from typing import Any, ClassVar, cast

from daskclip.report.html import LargestSlice, PerAxis, Pictures, fragment
from daskclip.report.text import as_document, as_text, format_axes, format_size


class Report:
    """Base of all reports."""

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def rows(self) -> dict[str, str]:
        """Figures as text, by their names."""
        raise NotImplementedError

    def __repr__(self) -> str:
        # all fields would be thousands of characters: of a histogram, and of pictures
        return as_text(self)

    def to_json(self) -> str:
        """One JSON document; an infinite figure is the string "inf"."""
        return as_document(self)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ClipReport(Report):
    """Result of a run; ``print`` shows it as text, `to_json` gives it to programs."""

    status: str
    """Outcome of this call: 'clipped', 'nothing to clip' (in place) or 'up to date'."""
    source: str
    """Location of the array or group that was read."""
    target: str
    """Location of the clipped one."""
    clip_norm: float | None
    """Limit of the norms; None if each slice had its own."""
    ord: float
    """Order of the norm: 1, 2 or inf."""
    axes: tuple[int, ...] | str | None
    """Axes the norms were taken over; of each array of a group, None for all, or the text of a
    slice such as '1:'."""
    arrays: int
    """Number of arrays that were clipped."""
    copied: int
    """Number of arrays of the group that were copied as they are."""
    slices: int
    """Number of slices."""
    clipped: int
    """Finite slices whose norm was above the limit."""
    nonfinite: int
    """Slices with infinity, or with NaN that is not omitted."""
    zeros: int
    """Finite slices whose norm was 0."""
    zeroed: int
    """Slices that became zeros, since they were not finite; they are counted in `nonfinite` too."""
    smallest_norm: float | None
    """Smallest norm of a finite slice before clipping; None if there is none."""
    largest_norm: float | None
    """Largest norm of a finite slice before clipping; None if there is none."""
    largest_norm_after: float
    """Upper bound of the exact norms of all slices after clipping, at most the largest limit: of a
    slice that was clipped the limit, of another one the float64 above its norm. 0 if there is no
    slice, NaN if one that is not finite was not made zeros."""
    bytes_read: int
    """Bytes of decoded chunks that this call read, over all passes."""
    bytes_written: int
    """Bytes of blocks that this call wrote, before encoding."""
    passes: int
    """Times the source was read."""
    blocks: int
    """Number of blocks."""
    seconds: float
    """Seconds from the start of the call until the result was complete, before it is published."""
    peak_memory: int | None
    """Bytes by which the largest process that ran blocks grew during the run; None where the system
    does not say. What else runs in that process counts too; of runs at the same time, each counts
    from the beginning of the last one."""
    projected_memory: int
    """Bytes that the plan projected for each process."""
    run: str
    """Id of the run; the same for all calls that it took."""
    began: str
    """UTC time at which the first call began."""
    parameters: dict[str, Any]
    """Arguments that differ from their defaults, and always nonfinite, missing and memory (bytes);
    clip_norm as it was given if that was a quantile."""
    versions: dict[str, str]
    """Versions of Python and of the packages that read, clip and write."""
    source_fingerprint: str
    """Hash of the names, sizes and times or ETags of all objects of the source."""
    digest: str | None
    """Sum of the digests of all objects of the target, with its metadata; the same wherever the
    target is and however it was written. None if nothing was written."""
    pictures: dict[str, Any] | None = None
    """Numbers of the charts of the HTML page, if they were collected."""

    def rows(self) -> dict[str, str]:
        """Figures as text, by their names."""
        # an array of size 0 may have no slices
        share = 100 * self.clipped / self.slices if self.slices else 0.0
        passes = "1 pass" if self.passes == 1 else f"{self.passes} passes"
        peak = "unknown" if self.peak_memory is None else format_size(self.peak_memory)
        projected = format_size(self.projected_memory)
        arrays = {"arrays": f"{self.arrays:,}, {self.copied:,} more are copied"}
        kind = "" if self.ord == 2 else f", ord {self.ord:g}"
        # arrays of a group may have a dimension on different axes, so that only its name is shown
        over = format_axes(self.axes, self.parameters.get("dim"))
        if self.parameters.get("global_norm"):
            over = "all arrays" if over == format_axes(None) else f"{over} of all arrays"
        zeroed = f", {self.zeroed:,} made zeros" if self.zeroed else ""
        kind += ", normalized" if self.parameters.get("normalize") else ""
        return {
            "status": self.status,
            "source": self.source,
            "target": self.target,
            # an array by itself has no such row
            **(arrays if self.arrays + self.copied > 1 else {}),
            "clip_norm": f"{_limit(self.clip_norm)} over {over}{kind}",
            "slices": f"{self.slices:,}",
            "zero": f"{self.zeros:,}",
            "clipped": f"{self.clipped:,} ({share:.1f} %)",
            "non-finite": f"{self.nonfinite:,}{zeroed}",
            "norms": _norms(self.smallest_norm, self.largest_norm),
            "read": f"{format_size(self.bytes_read)} in {passes}",
            "written": format_size(self.bytes_written),
            "norms after": _bound(self.largest_norm_after),
            "blocks": f"{self.blocks:,}",
            "digest": self.digest or "none",
            "time": f"{self.seconds:.2f} s",
            "peak memory": f"{peak} of {projected} projected",
        }

    def _repr_html_(self) -> str:
        # of a quantile, the limit that it came to
        title = f"{self.source} clipped to {_limit(self.clip_norm)}"
        return fragment(title, self.rows(), cast("Pictures", self.pictures), self.clip_norm)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class StatsReport(Report):
    """Norms of an array or group; ``print`` shows them as text, `to_json` gives them to programs.

    Counts and the largest norms are exact, and no figure depends on the chunks.
    """

    source: str
    """Location of the array or group that was read."""
    axes: tuple[int, ...] | str | None
    """Axes the norms were taken over; of each array of a group, None for all, or the text of a
    slice such as '1:'."""
    dim: list[str] | None
    """Dimensions of a group the norms were taken over, if they were given."""
    ord: float
    """Order of the norm: 1, 2 or inf."""
    arrays: int
    """Number of arrays whose slices were counted."""
    slices: int
    """Number of slices."""
    zeros: int
    """Slices with norm 0."""
    nan: int
    """Slices with NaN that is not omitted."""
    infinite: int
    """Slices with infinity and no NaN."""
    smallest_norm: float | None
    """Smallest norm of a finite slice; None if there is none."""
    largest_norm: float | None
    """Largest norm of a finite slice; None if there is none."""
    quantiles: dict[str, float]
    """Quantiles of the finite norms, by names like 'p99'."""
    relative_error: float
    """Relative error of a quantile, at most."""
    clips: dict[str, int]
    """Slices that each of some limits would clip. Exact for powers of two and for 1, 2, 5, 10 and
    so on up to 5000; for other limits to within ``relative_error`` of the limit."""
    histogram: list[tuple[float, float, int]]
    """Lower edge (excluded), upper edge (included) and count of each bar; finite norms above 0."""
    worst: list[LargestSlice]
    """Largest finite norms and the indices of their slices in the kept axes; in a group, the name
    of the array comes first."""
    along: list[PerAxis]
    """For each kept axis, the largest finite norm of each of its parts; empty for a group."""
    bytes_read: int
    """Bytes of decoded chunks that were read."""
    seconds: float
    """Seconds from the start of the call."""
    projected_memory: int
    """Bytes that the plan projected for each process."""

    def rows(self) -> dict[str, str]:
        """Figures as text, by their names."""
        rows = {
            "source": f"{self.source}, {format_axes(self.axes, self.dim)}",
            "slices": f"{self.slices:,}",
            "zero": f"{self.zeros:,}",
            "NaN": f"{self.nan:,}",
            "infinite": f"{self.infinite:,}",
        }
        # unlike the row of a run, left out where no slice is finite: the rows above say so already
        if self.largest_norm is not None:
            rows["norms"] = _norms(self.smallest_norm, self.largest_norm)
        rows |= {k: f"{v:.6g}" for k, v in self.quantiles.items()}
        rows["error"] = f"at most {100 * self.relative_error:.2f} % of a quantile"
        for limit, clipped in self.clips.items():
            share = 100 * clipped / self.slices
            rows[f"clip_norm {limit}"] = f"clips {share:.3g} % of {self.slices:,} slices"
        for i, worst in enumerate(self.worst, 1):
            rows[f"largest {i}"] = f"{worst['norm']:.6g} at {worst['index']}"
        rows["read"] = f"{format_size(self.bytes_read)} in {self.seconds:.2f} s"
        return rows

    def _repr_html_(self) -> str:
        # the largest norms have a table of their own
        rows = {k: v for k, v in self.rows().items() if not k.startswith("largest ")}
        # asdict has more than Pictures names; fragment ignores the rest
        return fragment(f"Norms of {self.source}", rows, cast("Pictures", asdict(self)))


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class VerifyReport(Report):
    """Result of a successful verification; a failure raises."""

    target: str
    """Location of the array or group that was verified."""
    source: str | None
    """Location of the source whose blocks were clipped again and compared, if it was given."""
    run: str
    """Id of the run that wrote the target."""
    clip_norm: float | None
    """Limit of the norms; None if each slice had its own."""
    blocks: int
    """Blocks whose files are unchanged since they were written."""
    slices: int
    """Slices whose norm is within the limit, or that hold NaN or infinity."""
    nonfinite: int
    """Slices that hold NaN or infinity."""
    largest_norm: float | None
    """Largest norm of a finite slice; None if there is none."""
    largest_norm_after: float
    """Bound in the report of the run, which no exact norm exceeds; NaN if not all slices have to be
    finite."""
    seconds: float
    """Seconds from the start of the call."""

    def rows(self) -> dict[str, str]:
        """Figures as text, by their names."""
        source = {} if self.source is None else {"source": f"{self.source}, compared bit for bit"}
        largest = self.largest_norm
        return {
            "target": self.target,
            **source,
            "run": self.run,
            "clip_norm": _limit(self.clip_norm),
            "blocks": f"{self.blocks:,}, as they were written",
            "slices": f"{self.slices:,}, none above its limit",
            "non-finite": f"{self.nonfinite:,}",
            "largest norm": "none finite" if largest is None else f"{largest:.6g}",
            "exact norms": _bound(self.largest_norm_after),
            "time": f"{self.seconds:.2f} s",
        }

    def _repr_html_(self) -> str:
        return fragment(f"{self.target} verified", self.rows())


def _limit(clip_norm: float | None) -> str:
    # limits of each slice may be as large as the array, so that a report does not hold them
    return "a limit each" if clip_norm is None else f"{clip_norm:g}"


def _norms(smallest: float | None, largest: float | None) -> str:
    # both or none: the smallest is known where the largest is
    return "none finite" if largest is None else f"{smallest:.6g} to {largest:.6g}"


def _bound(largest: float) -> str:
    # all digits: a bound that is rounded is none
    return "not finite" if math.isnan(largest) else f"at most {largest!r}"
