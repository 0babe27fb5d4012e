"""The orders 1 and inf keep every rule that 2 keeps, in memory, lazily and from storage."""

import json
import math
from itertools import pairwise

import dask.array as da
import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import BFLOAT16, bits, integer, is_ideal, is_rounded, native, slices, totals
from stores import create, finished, least_memory, read, some, stopping_at
from strategies import LAYOUTS, cases

from daskclip import clip_by_norm, clip_zarr, norm, plan_zarr, verify_zarr
from daskclip.cli import main
from daskclip.errors import DaskClipError, TargetExistsError, VerificationError
from daskclip.numerics import combine, partial_norm

many = settings(max_examples=80, derandomize=True, deadline=None)
orders = pytest.mark.parametrize("ord", [1, math.inf])
policies = st.sampled_from(["propagate", "omit"])
REAL = [np.dtype(d) for d in ("f2", BFLOAT16, "f4", "f8")]


@orders
@many
@given(data=st.data())
def test_the_bound_the_accuracy_and_no_second_change(ord, data):
    case = data.draw(cases(ord=ord))
    y = clip_by_norm(case.x, case.clip_norm, case.axes, ord=ord)
    assert (y.dtype, y.shape) == (case.x.dtype, case.x.shape)
    limit = integer(max(case.clip_norm, 0.0)) ** 2
    assert all(total <= limit for total in totals(y, case.axes, ord).flat)
    exact = totals(case.plain, case.axes, ord)
    for index, part in slices(y.shape, case.axes):
        assert is_ideal(y[part], case.plain[part], exact[index], case.clip_norm)
    assert bits(clip_by_norm(y, case.clip_norm, case.axes, ord=ord)) == bits(y)


@orders
@many
@given(data=st.data())
def test_norms_are_rounded_correctly(ord, data):
    case = data.draw(cases(ord=ord))
    norms = norm(case.x, case.axes, keepdims=True, ord=ord)
    exact = totals(case.plain, case.axes, ord)
    assert norms.shape == exact.shape
    assert all(is_rounded(n, t) for n, t in zip(norms.flat, exact.flat, strict=True))


@orders
@many
@given(data=st.data(), special=st.booleans(), nonfinite=policies)
def test_bits_do_not_depend_on_layout_or_chunks(ord, data, special, nonfinite):
    case = data.draw(cases(special=special, ord=ord))

    def clip(x):
        how = {"nonfinite": nonfinite, "return_norm": True, "ord": ord}
        return [*clip_by_norm(x, case.clip_norm, case.axes, **how), norm(x, case.axes, ord=ord)]

    expected = [bits(v) for v in clip(case.plain)]
    assert [bits(v) for v in clip(case.x)] == expected
    assert [bits(v) for v in case.compute(clip, "sync")] == expected


@orders
@settings(many, max_examples=50)
@given(data=st.data())
def test_policies_for_nan_and_infinity(ord, data):
    case = data.draw(cases(special=True, ord=ord))
    y = clip_by_norm(case.x, case.clip_norm, case.axes, ord=ord)
    for _, part in slices(y.shape, case.axes):
        x, result = case.plain[part], y[part]
        if np.isnan(x).any():
            assert np.isnan(result).all()
        elif np.isinf(x).any():
            assert np.array_equal(np.isnan(result), np.isinf(x))
            assert not native(result[np.isfinite(x)]).any()
        else:
            exact = totals(x, None, ord).item()
            assert is_ideal(result, x, exact, case.clip_norm)
    y = clip_by_norm(case.x, case.clip_norm, case.axes, ord=ord, nonfinite="omit")
    nan = np.isnan(case.plain)
    filled = np.where(nan, case.plain.dtype.type(0), case.plain)
    expected = clip_by_norm(filled, case.clip_norm, case.axes, ord=ord)
    assert np.isnan(y[nan]).all()
    assert bits(y[~nan]) == bits(expected[~nan])
    if not np.isfinite(case.plain).all():
        with pytest.raises(FloatingPointError, match=r"^slice "):
            clip_by_norm(case.x, case.clip_norm, case.axes, ord=ord, nonfinite="raise")
    unchanged = clip_by_norm(case.x, math.inf, case.axes, ord=ord, nonfinite="raise")
    assert bits(unchanged) == bits(case.plain)
    assert np.isnan(clip_by_norm(case.x, math.nan, case.axes, ord=ord)).all()


@orders
@settings(many, max_examples=50)
@given(data=st.data())
def test_any_grouping_of_the_parts_equals_the_whole(ord, data):
    case = data.draw(cases(special=True, ord=ord))
    if not case.axes:
        return
    axis = data.draw(st.sampled_from(case.axes))
    edges = np.cumsum([0, *case.chunks[axis]])
    parts = [
        partial_norm(np.take(case.plain, range(a, b), axis), case.axes, ord=ord)
        for a, b in pairwise(edges)
    ]
    parts = data.draw(st.permutations(parts))
    while len(parts) > 1:
        taken = data.draw(st.integers(1, len(parts)))
        parts = [*parts[taken:], combine(parts[:taken])]
    whole = partial_norm(case.plain, case.axes, ord=ord)
    assert np.array_equal(parts[0].flags, whole.flags)
    assert (parts[0].terms, parts[0].ord) == (whole.terms, whole.ord)
    finite = whole.flags == 0  # what is summed of the others depends on where the infinity is
    assert np.array_equal(parts[0].limbs[:, finite].any(), whole.limbs[:, finite].any())
    if finite.all():
        assert parts[0].low == whole.low
        assert np.array_equal(parts[0].limbs, whole.limbs)


# longer than a run, a tile and a panel, whole range of exponents, slices along rows and columns
@orders
@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize(
    ("shape", "axes"), [((3, 40, 5), (0, 2)), ((1030, 20), (0,)), ((20, 1030), (1,))]
)
def test_norms_over_the_whole_range(ord, dtype, shape, axes):
    rng = np.random.default_rng(0)
    info = {"bfloat16": (-133, 127), "float16": (-24, 15), "float32": (-149, 127)}
    low, high = info.get(dtype.name, (-1074, 1023))
    x = np.ldexp(rng.uniform(-1, 1, shape), rng.integers(low, high, shape)).astype(dtype)
    exact = totals(x, axes, ord)
    for layout in LAYOUTS.values():
        norms = norm(layout(x), axes, keepdims=True, ord=ord)
        assert all(is_rounded(n, t) for n, t in zip(norms.flat, exact.flat, strict=True))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_the_largest_values_of_a_whole_panel_add_up(dtype):
    x = np.full((2**18 + 1, 1), np.finfo(dtype).max, dtype)
    total = len(x) * integer(x[0, 0])
    partial = partial_norm(x, (0,), ord=1)
    found = sum(int(limb) << (32 * i) for i, limb in enumerate(partial.limbs.ravel()))
    assert found << (32 * partial.low + 1074) == total
    assert norm(x, ord=math.inf) == np.finfo(dtype).max
    y = clip_by_norm(x, 1e-30 if dtype != "f2" else 0.01, ord=1)
    assert totals(y, None, 1).item() <= integer(1e-30 if dtype != "f2" else 0.01) ** 2


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
def test_sums_at_the_edges(x, expected):
    assert norm(np.array(x), ord=1) == expected
    assert norm(np.array(x), ord=math.inf) == max(map(abs, x), default=0.0)


@orders
@pytest.mark.parametrize("clip_norm", [1e-310, 5e-324, 1e-300, 1e300])
@pytest.mark.parametrize("dtype", REAL, ids=str)
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


def memory_of(source, passes):
    """The smallest budget, to a few bytes, or one that everything fits."""
    if passes == 1:
        return 2**30
    return least_memory(source, source.parent / "absent", 1.0, 0)


@pytest.mark.usefixtures("small")
@orders
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("nonfinite", ["propagate", "omit"])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_storage_gives_numpys_bits(tmp_path, ord, passes, nonfinite, dtype):
    values = some((20, 24), dtype)
    values[3, 5], values[4, 7] = math.nan, math.inf
    x = create(tmp_path / "x", values, (4, 4))
    memory, limit = memory_of(x, passes), float(np.median(norm(values[5:], 0, ord=ord)))
    report = clip_zarr(x, tmp_path / "y", limit, 0, ord=ord, memory=memory, nonfinite=nonfinite)
    assert report.passes == passes
    assert report.ord == ord
    assert report.clipped > 0
    expected = clip_by_norm(values, limit, 0, ord=ord, nonfinite=nonfinite)
    assert bits(read(tmp_path / "y")) == bits(expected)
    lazily = clip_by_norm(da.from_zarr(x), limit, 0, ord=ord, nonfinite=nonfinite)
    assert bits(lazily.compute()) == bits(expected)
    assert verify_zarr(tmp_path / "y", source=x).slices == 24
    assert (
        clip_zarr(x, tmp_path / "y", limit, 0, ord=ord, memory=memory, nonfinite=nonfinite).status
        == "up to date"
    )


@pytest.mark.usefixtures("small")
@orders
def test_a_run_in_two_passes_that_is_stopped_anywhere(tmp_path, monkeypatch, ord):
    values = some((20, 24), "f8")
    x = create(tmp_path / "x", values, (4, 4))
    expected = clip_by_norm(values, 2.0, 0, ord=ord)
    left, memory = stopping_at(monkeypatch), memory_of(x, 2)
    for number in range(1, 100, 7):
        left[0] = number
        target = tmp_path / f"y{number}"
        try:
            clip_zarr(x, target, 2.0, 0, ord=ord, memory=memory)
            break
        except KeyboardInterrupt:
            assert not target.exists()
        if number == 1:
            with pytest.raises(
                TargetExistsError, match=rf"has ord {ord:.1f} and not 2\.0; finish it"
            ):
                clip_zarr(x, target, 2.0, 0, memory=memory)
        left[0] = 0
        clip_zarr(x, target, 2.0, 0, ord=ord, memory=memory)
        assert bits(read(target)) == bits(expected)
    assert number > 12


@orders
def test_what_was_written_is_verified_by_its_own_norm(tmp_path, ord):
    values = some((20, 24), "f4")
    x = create(tmp_path / "x", values, (4, 4))
    clip_zarr(x, tmp_path / "y", 1.0, 0, ord=ord)
    found = verify_zarr(tmp_path / "y")
    assert found.largest_norm == norm(read(tmp_path / "y"), 0, ord=ord).max() <= 1.0
    with pytest.raises(TargetExistsError):
        clip_zarr(x, tmp_path / "y", 1.0, 0)
    zarr.open_array(x, mode="r+")[0, 0] = 99
    with pytest.raises(VerificationError):
        verify_zarr(tmp_path / "y", source=x)


@pytest.mark.parametrize("ord", [0, 3, -1, 0.5, math.nan, -math.inf, "2", "inf", None, True, [2]])
def test_other_orders_are_refused(tmp_path, ord):
    x = create(tmp_path / "x", some((4, 4), "f4"), (2, 2))
    before = finished(tmp_path)
    for call in (
        lambda: clip_by_norm(np.ones(3), 1.0, ord=ord),
        lambda: clip_by_norm(da.ones(3), 1.0, ord=ord),
        lambda: norm(np.ones(3), ord=ord),
        lambda: clip_zarr(x, tmp_path / "y", 1.0, ord=ord),
        lambda: plan_zarr(x, tmp_path / "y", 1.0, ord=ord),
    ):
        with pytest.raises(ValueError, match=r"^ord .*; use 1, 2 or inf$") as caught:
            call()
        assert isinstance(caught.value, DaskClipError)
    assert finished(tmp_path) == before


@pytest.mark.parametrize("ord", [2, 2.0, np.float32(2), np.int8(2)])
def test_the_same_order_in_other_words(ord):
    x = some((4, 4), "c8")
    assert bits(clip_by_norm(x, 1.0, ord=ord)) == bits(clip_by_norm(x, 1.0))
    lazily = da.from_array(x, 2)
    assert clip_by_norm(lazily, 1.0, ord=ord).name == clip_by_norm(lazily, 1.0).name
    assert clip_by_norm(lazily.real, 1.0, ord=1).name != clip_by_norm(lazily.real, 1.0).name


@orders
@pytest.mark.parametrize("dtype", ["c8", "c16"])
def test_complex_arrays_have_one_order(tmp_path, ord, dtype):
    x = create(tmp_path / "x", some((4, 4), dtype), (2, 2))
    for call in (
        lambda: clip_by_norm(read(x), 1.0, ord=ord),
        lambda: norm(da.from_zarr(x), ord=ord),
        lambda: clip_zarr(x, tmp_path / "y", 1.0, ord=ord),
    ):
        with pytest.raises(TypeError, match=r"complex.*; use ord=2, or clip \.real and \.imag$"):
            call()


@pytest.mark.parametrize("ord", ["1", "2", "inf"])
def test_the_command_line(tmp_path, ord):
    values = some((6, 8), "f4")
    x = create(tmp_path / "x", values, (2, 4))
    words = [str(x), str(tmp_path / "y"), "--clip-norm=1", "--axes=1", "--ord", ord]
    done = CliRunner().invoke(main, ["run", *words, "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["ord"] == (ord if ord == "inf" else int(ord))
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(values, 1.0, 1, ord=float(ord)))
    done = CliRunner().invoke(main, ["run", *words])
    assert ("ord" in done.stdout) == (ord != "2")
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "y")]).exit_code == 0


def test_an_order_the_command_line_does_not_know(tmp_path):
    words = ["run", str(tmp_path / "x"), str(tmp_path / "y"), "--clip-norm=1", "--ord=3"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
