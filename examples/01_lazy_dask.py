"""A Dask array that comes from Zarr, clipped lazily and stored.

You learn that nothing is computed until it is asked for, that rows which lie inside a chunk are
clipped in one read, that a norm over the whole array makes each chunk twice instead of holding
all of them, and that the chunks have no say in the bits of the result.
"""

import tempfile
from pathlib import Path

import dask.array as da
import numpy as np
import zarr

import daskclip


def main(tmp):
    folder = Path(tmp)
    stored = zarr.create_array(
        folder / "x.zarr", shape=(4000, 300), chunks=(500, 300), dtype="float32"
    )
    stored[:] = np.random.default_rng(0).normal(size=stored.shape)
    x = da.from_zarr(folder / "x.zarr")

    # by rows: every row lies inside one chunk, so one task reads, clips and hands on a chunk
    by_rows, norms = daskclip.clip_by_norm(x, 17.0, axes=1, return_norm=True)
    by_rows.to_zarr(folder / "rows.zarr")
    above = int((norms > 17.0).sum().compute())
    assert 0 < above < len(x)
    assert (daskclip.norm(da.from_zarr(folder / "rows.zarr"), axes=1) <= 17.0).all().compute()

    # as a whole: the norm needs all chunks; they are read again for the result, not held
    whole = daskclip.clip_by_norm(x, 100.0)
    whole.to_zarr(folder / "whole.zarr")
    assert daskclip.norm(da.from_zarr(folder / "whole.zarr")).compute() <= 100.0

    # a zarr array is taken as it is; other chunks, or none, give the same bits
    expected = whole.compute().tobytes()
    assert daskclip.clip_by_norm(stored, 100.0).compute().tobytes() == expected
    assert daskclip.clip_by_norm(x.rechunk((333, 77)), 100.0).compute().tobytes() == expected
    assert daskclip.clip_by_norm(stored[:], 100.0).tobytes() == expected


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
