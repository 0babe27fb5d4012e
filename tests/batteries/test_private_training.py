"""Joint clipping beside that of Opacus and of jax-privacy, on the same small network.

`data/record_private_training.py` made the recordings, and says how.
"""

from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from reference import bits, integer, squares

from daskclip import clip_by_global_norm, clip_zarr, verify_zarr

DATA = Path(__file__).parents[1] / "data"
NAMES = ["w1", "b1", "w2", "b2"]
EACH = slice(1, None)
# both take norms and factors in float32. Opacus divides by the norm and 1e-6 more
ROUNDING = {"opacus": 4 * 2.0**-23 + 1e-6, "jax_privacy": 4 * 2.0**-23}


def recorded(package):
    """Limit, gradients before and after clipping."""
    with np.load(DATA / f"{package}.npz") as found:
        return float(found["limit"]), *(
            [found[f"{name}_{when}"] for name in NAMES] for when in ("before", "after")
        )


def exact_squares(arrays):
    """Exact squares of the norm of each example over all arrays, in units of `squares`."""
    return sum(squares(x, tuple(range(1, x.ndim))).reshape(-1) for x in arrays)


@pytest.mark.parametrize("package", ROUNDING)
def test_clipping_gives_what_was_recorded_within_its_rounding(package):
    limit, before, after = recorded(package)
    clipped, norms = clip_by_global_norm(before, limit, axes=EACH)
    above = exact_squares(before) > integer(limit) ** 2
    assert 0 < above.sum() < len(above)
    for x, y, theirs in zip(before, clipped, after, strict=True):
        np.testing.assert_allclose(y, theirs, rtol=ROUNDING[package], atol=0)
        assert bits(y[~above]) == bits(x[~above])
    assert np.array_equal(norms > limit, above)
    assert (exact_squares(clipped) <= integer(limit) ** 2).all()
    # what both leave to rounding; jax-privacy says so
    theirs = exact_squares(after) > integer(limit) ** 2
    assert theirs.any() == (package == "jax_privacy")


def test_both_recordings_have_the_same_gradients():
    for ours, other in zip(*(recorded(package)[1] for package in ROUNDING), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("package", ROUNDING)
def test_all_forms_give_the_same_bits(tmp_path, package):
    limit, before, _ = recorded(package)
    clipped, _ = clip_by_global_norm(before, limit, axes=EACH)
    lazily, _ = clip_by_global_norm([da.from_array(x, 7) for x in before], limit, axes=EACH)
    assert [*map(bits, dask.compute(*lazily))] == [*map(bits, clipped)]
    group = zarr.create_group(tmp_path / "x")
    for name, x in zip(NAMES, before, strict=True):
        group.create_array(name, data=x, chunks=(5, *x.shape[1:]))
    report = clip_zarr(tmp_path / "x", tmp_path / "y", limit, axes=EACH, global_norm=True)
    written = [zarr.open_array(tmp_path / "y" / name, mode="r")[...] for name in NAMES]
    assert [*map(bits, written)] == [*map(bits, clipped)]
    assert (report.slices, report.largest_norm_after) == (24, limit)
    assert (exact_squares(written) <= integer(report.largest_norm_after) ** 2).all()
    assert verify_zarr(tmp_path / "y", tmp_path / "x").largest_norm_after == limit
