"""The rules of the operation on random arrays, judged in exact arithmetic."""

import math
import re

import numpy as np
import pytest
from distributed import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import bits, integer, is_ideal, is_rounded, native, slices, squares
from servers import local_cluster
from strategies import cases

from daskclip import clip_by_norm, norm

many = settings(max_examples=500, derandomize=True, deadline=None)


@many
@given(case=cases())
def test_no_slice_exceeds_the_limit(case):
    y = clip_by_norm(case.x, case.clip_norm, case.axes)
    limit = integer(max(case.clip_norm, 0.0)) ** 2
    assert all(total <= limit for total in squares(y, case.axes).flat)


@many
@given(case=cases())
def test_elements_are_within_2_ulp_and_unclipped_slices_unchanged(case):
    y = clip_by_norm(case.x, case.clip_norm, case.axes)
    assert (y.dtype, y.shape) == (case.x.dtype, case.x.shape)
    totals = squares(case.plain, case.axes)
    for index, part in slices(y.shape, case.axes):
        assert is_ideal(y[part], case.plain[part], totals[index], case.clip_norm)


@many
@given(case=cases())
def test_clipping_twice_changes_nothing_more(case):
    once = clip_by_norm(case.x, case.clip_norm, case.axes)
    assert bits(clip_by_norm(once, case.clip_norm, case.axes)) == bits(once)


@many
@given(case=cases())
def test_norms_are_rounded_correctly(case):
    norms = norm(case.x, case.axes, keepdims=True)
    totals = squares(case.plain, case.axes)
    assert norms.shape == totals.shape
    assert all(is_rounded(n, t) for n, t in zip(norms.flat, totals.flat, strict=True))


@many
@given(case=cases(), scheduler=st.sampled_from(["sync", "threads"]))
def test_bits_do_not_depend_on_layout_chunks_or_scheduler(case, scheduler):
    assert_same_bits(case, scheduler)


@settings(many, max_examples=100)
@given(case=cases(special=True), nonfinite=st.sampled_from(["propagate", "omit"]))
def test_bits_of_nonfinite_slices_do_not_depend_on_layout_or_chunks(case, nonfinite):
    assert_same_bits(case, "sync", nonfinite)


def assert_same_bits(case, scheduler, nonfinite="propagate"):
    def clip(x):
        return clip_by_norm(x, case.clip_norm, case.axes, nonfinite=nonfinite, return_norm=True)

    expected = [bits(v) for v in clip(case.plain)]
    assert [bits(v) for v in clip(case.x)] == expected
    assert [bits(v) for v in case.compute(clip, scheduler)] == expected


@settings(many, max_examples=120)
@given(case=cases(special=True))
def test_propagate(case):
    y = clip_by_norm(case.x, case.clip_norm, case.axes)
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
            assert is_ideal(result, x, squares(x, None).item(), case.clip_norm)


@settings(many, max_examples=120)
@given(case=cases(special=True))
def test_omit(case):
    y = clip_by_norm(case.x, case.clip_norm, case.axes, nonfinite="omit")
    filled = np.where(np.isnan(case.plain), case.plain.dtype.type(0), case.plain)
    expected = clip_by_norm(filled, case.clip_norm, case.axes)
    nan = np.isnan(case.plain)
    assert np.isnan(y[nan]).all()
    assert bits(y[~nan]) == bits(expected[~nan])


@settings(many, max_examples=100)
@given(case=cases(special=True))
def test_raise_names_the_first_slice(case):
    finite = np.isfinite(case.plain).all(axis=case.axes, keepdims=True)
    if finite.all():
        y = clip_by_norm(case.x, case.clip_norm, case.axes, nonfinite="raise")
        assert bits(y) == bits(clip_by_norm(case.x, case.clip_norm, case.axes))
        return
    first = np.argwhere(~finite)[0]
    name = ", ".join(":" if k in case.axes else str(i) for k, i in enumerate(first))
    with pytest.raises(FloatingPointError, match=rf"^slice {re.escape(f'[{name}]')} holds nan or"):
        clip_by_norm(case.x, case.clip_norm, case.axes, nonfinite="raise")


@settings(many, max_examples=100)
@given(case=cases(special=True))
def test_raise_names_a_slice_of_a_chunk(case):
    def clip(x):
        return [clip_by_norm(x, case.clip_norm, case.axes, nonfinite="raise")]

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


@settings(many, max_examples=100)
@given(case=cases(special=True), nonfinite=st.sampled_from(["propagate", "omit", "raise"]))
def test_no_limit_changes_nothing(case, nonfinite):
    def clip(x):
        return [clip_by_norm(x, math.inf, case.axes, nonfinite=nonfinite)]

    assert bits(clip(case.x)[0]) == bits(case.plain)
    assert bits(case.compute(clip, "sync")[0]) == bits(case.plain)


@settings(many, max_examples=100)
@given(case=cases(special=True), nonfinite=st.sampled_from(["propagate", "omit"]))
def test_a_limit_of_nan_gives_nan(case, nonfinite):
    assert np.isnan(clip_by_norm(case.x, math.nan, case.axes, nonfinite=nonfinite)).all()


@pytest.fixture(scope="module")
def client():
    with local_cluster(2) as two, Client(two) as client:
        yield client


@pytest.mark.slow
@pytest.mark.distributed
@settings(many, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_bits_do_not_depend_on_processes(client, case):
    assert_same_bits(case, client)
