"""Labelled arrays in storage: packed values, names of dimensions, and a climate data set."""

import math
import re
import shutil
import warnings
from importlib.metadata import PackageNotFoundError, distribution

import dask.array as da
import numpy as np
import pytest
import zarr
from command_line import run
from labelled_arrays import cube, identical, one_line
from reference import bits, squares
from stores import create, read, some

import daskclip
from daskclip import clip_zarr, plan_zarr
from daskclip.errors import DTypeError

xr = pytest.importorskip("xarray", reason="xarray is not installed: pip install daskclip[xarray]")
import daskclip.xarray as labelled  # noqa: E402

# zarr warns of what xarray writes by default
pytestmark = pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part")
SENTINEL = 2.0**60


# ---- packed values


def packed(path, zarr_format=3, **encoding):
    """Store a dataset whose ``wind`` has an encoding."""
    x = cube("f8")
    x.encoding = {"chunks": (2, 5, 6), **encoding}
    x.to_dataset().to_zarr(path, zarr_format=zarr_format, consolidated=False)
    return path


INT16 = {"dtype": "int16", "scale_factor": 0.5, "add_offset": 10.0, "_FillValue": -32768}


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_packed_integers_are_refused_until_they_are_decoded(tmp_path, zarr_format):
    path = packed(tmp_path / "x", zarr_format, **INT16)
    words = ("packed as int16 with scale_factor 0.5, add_offset 10.0", "xarray", "mask_and_scale")
    for how in ({"decode_cf": False}, {"mask_and_scale": False}):
        with xr.open_zarr(path, consolidated=False, **how) as raw:
            assert raw.wind.dtype == np.int16
            for obj in (raw, raw.wind):
                one_line(lambda o=obj: labelled.clip_by_norm(o, 1.0), DTypeError, *words, "wind")
                one_line(lambda o=obj: labelled.norm(o), DTypeError, *words, "wind")
    for call in (clip_zarr, plan_zarr):
        one_line(lambda c=call: c(path / "wind", tmp_path / "y", 1.0), DTypeError, *words)
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    "encoding",
    [
        {"_FillValue": SENTINEL},
        {"missing_value": SENTINEL},
        {"dtype": "f4", "_FillValue": -1.0},
    ],
)
def test_numbers_that_stand_for_missing_values_are_refused(tmp_path, zarr_format, encoding):
    path = packed(tmp_path / "x", zarr_format, **encoding)
    name = [*encoding][-1]
    assert (read(path / "wind") == encoding[name]).sum() == 6
    words = (f"{name} {encoding[name]:g}", "mask_and_scale")
    one_line(lambda: clip_zarr(path / "wind", tmp_path / "y", 1.0), ValueError, *words)
    with xr.open_zarr(path, consolidated=False) as ds:
        assert identical(ds.daskclip.norm("lat"), ds.compute().daskclip.norm("lat"))
    if name == "missing_value" or zarr_format == 3:
        with xr.open_zarr(path, consolidated=False, mask_and_scale=False) as raw:
            one_line(lambda: raw.daskclip.norm("lat"), ValueError, *words)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("encoding", [{}, {"_FillValue": math.nan}, {"_FillValue": 0.0}])
def test_nan_and_zero_as_missing_values_are_clipped(tmp_path, zarr_format, encoding):
    path = packed(tmp_path / "x", zarr_format, **encoding)
    clip_zarr(path / "wind", tmp_path / "y", 1.0, dim="lat", nonfinite="omit")
    with xr.open_zarr(path, consolidated=False) as ds:
        expected = ds.wind.daskclip.clip_by_norm(1.0, "lat").values
    y = read(tmp_path / "y")
    if 0.0 in encoding.values():  # a zero of either sign is missing
        expected = np.where(y == 0, y, expected)
    assert bits(y) == bits(expected)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize(
    "encoding",
    [INT16, {"dtype": "f4"}, {"dtype": "f4", "scale_factor": 3.0, "_FillValue": SENTINEL}],
)
def test_what_is_saved_holds_the_bound_to_the_bit(tmp_path, zarr_format, chunked, encoding):
    path = packed(tmp_path / "x", zarr_format, **encoding)
    with xr.open_zarr(path, consolidated=False, chunks={} if chunked else None) as ds:
        # values of float64, which the encoding of the source rounds
        ds = ds.assign(wind=(ds.wind.astype(float) / 3).assign_attrs(ds.wind.attrs))
        ds.wind.encoding = xr.open_zarr(path, consolidated=False).wind.encoding
        y = ds.daskclip.clip_by_norm(1.0, "lon")
        y.to_zarr(tmp_path / "y", zarr_format=zarr_format, consolidated=False)
        rounded = y.copy()
        rounded.wind.encoding = ds.wind.encoding
        rounded.to_zarr(tmp_path / "rounded", zarr_format=zarr_format, consolidated=False)
        with xr.open_zarr(tmp_path / "y", consolidated=False) as again:
            assert identical(again.compute(), y.compute())
            values = again.wind.values
    limit = squares(np.float64([1.0]), (0,)).item()
    assert (squares(np.nan_to_num(values), (2,)) <= limit).all()
    with xr.open_zarr(tmp_path / "rounded", consolidated=False) as lossy:
        assert (squares(np.nan_to_num(np.float64(lossy.wind.values)), (2,)) > limit).any()


@pytest.mark.parametrize(
    ("sentinel", "limit", "is_kept"),
    [
        (math.nan, 1.0, True),
        (SENTINEL, 1.0, True),
        (-9.0, 5.0, True),
        (5.0, 5.0, False),
        (0.0, 5.0, False),
        (0.0, -1.0, False),
        (9.0, da.from_array(5.0), False),
    ],
)
def test_a_number_for_missing_values_is_kept_if_no_value_can_equal_it(sentinel, limit, is_kept):
    for name in ("_FillValue", "missing_value"):
        x = cube("f8")
        x.encoding = {name: np.float64(sentinel), "dtype": np.dtype(">f8"), "zlib": True}
        y = labelled.clip_by_norm(x, limit, "lat")
        assert (name in y.encoding) == is_kept
        assert y.encoding["dtype"] == ">f8"
        assert y.encoding["zlib"]


def test_lossy_parts_of_an_encoding_go(tmp_path):
    from zarr.codecs.numcodecs import BitRound

    x = cube("f8").fillna(0.0).drop_encoding().to_dataset()
    with warnings.catch_warnings(action="ignore"):  # of zarr, about a codec outside its standard
        x.to_zarr(
            tmp_path / "x",
            encoding={"wind": {"filters": [BitRound(keepbits=3)]}},
            consolidated=False,
        )
        with xr.open_zarr(tmp_path / "x", consolidated=False) as ds:
            y = ds.daskclip.clip_by_norm(1.0, "lon")
            y.to_zarr(tmp_path / "y", consolidated=False)
            with xr.open_zarr(tmp_path / "y", consolidated=False) as again:
                assert identical(again.compute(), y.compute())


# ---- dimensions of stored arrays


@pytest.fixture(params=["format 3", "format 2", "by xarray, 2", "by xarray, 3"])
def stored_cube(request, tmp_path):
    values, path = cube().values, tmp_path / "x"
    names = ["time", "lat", "lon"]
    if request.param == "format 3":
        return create(path, values, (2, 5, 3), dimension_names=names)
    if request.param == "format 2":
        names = {"_ARRAY_DIMENSIONS": names}
        return create(path, values, (2, 5, 3), attributes=names, zarr_format=2, fill_value=0)
    cube().chunk(time=2, lon=3).to_dataset().to_zarr(
        path, zarr_format=int(request.param[-1]), consolidated=False
    )
    return path / "wind"


@pytest.mark.parametrize(
    ("dim", "axes"), [("lat", 1), (["lon", "time"], (0, 2)), (..., None), ([], []), (("lat",), 1)]
)
def test_stored_names_are_axes(stored_cube, tmp_path, dim, axes):
    assert plan_zarr(stored_cube, tmp_path / "y", 2.0, dim=dim) == plan_zarr(
        stored_cube, tmp_path / "y", 2.0, axes
    )
    clip_zarr(stored_cube, tmp_path / "y", 2.0, dim=dim, nonfinite="omit")
    expected = daskclip.clip_by_norm(cube().values, 2.0, axes, nonfinite="omit")
    assert bits(read(tmp_path / "y")) == bits(expected)
    # the same run, by names or by numbers
    report = clip_zarr(stored_cube, tmp_path / "y", 2.0, axes, nonfinite="omit")
    assert report.status == "up to date"


def test_stored_names_in_the_shell(stored_cube, tmp_path):
    words = ["run", stored_cube, tmp_path / "y", "--clip-norm", 2, "--nonfinite", "omit"]

    for options, said in [
        (["--dim", "level"], "there are: time, lat, lon"),
        (["--dim", "lat", "--axes", "1"], "give one"),
        (["--dim", "lat,lat"], "twice"),
    ]:
        failed = run(*words, *options)
        assert failed.exit_code == 3
        assert re.fullmatch(rf"daskclip: .*{said}.*\n", failed.stderr)
    assert run(*words, "--dim", "time, lat").exit_code == 0
    expected = daskclip.clip_by_norm(cube().values, 2.0, (0, 1), nonfinite="omit")
    assert bits(read(tmp_path / "y")) == bits(expected)
    assert "up to date" in run(*words, "--axes", "0,1").stdout
    assert "exists" in run(*words, "--dim", "").stderr


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"zarr_format": 2},
        {"zarr_format": 2, "attributes": {"_ARRAY_DIMENSIONS": ["a"]}},
        {"zarr_format": 2, "attributes": {"_ARRAY_DIMENSIONS": 3}},
        {"dimension_names": [None, None]},
    ],
)
def test_arrays_without_names_are_refused(tmp_path, options):
    path = create(tmp_path / "x", some((4, 6), "f4"), (2, 3), **options)
    one_line(
        lambda: clip_zarr(path, tmp_path / "y", 1.0, dim="a"), ValueError, "no dimensions", "axes"
    )


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    "value", [None, "NaN", "some", "ü", {}, [], [[1], {}], ["AAAAAAAA+H8="], 0, -0.0, 10**400]
)
def test_attributes_that_name_no_number_are_carried_over(tmp_path, zarr_format, value):
    names = {"_FillValue": value, "missing_value": value, "scale_factor": value}
    path = create(
        tmp_path / "x", some((4, 6), "f4"), (2, 3), zarr_format=zarr_format, attributes=names
    )
    clip_zarr(path, tmp_path / "y", 1.0)
    assert zarr.open_array(tmp_path / "y").attrs.asdict() == names


@pytest.mark.parametrize("value", [-999, "1e30", [None, 1e20], "AAAAAAAA8D8="])
def test_numbers_that_stand_for_missing_values_are_found_in_any_form(tmp_path, value):
    path = create(tmp_path / "x", some((4, 6), "f4"), (2, 3), attributes={"missing_value": value})
    one_line(lambda: clip_zarr(path, tmp_path / "y", 1.0), ValueError, "missing_value")


def test_some_dimensions_may_have_no_name(tmp_path):
    path = create(tmp_path / "x", some((4, 6), "f4"), (2, 3), dimension_names=[None, "lon"])
    assert plan_zarr(path, tmp_path / "y", 1.0, dim="lon").axes == (1,)
    assert plan_zarr(path, tmp_path / "y", 1.0, dim=...).axes == (0, 1)
    one_line(lambda: plan_zarr(path, tmp_path / "y", 1.0, dim="lat"), ValueError, "there are: lon")


# ---- a real data set


def temperatures():
    """Sea surface temperatures of 50 winters, from the package eofs; land is missing."""
    try:
        path = distribution("eofs").locate_file("eofs/examples/example_data/sst_ndjfm_anom.nc")
    except PackageNotFoundError:
        pytest.skip("eofs, which has the data, is not installed: pip install daskclip[test]")
    with xr.open_dataset(path, decode_coords="all") as ds:
        return ds.load()


SPACE = ["latitude", "longitude"]


@pytest.mark.parametrize("chunks", [None, {"time": 7, "latitude": 5}])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_climate_data_set_by_xarray(tmp_path, chunks, zarr_format):
    ds = temperatures()
    assert ds.sst.isnull().sum() == 4500
    limit = 10.0
    x = ds if chunks is None else ds.chunk(chunks)
    x.daskclip.clip_by_norm(limit, SPACE).to_zarr(tmp_path / "y", zarr_format=zarr_format)
    with xr.open_zarr(tmp_path / "y", decode_coords="all") as y:
        y = y.load()

    norms = (ds.sst.astype(np.longdouble) ** 2).sum(SPACE) ** 0.5
    plain = (ds.sst * np.minimum(1, limit / norms)).astype(float)
    assert 5 < (norms > limit).sum() < 45
    xr.testing.assert_allclose(y.sst, plain, rtol=1e-15)
    np.testing.assert_array_equal(y.sst.isnull(), ds.sst.isnull())
    xr.testing.assert_equal(y.sst[norms <= limit], ds.sst[norms <= limit])
    assert (squares(np.nan_to_num(y.sst.values), (1, 2)) <= squares([limit], (0,)).item()).all()
    xr.testing.assert_identical(y.drop_vars("sst"), ds.drop_vars("sst"))
    assert y.sst.attrs == ds.sst.attrs
    xr.testing.assert_allclose(labelled.norm(ds.sst, SPACE), norms.astype(float), rtol=1e-15)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("dim", ["time", SPACE, None])
def test_a_climate_data_set_in_storage_equals_the_one_by_xarray(tmp_path, zarr_format, dim):
    source, target = tmp_path / "x", tmp_path / "y"
    ds = temperatures().drop_encoding().chunk(time=7, latitude=5)
    ds.to_zarr(source, zarr_format=zarr_format, consolidated=False)
    shutil.copytree(source, target)
    shutil.rmtree(target / "sst")
    clip_zarr(source / "sst", target / "sst", 5.0, dim=dim, nonfinite="omit")
    with (
        xr.open_zarr(target, consolidated=False, decode_coords="all") as y,
        xr.open_zarr(source, consolidated=False, decode_coords="all") as x,
    ):
        clipped = x.daskclip.clip_by_norm(5.0, dim)
        assert not clipped.sst.equals(x.sst)
        assert identical(y.compute(), clipped.compute())
        assert str(y.sst.encoding) == str(x.sst.encoding)  # NaN is not equal to NaN


def test_a_climate_data_set_with_its_encoding_is_refused_in_storage(tmp_path):
    temperatures().to_zarr(tmp_path / "x", consolidated=False)
    one_line(
        lambda: clip_zarr(tmp_path / "x" / "sst", tmp_path / "y", 5.0, dim=SPACE, nonfinite="omit"),
        ValueError,
        "missing_value 1e+20",
        "drop_encoding()",
    )


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_a_group_equals_the_dataset_clipped_through_xarray(tmp_path, zarr_format, consolidated):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(5, 4, 3)) * 10
    values[0, 1] = np.nan
    ds = xr.Dataset(
        {
            "wind": (("time", "lat", "lon"), values, {"units": "m/s"}),
            "rain": (("time", "lat"), np.float32(values[..., 0]), {"note": "daily"}),
            "height": (("lat", "lon"), values[1]),
            "count": (("time",), np.arange(5)),
            "lat_bounds": (("lat", "edge"), 100.0 * np.ones((4, 2))),
        },
        coords={
            "time": ("time", 100.0 * np.arange(5)),
            "lat": ("lat", np.linspace(-90, 90, 4), {"bounds": "lat_bounds"}),
            "area": (("lat", "lon"), 1000 * np.ones((4, 3))),
        },
        attrs={"title": "weather"},
    )
    options = {"consolidated": consolidated}
    ds.to_zarr(tmp_path / "x", zarr_format=zarr_format, **options)
    report = clip_zarr(tmp_path / "x", tmp_path / "y", 3.0, dim=["lat", "lon"], nonfinite="omit")
    assert (report.arrays, report.copied) == (3, 5)
    with xr.open_zarr(tmp_path / "x", **options) as x, xr.open_zarr(tmp_path / "y", **options) as y:
        wanted = x.daskclip.clip_by_norm(3.0, ["lat", "lon"]).compute()
        xr.testing.assert_identical(y.compute(), wanted)
        assert wanted.wind.values.tobytes() == y.wind.values.tobytes()
        assert not wanted.identical(x.compute())
