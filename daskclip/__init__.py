"""Clip norms of arrays larger than memory, exactly.

From Zarr to Zarr, within a memory budget; a call that was killed resumes when it is repeated:

>>> import tempfile, numpy as np, zarr, daskclip
>>> folder = tempfile.mkdtemp()
>>> x = zarr.create_array(f"{folder}/x", data=np.float32([[3, 4], [0.3, 0.4]]))
>>> report = daskclip.clip_zarr(f"{folder}/x", f"{folder}/y", 1.0, axes=1)
>>> report.clipped
1

NumPy arrays at once, Dask arrays lazily:

>>> y = daskclip.clip_by_norm(np.float32([[3, 4], [0.3, 0.4]]), 1.0, axes=1)
>>> bool((daskclip.norm(y, axes=1) <= 1).all())
True

clip_zarr, plan_zarr, stats_zarr, verify_zarr
    Zarr arrays and groups: clip them, plan it, look at their norms, check what was written.
open_flat
    A .npy or .safetensors file, opened as a Zarr array or group.
clip_by_norm, norm
    An array of NumPy, Dask or Zarr, or `IndexedSlices`.
clip_by_global_norm, global_norm
    A list of arrays, by one norm.

`daskclip.xarray` adds ``.daskclip`` to labelled arrays, `daskclip.errors` has the errors, and
``daskclip --help`` explains the command line.

Notes
-----
The rooms of the package, from the bottom up. An import goes down, never sideways,
and into a room only through its ``__init__``, whose docstring draws what is inside.

=========  =========================================================================
errors     every error, with its exit code
grid       boxes of array elements, and grids of boxes
numerics   exact norms, factors and rescaling of NumPy blocks: a C kernel and its callers
storage    Zarr arrays and groups in folders and object stores; knows no norms
report     reports as text, JSON and HTML, and progress
plan       what a run will do, in integers: blocks, slabs, passes, memory
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

import importlib
import typing

# not xarray and cli: xarray is optional, and click is of no use in a program
if typing.TYPE_CHECKING:
    from daskclip.engine import clip_zarr, open_flat, plan_zarr, stats_zarr, verify_zarr
try:
    from daskclip.lazy import IndexedSlices, clip_by_global_norm, clip_by_norm, global_norm, norm
except Exception as error:
    # Dask and zarr refuse broken settings when they are imported. An error here would keep the
    # command line from saying so in one line; what is public raises it instead.
    _error: Exception | None = error
else:
    _error = None


def __getattr__(name: str) -> object:
    """Return a name of the engine, which is imported here: arrays are clipped without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        if _error is not None:
            raise _error
        return getattr(importlib.import_module("daskclip.engine"), name)
    except Exception as error:
        raise ImportError(f"daskclip cannot be used: {error}") from error


__version__ = "0.5.0"

__all__ = [
    "IndexedSlices", "clip_by_global_norm", "clip_by_norm", "clip_zarr", "global_norm", "norm",
    "open_flat", "plan_zarr", "stats_zarr", "verify_zarr",
]  # fmt: skip


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
