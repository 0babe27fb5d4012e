"""Exact norms of NumPy blocks, the factors that bring them to a limit, and rescaling.

One compiled kernel does the arithmetic (`kernel.c`); here it is given arrays. Nothing in this room
knows Dask, Zarr or files.

    partial_norm ──> Partial ──combine──> Partial ──finalize──> Scale ──rescale──> the clipped block
    clip_block: the same at once, for a block that holds its slices whole
"""

from daskclip.numerics import histogram, tally
from daskclip.numerics.block import clip_array, clip_block, require_finite, rescale
from daskclip.numerics.compiled import Array
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
from daskclip.numerics.tally import Tally, collect, count

__all__ = [
    "NAN", "ORDERS", "Array", "Partial", "Scale", "Tally", "clip_array", "clip_block", "collect",
    "combine", "combine_all", "count", "finalize", "histogram", "nan_if_infinite", "partial_norm",
    "require_finite", "rescale", "tally",
]  # fmt: skip
