"""Clip sea surface temperatures winter by winter, with missing values over land.

It shows how to clip labelled data by the names of its dimensions and to leave out missing values:
in Zarr, where the data may be larger than memory, and with xarray. The anomalies of 50 winters come
with the package eofs; a winter whose norm exceeds the limit is scaled down as a whole.
"""

import tempfile
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import xarray as xr

import daskclip.xarray  # registers the accessor .daskclip

DATA = "eofs/examples/example_data/sst_ndjfm_anom.nc"
SPACE = ["latitude", "longitude"]


def main(tmp):
    source, target = Path(tmp) / "sst.zarr", Path(tmp) / "clipped.zarr"
    file = xr.load_dataset(distribution("eofs").locate_file(DATA), decode_coords="all")
    # the file marks land with 1e20; without its encoding, Zarr stores NaN
    ds = file.drop_encoding().chunk(time=10)
    ds.to_zarr(source, consolidated=False)

    winters = ds.sst.daskclip.norm(SPACE).compute()
    limit = round(float(winters.quantile(0.75)), 3)
    # daskclip run sst.zarr clipped.zarr --dim latitude,longitude --nonfinite omit ...
    report = daskclip.clip_zarr(source, target, limit, dim=SPACE, nonfinite="omit", memory="64MiB")
    print(report, "\nstrongest winters:")
    for winter in winters.sortby(-winters)[:3]:
        print(f"{winter.time.dt.year:d}  {float(winter):.3f} kept {limit / float(winter):.1%}")

    with (
        xr.open_zarr(target, consolidated=False, decode_coords="all") as stored,
        xr.open_zarr(source, consolidated=False, decode_coords="all") as opened,
    ):
        lazy = opened.daskclip.clip_by_norm(limit, SPACE)
        xr.testing.assert_identical(stored, lazy)
        assert stored.sst.isnull().sum() == opened.sst.isnull().sum() == 4500
        plain = ds.sst * np.minimum(1, limit / winters)
        xr.testing.assert_allclose(stored.sst, plain, rtol=1e-15)
        clipped = stored.sst.daskclip.norm(SPACE).compute()
    assert float(clipped.max()) <= limit


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
