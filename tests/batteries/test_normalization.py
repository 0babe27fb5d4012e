"""Slices that are brought to their limit, from below too: checked in exact arithmetic."""

import math
from fractions import Fraction

import dask.array as da
import numpy as np
import pytest
from hypothesis import strategies as st
from reference import DTYPES, EXPONENTS, FORMATS, bits, integer, native, slices, totals
from strategies import ORDS, for_each_ord

from daskclip import IndexedSlices, clip_by_global_norm, clip_by_norm, global_norm, norm

NAMES = ["float16", "bfloat16", "float32", "float64"]
policies = st.sampled_from(["propagate", "omit", "zero"])


def largest(name):
    """The largest number of a dtype, in units of 2**-1074."""
    highest = EXPONENTS[name][1]
    return ((1 << FORMATS[name][0]) - 1) << (highest + 1 - FORMATS[name][0] + 1074)


def assert_close(before, after, clip_norm, names, terms, ord):
    """Require what the documentation says of the exact norm of a slice of so many ``terms``.

    Squares of norms, in units of 2**-2148, and the names of the dtypes of the slice.
    """
    limit = integer(max(clip_norm, 0.0))
    assert after <= limit**2
    # to the largest number, where one element alone could not reach the limit
    least = min(map(largest, names))
    if least**2 < before <= limit**2:
        assert after == before
    elif before:
        target = min(limit, least) if before <= limit**2 else limit
        eps = Fraction(2) ** (1 - min(FORMATS[name][0] for name in names))
        roots = {1: terms, 2: math.isqrt(max(terms - 1, 0)) + 1, math.inf: 1}  # rounded up
        error = roots[ord] << (max(FORMATS[name][1] for name in names) + 1074)
        is_near = 8 * error <= eps * target
        lowest = (1 - 2 * eps) * target if is_near else (1 - Fraction(15, 8) * eps) * target - error
        assert after >= max(lowest, 0) ** 2
    else:
        assert not after


def assert_slices_close(x, y, clip_norm, axes, ord=2):
    terms = math.prod(x.shape[a] for a in axes) * (2 if x.dtype.kind == "c" else 1)
    name = native(x).dtype.name
    pairs = zip(totals(x, axes, ord).flat, totals(y, axes, ord).flat, strict=True)
    for before, after in pairs:
        assert_close(before, after, clip_norm, [name], terms, ord)


@for_each_ord(300, 80)
def test_norms_are_just_below_the_limit(case, ord):
    y = clip_by_norm(case.x, case.clip_norm, case.axes, ord=ord, normalize=True)
    assert (y.dtype, y.shape) == (case.x.dtype, case.x.shape)
    assert_slices_close(case.plain, y, case.clip_norm, case.axes, ord)


@for_each_ord(200, 80)
def test_zeros_stay_and_slices_above_the_limit_are_clipped(case, ord):
    y = clip_by_norm(case.x, case.clip_norm, case.axes, ord=ord, normalize=True)
    clipped = clip_by_norm(case.x, case.clip_norm, case.axes, ord=ord)
    limit, exact = integer(max(case.clip_norm, 0.0)) ** 2, totals(case.plain, case.axes, ord)
    is_float64 = native(y).dtype == float  # of which the factor is another one
    for index, part in slices(y.shape, case.axes):
        if not exact[index] or (exact[index] > limit and not is_float64):
            assert bits(y[part]) == bits(clipped[part])


@for_each_ord(300, 80)
def test_normalizing_twice_changes_nothing_more(case, ord):
    once = clip_by_norm(case.x, case.clip_norm, case.axes, ord=ord, normalize=True)
    again = clip_by_norm(once, case.clip_norm, case.axes, ord=ord, normalize=True)
    assert bits(again) == bits(once)
    # clipping and normalizing agree on what is within the limit
    assert bits(clip_by_norm(once, case.clip_norm, case.axes, ord=ord)) == bits(once)


@for_each_ord(
    300, 80, special=True, nonfinite=policies, scheduler=st.sampled_from(["sync", "threads"])
)
def test_bits_do_not_depend_on_layout_chunks_or_scheduler(case, ord, nonfinite, scheduler):
    def normalized(x):
        how = {"ord": ord, "nonfinite": nonfinite, "normalize": True, "return_norm": True}
        return [*clip_by_norm(x, case.clip_norm, case.axes, **how)]

    expected = [bits(v) for v in normalized(case.plain)]
    assert [bits(v) for v in normalized(case.x)] == expected
    assert [bits(v) for v in case.compute(normalized, scheduler)] == expected


@for_each_ord(120, 50, special=True)
def test_slices_that_are_not_finite_become_what_clipping_makes_of_them(case, ord):
    y = clip_by_norm(case.x, case.clip_norm, case.axes, ord=ord, normalize=True)
    clipped = clip_by_norm(case.x, case.clip_norm, case.axes, ord=ord)
    for _, part in slices(y.shape, case.axes):
        if not np.isfinite(case.plain[part]).all():
            assert bits(y[part]) == bits(clipped[part])


@for_each_ord(120, 50, special=True)
def test_omitted_nan_counts_as_zero(case, ord):
    how = {"ord": ord, "normalize": True}
    y = clip_by_norm(case.x, case.clip_norm, case.axes, nonfinite="omit", **how)
    filled = np.where(np.isnan(case.plain), case.plain.dtype.type(0), case.plain)
    nan = np.isnan(case.plain)
    assert np.isnan(y[nan]).all()
    assert bits(y[~nan]) == bits(clip_by_norm(filled, case.clip_norm, case.axes, **how)[~nan])


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.kind != "c"], ids=str)
def test_the_ends_of_the_range(dtype, ord):
    name = dtype.name
    digits, lowest = FORMATS[name]
    highest = EXPONENTS[name][1]
    rng = np.random.default_rng(0)
    for low, n in [
        (lowest, 1),
        (lowest, 3),
        (lowest, 1000),
        (lowest + digits, 700),
        (0, 5),
        (highest - digits // 2, 4),
    ]:
        x = np.ldexp(rng.integers(1, 1 << digits // 2, (4, n)).astype(float), low).astype(dtype)
        for exponent in (lowest, lowest + 1, lowest + digits, -3, 0, highest, highest + 1, 1023):
            for mantissa in (1.0, 1 + 2.0**-30, 1.9):
                limit = math.ldexp(mantissa, min(exponent, 1023))
                y = clip_by_norm(x, limit, 1, ord=ord, normalize=True)
                assert_slices_close(x, y, limit, (1,), ord)
                assert bits(clip_by_norm(y, limit, 1, ord=ord, normalize=True)) == bits(y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e4])
def test_slices_side_by_side_do_not_depend_on_one_another(dtype, limit):
    rng = np.random.default_rng(0)
    lowest = FORMATS[native(np.zeros((), dtype)).dtype.name][1]
    size = np.ldexp(rng.uniform(1, 2, (300, 24)), rng.integers(lowest, 4, (300, 24)))
    x = (size * rng.choice([-1, 1], size.shape)).astype(dtype)
    x[:, 3] = 0
    alone = [clip_by_norm(x[:, k], limit, normalize=True) for k in range(24)]
    for column in (0, math.nan, math.inf, np.finfo(np.float16).max):
        x[:, 7] = column
        y = clip_by_norm(x, limit, 0, normalize=True, nonfinite="zero")
        for k in range(24):
            assert k == 7 or bits(y[:, k]) == bits(alone[k])


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_of_norm_1(name):
    dtype = next(d for d in DTYPES if d.name == name)
    x = np.random.default_rng(0).normal(0, 0.3, (200, 384)).astype(dtype)
    x[7] = 0
    y = clip_by_norm(x, 1.0, 1, normalize=True)
    eps = 2.0 ** (1 - FORMATS[name][0])
    norms = norm(y, 1)
    assert norms[7] == 0
    assert 1 - 2 * eps <= norms[norms > 0].min() <= norms.max() <= 1
    assert bits(clip_by_norm(y, 1.0, 1, normalize=True)) == bits(y)


def test_each_slice_has_its_limit():
    x = np.random.default_rng(0).normal(size=(40, 9)).astype("f4")
    limits = np.linspace(0, 60, 40)[:, None]
    limits[-1] = math.inf
    y = clip_by_norm(x, limits=limits, axes=1, normalize=True)
    for row, clipped, limit in zip(x[:-1], y[:-1], limits[:-1, 0], strict=True):
        assert bits(clipped) == bits(clip_by_norm(row, limit, normalize=True))
    assert bits(y[-1]) == bits(x[-1])
    lazily = clip_by_norm(da.from_array(x, 7), limits=limits, axes=1, normalize=True)
    assert bits(lazily.compute()) == bits(y)


def test_a_large_array_is_normalized_by_threads():
    x = np.random.default_rng(0).normal(size=(300, 8000)).astype("f4")
    for axes in (0, 1, None):
        y = clip_by_norm(x, 1e4, axes, normalize=True)
        assert bits(
            clip_by_norm(da.from_array(x, 150), 1e4, axes, normalize=True).compute()
        ) == bits(y)


def test_indexed_slices_are_normalized():
    values = np.float32([[3, 4], [0.03, 0.04], [0, 0]])
    indices = np.array([1, 1, 2])
    found = clip_by_norm(IndexedSlices(values, indices, (4, 2)), 1.0, 1, normalize=True)
    assert found.indices is indices
    assert bits(found.values) == bits(clip_by_norm(values, 1.0, 1, normalize=True))
    assert np.allclose(norm(found.values, 1), [1, 1, 0])


@pytest.mark.parametrize("seed", range(60))
def test_the_global_norm_of_a_list_gets_near_the_limit(seed):
    rng = np.random.default_rng(seed)
    arrays = []
    for _ in range(rng.integers(1, 4)):
        dtype = DTYPES[rng.integers(len(DTYPES))]
        x = np.ldexp(rng.uniform(-1, 1, rng.integers(0, 30, 2)), int(rng.integers(-14, 12)))
        arrays.append(x.astype(dtype))
    limit = float(np.ldexp(rng.uniform(1, 2), int(rng.integers(-20, 16))))
    found, before = clip_by_global_norm(arrays, limit, normalize=True)
    names = [native(x).dtype.name for x in arrays]
    terms = sum(native(x).size for x in arrays)
    sums = [sum(totals(x, None, 2).item() for x in some) for some in (arrays, found)]
    assert before == global_norm(arrays)
    assert_close(*sums, limit, names, terms, 2)
    again, _ = clip_by_global_norm(found, limit, normalize=True)
    assert [*map(bits, again)] == [*map(bits, found)]
    lazy, _ = clip_by_global_norm([da.from_array(x, 5) for x in arrays], limit, normalize=True)
    assert [bits(x.compute()) for x in lazy] == [*map(bits, found)]


def test_a_known_global_norm_gives_the_factor():
    x = np.float64([3.0, 4.0])
    (found,), total = clip_by_global_norm([x], 20.0, 5.0, normalize=True)
    assert total == 5
    assert np.allclose(found, 4 * x, rtol=1e-15)
    assert bits(clip_by_global_norm([x], 20.0, 5.0)[0][0]) == bits(x)


@pytest.mark.parametrize("flag", [None, 1, "yes", np.True_])
def test_normalize_is_a_bool(flag):
    x = np.ones(3)
    for call in (
        lambda: clip_by_norm(x, 1.0, normalize=flag),
        lambda: clip_by_global_norm([x], 1.0, normalize=flag),
    ):
        with pytest.raises(TypeError, match=r"^normalize .* give one of them$"):
            call()
