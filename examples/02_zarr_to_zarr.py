"""Clip one Zarr array to another in less memory than the array takes.

It shows the plan of a run, what its figures mean, and the report of the run. The array of 128 MiB
is clipped by its global norm within 64 MiB, so it is read twice.
"""

import tempfile
from pathlib import Path

import dask
import numpy as np
import zarr

from daskclip import clip_zarr, norm, plan_zarr

MIB = 2**20


def main(tmp):
    source, target = Path(tmp) / "x.zarr", Path(tmp) / "y.zarr"
    x = zarr.create_array(source, shape=(1024, 32768), chunks=(64, 4096), dtype="float32")
    random = np.random.default_rng(0)
    for first in range(0, 1024, 64):
        x[first : first + 64] = random.standard_normal((64, 32768), np.float32)

    # the threads of a process share its budget, so the plan depends on their number
    with dask.config.set(num_workers=2):
        plan = plan_zarr(source, target, 1000.0, memory="64MiB")
        assert plan.nbytes == 128 * MIB
        assert plan.passes == 2
        assert plan.bytes_read == 2 * plan.nbytes
        assert plan.projected_memory <= 64 * MIB
        assert not target.exists()

        report = clip_zarr(source, target, 1000.0, memory="64MiB")
    print(report)

    assert report.clipped == report.slices == 1
    assert report.projected_memory == plan.projected_memory
    y = zarr.open_array(target, mode="r")
    assert (y.chunks, y.dtype) == (x.chunks, x.dtype)
    assert 999.9999 < norm(y).compute() <= 1000.0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
