"""A limit for each slice acts as clip_norm does: in memory, lazily and from storage."""

import math

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from command_line import assert_fails, run
from distributed import Client
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import BFLOAT16, bits, slices
from servers import local_cluster
from stores import BUDGETS, create, finished, memory_of, read, some, stopping_at, stored
from strategies import cases

from daskclip import clip_by_norm, clip_zarr, norm, plan_zarr, verify_zarr
from daskclip.errors import (
    DaskClipError,
    InvalidValueError,
    NonFiniteError,
    SourceChangedError,
    StorageError,
    TargetExistsError,
    VerificationError,
)
from daskclip.storage import StoredArray
from daskclip.target.journal import Journal
from daskclip.worker.slices import read_limits

SPECIAL = [math.nan, math.inf, 0.0, -1.0, -math.inf, 5e-324, 1e-300, 1e300, 1e-40, 1e-6]
many = settings(max_examples=50, derandomize=True, deadline=None)
policies = st.sampled_from(["propagate", "omit"])


def one_by_one(x, limits, axes, **how):
    """Clip each slice alone, with its limit as clip_norm."""
    y = x.copy()
    kept = tuple(1 if k in axes else n for k, n in enumerate(x.shape))
    each = np.broadcast_to(limits, kept)
    for at, part in slices(x.shape, axes):
        y[part] = clip_by_norm(x[part], float(each[at]), **how)
    return y


@st.composite
def limits_for(draw, case, ord):
    """Limits of a shape that broadcasts, around the norms or special."""
    norms = norm(case.plain, case.axes, keepdims=True, ord=ord)
    size = [n if draw(st.booleans()) else 1 for n in norms.shape]
    shape = tuple(size)[draw(st.integers(0, len(size))) :]
    some_norm = float(np.nanmin(np.where(np.isfinite(norms), norms, 1.0), initial=1.0))
    values = st.sampled_from([*SPECIAL, some_norm, 0.5, 0.25 * some_norm, case.clip_norm])
    flat = [draw(values) for _ in range(min(math.prod(shape), 12))]
    return np.resize(np.array(flat or [0.0]), shape)


@many
@given(data=st.data(), ord=st.sampled_from([1, 2, math.inf]), nonfinite=policies)
def test_each_limit_does_what_clip_norm_does_whatever_the_chunks(data, ord, nonfinite):
    case = data.draw(cases(special=data.draw(st.booleans()), ord=ord))
    limits = data.draw(limits_for(case, ord))
    how = {"ord": ord, "nonfinite": nonfinite}
    expected = one_by_one(case.plain, limits, case.axes, **how)

    def clip(x, limits=limits):
        return clip_by_norm(x, None, case.axes, limits=limits, return_norm=True, **how)

    y, norms = clip(case.x)
    assert bits(y) == bits(expected)
    assert bits(norms) == bits(norm_of(case, ord, nonfinite))
    lazy_limits = da.from_array(limits, chunks=data.draw(st.integers(1, 3)))
    assert [bits(v) for v in case.compute(clip, "sync")] == [bits(y), bits(norms)]
    lazily = case.compute(lambda x: clip(x, lazy_limits), "sync")
    assert [bits(v) for v in lazily] == [bits(y), bits(norms)]
    y, norms = clip(case.x, lazy_limits)
    assert isinstance(y, da.Array)
    assert bits(y.compute(scheduler="sync")) == bits(expected)


def norm_of(case, ord, nonfinite):
    return clip_by_norm(case.plain, 1.0, case.axes, ord=ord, nonfinite=nonfinite, return_norm=True)[
        1
    ]


@settings(many, max_examples=20)
@given(data=st.data())
def test_raise_passes_over_slices_without_a_limit(data):
    case = data.draw(cases(special=True))
    finite = np.isfinite(case.plain).all(axis=case.axes, keepdims=True)
    limits = np.where(finite, 1.0, math.inf)
    expected = one_by_one(case.plain, limits, case.axes)
    how = {"limits": limits, "nonfinite": "raise"}
    assert bits(clip_by_norm(case.x, None, case.axes, **how)) == bits(expected)
    (lazily,) = case.compute(lambda x: [clip_by_norm(x, None, case.axes, **how)], "sync")
    assert bits(lazily) == bits(expected)
    if not finite.all():
        with pytest.raises(NonFiniteError):
            clip_by_norm(case.x, None, case.axes, limits=np.ones_like(limits), nonfinite="raise")


# parts for several threads, along a kept axis and along a reduced one; compiled loops
@pytest.mark.parametrize("dtype", ["f2", BFLOAT16, "f4", "f8", "c8"], ids=str)
@pytest.mark.parametrize("axes", [(0,), (1,)])
def test_limits_of_large_arrays_are_those_of_each_slice(axes, dtype):
    x = some((1200, 2000), dtype)
    x = x if x.dtype.itemsize > 2 else np.tile(x, (2, 1))
    kept = tuple(1 if k in axes else n for k, n in enumerate(x.shape))
    limits = np.resize(np.array([*SPECIAL, 1.0, 1e3, 1e9, 40.0]), kept)
    y = clip_by_norm(x, None, axes, limits=limits)
    for at in (0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 13):
        part = (slice(None), at) if axes == (0,) else at
        assert bits(y[part]) == bits(clip_by_norm(x[part], limits.flat[at]))
    lazily = clip_by_norm(da.from_array(x, 700), None, axes, limits=limits)
    assert bits(lazily.compute()) == bits(y)


@pytest.mark.parametrize(
    "limits", [[1, 2, 0], [[1.0, 2.0, 0.0]], np.float32([1, 2, 0]), np.array([1, 2, 0], BFLOAT16)]
)
def test_limits_of_any_real_dtype(tmp_path, limits):
    x = some((4, 3), "f4")
    expected = one_by_one(x, np.array([[1.0, 2.0, 0.0]]), (0,))
    for t in (x, da.from_array(x, 2), zarr.open_array(create(tmp_path / "x", x, (2, 2)))):
        assert bits(np.asarray(clip_by_norm(t, axes=0, limits=limits))) == bits(expected)


def test_equal_limits_give_equal_keys():
    x = da.from_array(some((6, 8), "f4"), 2)
    names = [
        clip_by_norm(x, None, 1, limits=np.full((6, 1), limit)).name for limit in (1.0, 1.0, 2.0)
    ]
    assert names[0] == names[1] != names[2]


def limits_of(shape):
    """Limits that storage takes."""
    return np.resize(np.array([1.0, 2.0, *(c for c in SPECIAL if c >= 0), -0.0, 3.0]), shape)


STORED = {
    "numpy": lambda path, values: values,
    "path": lambda path, values: create(path, values, tuple(min(3, n) for n in values.shape)),
    "zarr": lambda path, values: zarr.open_array(
        create(path, values, tuple(min(5, n) for n in values.shape)), mode="r"
    ),
    "shards": lambda path, values: create(  # except for 0-d arrays, which cannot have shards
        path,
        values.astype("f4"),
        tuple(min(2, n) for n in values.shape),
        shards=tuple(6 if n > 1 else 1 for n in values.shape) or None,
    ),
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    ("kind", "axes", "shape"),
    [(kind, *at) for at in [((0,), (1, 24)), ((0, 1), ())] for kind in STORED]
    + [("path", (0,), (24,)), ("shards", (1,), (20, 1)), ("path", (), (20, 1))],
)
def test_limits_from_storage_give_numpys_bits(tmp_path, passes, kind, axes, shape):
    values = some((20, 24), "f8")
    values[3, 5], values[4, 7] = math.nan, math.inf
    x = create(tmp_path / "x", values, (4, 4))
    with np.errstate(over="ignore"):
        numbers = limits_of(shape).astype("f4").astype("f8")  # as they are in shards
    limits = STORED[kind](tmp_path / "limits", numbers)
    how = {"limits": limits, "memory": memory_of(BUDGETS[passes], x, axes, None, limits=limits)}
    with dask.config.set(num_workers=1):  # more threads share the slices of few blocks
        report = clip_zarr(x, tmp_path / "y", None, axes, **how)
    if axes:
        assert report.passes == passes
    assert report.clip_norm is None
    expected = one_by_one(values, numbers, axes)
    assert bits(read(tmp_path / "y")) == bits(expected)
    assert bits(clip_by_norm(values, None, axes, limits=numbers)) == bits(expected)
    lazily = clip_by_norm(da.from_zarr(x), None, axes, limits=numbers)
    assert bits(lazily.compute()) == bits(expected)
    assert "a limit each over axes" in str(report)
    found = verify_zarr(tmp_path / "y", source=x, limits=limits)
    assert found.clip_norm is None
    assert clip_zarr(x, tmp_path / "y", None, axes, **how).status == "up to date"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", ["numpy", "path"])
def test_limits_where_nothing_is_stored(tmp_path, passes, in_place, kind):
    array = zarr.create_array(tmp_path / "x", shape=(20, 24), chunks=(4, 4), dtype="f4")
    array[4:8, 4:8] = 7.0
    numbers = limits_of((1, 24))
    expected = one_by_one(array[...], numbers, (0,))
    limits = STORED[kind](tmp_path / "limits", numbers)
    memory = memory_of(BUDGETS[passes], tmp_path / "x", 0, None, limits=limits)
    target = None if in_place else tmp_path / "y"
    how = {"limits": limits, "memory": memory, "in_place": in_place}
    assert clip_zarr(tmp_path / "x", target, None, 0, **how).slices == 24
    assert bits(read(target or tmp_path / "x")) == bits(expected)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("wrong", [-1.0, -5e-324, -math.inf, math.nan])
@pytest.mark.parametrize("is_stored", [True, False])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("kind", STORED)
def test_storage_refuses_a_limit_that_would_destroy_data(
    tmp_path, kind, passes, in_place, is_stored, wrong
):
    # the limits of slices of which nothing is stored are read too
    array = zarr.create_array(tmp_path / "x", shape=(20, 24), chunks=(4, 4), dtype="f4")
    array[:, : 24 if is_stored else 8] = 7.0
    numbers = np.full((1, 24), 2.0, "f4" if kind == "shards" else "f8")
    numbers[0, 21:] = wrong if numbers.dtype == "f8" or abs(wrong) > 1 else -1.0
    limits = STORED[kind](tmp_path / "limits", numbers)
    memory = memory_of(BUDGETS[passes], tmp_path / "x", 0)
    before = stored(tmp_path)
    target = None if in_place else tmp_path / "y"
    with pytest.raises(InvalidValueError, match=r"limits\[0, 21\] is .*; give 0 or more") as caught:
        clip_zarr(
            tmp_path / "x", target, None, 0, limits=limits, in_place=in_place, memory=2 * memory
        )
    assert "\n" not in str(caught.value)
    assert stored(tmp_path) == before
    if kind == "numpy":
        with pytest.raises(InvalidValueError, match=r"^limits\[0, 21\] is"):
            plan_zarr(tmp_path / "x", target, None, 0, limits=limits, in_place=in_place)


def test_a_wrong_limit_is_named_with_its_array(tmp_path):
    group = zarr.create_group(tmp_path / "x")
    for name in ("a", "b"):
        group.create_array(name, shape=(2, 3), dtype="f4", chunks=(1, 3))[...] = 1.0
    for limits in ({"a": np.ones((2, 1)), "b": np.array([[1.0], [-2.0]])}, -2.0):
        name = "a" if limits == -2.0 else r"b\[1, 0\]"
        with pytest.raises(InvalidValueError, match=rf"^limits of {name} is -2.0, and"):
            clip_zarr(tmp_path / "x", tmp_path / "y", None, 1, limits=limits)


@pytest.mark.parametrize("wrong", ["-1", "-1e-320", "-inf", "nan"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_clip_norm_that_would_destroy_data_is_refused(tmp_path, wrong, in_place):
    x = create(tmp_path / "x", some((4, 6), "f4"), (2, 2))
    before = stored(tmp_path)
    target = None if in_place else tmp_path / "y"
    for function in (clip_zarr, plan_zarr):
        with pytest.raises(InvalidValueError, match=rf"^clip_norm is {wrong}.*, and .*; give 0"):
            function(x, target, float(wrong), 1, in_place=in_place)
    words = [x, "--in-place"] if in_place else [x, tmp_path / "y"]
    for command in ("run", "plan"):
        assert_fails(run(command, *words, f"--clip-norm={wrong}"), 3, "clip_norm is", "give 0")
    assert stored(tmp_path) == before


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("missing", ["fill", "error"])
def test_limits_that_are_not_stored(tmp_path, missing):
    values = some((20, 24), "f4")
    x = create(tmp_path / "x", values, (4, 4))
    limits = zarr.create_array(
        tmp_path / "limits", shape=(20, 1), chunks=(3, 1), dtype="f8", fill_value=2.0
    )
    limits[3:6] = 1.0
    how = {"limits": tmp_path / "limits", "missing": missing}
    if missing == "error":
        with pytest.raises(ValueError, match=r"chunk .* of .*/limits is missing"):
            clip_zarr(x, tmp_path / "y", None, 1, **how)
    else:
        clip_zarr(x, tmp_path / "y", None, 1, **how)
        assert bits(read(tmp_path / "y")) == bits(one_by_one(values, limits[...], (1,)))


def test_a_region_reads_what_it_needs_and_no_more(tmp_path, monkeypatch):
    values = np.arange(70.0).reshape(7, 1, 10)
    limits = StoredArray(zarr.open_array(create(tmp_path / "limits", values, (2, 1, 3)), mode="r"))
    seen = []
    stored = StoredArray.read
    monkeypatch.setattr(
        StoredArray,
        "read",
        lambda a, r, missing, out=None: seen.append(r) or stored(a, r, missing, out),
    )
    region = (slice(4, 5), slice(0, 9), slice(2, 7))
    assert np.array_equal(read_limits(limits, region, "fill"), values[4:5, :, 2:7])
    assert [[(s.start, s.stop) for s in r] for r in seen] == [
        [(4, 6), (0, 1), (a, a + 3)] for a in (0, 3, 6)
    ]


def test_a_chunk_of_the_limits_is_in_the_plan(tmp_path):
    x = create(tmp_path / "x", some((4096, 2), "f4"), (4096, 2))
    need = [
        plan_zarr(x, tmp_path / "y", None, 1, limits=np.ones((n, 1))).projected_memory
        for n in (1, 4096)
    ]
    threads = plan_zarr(x, tmp_path / "y", 1.0, 1).threads
    assert need[1] - need[0] == threads * 4 * 8 * 4095


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("passes", [1, 2])
def test_a_run_is_resumed_with_the_same_limits_only(tmp_path, monkeypatch, passes):
    values = some((20, 24), "f8")
    x = create(tmp_path / "x", values, (4, 4))
    numbers = limits_of((1, 24))
    limits = create(tmp_path / "limits", numbers, (1, 5))
    other = create(tmp_path / "other", 2 * numbers, (1, 5))
    how = {"memory": memory_of(BUDGETS[passes], x, 0, None, limits=limits)}
    left = stopping_at(monkeypatch)
    for left[0] in (1, 1):
        with pytest.raises(KeyboardInterrupt):
            clip_zarr(x, tmp_path / "y", None, 0, limits=limits, **how)
        for wrong in (other, 2 * numbers, np.ones((1, 1))):
            with pytest.raises(
                TargetExistsError, match=r"has limits of shape .* and not of shape .*; finish it"
            ):
                clip_zarr(x, tmp_path / "y", None, 0, limits=wrong)
        with pytest.raises(TargetExistsError, match=r"has clip_norm None and not 1\.0, limits of"):
            clip_zarr(x, tmp_path / "y", 1.0, 0)
    clip_zarr(x, tmp_path / "y", None, 0, limits=limits, **how)
    assert bits(read(tmp_path / "y")) == bits(one_by_one(values, numbers, (0,)))
    with pytest.raises(TargetExistsError):
        clip_zarr(x, tmp_path / "y", None, 0, limits=other, **how)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("passes", [1, 2])
def test_limits_that_change_during_the_run_stop_it(tmp_path, monkeypatch, passes):
    x = create(tmp_path / "x", some((20, 24), "f8"), (4, 4))
    limits = create(tmp_path / "limits", np.full((1, 24), 2.0), (1, 5))
    memory, append = memory_of(BUDGETS[passes], x, 0, None, limits=limits), Journal.append

    def changing(self, entry):
        append(self, entry)
        zarr.open_array(limits, mode="r+")[0, 0] = 1.0

    monkeypatch.setattr(Journal, "append", changing)
    with pytest.raises(SourceChangedError, match=r"^limits changed during the run; let"):
        clip_zarr(x, tmp_path / "y", None, 0, limits=limits, memory=memory)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["limits", "x"]


@pytest.mark.distributed
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["numpy", "path"])
def test_limits_on_two_processes(tmp_path, kind):
    values, numbers = some((20, 24), "f4"), limits_of((1, 24))
    x = create(tmp_path / "x", values, (4, 4))
    limits = STORED[kind](tmp_path / "limits", numbers)
    with local_cluster(2) as two, Client(two):
        for passes in (1, 2):
            how = {
                "limits": limits,
                "memory": memory_of(BUDGETS[passes], x, 0, None, limits=limits),
            }
            report = clip_zarr(x, tmp_path / f"y{passes}", None, 0, ord=1, **how)
            assert report.passes == passes
    for passes in (1, 2):
        found = read(tmp_path / f"y{passes}")
        assert bits(found) == bits(one_by_one(values, numbers, (0,), ord=1))


def test_a_broken_chunk_of_the_limits_is_named(tmp_path):
    x = create(tmp_path / "x", some((20, 24), "f8"), (4, 4))
    limits = create(tmp_path / "limits", np.full((1, 24), 2.0), (1, 5))
    (limits / "c" / "0" / "1").write_bytes(b"no chunk")
    with pytest.raises(StorageError, match=r"/limits failed at chunk c/0/1: ") as caught:
        clip_zarr(x, tmp_path / "y", None, 0, limits=limits)
    assert "\n" not in str(caught.value)


def test_verification_needs_the_limits_of_the_run(tmp_path):
    x = create(tmp_path / "x", some((20, 24), "f8"), (4, 4))
    numbers = np.full((20, 1), 2.0)
    clip_zarr(x, tmp_path / "y", None, 1, limits=numbers)
    assert verify_zarr(tmp_path / "y", limits=numbers).slices == 20
    with pytest.raises(VerificationError, match=r"with limits of shape .*, not None; give those$"):
        verify_zarr(tmp_path / "y")
    with pytest.raises(VerificationError, match=r"with limits of shape .*, not of .*; give those$"):
        verify_zarr(tmp_path / "y", limits=2 * numbers)
    with pytest.raises(ValueError, match=r"do not broadcast"):
        verify_zarr(tmp_path / "y", limits=np.ones(3))
    clip_zarr(x, tmp_path / "z", 1.0, 1)
    with pytest.raises(VerificationError, match=r"with limits None, not of shape .*; give those$"):
        verify_zarr(tmp_path / "z", limits=numbers)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("nonfinite", ["propagate", "omit"])
@pytest.mark.parametrize("each", [True, False])
def test_what_a_limit_of_zero_made_is_verified(tmp_path, passes, nonfinite, each):
    x = create(tmp_path / "x", 5 * some((20, 24), "f4"), (4, 4))
    numbers = np.where(np.arange(24) % 3 == 0, -0.0, 2.0)[None]
    clip_norm, limits = (None, numbers) if each else (-0.0, None)
    memory = memory_of(BUDGETS[passes], x, 0, clip_norm, limits=limits)
    report = clip_zarr(
        x, tmp_path / "y", clip_norm, 0, limits=limits, nonfinite=nonfinite, memory=memory
    )
    assert (report.passes, report.clipped) == (passes, 24)
    assert verify_zarr(tmp_path / "y", tmp_path / "x", limits=limits).slices == 24


def test_one_number_is_a_limit_for_all(tmp_path):
    x = create(tmp_path / "x", 5 * some((8, 6), "f4"), (2, 2))
    clip_zarr(x, tmp_path / "y", None, 1, limits=2.0)
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(x), 2.0, 1))


def test_what_exceeds_its_limit_is_found(tmp_path):
    x = create(tmp_path / "x", some((20, 24), "f8"), (4, 4))
    limits = create(tmp_path / "limits", np.full((20, 1), 2.0), (5, 1))
    clip_zarr(x, tmp_path / "y", None, 1, limits=limits)
    chunk = tmp_path / "y" / "c" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[::-1])
    with pytest.raises(VerificationError):
        verify_zarr(tmp_path / "y", limits=limits)


WRONG = [
    (np.ones(3), ValueError, ["(3,)", "(4, 1)", "do not broadcast"]),
    (np.ones((4, 6)), ValueError, ["(4, 6)", "(4, 1)"]),
    (np.ones((1, 4, 1)), ValueError, ["(1, 4, 1)", "(4, 1)"]),
    (np.ones((0, 1)), ValueError, ["(0, 1)", "(4, 1)"]),
    (np.ones((4, 1), "c8"), TypeError, ["complex64", "limits"]),
    (np.full((4, 1), "2"), TypeError, ["limits", "<U1"]),
    (np.ma.ones((4, 1)), TypeError, ["MaskedArray"]),
]


def is_storable(limits):
    return limits.size and limits.dtype.kind != "U" and not isinstance(limits, np.ma.MaskedArray)


@pytest.mark.parametrize(
    ("form", "limits", "kind", "words"),
    [
        (form, *wrong)
        for form in ("numpy", "dask", "dask limits", "zarr", "stored limits")
        for wrong in WRONG
        if form != "stored limits" or is_storable(wrong[0])
    ],
    ids=lambda v: f"{v!r:.20}",
)
def test_limits_that_are_refused(tmp_path, form, limits, kind, words):
    values = some((4, 6), "f4")
    x = create(tmp_path / "x", values, (2, 2))
    t = values if form == "numpy" else da.from_array(values, 2)
    if form == "dask limits":
        limits = da.from_array(limits, chunks=-1)
    if form == "stored limits":
        limits = create(tmp_path / "limits", limits, limits.shape)
    before = finished(tmp_path)
    calls = [lambda: clip_by_norm(t, None, 1, limits=limits)]
    if form in ("zarr", "stored limits"):
        calls = [
            lambda f=f: f(x, tmp_path / "y", None, 1, limits=limits) for f in (clip_zarr, plan_zarr)
        ]
    for call in calls:
        with pytest.raises((TypeError, ValueError) if form == "zarr" else kind) as caught:
            call()
        assert isinstance(caught.value, DaskClipError)
        assert "\n" not in str(caught.value)
        for word in words:
            assert word in str(caught.value)
    assert finished(tmp_path) == before


def test_clip_norm_and_limits_exclude_each_other(tmp_path):
    x = create(tmp_path / "x", some((4, 6), "f4"), (2, 2))
    for call in (
        lambda *a, **k: clip_by_norm(read(x), *a, **k),
        lambda *a, **k: clip_zarr(x, tmp_path / "y", *a, **k),
        lambda *a, **k: plan_zarr(x, tmp_path / "y", *a, **k),
    ):
        with pytest.raises(
            ValueError, match=r"^clip_norm 1\.0 and limits are both given; give one"
        ):
            call(1.0, limits=np.ones(()))
        with pytest.raises(TypeError, match=r"^clip_norm None is not a real number"):
            call()
        with pytest.raises(TypeError, match=r"^clip_norm None is not a real number"):
            call(None, 0)
    with pytest.raises(ValueError, match=r"ragged"):
        clip_by_norm(read(x), limits=[[1], [1, 2]])


def test_limits_on_the_command_line(tmp_path):
    values = some((4, 6), "f4")
    x = create(tmp_path / "x", values, (2, 2))
    limits = create(tmp_path / "limits", np.array([[1.0], [math.inf], [0.0], [0.5]]), (3, 1))
    words = [x, tmp_path / "y", "--axes=1"]
    assert run("plan", *words, "--limits", limits).exit_code == 0
    done = run("run", *words, "--limits", limits, "--json")
    assert (done.exit_code, '"clip_norm": null' in done.stdout) == (0, True)
    assert bits(read(tmp_path / "y")) == bits(one_by_one(values, read(limits), (1,)))
    assert run("verify", tmp_path / "y", "--limits", limits, "--source", x).exit_code == 0
    assert run("verify", tmp_path / "y").exit_code == 4
    for code, word, more in (
        (2, "--clip-norm", []),
        (3, "both given", ["--clip-norm=1", "--limits", limits]),
        (3, "limits: source", ["--limits", tmp_path / "none"]),
        (3, "do not broadcast", ["--limits", x]),
        (5, "exists", ["--clip-norm=1"]),
    ):
        done = run("run", *words, *more)
        assert done.exit_code == code
        assert word in done.stderr
        assert done.stderr.count("\n") == 1
