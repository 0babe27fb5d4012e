"""Indexed slices: rows of a larger array."""

from types import SimpleNamespace

import dask.array as da
import numpy as np
import pytest
from reference import BFLOAT16, bits

from daskclip import IndexedSlices, clip_by_global_norm, clip_by_norm, global_norm, norm

VALUES = np.float32([[1, 2], [3, 4], [5, 6]])
INDICES = np.array([4, 0, 4])


def slices(lazy=False):
    return IndexedSlices(da.from_array(VALUES, 1) if lazy else VALUES, INDICES, (6, 2))


@pytest.mark.parametrize("axes", [None, 0, 1, []])
@pytest.mark.parametrize("lazy", [False, True])
def test_values_are_clipped_and_the_rest_passes_through(lazy, axes):
    s = slices(lazy)
    y, value = clip_by_norm(s, 2.0, axes, return_norm=True)
    assert isinstance(y, IndexedSlices)
    assert y.indices is s.indices
    assert y.dense_shape is s.dense_shape
    assert isinstance(y.values, da.Array) == lazy
    # duplicate indices are not merged, as in TensorFlow
    assert bits(np.asarray(y.values)) == bits(clip_by_norm(VALUES, 2.0, axes))
    assert bits(np.asarray(value)) == bits(norm(VALUES, axes)) == bits(norm(slices(), axes))


@pytest.mark.parametrize("lazy", [False, True])
def test_any_object_with_the_three_parts_will_do(lazy):
    indices, dense_shape = object(), object()
    values = slices(lazy).values
    s = SimpleNamespace(values=values, indices=indices, dense_shape=dense_shape)
    (y,), value = clip_by_global_norm([s], 2.0)
    for z in (y, clip_by_norm(s, 2.0)):
        assert isinstance(z, IndexedSlices)
        assert z.indices is indices
        assert z.dense_shape is dense_shape
        assert bits(np.asarray(z.values)) == bits(clip_by_norm(VALUES, 2.0))
    assert float(value) == float(global_norm([s])) == float(norm(s)) == norm(VALUES)


def test_in_a_list_beside_arrays():
    clipped, value = clip_by_global_norm([slices(), None, VALUES, slices(lazy=True)], 2.0)
    plain, _ = clip_by_global_norm([VALUES] * 3, 2.0)
    assert clipped[1] is None
    for y, expected in zip((clipped[0].values, clipped[2], clipped[3].values), plain, strict=True):
        assert isinstance(y, da.Array)
        assert bits(y.compute()) == bits(expected)
    assert value.compute() == global_norm([VALUES] * 3)


@pytest.mark.parametrize("dtype", ["f2", BFLOAT16, "f4", "f8", "c8", "c16"])
@pytest.mark.parametrize("lazy", [False, True])
def test_to_dense_adds_rows_of_the_same_index(lazy, dtype):
    values = VALUES.astype(dtype)
    s = IndexedSlices(da.from_array(values, 1) if lazy else values, INDICES, (6, 2))
    expected = np.zeros((6, 2), dtype)
    expected[0], expected[4] = (3, 4), (6, 8)
    assert bits(s.to_dense()) == bits(expected)


def test_coalesce_sorts_the_indices_and_makes_them_unique():
    s = slices()
    y = s.coalesce()
    assert y.indices.tolist() == [0, 4]
    assert y.values.tolist() == [[3, 4], [6, 8]]
    assert y.values.dtype == VALUES.dtype
    assert y.dense_shape is s.dense_shape
    assert bits(y.to_dense()) == bits(s.to_dense())


def test_indexed_slices_without_rows():
    s = IndexedSlices(np.zeros((0, 2), np.float32), np.zeros(0, int), (6, 2))
    assert clip_by_norm(s, 1.0, 1).values.shape == (0, 2)
    assert bits(s.to_dense()) == bits(np.zeros((6, 2), np.float32))
    assert s.coalesce().values.shape == (0, 2)


@pytest.mark.parametrize(
    ("indices", "dense_shape", "error", "message"),
    [
        (INDICES, None, ValueError, "^dense_shape is None; give it "),
        (INDICES, (4, 2), ValueError, r"^indices 0 to 4 leave 0 to 3; .* dense_shape \(4, 2\)$"),
        (-INDICES, (6, 2), ValueError, "^indices -4 to 0 leave 0 to 5; "),
        (INDICES[:2], (6, 2), ValueError, r"^indices of shape \(2,\) .*; give one index a row$"),
        (INDICES / 2, (6, 2), TypeError, "^indices have dtype float64; give integers$"),
    ],
)
def test_slices_that_do_not_fit(indices, dense_shape, error, message):
    with pytest.raises(error, match=message):
        IndexedSlices(VALUES, indices, dense_shape).to_dense()


def test_values_that_cannot_be_clipped():
    with pytest.raises(TypeError, match="dtype int64"):
        clip_by_norm(IndexedSlices(INDICES, INDICES), 1.0)
