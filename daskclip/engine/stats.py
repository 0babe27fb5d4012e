"""What the norms of an array are, before it is clipped."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

from daskclip.arguments import NonFinite
from daskclip.engine.attempt import measure
from daskclip.engine.cluster import require_alike
from daskclip.engine.request import ClipRequest, prepare
from daskclip.engine.saved_norms import saving
from daskclip.numerics import RELATIVE_ERROR, NormHistogram
from daskclip.report import (
    Mode,
    as_document,
    as_text,
    format_axes,
    format_size,
    fragment,
)
from daskclip.storage import translating_storage_errors

PERCENTS = ("0.1", "1", "5", "10", "25", "50", "75", "90", "95", "99", "99.9")
CANDIDATES = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class StatsReport:
    """What the norms of an array are; ``print`` shows it for people, `to_json` for programs.

    Counts and the largest norms are exact, and none of it depends on the chunks.
    """

    source: str
    """Where the array was read."""
    axes: tuple[int, ...] | None
    """Axes the norms were taken over; None for all axes of each array of a group."""
    dim: list[str] | None
    """Dimensions of a group they were taken over, if these were given."""
    ord: float
    """Which norm: 1, 2 or inf."""
    arrays: int
    """Number of arrays whose slices were counted."""
    slices: int
    """Number of slices."""
    zeros: int
    """Those with norm 0."""
    nan: int
    """Those with NaN that counts."""
    infinite: int
    """Those with infinity and no NaN."""
    smallest_norm: float | None
    """Smallest norm of a finite slice; None if there is none."""
    largest_norm: float | None
    """Largest norm of a finite slice; None if there is none."""
    quantiles: dict[str, float]
    """Norms that so many percent of the finite slices do not exceed, by names like 'p99'."""
    relative_error: float
    """Of the quantiles, at most."""
    clips: dict[str, int]
    """Finite slices above each of some numbers, as a clip_norm; of the powers of two and of 1, 2,
    5, 10 and so on to 5000 exactly, of others to within the relative error of the norm."""
    histogram: list[tuple[float, float, int]]
    """Edges of bars, and the finite norms in each that are above 0, from the lower edge, which is
    not in it, to the upper one, which is."""
    worst: list[dict[str, Any]]
    """Largest finite norms, each with the index of its slice in the kept axes, in a group after
    the name of its array."""
    along: list[dict[str, Any]]
    """For each kept axis, the largest finite norm in each of its parts of so many indices; empty
    for a group."""
    bytes_read: int
    """Bytes of decoded chunks that were read."""
    seconds: float
    """What it took."""
    projected_memory: int
    """Bytes that the plan foresaw for each process that ran blocks."""

    def rows(self) -> dict[str, str]:
        """The figures for people."""
        rows = {
            "source": f"{self.source}, {format_axes(self.axes, self.dim)}",
            "slices": f"{self.slices:,}",
            "zero": f"{self.zeros:,}",
            "NaN": f"{self.nan:,}",
            "infinite": f"{self.infinite:,}",
        }
        if self.largest_norm is not None:
            rows["norms"] = f"{self.smallest_norm:.6g} to {self.largest_norm:.6g}"
        rows |= {k: f"{v:.6g}" for k, v in self.quantiles.items()}
        rows["error"] = f"at most {100 * self.relative_error:.2f} % of a quantile"
        for limit, clipped in self.clips.items():
            share = 100 * clipped / self.slices
            rows[f"clip_norm {limit}"] = f"clips {share:.3g} % of {self.slices:,} slices"
        for i, worst in enumerate(self.worst, 1):
            rows[f"largest {i}"] = f"{worst['norm']:.6g} at {worst['index']}"
        rows["read"] = f"{format_size(self.bytes_read)} in {self.seconds:.2f} s"
        return rows

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        rows = {k: v for k, v in self.rows().items() if not k.startswith("largest ")}
        return fragment(f"Norms of {self.source}", rows, asdict(self))

    def to_json(self) -> str:
        """One JSON document; an infinite figure is the string "inf"."""
        return as_document(self)


def stats_zarr(
    source: object,
    axes: object = None,
    *,
    dim: object = None,
    ord: float = 2,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    memory: str | int = "512MiB",
    nonfinite: NonFinite = "propagate",
    missing: Literal["fill", "error"] = "fill",
    storage_options: dict[str, Any] | None = None,
    progress: bool | Mode = False,
    save_norms: str | os.PathLike[str] | None = None,
) -> StatsReport:
    """Look at the norms of a Zarr array or group, to choose a ``clip_norm``; clips nothing.

    Parameters
    ----------
    source, axes, dim, ord, include, exclude, memory, nonfinite, missing
        See `clip_zarr`.
    storage_options, progress
        See `clip_zarr`.
    save_norms : str or path, optional
        Where the norms of an array are to be written, as a Zarr array of float64 over its kept
        axes, for ``norms`` of `clip_zarr`; nothing may be there. The exact sums, which a second
        pass needs, are kept in it too.

    Returns
    -------
    StatsReport
        Counts, quantiles, largest norms, and what each of some limits would clip.

    Raises
    ------
    DaskClipError
        What `clip_zarr` would raise for the source.

    See Also
    --------
    clip_zarr : Takes a quantile as a limit too.

    Notes
    -----
    Reads each byte that is stored once, within the memory of `clip_zarr`. Norms are counted in
    bins that are kept for all slices together: some thousands, at most half a million.

    Saved norms take 8 bytes a slice on disk, before compression, and 24 to 80 more where a slice
    does not fit into a block. They appear when they are complete; a call that was stopped begins
    again.

    References
    ----------
    `DDSketch <https://arxiv.org/abs/1908.10693>`_

    Examples
    --------
    >>> import tempfile, numpy as np, zarr
    >>> folder = tempfile.mkdtemp()
    >>> x = zarr.create_array(f"{folder}/x", shape=(4, 2), chunks=(1, 2), dtype="float32")
    >>> x[:] = [[3, 4], [0.3, 0.4], [0, 0], [np.nan, 0]]
    >>> report = stats_zarr(x, axes=1)
    >>> report.slices, report.zeros, report.nan, report.clips["1"]
    (4, 1, 1, 1)
    """
    started = time.monotonic()
    request = ClipRequest(
        source=source, axes=axes, dim=dim, ord=ord, include=include, exclude=exclude,
        memory=memory, nonfinite=nonfinite, missing=missing, storage_options=storage_options,
        progress=progress, clips=False,
    )  # fmt: skip
    with translating_storage_errors("looking at the source"):
        prepared = prepare(request)
        run = prepared.run_record()
        require_alike(prepared.paths)
    opened, plan = prepared.source, prepared.plan
    with (
        translating_storage_errors(f"reading {opened}"),
        saving(save_norms, opened, run, plan) as norms_array,
    ):
        passes = measure(prepared, run, norms_array)
        prepared.require_unchanged(run)
    total, taken = passes.total, run.parameters["axes"]
    norms = total.histogram or NormHistogram.empty(plan.kept.values())
    finite = total.slices > total.nonfinite
    figures = norms.figures(plan.kept)
    for along in figures["along"]:
        del along["clipped"]  # there is no limit
    return StatsReport(
        source=str(opened),
        axes=None if taken is None else tuple(taken),
        dim=run.parameters["dim"],
        ord=float(ord),
        arrays=len(plan.clipped),
        slices=total.slices,
        nan=norms.nan,
        infinite=total.nonfinite - norms.nan,
        smallest_norm=total.smallest if finite else None,
        largest_norm=total.largest if finite else None,
        quantiles={
            f"p{p}": norms.quantile(Fraction(p), total.smallest, total.largest)
            for p in PERCENTS
            if finite
        },
        relative_error=RELATIVE_ERROR,
        clips={f"{c:g}": norms.above(c) for c in _candidates(figures["histogram"])},
        bytes_read=passes.bytes_read,
        seconds=time.monotonic() - started,
        projected_memory=plan.projected_memory,
        **figures,
    )


def _candidates(bars: list[tuple[float, float, int]]) -> list[float]:
    """Round numbers in the range of a histogram; fewer a decade where there would be too many."""
    if not bars:
        return []
    low, high = bars[0][0], bars[-1][1]
    first, last = math.floor(math.log10(max(low, 1e-300))), math.ceil(math.log10(high))
    step = max(1, (last - first) // CANDIDATES + 1)
    digits = (1, 2, 5) if 3 * (last - first) <= CANDIDATES else (1,)
    numbers = [float(f"{d}e{k}") for k in range(first, min(last, 308) + 1, step) for d in digits]
    found = [n for n in numbers if low <= n <= high]
    return found or [n for n in numbers if n >= high][:1]
