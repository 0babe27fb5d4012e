"""Clip a Dask array that is read from Zarr, lazily, and store the result.

It shows that nothing is computed before it is needed, that rows inside a chunk are clipped in one
read, that a norm over the whole array reads each chunk twice instead of keeping all chunks in
memory, and that the bits of the result do not depend on the chunks.
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

    # by rows: every row lies inside one chunk, so that one task reads and clips a chunk
    by_rows, norms = daskclip.clip_by_norm(x, 17.0, axes=1, return_norm=True)
    by_rows.to_zarr(folder / "rows.zarr")
    above = int((norms > 17.0).sum().compute())
    assert 0 < above < len(x)
    assert (daskclip.norm(da.from_zarr(folder / "rows.zarr"), axes=1) <= 17.0).all().compute()

    # as a whole: the norm needs all chunks; they are read again for the result, not kept
    whole = daskclip.clip_by_norm(x, 100.0)
    whole.to_zarr(folder / "whole.zarr")
    assert daskclip.norm(da.from_zarr(folder / "whole.zarr")).compute() <= 100.0

    # a Zarr array, other chunks or no chunks at all give the same bits
    expected = whole.compute().tobytes()
    assert daskclip.clip_by_norm(stored, 100.0).compute().tobytes() == expected
    assert daskclip.clip_by_norm(x.rechunk((333, 77)), 100.0).compute().tobytes() == expected
    assert daskclip.clip_by_norm(stored[:], 100.0).tobytes() == expected


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
