"""Properties of the operation on random arrays, checked in exact arithmetic."""

import math
import re

import numpy as np
import pytest
from distributed import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import DTYPES, bits, integer, is_ideal, is_rounded, native, slices, totals
from servers import local_cluster
from strategies import ORDS, bits_of, cases, for_each_ord, parts_as_integers

from daskclip import clip_by_norm, norm

policies = st.sampled_from(["propagate", "omit", "zero"])


@for_each_ord(500, 80)
def test_no_slice_exceeds_the_limit(case, ord):
    y = clip_by_norm(case.x, case.clip_norm, case.axes, ord=ord)
    limit = integer(max(case.clip_norm, 0.0)) ** 2
    assert all(total <= limit for total in totals(y, case.axes, ord).flat)


@for_each_ord(500, 80)
def test_elements_are_within_2_ulp_and_unclipped_slices_unchanged(case, ord):
    y = clip_by_norm(case.x, case.clip_norm, case.axes, ord=ord)
    assert (y.dtype, y.shape) == (case.x.dtype, case.x.shape)
    exact = totals(case.plain, case.axes, ord)
    for index, part in slices(y.shape, case.axes):
        assert is_ideal(y[part], case.plain[part], exact[index], case.clip_norm)


@for_each_ord(500, 80)
def test_clipping_twice_changes_nothing_more(case, ord):
    once = clip_by_norm(case.x, case.clip_norm, case.axes, ord=ord)
    assert bits(clip_by_norm(once, case.clip_norm, case.axes, ord=ord)) == bits(once)


@for_each_ord(500, 80)
def test_norms_are_rounded_correctly(case, ord):
    norms = norm(case.x, case.axes, keepdims=True, ord=ord)
    exact = totals(case.plain, case.axes, ord)
    assert norms.shape == exact.shape
    assert all(is_rounded(n, t) for n, t in zip(norms.flat, exact.flat, strict=True))


@for_each_ord(500, 80, scheduler=st.sampled_from(["sync", "threads"]))
def test_bits_do_not_depend_on_layout_chunks_or_scheduler(case, ord, scheduler):
    assert_same_bits(case, ord, scheduler)


@for_each_ord(100, 80, special=True, nonfinite=policies)
def test_bits_of_nonfinite_slices_do_not_depend_on_layout_or_chunks(case, ord, nonfinite):
    assert_same_bits(case, ord, "sync", nonfinite)


def assert_same_bits(case, ord, scheduler, nonfinite="propagate"):
    def clip(x):
        how = {"ord": ord, "nonfinite": nonfinite, "return_norm": True}
        return [*clip_by_norm(x, case.clip_norm, case.axes, **how), norm(x, case.axes, ord=ord)]

    expected = [bits(v) for v in clip(case.plain)]
    assert [bits(v) for v in clip(case.x)] == expected
    assert [bits(v) for v in case.compute(clip, scheduler)] == expected


@for_each_ord(120, 50, special=True)
def test_propagate_makes_slices_nan_or_zero_where_they_are_not_finite(case, ord):
    y = clip_by_norm(case.x, case.clip_norm, case.axes, ord=ord)
    for _, part in slices(y.shape, case.axes):
        x, result = case.plain[part], y[part]
        if np.isnan(x).any():
            assert np.isnan(result).all()
        elif np.isinf(x).any():
            assert np.array_equal(np.isnan(result), np.isinf(x))
            parts = native(x[np.isfinite(x)])
            signed_zeros = parts * parts.dtype.type(0)
            assert bits(native(result[np.isfinite(x)])) == bits(signed_zeros)
        else:
            assert is_ideal(result, x, totals(x, None, ord).item(), case.clip_norm)


@for_each_ord(120, 50, special=True)
def test_omit_clips_as_if_nan_were_zero(case, ord):
    y = clip_by_norm(case.x, case.clip_norm, case.axes, ord=ord, nonfinite="omit")
    filled = np.where(np.isnan(case.plain), case.plain.dtype.type(0), case.plain)
    expected = clip_by_norm(filled, case.clip_norm, case.axes, ord=ord)
    nan = np.isnan(case.plain)
    assert np.isnan(y[nan]).all()
    assert bits(y[~nan]) == bits(expected[~nan])


@for_each_ord(200, 80, special=True, normalize=st.booleans())
def test_zero_makes_zeros_of_slices_that_are_not_finite(case, ord, normalize):
    how = {"ord": ord, "normalize": normalize, "return_norm": True}
    y, norms = clip_by_norm(case.x, case.clip_norm, case.axes, nonfinite="zero", **how)
    is_finite = np.isfinite(case.plain).all(axis=case.axes, keepdims=True)
    filled = np.where(is_finite, case.plain, case.plain.dtype.type(0))
    expected, counted = clip_by_norm(filled, case.clip_norm, case.axes, **how)
    assert bits(y) == bits(expected)
    assert bits(norms) == bits(counted)


@for_each_ord(200, 80, special=True, nonfinite=policies)
def test_nan_that_is_made_is_one_and_any_other_keeps_its_bits(case, ord, nonfinite):
    y = clip_by_norm(case.x, case.clip_norm, case.axes, ord=ord, nonfinite=nonfinite)
    quiet = bits_of(math.nan, case.plain.dtype)
    for _, part in slices(y.shape, case.axes):
        x, clipped = (np.array(native(a[part])) for a in (case.plain, y))
        is_made = np.isnan(clipped) & ~np.isnan(x)
        if nonfinite == "propagate" and np.isnan(x).any():
            is_made[:] = True
        found, before = parts_as_integers(clipped), parts_as_integers(x)
        is_kept = (np.isnan(clipped) & ~is_made).ravel()
        assert (found[is_made.ravel()] == quiet).all()
        assert (found[is_kept] == before[is_kept]).all()


@for_each_ord(100, 50, special=True)
def test_raise_names_the_first_slice(case, ord):
    finite = np.isfinite(case.plain).all(axis=case.axes, keepdims=True)
    if finite.all():
        y = clip_by_norm(case.x, case.clip_norm, case.axes, ord=ord, nonfinite="raise")
        assert bits(y) == bits(clip_by_norm(case.x, case.clip_norm, case.axes, ord=ord))
        return
    first = np.argwhere(~finite)[0]
    name = ", ".join(":" if k in case.axes else str(i) for k, i in enumerate(first))
    with pytest.raises(FloatingPointError, match=rf"^slice {re.escape(f'[{name}]')} holds nan or"):
        clip_by_norm(case.x, case.clip_norm, case.axes, ord=ord, nonfinite="raise")


@for_each_ord(100, 50, special=True)
def test_raise_names_a_slice_of_a_chunk(case, ord):
    def clip(x):
        return [clip_by_norm(x, case.clip_norm, case.axes, ord=ord, nonfinite="raise")]

    if np.isfinite(case.plain).all():
        assert bits(case.compute(clip, "sync")[0]) == bits(clip(case.plain)[0])
        return
    with pytest.raises(FloatingPointError, match=r"^slice ") as error:
        case.compute(clip, "sync")
    names, numbers = re.match(
        r"slice \[(.*)\] holds nan or infinity \(chunk \((.*)\)\);", str(error.value)
    ).groups()
    chunk = tuple(int(n) for n in re.findall(r"\d+", numbers))
    edges = [np.cumsum([0, *c]) for c in case.chunks]
    part = [slice(e[i], e[i + 1]) for e, i in zip(edges, chunk, strict=True)]
    for k, n in enumerate(filter(None, names.split(", "))):
        if n != ":":
            assert part[k].start <= int(n) < part[k].stop
            part[k] = slice(int(n), int(n) + 1)
    assert not np.isfinite(case.plain[tuple(part)]).all()


@for_each_ord(100, 50, special=True, nonfinite=policies | st.just("raise"))
def test_no_limit_changes_nothing(case, ord, nonfinite):
    def clip(x):
        return [clip_by_norm(x, math.inf, case.axes, ord=ord, nonfinite=nonfinite)]

    assert bits(clip(case.x)[0]) == bits(case.plain)
    assert bits(case.compute(clip, "sync")[0]) == bits(case.plain)


@for_each_ord(100, 50, special=True, nonfinite=policies)
def test_a_limit_of_nan_gives_nan(case, ord, nonfinite):
    y = clip_by_norm(case.x, math.nan, case.axes, ord=ord, nonfinite=nonfinite)
    assert np.isnan(y).all()


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("clip_norm", [1e-310, 5e-324, 1e-300, 1e300])
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.kind != "c"], ids=str)
def test_many_subnormal_results_stay_within_the_limit(ord, dtype, clip_norm):
    tiny = {"bfloat16": 2.0**-126, "float16": 2.0**-14, "float32": 2.0**-126}
    rng = np.random.default_rng(0)
    least = tiny.get(dtype.name, 2.0**-1022)
    x = (least * rng.uniform(0.2, 4, 3000)).astype(dtype)
    for limit in (clip_norm, 700 * least, 1500 * least, 0.9 * least):
        y = clip_by_norm(x, limit, ord=ord)
        assert totals(y, None, ord).item() <= integer(limit) ** 2
        assert is_ideal(y, x, totals(x, None, ord).item(), limit)
        assert bits(clip_by_norm(y, limit, ord=ord)) == bits(y)


@pytest.fixture(scope="module")
def client():
    with local_cluster(2) as two, Client(two) as client:
        yield client


@pytest.mark.slow
@pytest.mark.distributed
@settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(case=cases())
def test_bits_do_not_depend_on_processes(client, case):
    assert_same_bits(case, 2, client)
