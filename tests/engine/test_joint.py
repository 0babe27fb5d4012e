"""Norms that the arrays of a group have in common for each kept position."""

import math

import numpy as np
import pytest
import zarr
from command_line import assert_fails, run
from joint import joint_arrays, rows
from reference import bits
from servers import local_client
from sizes import SMALL, resize

from daskclip import (
    clip_by_global_norm,
    clip_by_norm,
    clip_zarr,
    global_norm,
    plan_zarr,
    stats_zarr,
    verify_zarr,
)
from daskclip.errors import InvalidValueError, MemoryBudgetError, NonFiniteError

DTYPES = ["f2", "f4", ">f4", "f8", "c8", "c16"]
IN_COMMON = {"global_norm": True}


def store(path, arrays, rng=None, **options):
    """Store arrays as a group, in random chunks, and return what is read back."""
    group = zarr.create_group(path)
    for i, x in enumerate(arrays):
        chunks = tuple(int(rng.integers(1, n + 2)) for n in x.shape) if rng else x.shape
        chunks = tuple(max(1, min(c, 7)) for c in chunks)
        shards = tuple(c * int(rng.integers(1, 3)) for c in chunks) if rng and i % 3 == 2 else None
        member = group.create_array(
            f"{i}", shape=x.shape, chunks=chunks, shards=shards, dtype=x.dtype, **options
        )
        member[...] = x
    other = group.create_array("other", shape=(3,), chunks=(2,), dtype="i4")
    other[:] = [1, 2, 3]
    return read_all(path, len(arrays))


def read_all(path, count):
    group = zarr.open_group(path, mode="r")
    return [np.asarray(group[f"{i}"][...]) for i in range(count)]


def enough(source, memory, **call):
    """So much memory, or the least that is needed."""
    try:
        plan_zarr(source, f"{source}-no", 1.0, memory=memory, **call)
    except MemoryBudgetError as error:
        return error.need
    return memory


def by_position(arrays, axes, limits, **how):
    """Each position clipped alone, to a limit of its own."""
    clipped = [np.empty_like(rows(x, axes)) for x in arrays]
    for position in np.ndindex(limits.shape):
        each = [rows(x, axes)[position] for x in arrays]
        alone, _ = clip_by_global_norm(each, limits[position], **how)
        for y, value in zip(clipped, alone, strict=True):
            y[position] = value
    return clipped


@pytest.mark.parametrize("seed", range(60))
def test_a_group_is_clipped_as_a_list(tmp_path, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    resize(monkeypatch, **SMALL)
    if rng.random() < 0.5:
        resize(monkeypatch, block_nbytes=int(rng.choice([1, 4096, 2**20])))
    arrays, axes = joint_arrays(rng, DTYPES)
    for x in arrays:
        if rng.random() < 0.2 and x.size:
            x.flat[rng.integers(x.size)] = rng.choice([np.nan, np.inf])
        if rng.random() < 0.2:
            x[...] = 0
    arrays = store(tmp_path / "x", arrays, rng)
    source, target = tmp_path / "x", tmp_path / "y"
    limit, how = float(rng.choice([0.5, 2.0, 100.0])), {"normalize": bool(rng.integers(2))}
    clipped, norms = clip_by_global_norm(arrays, limit, axes=axes, **how)
    kept = np.shape(norms)
    call = {"axes": axes} | IN_COMMON
    call["memory"] = enough(source, int(rng.choice([1, 2**12, 2**20])), **call)
    report = clip_zarr(source, target, limit, **call, **how, pictures=bool(rng.integers(2)))
    assert [bits(y) for y in read_all(target, len(arrays))] == [bits(y) for y in clipped]
    finite = norms[np.isfinite(norms)]
    assert report.slices == norms.size
    assert report.nonfinite == norms.size - finite.size
    assert report.largest_norm == (finite.max() if finite.size else None)
    assert verify_zarr(target, source=source).slices == norms.size
    assert verify_zarr(target).nonfinite == report.nonfinite
    assert clip_zarr(source, target, limit, **call, **how).status == "up to date"
    # each with a limit of its own, in a budget that has room for these
    limits = rng.choice([0.0, 0.5, 3.0, math.inf], kept)
    more = call | {"memory": "64MiB"}
    clip_zarr(source, tmp_path / "z", limits=limits, **more, **how)
    expected = by_position(arrays, axes, limits, **how)
    found = [rows(y, axes) for y in read_all(tmp_path / "z", len(arrays))]
    assert [bits(y) for y in found] == [bits(y) for y in expected]
    verify_zarr(tmp_path / "z", source, limits=limits)
    stats = stats_zarr(source, **call)
    assert (stats.slices, stats.arrays) == (norms.size, len(arrays))
    assert stats.largest_norm == report.largest_norm
    largest = [w["norm"] for w in stats.worst if w["norm"]]
    assert largest == sorted(finite[finite > 0], reverse=True)[:10]
    assert all(norms[tuple(w["index"])] == w["norm"] for w in stats.worst)


def passes_of(source, axes, passes):
    """A budget that leads to that many passes."""
    for memory in (2**k for k in range(6, 30)):
        try:
            plan = plan_zarr(source, f"{source}-no", 1.0, axes, memory=memory, **IN_COMMON)
        except MemoryBudgetError:
            continue
        if plan.passes == passes:
            return memory
    raise AssertionError("no budget gives so many passes")


def layers(n=24):
    """Gradients of two layers and two biases for each of some examples."""
    rng = np.random.default_rng(n)
    shapes = {"w1": (n, 5, 4), "b1": (n, 4), "w2": (n, 4, 3), "scale": (n,)}
    return {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}


@pytest.fixture
def gradients(tmp_path):
    """A group of layers in chunks that differ along the examples."""
    group = zarr.create_group(tmp_path / "x")
    for i, (name, x) in enumerate(layers().items()):
        chunks = ((2, 3, 4, 6)[i], *(2 for _ in x.shape[1:]))
        names = ["example", *(f"{name}-{k}" for k in range(x.ndim - 1))]
        group.create_array(name, shape=x.shape, chunks=chunks, dtype="f4", dimension_names=names)[
            ...
        ] = x
    return tmp_path / "x"


def read_layers(path):
    group = zarr.open_group(path, mode="r")
    return {name: np.asarray(group[name][...]) for name in layers()}


AXES = slice(1, None)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("limit", [1.5, "p50"])
def test_layers_in_both_passes(gradients, tmp_path, small, passes, limit):
    memory = passes_of(gradients, AXES, passes)
    values = list(layers().values())
    norms = global_norm(values, axes=AXES)
    how = {"axes": AXES, "memory": memory} | IN_COMMON
    report = clip_zarr(gradients, tmp_path / "y", limit, **how)
    assert (report.slices, report.axes) == (24, "1:")
    assert report.passes == passes + isinstance(limit, str)
    expected, _ = clip_by_global_norm(values, report.clip_norm, axes=AXES)
    assert [bits(y) for y in read_layers(tmp_path / "y").values()] == [bits(y) for y in expected]
    assert report.clipped == (norms > report.clip_norm).sum()
    if limit == "p50":
        assert math.isclose(report.clip_norm, np.sort(norms)[11], rel_tol=1 / 256)
    assert verify_zarr(tmp_path / "y", gradients).slices == 24
    assert report.rows()["clip_norm"].endswith("over axes 1: of all arrays")


@pytest.mark.parametrize("passes", [1, 2])
def test_in_place_and_where_little_is_stored(tmp_path, small, passes):
    arrays = [np.zeros((12, 4, 4), "f4"), np.zeros((12, 6), "f4"), np.zeros(12, "f8")]
    arrays[0][5], arrays[1][5:7] = 1, 3
    store(tmp_path / "x", arrays)
    memory = passes_of(tmp_path / "x", AXES, passes)
    expected, norms = clip_by_global_norm(arrays, 2.0, axes=AXES)
    how = {"axes": AXES, "memory": memory} | IN_COMMON
    stats = stats_zarr(tmp_path / "x", **how)
    assert (stats.slices, stats.zeros) == (12, 10)
    report = clip_zarr(tmp_path / "x", None, 2.0, in_place=True, **how)
    assert (report.slices, report.clipped, report.largest_norm) == (12, 2, norms.max())
    assert [bits(y) for y in read_all(tmp_path / "x", 3)] == [bits(y) for y in expected]
    assert verify_zarr(tmp_path / "x").slices == 12
    again = clip_zarr(tmp_path / "x", None, 3.0, in_place=True, **how)
    assert again.status == "nothing to clip"


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("policy", ["propagate", "omit", "zero", "raise"])
def test_policies_for_nan(tmp_path, small, passes, policy):
    arrays = [np.ones((12, 4), "f4"), np.zeros((12, 6), "f4"), np.ones(12, "f8")]
    arrays[0][3, 1] = np.nan
    store(tmp_path / "x", arrays)
    memory = passes_of(tmp_path / "x", AXES, passes)
    how = {"axes": AXES, "memory": memory, "nonfinite": policy} | IN_COMMON
    if policy == "raise":
        with pytest.raises(NonFiniteError, match=r"slice \[3, :\] holds nan"):
            clip_zarr(tmp_path / "x", tmp_path / "y", 1.0, **how)
        limits = np.ones(12)
        limits[3] = math.inf
        # a limit of infinity exempts its slices; limits take memory too
        clip_zarr(tmp_path / "x", tmp_path / "y", limits=limits, **how | {"memory": 2 * memory})
        return
    clip_zarr(tmp_path / "x", tmp_path / "y", 1.0, **how)
    together = np.concatenate([x.reshape(12, -1).astype("f8") for x in arrays], axis=1)
    expected = clip_by_norm(together, 1.0, 1, nonfinite=policy)
    found = np.concatenate([y.reshape(12, -1) for y in read_all(tmp_path / "y", 3)], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    verify_zarr(tmp_path / "y", tmp_path / "x")


def test_dimensions_by_name_are_those_axes(gradients, tmp_path):
    dims = ["w1-0", "w1-1", "b1-0", "w2-0", "w2-1"]
    report = clip_zarr(gradients, tmp_path / "y", 1.5, dim=dims, **IN_COMMON)
    expected, _ = clip_by_global_norm(list(layers().values()), 1.5, axes=AXES)
    assert [bits(y) for y in read_layers(tmp_path / "y").values()] == [*map(bits, expected)]
    assert (report.arrays, report.copied, report.slices) == (4, 0, 24)


REFUSED = {
    "other lengths": (
        {"axes": 0},
        r"^array b1 keeps the shape \(4,\) and array scale the shape \(\), so that they have "
        r"no norms in common",
    ),
    "other names": (
        {"dim": ["w1-0", "w1-1", "example"], "include": ["w1", "scale", "b1"], "axes": None},
        r"^array b1 keeps the shape \(4,\) and array scale the shape \(\)",
    ),
    "limits by name": (
        {"axes": AXES, "clip_norm": None, "limits": {"w1": np.ones(24)}},
        r"limits are given for \['w1'\], and arrays that have norms in common have one array",
    ),
    "limits of another shape": (
        {"axes": AXES, "clip_norm": None, "limits": np.ones((24, 1))},
        r"limits of shape \(24, 1\) do not broadcast against norms of shape \(24,\)",
    ),
    "limits of the whole": (
        {"clip_norm": None, "limits": np.ones(24)}, "a global norm has one limit"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_norms_in_common_is_said_on_one_line(gradients, tmp_path, what):
    options, text = REFUSED[what]
    with pytest.raises(InvalidValueError, match=text) as caught:
        plan_zarr(gradients, tmp_path / "y", **{"clip_norm": 1.0} | options, **IN_COMMON)
    assert "\n" not in str(caught.value)


def test_equal_lengths_of_other_dimensions_are_refused(tmp_path):
    group = zarr.create_group(tmp_path / "x")
    for name, dims in {"a": ["i", "x"], "b": ["j", "x"]}.items():
        group.create_array(name, shape=(4, 2), chunks=(2, 2), dtype="f4", dimension_names=dims)
    different = r"array a keeps the dimensions .*'i'.* and array b .*'j'"
    with pytest.raises(InvalidValueError, match=different):
        plan_zarr(tmp_path / "x", tmp_path / "y", 1.0, dim="x", **IN_COMMON)


@pytest.mark.parametrize("names", [["e"], None])
def test_elements_of_kept_positions_are_part_of_norms_by_dimension(tmp_path, names):
    values = {"scale": np.float32([3, 100]), "w": np.float32([[4], [8]])}
    group = zarr.create_group(tmp_path / "x")
    for name, dims in {"scale": names, "w": ["e", "x"]}.items():
        group.create_array(name, data=values[name], dimension_names=dims)
    group.create_array("other", data=np.float32([7]), dimension_names=["time"])
    report = clip_zarr(tmp_path / "x", tmp_path / "y", 5.0, dim="x", **IN_COMMON)
    both = [values["scale"], values["w"]] if names else [values["w"]]
    expected, norms = clip_by_global_norm(both, 5.0, axes=AXES)
    found = zarr.open_group(tmp_path / "y", mode="r")
    clipped = [found[name][...] for name in (["scale", "w"] if names else ["w"])]
    assert [*map(bits, clipped)] == [*map(bits, expected)]
    assert (report.arrays, report.largest_norm) == (len(both), norms.max())
    assert found["other"][...] == 7


def test_joint_norms_on_the_command_line(gradients, tmp_path):
    target = tmp_path / "y"
    planned = run("plan", gradients, target, "--clip-norm", 1.5, "--global", "--axes", "1:")
    assert "slices" in planned.stdout
    assert "24" in planned.stdout
    saved = run("stats", gradients, "--global", "--axes", "1:", "--save-norms", tmp_path / "norms")
    assert saved.exit_code == 0
    norms = ["--norms", tmp_path / "norms"]
    done = run("run", gradients, target, "--clip-norm", 1.5, "--global", "--axes", "1:", *norms)
    assert done.exit_code == 0
    assert "1.5 over axes 1: of all arrays" in done.stdout
    expected, _ = clip_by_global_norm(list(layers().values()), 1.5, axes=AXES)
    assert [bits(y) for y in read_layers(target).values()] == [bits(y) for y in expected]
    assert run("verify", target, "--source", gradients).exit_code == 0
    wrong = run("run", gradients, tmp_path / "z", "--clip-norm", 1, "--global", "--axes", "0")
    assert_fails(wrong, 3, "array b1 keeps the shape (4,) and array scale the shape ()")


@pytest.mark.parametrize("passes", [1, 2])
def test_joint_norms_on_a_cluster(gradients, tmp_path, small, passes):
    how = {"axes": AXES, "memory": passes_of(gradients, AXES, passes)} | IN_COMMON
    with local_client(2):
        report = clip_zarr(gradients, tmp_path / "y", 1.5, **how)
        stats_zarr(gradients, save_norms=tmp_path / "norms", **how)
        assert verify_zarr(tmp_path / "y", gradients).slices == 24
        clip_zarr(gradients, tmp_path / "z", 1.5, norms=tmp_path / "norms", **how)
    assert report.slices == 24
    expected, norms = clip_by_global_norm(list(layers().values()), 1.5, axes=AXES)
    for target in ("y", "z"):
        found = read_layers(tmp_path / target).values()
        assert [bits(y) for y in found] == [bits(y) for y in expected]
    assert bits(zarr.open_array(tmp_path / "norms", mode="r")[...]) == bits(norms)


@pytest.mark.parametrize("whole", [False, True])
def test_sums_of_any_spread(tmp_path, monkeypatch, whole):
    resize(monkeypatch, **SMALL | {"sum_nbytes": None, "block_nbytes": 2**20 if whole else 1})
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((12, 6)) * 10.0 ** rng.integers(-300, 150, (12, 6))
    arrays = store(tmp_path / "x", [np.ones((12, 4), "f2"), wide, np.ones((12, 2, 3), "f4")], rng)
    how = {"axes": AXES} | IN_COMMON
    memory = enough(tmp_path / "x", 1, **how)
    plan = plan_zarr(tmp_path / "x", tmp_path / "y", 1.0, memory=memory, **how)
    assert {one.state for one in plan.plans.values() if one.passes} == {80}
    with pytest.raises(MemoryBudgetError) as caught:
        clip_zarr(tmp_path / "x", tmp_path / "y", 1.0, memory=memory, **how)
    for number, more in enumerate((caught.value.need, 4 * caught.value.need)):
        target = tmp_path / f"y{number}"
        clip_zarr(tmp_path / "x", target, 1.0, memory=more, **how)
        expected, _ = clip_by_global_norm(arrays, 1.0, axes=AXES)
        assert [bits(y) for y in read_all(target, 3)] == [bits(y) for y in expected]


@pytest.mark.parametrize("chunks", [(1, 2), (1, 1)])
def test_zeros_of_slices_that_are_not_finite_have_no_sign(tmp_path, chunks):
    group = zarr.create_group(tmp_path / "x")
    group.create_array("a", shape=(1, 2), chunks=chunks, dtype="f8")[...] = np.nan
    group.create_array("b", shape=(1, 2), chunks=chunks, dtype="f8", fill_value=-0.0)
    how = {"axes": slice(1, None), "global_norm": True, "nonfinite": "zero"}
    clip_zarr(tmp_path / "x", tmp_path / "y", 1.0, **how)
    assert not np.signbit(zarr.open_group(tmp_path / "y", mode="r")["b"][...]).any()
    assert verify_zarr(tmp_path / "y", tmp_path / "x").slices == 1


def test_an_axis_that_one_array_lacks_is_told_with_the_array(tmp_path):
    group = zarr.create_group(tmp_path / "x")
    group.create_array("a", shape=(2, 2), chunks=(1, 2), dtype="f4")
    group.create_array("b", shape=(2,), chunks=(1,), dtype="f4")
    with pytest.raises(ValueError, match=r"^array b: axis 1 is out of bounds"):
        plan_zarr(tmp_path / "x", tmp_path / "y", 1.0, axes=1, global_norm=True)
