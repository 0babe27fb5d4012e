"""Labelled arrays: dimensions by name, labels kept, missing values left out."""

import inspect
import math
import subprocess
import sys

import dask
import dask.array as da
import numpy as np
import pytest
from labelled_arrays import cube, identical, one_line
from reference import bits

import daskclip
from daskclip.errors import DTypeError, InvalidTypeError, InvalidValueError

xr = pytest.importorskip("xarray", reason="xarray is not installed: pip install daskclip[xarray]")
import daskclip.xarray as labelled  # noqa: E402

# zarr warns of what xarray writes by default
pytestmark = pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part")


# ---- arrays


@pytest.mark.parametrize(
    ("dim", "axes"),
    [
        ("lat", 1),
        (["lon", "lat"], (1, 2)),
        (("time",), 0),
        (..., None),
        (None, None),
        ([], []),
        ({"lat": 1, "lon": 2}.keys(), (1, 2)),
    ],
)
@pytest.mark.parametrize("chunks", [None, {"time": 2, "lon": 3}])
def test_dimensions_are_axes_by_name(dim, axes, chunks):
    x = cube(chunks=chunks)
    clipped, norms = daskclip.clip_by_norm(
        cube().values, 20.0, axes, nonfinite="omit", return_norm=True
    )
    y = labelled.clip_by_norm(x, 20.0, dim)
    assert bits(y.values) == bits(clipped)
    assert not np.array_equal(clipped, x.values, equal_nan=True)
    assert bits(labelled.norm(x, dim).values) == bits(norms)


@pytest.mark.parametrize("chunks", [None, {"time": 2}])
def test_dimensions_may_come_from_a_generator(chunks):
    for obj in (cube(chunks=chunks), cube(chunks=chunks).to_dataset()):
        for call in (labelled.norm, lambda x, dim: labelled.clip_by_norm(x, 1.0, dim)):
            assert identical(call(obj, iter(["lat", "lon"])), call(obj, ["lat", "lon"]))


@pytest.mark.parametrize("chunks", [None, {"time": 2}])
def test_labels_are_kept(chunks):
    x = cube(chunks=chunks)
    before = x.copy(deep=True)
    y = labelled.clip_by_norm(x, 1.0, "lat")
    xr.testing.assert_identical(y.copy(data=x.data), x)
    assert y.encoding == x.encoding == before.encoding
    assert y.encoding is not x.encoding
    y.attrs["units"] = "1"
    assert identical(x, before)

    n = labelled.norm(x, "lat")
    assert (n.dims, n.name, n.attrs) == (("time", "lon"), "wind", {"units": "m s-1"})
    assert set(n.coords) == {"time", "month"}
    assert n.dtype == float


def test_lazy_arrays_stay_lazy():
    def fail(block):
        raise AssertionError("computed")

    x = cube(chunks={"time": 1, "lat": 2})
    x = x.copy(data=x.data.map_blocks(fail, dtype=x.dtype, meta=x.data._meta))
    for obj in (x, x.to_dataset()):
        for dim in ("lat", ["time", "lat"]):
            y = labelled.clip_by_norm(obj, 1.0, dim)
            assert y.chunks == obj.chunks
            assert dask.is_dask_collection(labelled.norm(obj, dim))
            with pytest.raises(AssertionError, match="computed"):
                y.compute(scheduler="sync")
    one, two = (labelled.clip_by_norm(x, 1.0, "lat").data.name for _ in range(2))
    assert one == two


def test_missing_values_are_left_out_unless_told():
    x = cube()
    for skipna, policy in [(None, "omit"), (True, "omit"), (False, "propagate")]:
        expected, norms = daskclip.clip_by_norm(
            x.values, 1.0, 1, nonfinite=policy, return_norm=True
        )
        for obj in (x, x.chunk(lat=2)):
            assert bits(obj.daskclip.clip_by_norm(1.0, "lat", skipna=skipna).values) == bits(
                expected
            )
            n = obj.daskclip.norm("lat", skipna=skipna)
            assert bits(n.values) == bits(norms)
            # as the reductions of xarray
            assert n.isnull().equals(
                obj.isnull().sum("lat", skipna=skipna) * 1.0 > (math.inf if policy == "omit" else 0)
            )


@pytest.mark.parametrize("chunks", [None, {"lat": 2}])
def test_a_limit_may_be_labelled_and_lazy(chunks):
    x = cube(chunks=chunks)
    limit = labelled.norm(x, "lat").median(skipna=True) if chunks is None else x.max() / 2
    y = labelled.clip_by_norm(x, limit, "lat")
    assert bits(y.values) == bits(labelled.clip_by_norm(x, float(limit), "lat").values)


def test_the_accessor_is_registered_on_import_and_forwards():
    code = (
        "import xarray as xr; assert not hasattr(xr.DataArray, 'daskclip'); import daskclip.xarray"
    )
    code += "; assert all(hasattr(k, 'daskclip') for k in (xr.DataArray, xr.Dataset, xr.DataTree))"
    subprocess.run([sys.executable, "-c", code], check=True)
    for obj in (cube(), cube().to_dataset()):
        assert identical(
            obj.daskclip.clip_by_norm(2.0, "lat"), labelled.clip_by_norm(obj, 2.0, "lat")
        )
        assert identical(obj.daskclip.norm("lat"), labelled.norm(obj, "lat"))
    for name in ("clip_by_norm", "norm"):
        function, method = getattr(labelled, name), getattr(labelled.DaskClipAccessor, name)
        shown = [list(inspect.signature(f).parameters.values())[1:] for f in (function, method)]
        assert shown[0] == shown[1]


# ---- datasets


def collection():
    random = np.random.default_rng(0)
    return xr.Dataset(
        {
            "wind": cube(),
            "height": ("lat", 50 * random.standard_normal(5)),
            "total": ((), np.float64(30.0)),
            "count": (("time", "lat"), random.integers(0, 100, (4, 5))),
            "station": ("time", list("abcd")),
            "wave": (("lon",), random.standard_normal(6) * (1 + 99j)),
        },
        coords={"depth": ("lat", np.full(5, 1e6))},
        attrs={"title": "some"},
    )


@pytest.mark.parametrize(
    ("dim", "clipped"),
    [
        ("lat", {"wind": 1, "height": 0}),
        (["time", "lon"], {"wind": (0, 2), "wave": 0}),
        ("time", {"wind": 0}),
        (None, {"wind": None, "height": None, "total": None, "wave": None}),
        ([], {"wind": [], "height": [], "total": [], "wave": []}),
    ],
)
def test_each_variable_is_clipped_by_its_own_norm(dim, clipped):
    ds = collection()
    ds.encoding = {"unlimited_dims": {"time"}}
    y = ds.daskclip.clip_by_norm(20.0, dim)
    expected, norms = ds.copy(), {}
    for name, axes in clipped.items():
        values, norms[name] = daskclip.clip_by_norm(
            ds[name].values, 20.0, axes, nonfinite="omit", return_norm=True
        )
        expected[name] = ds[name].copy(data=values)
        assert not expected[name].equals(ds[name])
    assert identical(y, expected)
    assert list(y.data_vars) == list(ds.data_vars)
    assert y.encoding == ds.encoding
    assert identical(ds, collection())

    n = ds.daskclip.norm(dim)
    assert n.attrs == ds.attrs
    assert list(n.data_vars) == list(clipped)
    assert {k: bits(v.values) for k, v in n.items()} == {k: bits(v) for k, v in norms.items()}


def test_coordinates_are_not_looked_at():
    def fail(block):
        raise AssertionError("computed")

    lazy = da.ones((4, 5), chunks=2).map_blocks(fail, dtype=float, meta=np.empty((0, 0)))
    ds = collection().assign_coords(lazy=(("time", "lat"), lazy))
    for obj in (ds, ds.wind):
        assert obj.daskclip.clip_by_norm(1.0, "lon").lazy.chunks
        assert obj.daskclip.norm("lon").lazy.chunks


# ---- what is refused


@pytest.mark.parametrize(
    "function", [lambda x, dim: labelled.clip_by_norm(x, 1.0, dim), labelled.norm]
)
@pytest.mark.parametrize("obj", [cube(), cube().to_dataset()], ids=["array", "dataset"])
def test_unknown_dimensions_are_refused_and_the_known_ones_listed(function, obj):
    for dim in ("level", ["time", "level"], 3, [None]):
        one_line(lambda d=dim: function(obj, d), InvalidValueError, "there are: time, lat, lon")
    one_line(lambda: function(obj, ["lat", "lat"]), InvalidValueError, "twice")


def test_a_dimension_of_what_is_not_clipped_is_unknown():
    ds = collection()[["height", "count"]]
    one_line(lambda: ds.daskclip.norm("time"), InvalidValueError, "'time'", "there are: lat")


def test_what_cannot_be_clipped_is_refused():
    one_line(lambda: labelled.norm(np.ones(3)), InvalidTypeError, "ndarray", "DataArray")
    for obj in (cube(), cube().to_dataset()):
        one_line(lambda o=obj: daskclip.clip_by_norm(o, 1.0), TypeError, "use daskclip.xarray")
    one_line(lambda: labelled.norm(cube(), skipna="omit"), InvalidTypeError, "'omit'")
    one_line(lambda: labelled.norm(cube().fillna(0).astype(int)), DTypeError, "int64", "cast")
    one_line(lambda: labelled.norm(collection()[["count"]]), DTypeError, "none of the 1 variables")
    one_line(lambda: labelled.clip_by_norm(cube(), [1.0, 2.0]), InvalidValueError, "(2,)")
    one_line(lambda: labelled.clip_by_norm(cube(), cube().lat), InvalidValueError, "(5,)")


class Foreign:
    """The minimum that xarray accepts as an array of another library."""

    shape, ndim, dtype = (3,), 1, np.dtype("f4")

    def __array_function__(self, *_):
        return NotImplemented

    def __array_ufunc__(self, *_):
        return NotImplemented

    def __array__(self, *_, **__):
        raise AssertionError("converted")


def test_arrays_of_other_libraries_are_refused():
    x = xr.DataArray(Foreign(), dims="x")
    one_line(lambda: labelled.norm(x), DTypeError, "Foreign", "numpy or dask")
    one_line(lambda: labelled.clip_by_norm(x, 1.0), DTypeError, "Foreign", "numpy or dask")


# ---- trees


@pytest.mark.parametrize("dim", [None, ..., "time", ["lat", "lon"]])
@pytest.mark.parametrize("chunks", [None, {"time": 2}])
def test_trees_with_empty_groups_are_clipped(dim, chunks):
    x = cube(chunks=chunks).to_dataset(name="x")
    # the root and the group between are empty
    for root in (xr.Dataset(), xr.Dataset(attrs={"title": "t"})):
        tree = xr.DataTree.from_dict({"/": root, "/a": x, "/b/c": 2 * x})
        for name, args in (("clip_by_norm", (1.0, dim)), ("norm", (dim,))):
            function = getattr(labelled, name)
            mapped = tree.map_over_datasets(function, *args)
            by_method = tree.map_over_datasets(lambda d, n=name, a=args: getattr(d.daskclip, n)(*a))
            for y in (mapped, by_method):
                assert identical(y["a"].to_dataset(), function(x, *args))
                assert identical(y["b/c"].to_dataset(), function(2 * x, *args))
                assert y.to_dataset().identical(root)


@pytest.mark.parametrize("dim", [None, ..., "time", ["lat", "lon"], []])
@pytest.mark.parametrize("chunks", [None, {"time": 2}])
def test_a_tree_is_clipped_as_its_datasets_are(dim, chunks):
    x = cube(chunks=chunks).to_dataset(name="x")
    other = xr.Dataset({"w": ("depth", np.float32([3, 4])), "n": ("depth", [1, 2])})
    only = xr.Dataset({"n": ("depth", [1, 2])}, attrs={"title": "nothing to clip"})
    tree = xr.DataTree.from_dict({"/": xr.Dataset(), "/a": x, "/b/c": collection(), "/d": only})
    tree["b/other"] = xr.DataTree(other)
    for how in ({}, {"normalize": True}, {"nonfinite": "zero"}, {"skipna": False}):
        y = tree.daskclip.clip_by_norm(2.0, dim, **how)
        assert identical(y["a"].to_dataset(), x.daskclip.clip_by_norm(2.0, dim, **how))
        wanted = collection().daskclip.clip_by_norm(2.0, dim, **how)
        assert identical(y["b/c"].to_dataset(), wanted)
        own = dim if dim is None or dim is ... or not dim else "depth"
        wanted = other if own == "depth" else other.daskclip.clip_by_norm(2.0, own, **how)
        assert identical(y["b/other"].to_dataset(), wanted)
        assert y["d"].to_dataset().identical(only)
        assert [*y.groups] == [*tree.groups]
    given = iter(dim) if isinstance(dim, list) else dim
    norms = tree.daskclip.norm(given)
    assert identical(norms["a"].to_dataset(), x.daskclip.norm(dim))
    assert identical(norms["b/c"].to_dataset(), collection().daskclip.norm(dim))
    assert not norms["d"].data_vars


def test_coordinates_that_a_tree_inherits_stay_where_they_are():
    root = xr.Dataset(coords={"x": [1.0, 2.0]})
    tree = xr.DataTree.from_dict({"/": root, "/a": xr.Dataset({"v": ("x", [3.0, 4.0])})}, name="t")
    y = tree.daskclip.clip_by_norm(1.0, "x")
    own = y["a"].to_dataset(inherit=False)
    assert (y.name, dict(own.sizes), len(own.coords)) == ("t", {"x": 2}, 0)
    assert bits(y["a/v"].values) == bits(daskclip.clip_by_norm(np.array([3.0, 4.0]), 1.0))


def test_what_is_wrong_in_a_tree_is_told():
    tree = xr.DataTree.from_dict({"/a": cube().to_dataset(), "/b": xr.Dataset()})
    one_line(lambda: tree.daskclip.norm("z"), InvalidValueError, "'z'", "time, lat, lon")
    only = xr.DataTree.from_dict({"/a": xr.Dataset({"i": ("x", [1])})})
    one_line(lambda: only.daskclip.norm(), DTypeError, "none of the 1 variables")
    assert xr.DataTree().daskclip.clip_by_norm(1.0, "x").identical(xr.DataTree())


@pytest.mark.parametrize("policy", ["propagate", "omit", "zero"])
@pytest.mark.parametrize("chunks", [None, {"time": 2}])
def test_policies_for_nan_are_those_of_arrays(policy, chunks):
    x = cube(chunks=chunks)
    wanted = daskclip.clip_by_norm(cube().values, 20.0, (1, 2), nonfinite=policy)
    for obj in (x, x.to_dataset()):
        y = obj.daskclip.clip_by_norm(20.0, ["lat", "lon"], nonfinite=policy)
        assert bits((y if obj is x else y["wind"]).values) == bits(wanted)


def test_policies_are_checked():
    x = cube()
    with pytest.raises(FloatingPointError):
        x.daskclip.clip_by_norm(1.0, nonfinite="raise")
    for skipna in (True, False):
        call = lambda s=skipna: x.daskclip.clip_by_norm(1.0, nonfinite="zero", skipna=s)  # noqa: E731
        one_line(call, InvalidValueError, f"nonfinite 'zero' and skipna {skipna} are both given")
    one_line(lambda: x.daskclip.clip_by_norm(1.0, nonfinite="no"), InvalidValueError, "'no'")


def test_arguments_are_checked_for_empty_datasets_too():
    with pytest.raises(InvalidTypeError, match=r"^clip_norm "):
        labelled.clip_by_norm(xr.Dataset(), "1")
    with pytest.raises(InvalidTypeError, match=r"^skipna "):
        labelled.norm(xr.Dataset(), skipna=1)
    # something to clip is missing here, not everything
    with pytest.raises(DTypeError, match="none of the 1 variables"):
        labelled.norm(xr.Dataset({"i": ("x", [1])}))


@pytest.mark.parametrize("chunks", [2, 6])
def test_chunks_of_unknown_sizes_are_to_be_computed_first(chunks):
    values = np.arange(12, dtype="f4").reshape(6, 2)
    data = da.from_array(values, (chunks, 2))
    x = xr.DataArray(data[data[:, 0] > 3], dims=["time", "lat"], name="t")
    for dim in ("lat", "time"):
        got = x.daskclip.norm(dim).values
        assert bits(got) == bits(daskclip.norm(values[2:], x.get_axis_num(dim)))
    for obj in (x, x.to_dataset()):
        for dim in (None, "lat", "time", []):
            call = lambda obj=obj, dim=dim: obj.daskclip.clip_by_norm(1.0, dim)  # noqa: E731
            one_line(call, InvalidValueError, "array 't' ", "; call its .data.compute_chunk")
    x.data.compute_chunk_sizes()
    want = daskclip.clip_by_norm(values[2:], 1.0, 1)
    assert bits(x.daskclip.clip_by_norm(1.0, "lat").values) == bits(want)


def test_a_limit_in_a_unit_is_refused():
    x = cube()
    units = pytest.importorskip("astropy.units", reason="astropy is not installed")
    for limit in (1.0 * units.m, xr.DataArray(1.0 * units.m)):
        with pytest.raises(InvalidTypeError, match=r"^clip_norm has the unit m; "):
            labelled.clip_by_norm(x, limit)
    # an attribute is metadata
    limit = xr.DataArray(1.0, attrs={"units": "m"})
    assert identical(labelled.clip_by_norm(x, limit), labelled.clip_by_norm(x, 1.0))


# ---- norms that variables have in common


def layers(chunks=None):
    """Gradients of some examples by layer, with the examples on different axes."""
    rng = np.random.default_rng(0)
    variables = {
        "w": (("example", "i", "o"), rng.standard_normal((6, 3, 4)).astype("f4")),
        "b": (("o", "example"), rng.standard_normal((4, 6))),
        "loss": ("example", np.arange(6)),
        "rate": ((), np.float32(0.1)),
    }
    ds = xr.Dataset(variables, coords={"example": list("abcdef")}, attrs={"kept": 1})
    ds.w.encoding = {"dtype": "i2", "scale_factor": 0.1}
    return ds if chunks is None else ds.chunk(chunks)


@pytest.mark.parametrize("chunks", [None, {"example": 2, "o": 3}])
@pytest.mark.parametrize("normalize", [False, True])
def test_variables_are_clipped_by_the_norms_that_they_have_in_common(chunks, normalize):
    ds = layers(chunks)
    clipped = ds.daskclip.clip_by_global_norm(1.5, ["i", "o"], normalize=normalize)
    arrays = [layers().w.values, layers().b.values.T]
    expected, _ = daskclip.clip_by_global_norm(
        arrays, 1.5, axes=slice(1, None), normalize=normalize
    )
    assert bits(clipped.w.values) == bits(expected[0])
    assert bits(clipped.b.values.T.copy()) == bits(expected[1])
    assert clipped.b.dims == ("o", "example")
    assert clipped.attrs == ds.attrs
    assert clipped.w.encoding == {}
    for name in ("loss", "rate", "example"):
        assert clipped[name].identical(ds[name])
    assert (clipped.w.chunks is None) == (chunks is None)


def test_one_norm_of_all_variables():
    ds = layers()
    clipped = ds.daskclip.clip_by_global_norm(1.5)
    arrays = [ds.w.values, ds.b.values, ds.rate.values]
    expected, _ = daskclip.clip_by_global_norm(arrays, 1.5)
    found = [clipped[name].values for name in ("w", "b", "rate")]
    assert [bits(y) for y in found] == [bits(y) for y in expected]


def test_elements_of_kept_positions_are_part_of_joint_norms():
    ds = xr.Dataset({
        "scale": ("example", np.float32([3, 100])),
        "w": (("example", "x"), np.float32([[4], [8]])),
        "other": ("time", np.float32([7])),
    })  # fmt: skip
    clipped = ds.daskclip.clip_by_global_norm(5.0, "x")
    both, axes = [ds.scale.values, ds.w.values], slice(1, None)
    expected, _ = daskclip.clip_by_global_norm(both, 5.0, axes=axes)
    assert [bits(clipped[name].values) for name in ("scale", "w")] == [*map(bits, expected)]
    assert clipped.other.identical(ds.other)


def test_variables_without_norms_in_common_are_refused():
    def clip(obj):
        return lambda: obj.daskclip.clip_by_global_norm(1.0, "o")

    kept = "variable 'w' keeps the dimensions ('example', 'i') and variable 'b' the dimensions "
    one_line(clip(layers()), InvalidValueError, f"{kept}('example',)")
    one_line(clip(layers().w), InvalidTypeError, "obj is a DataArray; give a Dataset")
