"""Histograms of norms: within the stated error of NumPy, and independent of the blocks."""

import math
from fractions import Fraction
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daskclip import stats_zarr
from daskclip.numerics import finalize, partial_norm
from daskclip.numerics.histogram import (
    BINS,
    RELATIVE_ERROR,
    NormHistogram,
    collect,
    edges,
    largest_after,
)
from daskclip.numerics.partial import INF, NAN

reproducible = settings(derandomize=True, deadline=None)
PERCENTS = ["0", "0.1", "1", "5", "25", "50", "75", "90", "95", "99", "99.9", "100"]


def norms_of(x, limit=np.inf, start=None, shape=None):
    flags = NAN * np.isnan(x) + INF * np.isinf(x)
    clipped = (x > limit) & (flags == 0)
    return collect(x, flags, clipped, start or (0,) * x.ndim, shape or x.shape)


def quantile(norms, x, percent):
    return norms.quantile(Fraction(percent), float(x.min()), float(x.max()))


def exact(x, percent):
    # numpy.percentile rounds the rank: of 20,000 its 99.9 % is one too high
    rank = max(1, math.ceil(x.size * Fraction(percent) / 100))
    return np.sort(x)[rank - 1]


@pytest.mark.parametrize("spread", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("percent", PERCENTS)
def test_a_quantile_is_within_the_stated_error(spread, percent):
    x = np.exp(spread * np.random.default_rng(0).standard_normal(20_000))
    assert abs(quantile(norms_of(x), x, percent) / exact(x, percent) - 1) <= RELATIVE_ERROR


@reproducible
@given(st.lists(st.floats(2.0**-1022, 1e308) | st.just(0.0), min_size=1), st.sampled_from(PERCENTS))
def test_quantiles_of_any_norms(values, percent):
    x = np.array(values)
    wanted = exact(x, percent)
    assert abs(quantile(norms_of(x), x, percent) - wanted) <= RELATIVE_ERROR * wanted


@reproducible
@given(st.lists(st.floats(0.0, 2.0**-1021, exclude_min=True), min_size=1))
def test_subnormal_norms_are_told_to_within_twice_that(values):
    x = np.array(values)
    assert abs(quantile(norms_of(x), x, "50") / exact(x, "50") - 1) <= 2 * RELATIVE_ERROR


def test_the_last_rank_is_rounded_up_exactly():
    x = np.arange(1.0, 1001.0)
    # 0.07 * 100 is above 7 in floating point
    assert abs(quantile(norms_of(x[:100]), x[:100], "7") / 7 - 1) <= RELATIVE_ERROR
    assert abs(quantile(norms_of(x), x, "99.9") / 999 - 1) < 1 / 2000


def test_the_largest_norm_of_all_has_no_number_above_it():
    x = np.array([np.finfo(np.float64).max])
    assert stats_zarr(x).largest_norm == x[0]
    assert largest_after(finalize(partial_norm(x, (0,)), np.inf, x.dtype), np.inf) == np.inf


def test_quantiles_of_equal_norms_are_that_norm():
    x = np.full(100, 0.1)
    assert {quantile(norms_of(x), x, p) for p in PERCENTS} == {0.1}
    assert np.isnan(norms_of(np.array([np.nan])).quantile(Fraction(50), np.inf, -np.inf))


def test_what_is_above_an_edge_is_counted_exactly():
    x = np.abs(np.random.default_rng(0).standard_cauchy(10_000))
    x[:100] = 1.0  # just at an edge: not above
    for limit in [0.0, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 1000.0, 5000.0]:
        assert norms_of(x).above(limit) == (x > limit).sum()
    assert norms_of(x).above(-1.0) == x.size
    near = norms_of(x).above(0.3)  # without those of its bin
    assert (
        (x > 0.3 * (1 + 2 * RELATIVE_ERROR)).sum()
        <= near
        <= (x > 0.3 * (1 - 2 * RELATIVE_ERROR)).sum()
    )


@reproducible
@given(
    st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.5, 3.0, np.inf, np.nan]), min_size=12, max_size=12),
    st.integers(0, 4),
    st.integers(0, 3),
)
def test_boxes_add_up_to_the_same(values, i, j):
    x = np.array(values).reshape(4, 3)
    boxes = [(slice(a, b), slice(c, d)) for a, b in [(0, i), (i, 4)] for c, d in [(0, j), (j, 3)]]
    parts = [norms_of(x[b], 1.0, [s.start for s in b], x.shape) for b in reversed(boxes)]
    assert reduce(NormHistogram.add, parts) == norms_of(x, 1.0)


def test_the_largest_and_where_they_are():
    x = np.zeros((300, 2))
    x[7, 1], x[250, 0], x[3, 0] = 5.0, 7.0, np.nan
    found = norms_of(x, 4.0)
    assert found.largest_slices[:3] == [(7.0, [250, 0]), (5.0, [7, 1]), (0.0, [0, 0])]
    assert (len(found.largest_slices), found.nan, found.zeros) == (10, 1, 597)
    assert found.clipped[1] == [1, 1]
    assert found.largest[1] == [7.0, 5.0]
    assert len(found.clipped[0]) == 150  # two rows each
    assert {i: n for i, n in enumerate(found.largest[0]) if n} == {3: 5.0, 125: 7.0}


def test_all_of_float64_has_half_a_million_bins():
    tiny, huge = np.nextafter(0, 1), np.finfo(float).max
    low, high = norms_of(np.array([tiny, huge])).bins
    assert high - low < 550_000
    assert edges(np.array([low, high])).tolist() == [tiny, huge]
    assert norms_of(np.array([1.0])).bins == norms_of(np.nextafter([1.0], 0)).bins
    assert norms_of(np.nextafter([1.0], 2)).bins == [norms_of(np.array([1.0])).bins[0] + 1]
    assert BINS * 2 * RELATIVE_ERROR == 1.0


def test_bars_hold_all_norms():
    x = np.abs(np.random.default_rng(0).standard_normal(1000)) + 1e-3
    bars = norms_of(x).bars()
    assert len(bars) <= 64
    assert sum(n for *_, n in bars) == 1000
    assert [((x > a) & (x <= b)).sum() for a, b, _ in bars] == [n for *_, n in bars]
    assert NormHistogram.empty((3,)).bars() == []


@pytest.mark.parametrize("low", [5e-324, 1e-310, 1e-5, 1.0])
@pytest.mark.parametrize("high", [1.01, 7.0, 1e9, np.finfo(float).max])
def test_bars_are_of_one_width_on_a_logarithmic_axis(low, high):
    octaves = np.log2(high) - np.log2(low)
    with np.errstate(over="ignore", under="ignore"):
        x = np.clip(np.exp2(np.linspace(np.log2(low), np.log2(high), 5000)), low, high)
    bars = norms_of(x).bars()
    assert sum(n for *_, n in bars) == 5000
    assert [a for a, *_ in bars[1:]] == [b for _, b, _ in bars[:-1]]
    assert all(a < b for a, b, _ in bars)
    assert bars[0][0] <= x[0]
    assert bars[-1][1] >= x[-1]
    if octaves > 64 / BINS:
        widths = [np.log2(b) - np.log2(a) for a, b, _ in bars if a >= 2.0**-1022]
        assert max(widths) - min(widths) < 4 / BINS
