"""Norms of an array, measured before it is clipped."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import Any, Literal

from daskclip.arguments import Axes, Dim, NonFinite
from daskclip.engine.attempt import measure, with_room_for_sums
from daskclip.engine.cluster import leaving_worker_pool
from daskclip.engine.request import ClipRequest, prepare
from daskclip.engine.saved_norms import saving
from daskclip.errors import interrupts_first
from daskclip.numerics import RELATIVE_ERROR, NormHistogram
from daskclip.report import Mode, StatsReport
from daskclip.storage import translating_storage_errors

PERCENTS = ("0.1", "1", "5", "10", "25", "50", "75", "90", "95", "99", "99.9")
CANDIDATES = 30


@interrupts_first()
@leaving_worker_pool()
def stats_zarr(
    source: object,
    axes: Axes = None,
    *,
    dim: Dim = None,
    ord: float = 2,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    global_norm: bool = False,
    memory: str | int = "512MiB",
    nonfinite: NonFinite = "propagate",
    missing: Literal["fill", "error"] = "fill",
    storage_options: dict[str, Any] | None = None,
    progress: bool | Mode = False,
    save_norms: object = None,
) -> StatsReport:
    """Look at the norms of a Zarr array or group, to choose a ``clip_norm``; clips nothing.

    Parameters
    ----------
    source, axes, dim, ord, include, exclude, global_norm, memory, nonfinite, missing
        See `clip_zarr`.
    storage_options, progress
        See `clip_zarr`.
    save_norms : str, path or zarr store, optional
        Place for the norms, for ``norms`` of `clip_zarr`; nothing may exist there. They are a Zarr
        array of float64 over the kept axes, or, if the arrays of a group have norms of their own, a
        group of such arrays. The exact sums are there too, which a second pass needs.

    Returns
    -------
    StatsReport
        Counts, quantiles, the largest norms, and how many slices some limits would clip.

    Raises
    ------
    DaskClipError
        As `clip_zarr` for its source.

    See Also
    --------
    clip_zarr : Clip; its limit may be a quantile.

    Notes
    -----
    Reads each stored byte once, within the memory of `clip_zarr`. Norms are counted in bins of one
    histogram for all slices: usually some thousands, at most half a million.

    Saved norms take 8 bytes a slice on disk before compression, and 24 to 80 more if a slice does
    not fit into a block. They appear when they are complete; a call that was stopped starts again.

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
    request = ClipRequest(
        source=source, axes=axes, dim=dim, ord=ord, include=include, exclude=exclude,
        global_norm=global_norm, memory=memory, nonfinite=nonfinite, missing=missing,
        storage_options=storage_options, progress=progress, clips=False,
    )  # fmt: skip
    return with_room_for_sums(partial(_stats, save_norms), request)


def _stats(save_norms: object, request: ClipRequest) -> StatsReport:
    with translating_storage_errors("looking at the source"):
        prepared = prepare(request)
        run = prepared.run_record()
        prepared.require_alike_workers()
    opened, plan, options = prepared.source, prepared.plan, request.storage_options
    with (
        translating_storage_errors(f"reading {opened}"),
        saving(save_norms, opened, run, plan, options) as (journal, norms_by_array),
    ):
        passes = measure(prepared, run, journal, norms_by_array)
        # inside, so that norms of a source that changed are not published
        prepared.require_unchanged(run)
    total, taken = passes.total, run.parameters["axes"]
    norms = total.histogram or NormHistogram.empty(plan.kept.values())
    finite, ends = total.slices > total.nonfinite, (total.smallest, total.largest)
    figures = norms.figures(plan.kept)
    # without a limit, nothing is counted as clipped
    for along in figures["along"]:
        del along["clipped"]
    return StatsReport(
        source=str(opened),
        axes=tuple(taken) if isinstance(taken, list) else taken,
        dim=run.parameters["dim"],
        ord=run.parameters["ord"],
        arrays=len(plan.clipped),
        slices=total.slices,
        nan=norms.nan,
        infinite=total.nonfinite - norms.nan,
        smallest_norm=total.smallest if finite else None,
        largest_norm=total.largest if finite else None,
        quantiles={f"p{p}": norms.quantile(Fraction(p), *ends) for p in PERCENTS if finite},
        relative_error=RELATIVE_ERROR,
        clips={f"{c:g}": norms.above(c) for c in _candidates(figures["histogram"])},
        bytes_read=passes.bytes_read,
        seconds=time.monotonic() - request.started,
        projected_memory=plan.projected_memory,
        **figures,
    )


def _candidates(bars: list[tuple[float, float, int]]) -> list[float]:
    """Round numbers in the range of a histogram; fewer a decade where there would be too many."""
    if not bars:
        return []
    low, high = bars[0][0], bars[-1][1]
    # the logarithm of 0 is undefined, and limits below 1e-300 are of no use
    first, last = math.floor(math.log10(max(low, 1e-300))), math.ceil(math.log10(high))
    # norms that differ by many decades would give hundreds of limits
    step = max(1, (last - first) // CANDIDATES + 1)
    digits = (1, 2, 5) if 3 * (last - first) <= CANDIDATES else (1,)
    numbers = [float(f"{d}e{k}") for k in range(first, min(last, 308) + 1, step) for d in digits]
    found = [n for n in numbers if low <= n <= high]
    # a range between two round numbers has none in it
    return found or [n for n in numbers if n >= high][:1]
