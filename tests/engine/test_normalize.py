"""Runs that bring slices to their limit, and that make zeros of slices that are not finite."""

import math

import dask.array as da
import numpy as np
import pytest
import zarr
from command_line import run
from distributed import Client
from reference import bits
from servers import local_cluster
from stores import BUDGETS, create, memory_of, read, some, stored

from daskclip import (
    clip_by_global_norm,
    clip_by_norm,
    clip_zarr,
    norm,
    plan_zarr,
    stats_zarr,
    verify_zarr,
)

pytestmark = pytest.mark.usefixtures("small")
BOTH = {"normalize": True, "nonfinite": "zero"}
CHOICES = [{"normalize": True}, {"nonfinite": "zero"}, BOTH]


def spread(dtype, seed=0):
    """Slices of several sizes along both axes: some are zero, some not finite."""
    values = some((20, 24), dtype, seed) * np.geomspace(0.01, 100, 24).astype(dtype)
    values[:, 6] = 0
    values[3, 5], values[4, 7], values[5, 7] = math.nan, math.inf, math.nan
    return values.astype(dtype)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("how", CHOICES, ids=str)
@pytest.mark.parametrize(("dtype", "ord"), [("f2", 2), ("f4", 1), (">f8", math.inf), ("c8", 2)])
def test_storage_gives_numpys_bits(tmp_path, passes, how, dtype, ord):
    values = spread(dtype)
    x = create(tmp_path / "x", values, (4, 4))
    how = how | {"ord": ord}
    expected, norms = clip_by_norm(values, 2.0, 0, return_norm=True, **how)
    memory = memory_of(BUDGETS[passes], x, 0)
    report = clip_zarr(x, tmp_path / "y", 2.0, 0, memory=memory, **how)
    assert (report.passes, report.nonfinite) == (passes, 2)
    assert report.largest_norm == norms[np.isfinite(values).all(axis=0)].max()
    assert bits(read(tmp_path / "y")) == bits(expected)
    assert bits(clip_by_norm(da.from_zarr(x), 2.0, 0, **how).compute()) == bits(expected)
    found = verify_zarr(tmp_path / "y", source=x)
    assert (found.slices, found.largest_norm <= 2) == (24, True)
    assert clip_zarr(x, tmp_path / "y", 2.0, 0, memory=memory, **how).status == "up to date"


@pytest.mark.parametrize("passes", [1, 2])
def test_in_place_a_second_time_changes_nothing(tmp_path, passes):
    values = spread("f4")
    x = create(tmp_path / "x", values, (4, 4))
    memory = memory_of(BUDGETS[passes], x, 0)
    clip_zarr(x, None, 2.0, 0, in_place=True, memory=memory, **BOTH)
    assert bits(read(x)) == bits(clip_by_norm(values, 2.0, 0, **BOTH))
    before = stored(x)
    # another budget is another run
    report = clip_zarr(x, None, 2.0, 0, in_place=True, memory="1GiB", normalize=True)
    assert (report.status, stored(x) == before) == ("nothing to clip", True)


@pytest.mark.parametrize("memory", ["tight", "ample"])
def test_each_slice_has_its_limit(tmp_path, memory):
    values, limits = spread("f4"), np.linspace(0, 40, 24)[None]
    x = create(tmp_path / "x", values, (4, 4))
    for at, given in enumerate((limits, create(tmp_path / "limits", limits, (1, 5)))):
        budget = memory_of(memory, x, 0, None, limits=given)
        clip_zarr(x, tmp_path / f"y{at}", axes=0, limits=given, memory=budget, **BOTH)
        expected = clip_by_norm(values, limits=limits, axes=0, **BOTH)
        assert bits(read(tmp_path / f"y{at}")) == bits(expected)


def test_slices_are_brought_to_a_quantile(tmp_path):
    values = spread("f4")
    x = create(tmp_path / "x", values, (4, 4))
    report = clip_zarr(x, tmp_path / "y", "p50", 0, **BOTH)
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(values, report.clip_norm, 0, **BOTH))
    stats_zarr(x, 0, nonfinite="zero", save_norms=tmp_path / "norms")
    assert bits(read(tmp_path / "norms")) == bits(
        clip_by_norm(values, 1.0, 0, nonfinite="zero", return_norm=True)[1]
    )
    clip_zarr(x, tmp_path / "z", "p50", 0, norms=tmp_path / "norms", **BOTH)
    assert bits(read(tmp_path / "z")) == bits(read(tmp_path / "y"))


def make_group(path, nonfinite):
    """Make a group of several dtypes; returns its values in the order of their names."""
    group = zarr.create_group(path)
    values = {}
    for name, dtype in {"a": "f2", "b": "f4", "c": "f8", "d": "c8"}.items():
        values[name] = (some((9, 14), dtype, ord(name)) / 100).astype(dtype)
        one = group.create_array(name, shape=(9, 14), chunks=(4, 5), dtype=dtype)
        if nonfinite and name == "b":
            values[name][3, 3] = math.inf
        one[...] = values[name]
    return values


@pytest.mark.parametrize("nonfinite", [False, True])
def test_a_group_is_brought_to_a_global_norm(tmp_path, nonfinite):
    values = make_group(tmp_path / "x", nonfinite)
    report = clip_zarr(tmp_path / "x", tmp_path / "y", 30.0, global_norm=True, **BOTH)
    assert (report.slices, report.nonfinite) == (1, nonfinite)
    found = [read(tmp_path / "y" / name) for name in values]
    expected, _ = clip_by_global_norm([*values.values()], 30.0, normalize=True)
    if nonfinite:
        expected = [np.zeros_like(x) for x in values.values()]
    assert [*map(bits, found)] == [*map(bits, expected)]
    assert verify_zarr(tmp_path / "y", tmp_path / "x").slices == 1
    again = clip_zarr(tmp_path / "y", tmp_path / "z", 30.0, global_norm=True, **BOTH)
    assert again.clipped == 0
    assert [bits(read(tmp_path / "z" / name)) for name in values] == [*map(bits, found)]


def test_the_arrays_of_a_group_are_brought_to_their_own_norms(tmp_path):
    values = make_group(tmp_path / "x", True)
    clip_zarr(tmp_path / "x", tmp_path / "y", 3.0, slice(1, None), **BOTH)
    for name, x in values.items():
        expected = clip_by_norm(x, 3.0, slice(1, None), **BOTH)
        assert bits(read(tmp_path / "y" / name)) == bits(expected)


def test_blocks_that_are_not_stored_stay_so(tmp_path):
    x = zarr.create_array(tmp_path / "x", shape=(8, 8), chunks=(4, 4), dtype="f4")
    x[:4, :4] = 3
    x[4, 0] = math.nan
    for passes in (1, 2):
        memory = memory_of(BUDGETS[passes], tmp_path / "x", 1)
        target = tmp_path / f"y{passes}"
        clip_zarr(x, target, 1.0, 1, memory=memory, **BOTH)
        y = zarr.open_array(target)
        assert bits(y[...]) == bits(clip_by_norm(x[...], 1.0, 1, **BOTH))
        assert y.nchunks_initialized <= 2


def test_the_command_line(tmp_path):
    values = spread("f4")
    x = create(tmp_path / "x", values, (4, 4))
    words = ["--clip-norm", 2, "--axes", ":1", "--normalize", "--nonfinite", "zero"]
    done = run("run", x, tmp_path / "y", *words)
    assert done.exit_code == 0
    assert "2 over axes 0, normalized" in done.stdout
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(values, 2.0, 0, **BOTH))
    assert run("plan", x, tmp_path / "z", *words).exit_code == 0
    assert run("verify", tmp_path / "y", "--source", x).exit_code == 0
    assert run("stats", x, "--axes", 0, "--nonfinite", "zero").exit_code == 0
    other = run("run", x, tmp_path / "y", *words[:4])
    assert other.exit_code == 5


@pytest.mark.parametrize("flag", [None, 1, "yes"])
def test_normalize_is_a_bool(tmp_path, flag):
    x = create(tmp_path / "x", spread("f4"), (4, 4))
    for function in (clip_zarr, plan_zarr):
        with pytest.raises(TypeError, match=r"^normalize .* give one of them$"):
            function(x, tmp_path / "y", 1.0, normalize=flag)


@pytest.mark.distributed
def test_a_cluster_gives_the_same_bits(tmp_path):
    values = spread("f8")
    x = create(tmp_path / "x", values, (4, 4))
    expected = clip_by_norm(values, 2.0, 0, **BOTH)
    with local_cluster(2) as two, Client(two):
        for passes in (1, 2):
            memory = memory_of(BUDGETS[passes], x, 0)
            clip_zarr(x, tmp_path / f"y{passes}", 2.0, 0, memory=memory, **BOTH)
            assert bits(read(tmp_path / f"y{passes}")) == bits(expected)
        assert bits(clip_by_norm(da.from_zarr(x), 2.0, 0, **BOTH).compute()) == bits(expected)
    assert norm(expected, 0).max() <= 2
