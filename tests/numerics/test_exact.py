"""Exact sums, compared with Python's integers."""

import math
from itertools import pairwise

import dask.array as da
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import (
    DTYPES,
    EXPONENTS,
    exact_sums,
    integer,
    is_rounded,
    native,
    same,
    squares,
    tall_squares,
    totals,
)
from strategies import LAYOUTS, ORDS, cases, for_each_ord

from daskclip import clip_by_norm, norm
from daskclip.numerics import combine, no_sums, partial_norm, state_nbytes


def wide(shape, dtype, low=-1074, high=1023):
    """Random values with exponents spread over the dtype's range."""
    real = native(np.zeros((), dtype)).dtype
    lowest, highest = EXPONENTS[real.name]
    shape = (*shape, 2) if dtype.kind == "c" else shape
    low, high = max(low, lowest), min(high, highest)
    rng = np.random.default_rng(0)
    exponent = rng.integers(low, high, shape, endpoint=True)
    x = np.ldexp(rng.uniform(-1, 1, shape), exponent).astype(real)
    return x.view(dtype)[..., 0] if dtype.kind == "c" else x


@pytest.mark.parametrize("axes", [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_exact_over_the_whole_range(dtype, axes):
    x = wide((3, 40, 5), dtype)
    partial = partial_norm(x, axes)
    assert (exact_sums(partial) == squares(x, axes)).all()
    assert partial.limbs.dtype == np.uint32
    assert not partial.flags.any()


@pytest.mark.parametrize(
    ("low", "high"), [(-1074, -1040), (-1074, -500), (-3, 3), (-60, 60), (400, 900), (1000, 1023)]
)
@pytest.mark.parametrize("axes", [(0,), (1,)])
def test_float64_sums_are_exact_in_every_part_of_the_range(low, high, axes):
    x = wide((30, 31), np.dtype(float), low, high)
    assert (exact_sums(partial_norm(x, axes)) == squares(x, axes)).all()


# longer than a run, a tile and a panel, whole range of exponents, slices along rows and columns
@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.kind != "c"], ids=str)
@pytest.mark.parametrize(
    ("shape", "axes"), [((3, 40, 5), (0, 2)), ((1030, 20), (0,)), ((20, 1030), (1,))]
)
def test_norms_over_the_whole_range(ord, dtype, shape, axes):
    x = wide(shape, dtype)
    exact = totals(x, axes, ord)
    for layout in LAYOUTS.values():
        norms = norm(layout(x), axes, keepdims=True, ord=ord)
        assert all(is_rounded(n, t) for n, t in zip(norms.flat, exact.flat, strict=True))


# longer than a run of products, a tile and a panel; slices along rows and along columns
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((513, 3), (0,)),
        ((3, 513), (1,)),
        ((16400,), (0,)),
        ((2**14 + 1, 17), (0,)),
        ((20, 1000), (0,)),
        ((1000, 20), (1,)),
        ((7, 11, 300), (0, 2)),
        ((2, 2**17 + 5), (1,)),
        ((2**17 + 5, 2), (0,)),
    ],
)
@pytest.mark.parametrize(("dtype", "spread"), [("f4", 2), ("f8", 60)])
def test_sums_are_exact_over_many_tiles(shape, axes, spread, dtype):
    x = wide(shape, np.dtype(dtype), -spread, spread)
    assert (exact_sums(partial_norm(x, axes)) == squares(x, axes)).all()


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_the_largest_values_of_a_whole_panel_add_up(dtype, ord):
    x = np.full((2**18 + 1, 1), np.finfo(dtype).max, dtype)
    if ord == math.inf:
        assert norm(x, ord=ord) == np.finfo(dtype).max
    else:
        one = exact_sums(partial_norm(x[:1], (0,), ord=ord)).item()
        assert one == (integer(x[0, 0]) ** 2 if ord == 2 else integer(x[0, 0]) << 1074)
        assert exact_sums(partial_norm(x, (0,), ord=ord)).item() == len(x) * one
    limit = 1e-30 if dtype != "f2" else 0.01
    assert totals(clip_by_norm(x, limit, ord=ord), None, ord).item() <= integer(limit) ** 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1), (1, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_changes_nothing(dtype, axes, layout):
    x = wide((20, 3, 30), dtype, -40, 40)
    assert same(partial_norm(LAYOUTS[layout](x), axes), partial_norm(x, axes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposed_blocks_have_the_same_sums(dtype):
    x = wide((20, 3, 30), dtype)
    partial = partial_norm(x.transpose(2, 0, 1), (0, 1))
    assert same(
        partial._replace(
            limbs=partial.limbs.reshape(-1, 1, 3, 1), flags=partial.flags.reshape(1, 3, 1)
        ),
        partial_norm(x, (0, 2)),
    )


@for_each_ord(150, 50, special=True, data=st.data())
def test_any_grouping_of_the_parts_equals_the_whole(case, ord, data):
    assume(case.axes)
    axis = data.draw(st.sampled_from(case.axes))
    edges = np.cumsum([0, *case.chunks[axis]])
    parts = [
        partial_norm(np.take(case.plain, range(a, b), axis), case.axes, ord=ord)
        for a, b in pairwise(edges)
    ]
    whole = partial_norm(case.plain, case.axes, ord=ord)
    assert same(combine(parts), whole)
    parts = data.draw(st.permutations(parts))
    while len(parts) > 1:
        taken = data.draw(st.integers(1, len(parts)))
        parts = [*parts[taken:], combine(parts[:taken])]
    assert same(parts[0], whole)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(many=st.lists(cases(), max_size=4))
def test_sum_over_all_slices_of_several_arrays(many):
    parts = [partial_norm(c.plain, tuple(range(c.plain.ndim))).reshape(()) for c in many]
    total = combine([no_sums(()), *parts])
    assert exact_sums(total).item() == sum(squares(c.plain, None).item() for c in many)
    assert total.flags.shape == ()


@settings(max_examples=100, derandomize=True, deadline=None)
@given(case=cases(special=True), omit=st.booleans())
def test_flags_tell_what_was_met_and_the_sum_leaves_it_out(case, omit):
    partial = partial_norm(case.x, case.axes, omit_nan=omit)
    over = {"axis": case.axes, "keepdims": True}
    nan = np.isnan(case.plain) if not omit else np.zeros(case.plain.shape, bool)
    inf = np.isinf(case.plain)
    if case.plain.dtype.kind == "c" and omit:
        inf &= ~np.isnan(case.plain)
    assert np.array_equal(partial.flags & 1, nan.any(**over))
    assert np.array_equal(partial.flags & 2, 2 * inf.any(**over))


def test_more_parts_than_a_limb_has_room_for_carries():
    one = partial_norm(np.float32([0xFFFFFF]), (0,))
    assert exact_sums(combine([one] * 5000)).item() == 5000 * exact_sums(one).item()


@pytest.mark.parametrize("ord", [1, 2, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_sum_takes_more_bytes_than_are_announced(dtype, ord):
    """The largest sum that an array can have, beside the smallest element."""
    if dtype.kind == "c" and ord != 2:
        return
    lowest, highest = EXPONENTS[native(np.zeros((), dtype)).dtype.name]
    smallest, total = (
        partial_norm(np.ldexp([1.0], e).astype(dtype), (0,), ord=ord) for e in (lowest, highest)
    )
    for _ in range(62):
        total = combine([total, total])
    total = combine([total, smallest])
    assert 4 * len(total.limbs) <= state_nbytes(dtype)
    if ord == 2:
        assert 4 * len(total.limbs) == state_nbytes(dtype)


def test_a_sum_exceeds_float64_without_harm():
    x = np.full(1000, np.finfo(float).max)
    assert exact_sums(partial_norm(x, (0,))).item() == squares(x, (0,)).item()
    assert norm(x) == np.inf


def with_sum(total):
    """Floats whose squares add up to an integer below 2**108."""
    numbers = []
    while total:
        n = math.isqrt(total)
        n -= n % 2 if n > 2**53 else 0
        numbers.append(float(n))
        total -= n * n
    return np.array(numbers)


# 2**53 + odd lies halfway between two floats; the one with an even mantissa is `even`
@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**-540, 1.0, 2.0**900])
@pytest.mark.parametrize("beside", [-1, 0, 1])
@pytest.mark.parametrize(("odd", "even"), [(3, 4), (13, 12)])
def test_norms_halfway_between_two_floats(odd, even, beside, scale):
    x = with_sum((2**53 + odd) ** 2 + beside)
    assert norm(scale * x) == scale * (2**53 + (odd + beside if beside else even))


@pytest.mark.parametrize(
    ("x", "expected"), [([3, 4], 5), ([1, 1], 1), ([1, 1, 1], 2), ([2**60, 1], 2**60)]
)
def test_norms_of_subnormal_numbers(x, expected):
    assert norm(np.ldexp(np.float64(x), -1074)) == math.ldexp(expected, -1074)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ([1e300, 1e300], 2e300),
        ([1.7e308, 1.7e308], math.inf),
        ([5e-324, 5e-324, -5e-324], 15e-324),
        ([2.0**53, 1.0], 2.0**53),  # halfway: to even
        ([2.0**53, 1.0, 2.0**-1074], 2.0**53 + 2),
        ([2.0**53, -3.0], 2.0**53 + 4),
        ([2.0**53, 1 - 2.0**-53], 2.0**53),
        ([2.0**53, -0.5, 2.0**-1000], 2.0**53),
        ([1.0, 2.0**-54], 1.0),
        ([2.0**-1022, 2.0**-1074], 2.0**-1022 + 2.0**-1074),
        ([], 0.0),
    ],
)
def test_sums_of_magnitudes_and_the_largest_at_the_edges(x, expected):
    assert norm(np.array(x), ord=1) == expected
    assert norm(np.array(x), ord=math.inf) == max(map(abs, x), default=0.0)


def tall_constant():
    return np.full((10**7, 2), 0.1, np.float32)


def tall_gaussian():
    return np.random.default_rng(0).standard_normal((10**7, 2), np.float32)


def tall_half():
    return np.random.default_rng(0).standard_normal((10**6, 4), np.float32).astype(np.float16)


@pytest.mark.parametrize("make", [tall_constant, tall_gaussian, tall_half])
def test_norms_of_tall_columns_are_rounded_correctly(make):
    x = make()
    totals = tall_squares(x)
    for t in (x, da.from_array(x, (300_001, 1))):
        norms = np.asarray(norm(t, 0))
        assert all(is_rounded(n, total) for n, total in zip(norms, totals, strict=True))


def test_the_reference_of_tall_columns_agrees_with_the_other():
    x = wide((300, 3), np.dtype("f4"))
    assert (tall_squares(x) == squares(x, (0,))).all()
