"""The norms of order 1 and infinity from storage and on the command line, and what is refused."""

import json
import math

import dask.array as da
import numpy as np
import pytest
import zarr
from command_line import run
from reference import bits
from stores import BUDGETS, create, finished, memory_of, read, some, stopping_at

from daskclip import clip_by_norm, clip_zarr, norm, plan_zarr, verify_zarr
from daskclip.errors import DaskClipError, TargetExistsError, VerificationError

orders = pytest.mark.parametrize("ord", [1, math.inf])


@pytest.mark.usefixtures("small")
@orders
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("nonfinite", ["propagate", "omit"])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_every_norm_from_storage_gives_numpys_bits(tmp_path, ord, passes, nonfinite, dtype):
    values = some((20, 24), dtype)
    values[3, 5], values[4, 7] = math.nan, math.inf
    x = create(tmp_path / "x", values, (4, 4))
    memory, limit = memory_of(BUDGETS[passes], x, 0), float(np.median(norm(values[5:], 0, ord=ord)))
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
    left, memory = stopping_at(monkeypatch), memory_of("tight", x, 0)
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
def test_complex_arrays_are_refused_by_other_orders(tmp_path, ord, dtype):
    x = create(tmp_path / "x", some((4, 4), dtype), (2, 2))
    for call in (
        lambda: clip_by_norm(read(x), 1.0, ord=ord),
        lambda: norm(da.from_zarr(x), ord=ord),
        lambda: clip_zarr(x, tmp_path / "y", 1.0, ord=ord),
    ):
        with pytest.raises(TypeError, match=r"complex.*; use ord=2, or clip their parts"):
            call()


@pytest.mark.parametrize("ord", ["1", "2", "inf"])
def test_ord_on_the_command_line(tmp_path, ord):
    values = some((6, 8), "f4")
    x = create(tmp_path / "x", values, (2, 4))
    words = [x, tmp_path / "y", "--clip-norm=1", "--axes=1", "--ord", ord]
    done = run("run", *words, "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["ord"] == (ord if ord == "inf" else int(ord))
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(values, 1.0, 1, ord=float(ord)))
    done = run("run", *words)
    assert (", ord " in done.stdout) == (ord != "2")
    assert run("verify", tmp_path / "y").exit_code == 0


def test_an_unknown_ord_on_the_command_line_is_refused(tmp_path):
    done = run("run", tmp_path / "x", tmp_path / "y", "--clip-norm=1", "--ord=3")
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
