"""Exact norms of NumPy blocks, the factors that bring them to a limit, and rescaling.

One compiled kernel does the arithmetic (`kernel.c`); here it is given arrays. Nothing in this room
knows Dask, Zarr or files.

    partial_norm ──> Partial ──combine──> Partial ──finalize──> Scale ──rescale──> the clipped block
    clip_block: the same at once, for a block that holds its slices whole
"""

from daskclip.numerics.block import clip_array, clip_block, require_finite, rescale
from daskclip.numerics.compiled import Array
from daskclip.numerics.histogram import (
    RELATIVE_ERROR,
    NormHistogram,
    SliceCounts,
    count_slices,
    count_with_histogram,
)
from daskclip.numerics.partial import (
    NAN,
    ORDERS,
    Partial,
    combine,
    combine_all,
    nan_if_infinite,
    partial_norm,
)
from daskclip.numerics.scale import Scale, finalize

__all__ = [
    "NAN", "ORDERS", "RELATIVE_ERROR", "Array", "NormHistogram", "Partial", "Scale", "SliceCounts",
    "clip_array", "clip_block", "combine", "combine_all", "count_slices", "count_with_histogram",
    "finalize", "nan_if_infinite", "partial_norm", "require_finite", "rescale",
]  # fmt: skip  # fmt: skip
