"""Clip norms of arrays larger than memory, exactly.

The rooms of the package, from the bottom up. An import goes down, never sideways, and into a room
only through its ``__init__``, whose docstring draws what is inside.

=========  =========================================================================
errors     every error, with its exit code
grid       boxes of array elements, and grids of boxes
numerics   exact norms, factors and rescaling of NumPy blocks: a C kernel and its callers
storage    Zarr arrays and groups in folders and object stores; knows no norms
report     reports as text, JSON and HTML, and progress
plan       what a run will do, in integers: blocks, slabs, windows, passes, memory
target     where a run writes: lock, staging, journal and commit
arguments  the arguments of the operation, checked once
worker     one block in, one block out: the tasks of a run
lazy       the operation on NumPy and Dask arrays, and on lists of them
engine     a run from storage to storage, as the client sees it
xarray     the operation on labelled arrays, by the names of their dimensions
cli        the command line
=========  =========================================================================

A block of a run passes through engine, worker, storage, numerics and storage again; a chunk of a
Dask array through lazy and numerics. `examples/00_one_chunk.py` goes this way by hand.
"""

# xarray and cli are not imported here: xarray is optional, and click is of no use in a program
from daskclip.engine import clip_zarr, plan_zarr, stats_zarr, verify_zarr
from daskclip.lazy import IndexedSlices, clip_by_global_norm, clip_by_norm, global_norm, norm

__version__ = "0.3.0"

__all__ = [
    "IndexedSlices", "clip_by_global_norm", "clip_by_norm", "clip_zarr", "global_norm", "norm",
    "plan_zarr", "stats_zarr", "verify_zarr",
]  # fmt: skip
