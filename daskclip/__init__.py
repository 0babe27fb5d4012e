"""Clip norms of arrays larger than memory, exactly.

The rooms of the package, from the bottom up. An import goes down, never sideways, and into a room
only through its ``__init__``.

=========  =========================================================================
errors     every error, with its exit code
grid       grid arithmetic
numerics   exact norms of NumPy blocks, factors, rescaling: a C kernel and its callers
storage    Zarr arrays and groups in folders and object stores; no norms
report     text, JSON, HTML and progress
plan       what a run will do, in integers
target     lock, staging, journal and commit
arguments  the arguments of the operation, checked once
worker     one block in, one block out
lazy       the operation on NumPy and Dask arrays
engine     the client's side of a run from storage to storage
xarray     the operation on labelled arrays
cli        the command line
=========  =========================================================================
"""

from daskclip.engine import clip_zarr, plan_zarr, stats_zarr, verify_zarr
from daskclip.lazy import IndexedSlices, clip_by_global_norm, clip_by_norm, global_norm, norm

__version__ = "0.2.0"

__all__ = [
    "IndexedSlices",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_zarr",
    "global_norm",
    "norm",
    "plan_zarr",
    "stats_zarr",
    "verify_zarr",
]
