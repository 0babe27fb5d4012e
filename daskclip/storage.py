"""The only file that imports zarr."""
from __future__ import annotations
from typing import Any
import dask.array as da
import zarr
from dask.base import tokenize

def is_array(x: Any) -> bool:
    return isinstance(x, zarr.Array)

def as_dask(array: Any) -> da.Array:
    """Lazy array with one chunk for each stored object."""
    token = tokenize(
        str(array.store), array.path, array.metadata.to_dict(), ensure_deterministic=True
    )
    return da.from_array(array, chunks=array.shards or array.chunks, name=f"zarr-{token}")
