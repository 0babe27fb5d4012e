"""Exact norms of NumPy blocks, the factors that bring them to their limits, and rescaling.

A compiled kernel does the arithmetic; the modules describe arrays to it. The room knows NumPy only:
no Dask, no Zarr, no files, and not how an array is cut into blocks.

    partial_norm ──> Partial ──combine──> Partial ──finalize──> Scale ──rescale──> the clipped block
    clip_block: all of it at once, for a block that holds its slices whole

Read `partial.py` (exact sums), `scale.py` (norms and factors), `block.py` (rescaling and clipping),
`histogram.py` (counts of slices and of their norms) and `compiled.py` (how arrays are passed to the
kernel), then `kernel.c`, whose first comment explains the algorithm, and its parts `runs.h`,
`decide.h` and `elements.h`.

A new norm is an entry of `ORDERS`, which says which power of the magnitudes is summed, or that the
largest is taken; its key is a number. A power above 2 takes changes of the kernel and of the limbs
of sums: `kernel.c` lists the places. A norm that also divides by the number of terms takes a field
of the struct `block` (and of `Block` in compiled.py, set in `prepare_scale`) and the functions
`prepare_root`, `compute_roots` and `compare` of `decide.h`. Outside this room, the keys are in the
message of `parse_ord` in arguments.py and in the choices of ``--ord`` in cli.py.
"""

# what other rooms use; tests may import the modules themselves. Functions of shapes are there for
# those that reshape sums, since `lazy` imports no room below this one
from daskclip.grid import box_index, box_shape, joined_axes, without_axes
from daskclip.numerics.block import clip_array, clip_block, require_finite, require_limits, rescale
from daskclip.numerics.compiled import Array, require_subnormals
from daskclip.numerics.histogram import (
    RELATIVE_ERROR,
    NormHistogram,
    SliceCounts,
    count_slices,
    count_with_histogram,
)
from daskclip.numerics.partial import (
    ORDERS,
    Partial,
    combine,
    kept_shape,
    nan_if_infinite,
    no_sums,
    partial_norm,
    state_nbytes,
    term_count,
)
from daskclip.numerics.scale import Scale, finalize

__all__ = [
    "ORDERS", "RELATIVE_ERROR", "Array", "NormHistogram", "Partial", "Scale", "SliceCounts",
    "box_index", "box_shape", "clip_array", "clip_block", "combine", "count_slices",
    "count_with_histogram", "finalize", "joined_axes", "kept_shape", "nan_if_infinite", "no_sums",
    "partial_norm", "require_finite", "require_limits", "require_subnormals", "rescale",
    "state_nbytes", "term_count", "without_axes",
]  # fmt: skip
