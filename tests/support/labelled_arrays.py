"""Labelled arrays, and how they are compared."""

import math

import numpy as np
import pytest
from reference import bits
from stores import some

from daskclip.errors import DaskClipError

xr = pytest.importorskip("xarray", reason="xarray is not installed: pip install daskclip[xarray]")


def cube(dtype="f4", chunks=None, seed=0):
    """Array of dimensions time, lat and lon, with coordinates of all kinds and some NaN."""
    values = 9 * some((4, 5, 6), dtype, seed)
    values[1, 2, 3] = values[3, :, 0] = math.nan
    x = xr.DataArray(
        values,
        dims=["time", "lat", "lon"],
        coords={
            "time": np.arange(4),
            "lat": np.linspace(-1, 1, 5),
            "area": (("lat", "lon"), np.ones((5, 6))),
            "month": ("time", [12, 1, 2, 3]),
        },
        name="wind",
        attrs={"units": "m s-1"},
    )
    x.encoding = {"_FillValue": math.nan, "chunksizes": (1, 5, 6)}
    return x if chunks is None else x.chunk(chunks)


def identical(a, b):
    """Whether two labelled arrays are equal to the bit, labels and attributes too."""
    xr.testing.assert_identical(a, b)
    arrays = [(a, b)] if isinstance(a, xr.DataArray) else [(a[n], b[n]) for n in a.data_vars]
    return all(bits(p.values) == bits(q.values) for p, q in arrays if p.dtype.kind in "fc")


def one_line(call, kind, *words):
    with pytest.raises(kind) as caught:
        call()
    assert isinstance(caught.value, DaskClipError)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text
