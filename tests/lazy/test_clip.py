"""The operation on NumPy and Dask arrays: extremes, kinds of input, the documented example."""

import math

import dask.array as da
import numpy as np
import pytest
from reference import BFLOAT16, DTYPES, bits, is_ideal, native, slices, squares

from daskclip import clip_by_global_norm, clip_by_norm, global_norm, norm

TINY = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}
EXTREMES = [
    *[(v, "f2") for v in (300.0, 65504.0, 2.0**-14)],
    *[(v, BFLOAT16) for v in (3.0e38, 1e30, 1e-30)],
    *[(v, "f4") for v in (1e30, 3.4e38, 1e-30, 2.0**-126)],
    *[(v, "f8") for v in (1e300, 1.7e308, 1e-300, 2.0**-1022)],
    *[(v, "c8") for v in (1e30 - 3e38j, 1e-30j)],
    *[(v, "c16") for v in (1e300 + 1e-300j, 1e300j)],
    *[(TINY[np.dtype(d).name], d) for d in ("f2", BFLOAT16, "f4", "f8")],
    *[(7 * TINY[np.dtype(d).name], d) for d in ("f2", BFLOAT16, "f4", "f8")],
]


def assert_right(y, x, axes, clip_norm):
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    totals = squares(x, axes)
    for index, part in slices(x.shape, axes):
        assert is_ideal(y[part], x[part], totals[index], clip_norm)
    if clip_norm < math.inf:
        limit = squares(np.array(max(clip_norm, 0.0)), ()).item()
        assert all(total <= limit for total in squares(y, axes).flat)


@pytest.mark.parametrize("clip_norm", [5e-324, 1e-300, 1e-3, 1.0, 1e300, math.inf, 0.0, -0.0, -2.0])
@pytest.mark.parametrize(("value", "dtype"), EXTREMES)
def test_extremes_are_clipped_without_warnings(value, dtype, clip_norm):
    x = np.array([[value, -value, 0.0], [value, value / 2, -0.0]], dtype)
    # the caller's floating-point settings must not affect the computation
    with np.errstate(all="raise"):
        y = clip_by_norm(x, clip_norm, 1)
        lazy = clip_by_norm(da.from_array(x, (1, 2)), clip_norm, 1).compute(scheduler="sync")
    assert_right(y, x, (1,), clip_norm)
    assert bits(lazy) == bits(y)


@pytest.mark.parametrize(("value", "dtype"), EXTREMES)
def test_a_limit_of_nan_gives_nan_without_a_warning(value, dtype):
    with np.errstate(all="raise"):
        assert np.isnan(clip_by_norm(np.full(3, value, dtype), math.nan)).all()


def test_a_finite_slice_whose_norm_exceeds_float64_is_clipped():
    x = np.full(9, 1.7e308)
    y, value = clip_by_norm(x, 3e300, return_norm=True)
    assert value == math.inf
    assert_right(y, x, (0,), 3e300)


def test_a_global_norm_beyond_float64_is_not_an_infinite_list():
    x = np.full(9, 1.7e308)
    (y,), value = clip_by_global_norm([x], 3e300)
    assert value == math.inf
    assert_right(y, x, (0,), 3e300)


@pytest.mark.parametrize("excess", [2.0**-1074, 2.0**-1000, 2.0**-27])
def test_the_comparison_with_the_limit_is_exact(excess):
    assert bits(clip_by_norm([3.0, 4.0], 5.0)) == bits([3.0, 4.0])
    x = np.array([3.0, 4.0, excess])
    assert bits(clip_by_norm(x, 5.0)) != bits(x)
    assert_right(clip_by_norm(x, 5.0), x, (0,), 5.0)


def test_the_limit_is_exact_float64():
    x = np.float32([0.1])
    assert bits(clip_by_norm(x, 0.1)) != bits(x)  # float32's 0.1 is larger
    assert bits(clip_by_norm(x, np.float32(0.1))) == bits(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_slices_beside_others_stay_zero(dtype):
    """Wide sums beside them must not leak into slices that have none."""
    x = np.array([[0.0, -0.0], [60000.0, 2.0**-24], [2.0**-24, 2.0**-24]], dtype)
    if dtype.itemsize >= 8:
        x[1] = x[1].astype(dtype) * (dtype.type(2) ** 100)
    for clip_norm in (0.0, 1e-300, 1.0):
        assert_right(clip_by_norm(x, clip_norm, 1), x, (1,), clip_norm)


def test_the_documentation_example():
    y = clip_by_norm(np.array([[1, 2, 3, 4, 5]], np.float32), 2.0)
    printed = [[0.26967996, 0.5393599, 0.80903983, 1.0787199, 1.3483998]]
    # not 1e-7: TensorFlow rounds to nearest and the bound asks for rounding down, up to 2 ulp apart
    np.testing.assert_allclose(y, printed, rtol=1e-6)


# larger than a tile, a panel and the slices that are finished at a time
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    ("shape", "axes", "step"),
    [
        ((20_000, 3), 1, 999),
        ((3, 20_000), 0, 999),
        ((40, 300, 30), (0, 2), 70),
        ((9000, 4), [], 999),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_do_not_depend_on_their_neighbours(dtype, shape, axes, step, order):
    rng = np.random.default_rng(0)
    x = np.asarray(rng.standard_normal(shape), dtype, order=order)
    kept = 1 if len(shape) == 3 or axes == 0 else 0
    clip_norm = float(np.median(norm(x, axes)))
    pieces = np.split(x, range(step, shape[kept], step), axis=kept)
    y = np.concatenate([clip_by_norm(np.array(p), clip_norm, axes) for p in pieces], axis=kept)
    assert bits(clip_by_norm(x, clip_norm, axes)) == bits(y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_array_equals_its_chunks(dtype):
    x = np.random.default_rng(0).standard_normal((300, 1000)).astype(dtype)
    y = clip_by_norm(x, 1.0)
    assert bits(clip_by_norm(da.from_array(x, (101, 900)), 1.0).compute()) == bits(y)
    (z,), value = clip_by_global_norm([x], 1.0)
    assert bits(z) == bits(y)
    assert value == norm(x) == global_norm([x])


def test_lists_and_scalars_are_converted():
    assert clip_by_norm([3.0, 4.0], 1.0).dtype == np.float64
    assert clip_by_norm([[3j]], 1.0).dtype == np.complex128
    assert isinstance(clip_by_norm(np.float32(3), 1.0), np.float32)
    assert clip_by_norm(5.0, 1.0).shape == ()
    assert abs(clip_by_norm(5.0, 1.0)) <= 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, -0.0, 3.0, -3.0])
def test_0_d_arrays_are_one_slice(value, dtype):
    x = np.array(value, dtype)
    for t in (x, da.from_array(x)):
        for axes in (None, []):
            y, value = clip_by_norm(t, 1.5, axes, return_norm=True)
            assert_right(np.asarray(y), x, (), 1.5)
            assert value.shape == ()
            assert float(value) == abs(x)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_0_d_arrays_that_are_not_finite(value, dtype):
    x = np.array(value, dtype)
    assert np.isnan(clip_by_norm(x, 1.0))
    assert np.isnan(clip_by_norm(da.from_array(x), 1.0).compute())
    np.testing.assert_equal(float(norm(x)), abs(value))


@pytest.mark.parametrize("axes", [None, 0, 1, [0, 1], []])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty_arrays(shape, axes):
    x = np.zeros(shape, np.float32)
    for t in (x, da.from_array(x)):
        y, value = clip_by_norm(t, 1.0, axes, return_norm=True)
        assert bits(np.asarray(y)) == bits(x)
        expected = np.zeros(shape).sum(axis=tuple(axes) if isinstance(axes, list) else axes)
        assert bits(np.asarray(value)) == bits(expected)
        assert bits(np.asarray(norm(t, axes))) == bits(expected)


@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8", ">c8", ">c16"])
def test_byte_order_is_kept(dtype):
    x = np.arange(6).astype(dtype).reshape(2, 3)
    y = clip_by_norm(x, 1.0, 1)
    assert y.dtype == np.dtype(dtype)
    assert clip_by_norm(da.from_array(x, 1), 1.0, 1).compute().dtype == np.dtype(dtype)
    assert bits(y) == bits(clip_by_norm(x.astype(dtype[1:]), 1.0, 1))


@pytest.mark.parametrize("clip_norm", [1.0, 1e9, math.inf])
def test_input_is_neither_changed_nor_shared(clip_norm):
    x = np.random.default_rng(0).standard_normal((4, 5))
    before = bits(x)
    x.flags.writeable = False
    y = clip_by_norm(x, clip_norm)
    assert not np.shares_memory(x, y)
    assert not np.shares_memory(x, clip_by_global_norm([x], clip_norm)[0][0])
    assert y.flags.writeable
    assert bits(x) == before


def test_a_complex_slice_keeps_its_directions():
    x = np.array([3 + 4j, -12j])
    y = clip_by_norm(x, 1.0)
    assert_right(y, x, (0,), 1.0)
    assert norm(x) == 13.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_omitted_elements_keep_their_place(dtype):
    x = np.array([[3, math.nan, 4], [math.nan, math.nan, math.nan], [0.3, 0.4, 0]], dtype)
    y, value = clip_by_norm(x, 1.0, 1, nonfinite="omit", return_norm=True)
    assert np.array_equal(np.isnan(y), np.isnan(x))
    assert value[:2].tolist() == [5.0, 0.0]
    assert bits(native(y)[2]) == bits(native(x)[2])
    assert_right(y[0, [0, 2]], x[0, [0, 2]], (0,), 1.0)


def test_a_list_of_mixed_dtypes_has_one_factor():
    arrays = [np.array([3.0], "f2"), None, np.array([4.0]), np.array([12j], "c8")]
    clipped, value = clip_by_global_norm(arrays, 6.5)
    assert value == 13.0
    assert clipped[1] is None
    for x, y in zip(arrays, clipped, strict=True):
        if x is not None:
            assert is_ideal(y, x, squares(np.array(13.0), ()).item(), 6.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_list_that_is_not_finite_becomes_nan(bad):
    clipped, value = clip_by_global_norm([np.float32([1, 2]), np.array([bad])], 1.0)
    assert all(np.isnan(y).all() for y in clipped)
    np.testing.assert_equal(value, abs(bad))


def test_a_given_norm_is_believed():
    x = np.float32([1, 2])
    (y,), value = clip_by_global_norm([x], 1.0, 4.0)
    assert value == 4.0
    assert is_ideal(y, x, squares(np.array(4.0), ()).item(), 1.0)


@pytest.mark.parametrize("dtype", ["i1", "i8", "u8", "?", "f2", "f8", "g"])
def test_a_given_norm_may_be_lazy(dtype):
    x = np.float32([1, 2])
    use_norm = np.array(4 if dtype != "?" else 1, dtype)
    (y,), value = clip_by_global_norm([x], 0.5, use_norm)
    lazy, lazy_value = clip_by_global_norm([x], 0.5, da.from_array(use_norm))
    assert bits(lazy[0].compute()) == bits(y)
    assert lazy_value.compute() == value == use_norm
