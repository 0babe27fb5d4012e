"""Refused arguments: the documented error class, and one line with the value and a remedy."""

import random

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from reference import bits
from stores import some

from daskclip import clip_by_global_norm, clip_by_norm, clip_zarr, global_norm, norm, verify_zarr
from daskclip.errors import DaskClipError

X = np.ones((4, 6), np.float32)
AXES_TYPE = "give None, an int, a sequence of ints or a slice"


def assert_refused(error, value, remedy, call):
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert isinstance(caught.value, DaskClipError)
    assert "\n" not in text
    assert text[0].islower()
    assert value in text
    assert text.endswith(remedy)


@pytest.fixture(params=["numpy", "dask"])
def x(request):
    return X if request.param == "numpy" else da.from_array(X, 2)


@pytest.mark.parametrize(
    ("axes", "error", "value", "remedy"),
    [
        (2, np.exceptions.AxisError, "axis 2 ", "use -2 to 1"),
        (-3, np.exceptions.AxisError, "axis -3 ", "use -2 to 1"),
        ([0, 5], np.exceptions.AxisError, "axis 5 ", "use -2 to 1"),
        ([0, 0], ValueError, "[0, 0]", "give each axis once"),
        ((1, -1), ValueError, "(1, -1)", "give each axis once"),
        (1.0, TypeError, "1.0 is a float", AXES_TYPE),
        ([0.0], TypeError, "[0.0] holds a float", AXES_TYPE),
        (np.array([0.5]), TypeError, "float64", AXES_TYPE),
        (np.zeros((2, 2)), TypeError, "array", AXES_TYPE),
        (True, TypeError, "True is a bool", AXES_TYPE),
        (np.True_, TypeError, "bool", AXES_TYPE),
        (np.array([True]), TypeError, "bool", AXES_TYPE),
        ("0", TypeError, "'0' is a str", AXES_TYPE),
        ([[0]], TypeError, "[[0]] holds a list", AXES_TYPE),
        (np.array([[1]]), TypeError, "[[1]]", AXES_TYPE),
        (object, TypeError, "type", AXES_TYPE),
        (slice(1.0, None), TypeError, "holds a float", "such as slice(1, None)"),
        (slice(None, "1"), TypeError, "holds a str", "such as slice(1, None)"),
        (slice(None, None, True), TypeError, "holds a bool", "such as slice(1, None)"),
        (slice(None, None, 0), ValueError, "step of 0", "give another one, or none"),
        (slice(2, None), ValueError, "(2, None, None) takes no axis", "use [] to take none"),
        (slice(1, 1), ValueError, "a 2-d array", "use [] to take none"),
    ],
    ids=repr,
)
def test_wrong_axes_are_refused(x, axes, error, value, remedy):
    assert_refused(error, value, remedy, lambda: clip_by_norm(x, 1.0, axes))
    assert_refused(error, value, remedy, lambda: norm(x, axes))


@pytest.mark.parametrize("seed", range(30))
def test_a_slice_takes_axes_as_one_of_their_list_does(seed):
    rng = random.Random(seed)
    ndim = rng.randint(1, 5)
    bounds = [rng.choice([None, *range(-ndim - 2, ndim + 3)]) for _ in "01"]
    axes = slice(*bounds, rng.choice([None, -2, -1, 1, 2, np.int8(1)]))
    x = some([rng.randint(1, 3) for _ in range(ndim)], "f4", seed)
    wanted = [*range(ndim)][axes]
    for t in (x, da.from_array(x, 2)):
        if wanted:
            assert bits(np.asarray(norm(t, axes))) == bits(norm(x, wanted))
            assert bits(np.asarray(clip_by_norm(t, 1.0, axes))) == bits(
                clip_by_norm(x, 1.0, wanted)
            )
        else:
            with pytest.raises(ValueError, match="takes no axis"):
                clip_by_norm(t, 1.0, axes)


@pytest.mark.parametrize("axis", [0, -1])
def test_axes_of_0_d_arrays_are_refused(axis):
    def call():
        clip_by_norm(np.float32(1), 1.0, axis)

    assert_refused(np.exceptions.AxisError, f"axis {axis} ", "use None or []", call)


@pytest.mark.parametrize(
    "axes", [0, -2, [0], (0,), np.array(0), np.array([-2]), range(1), np.int8(0)]
)
def test_axes_that_are_the_first(x, axes):
    assert np.asarray(norm(x, axes)).tolist() == [2.0] * 6


LIMITS = [
    ([1.0], ValueError, "(1,)", "give one number (0-d)"),
    (np.ones((2, 1)), ValueError, "(2, 1)", "give one number (0-d)"),
    (da.ones(3), ValueError, "(3,)", "give one number (0-d)"),
    ([], ValueError, "(0,)", "give one number (0-d)"),
    ([1, [2, 3]], ValueError, "[1, [2, 3]]", "give one number (0-d)"),
    ([X, X[1:]], ValueError, "", "give one number (0-d)"),
    (10**400, ValueError, "1000", "use float('inf') for no limit"),
    ("2", TypeError, "'2'", "give a number"),
    (b"2", TypeError, "b'2'", "give a number"),
    (None, TypeError, "None", "give a number"),
    (1 + 0j, TypeError, "(1+0j)", "give a number"),
    (np.complex64(1), TypeError, "1+0j", "give a number"),
    (np.array(1j), TypeError, "complex128", "give a real number"),
    (np.array("2"), TypeError, "<U1", "give a real number"),
    (da.ones((), dtype="c8"), TypeError, "complex64", "give a real number"),
    (object(), TypeError, "object", "give a real number"),
]


@pytest.mark.parametrize(
    ("clip_norm", "error", "value", "remedy"), LIMITS, ids=lambda v: f"{v!r:.20}"
)
def test_wrong_limits_are_refused(x, clip_norm, error, value, remedy):
    def call():
        clip_by_norm(x, clip_norm)

    assert_refused(error, value, remedy, call)
    assert_refused(error, value, remedy, lambda: clip_by_global_norm([x], clip_norm))
    if clip_norm is not None:
        assert_refused(error, value, remedy, lambda: clip_by_global_norm([x], 1.0, clip_norm))


@pytest.mark.parametrize(
    "dtype", ["i4", "u1", "i8", "?", "O", "g", "G", "U1", "M8[s]", [("a", "f4")]]
)
def test_dtypes_that_cannot_be_clipped_are_refused(dtype):
    x = np.zeros((2, 3), dtype)
    remedy = "for example with .astype('float32')"
    for t in (x, da.from_array(x, 1)):
        for call in (
            lambda t=t: clip_by_norm(t, 1.0),
            lambda t=t: norm(t),
            lambda t=t: global_norm([X, t]),
            lambda t=t: clip_by_global_norm([X, t], 1.0),
        ):
            assert_refused(TypeError, f"dtype {x.dtype.name} ", remedy, call)


@pytest.mark.parametrize(
    "x", [np.ma.masked_array(X), da.ma.masked_array(da.from_array(X, 2))], ids=["numpy", "dask"]
)
def test_masked_arrays(x):
    assert_refused(TypeError, "MaskedArray", ".filled(numpy.nan)", lambda: clip_by_norm(x, 1.0))


MASKED = [
    np.ma.masked,
    np.ma.array(3.0, mask=True),
    np.ma.array(3.0),
    np.ma.array([3.0, 4.0], mask=[1, 0]),
]


@pytest.mark.parametrize("masked", MASKED, ids=repr)
@pytest.mark.filterwarnings("error")
def test_masks_are_refused_wherever_they_are(x, masked, tmp_path):
    """Also in lists: numpy.asarray would drop them, and make 0 of the masked constant."""
    zarr.create_array(tmp_path / "x.zarr", data=X)
    for limit in (masked, [masked], (masked, masked), [[1.0, 2.0], (masked, [masked])]):
        for call in (
            lambda limit=limit: clip_by_norm(x, limit),
            lambda limit=limit: clip_by_norm(x, limits=limit),
            lambda limit=limit: clip_by_global_norm([x], limit),
            lambda limit=limit: clip_by_global_norm([x], 1.0, limit),
            lambda limit=limit: clip_zarr(tmp_path / "x.zarr", tmp_path / "y.zarr", limit),
            lambda limit=limit: clip_by_norm(limit, 1.0),
            lambda limit=limit: norm(limit),
            lambda limit=limit: global_norm([x, limit]),
        ):
            assert_refused(TypeError, "asked", ".filled(numpy.nan)", call)
    assert [p.name for p in tmp_path.iterdir()] == ["x.zarr"]


def test_lazy_masks_are_refused_in_lists():
    lazy = da.ma.masked_array(da.ones(6, chunks=2))
    for call in (lambda: norm([lazy, lazy]), lambda: clip_by_norm(X, limits=[lazy])):
        assert_refused(TypeError, "MaskedArray", ".filled(numpy.nan)", call)


def test_dask_objects_that_are_no_arrays():
    x = dask.delayed(X)
    for call in (
        lambda: clip_by_norm(x, 1.0),
        lambda: norm(x),
        lambda: clip_by_global_norm([x], 1.0),
    ):
        assert_refused(TypeError, "Delayed", "", call)


def test_arrays_of_the_other_dask():
    x = da.from_array(X, 2)
    with dask.config.set({"array.query-planning": True}):
        remedy = "set array.query-planning to False before importing dask.array"
        assert_refused(TypeError, "array.query-planning", remedy, lambda: clip_by_norm(x, 1.0))


@pytest.mark.parametrize("t_list", [X, da.from_array(X, 2), "ab", 5, None])
def test_what_is_no_list_is_refused(t_list):
    for call in (lambda: global_norm(t_list), lambda: clip_by_global_norm(t_list, 1.0)):
        assert_refused(TypeError, type(t_list).__name__, "give a list of arrays", call)


@pytest.mark.parametrize("nonfinite", ["", "ignore", None, ["omit"]])
def test_unknown_policies_are_refused(x, nonfinite):
    def call():
        clip_by_norm(x, 1.0, nonfinite=nonfinite)

    assert_refused(ValueError, repr(nonfinite), "use 'propagate', 'omit', 'raise' or 'zero'", call)


@pytest.mark.parametrize("name", [5, b"clip", ["clip"]])
def test_names_that_are_no_strings_are_refused(x, name):
    remedy = "give a string or None"
    assert_refused(TypeError, repr(name), remedy, lambda: clip_by_norm(x, 1.0, name=name))
    assert_refused(TypeError, repr(name), remedy, lambda: clip_by_global_norm([x], 1.0, name=name))


class Quantity:
    """Number or array with a unit, as of packages that are not installed."""

    def __init__(self, value, **unit):
        self.value, self.dtype, self.shape = value, np.asarray(value).dtype, np.shape(value)
        self.__dict__ |= unit

    def __array__(self, *args, **kwargs):
        return np.asarray(self.value)

    def __float__(self):
        return float(self.value)


class Metres(float):
    unit = "m"


class MetresArray(np.ndarray):
    units = "m"


def quantities(value):
    """The same limit with a unit, in every form; the installed packages' own among them."""
    found = [
        Quantity(value, unit="m"),
        Quantity(value, units="m"),
        np.asarray(value).view(MetresArray),
    ]
    if np.ndim(value) == 0:
        found += [Metres(value), [Metres(value)], [[Metres(value)]], [([1.0, Metres(value)],)]]
        found += [np.timedelta64(1, "s"), [[np.timedelta64(1, "ns")]]]
    try:
        import astropy.units

        found += [value * astropy.units.m, value * astropy.units.one]
    except ImportError:
        print("astropy is not installed")
    try:
        import pint

        registry = pint.UnitRegistry()
        found += [registry.Quantity(value, "m"), registry.Quantity(value, "")]
        found += [registry.Quantity(da.asarray(value), "m")]
    except ImportError:
        print("pint is not installed")
    return found


def test_limits_with_a_unit_are_refused(x):
    remedy = "give a bare number in the unit of t"
    for limit in quantities(1.0):
        for call in (
            lambda limit=limit: clip_by_norm(x, limit),
            lambda limit=limit: clip_by_norm(x, limits=limit),
            lambda limit=limit: clip_by_global_norm([x], limit),
            lambda limit=limit: clip_by_global_norm([x], 1.0, limit),
        ):
            assert_refused(TypeError, "has the unit ", remedy, call)
    for limit in quantities(np.ones((4, 1))):
        call = lambda limit=limit: clip_by_norm(x, axes=1, limits=limit)  # noqa: E731
        assert_refused(TypeError, "an array of limits has the unit ", remedy, call)


@pytest.mark.parametrize(
    "clip_norm", [np.float64(1), np.array(1.0), 1, True, da.ones(())], ids=repr
)
def test_limits_without_a_unit_are_bare_numbers(x, clip_norm):
    assert bits(np.asarray(clip_by_norm(x, clip_norm))) == bits(clip_by_norm(X, 1.0))


def test_lazy_limits_with_a_unit_are_refused(x):
    """Also where only the block has it, and Dask does not know."""
    for limit in quantities(1.0):
        lazy = da.from_delayed(dask.delayed(lambda limit=limit: limit)(), (), float)
        for make in (
            lambda lazy=lazy: clip_by_norm(x, lazy),
            lambda lazy=lazy: clip_by_norm(x, limits=lazy),
            lambda lazy=lazy: clip_by_global_norm([x], 1.0, lazy)[1],
        ):
            with pytest.raises(DaskClipError):
                make().compute(scheduler="sync")


def test_limits_that_are_not_computed_are_refused_from_storage(tmp_path):
    zarr.create_array(tmp_path / "x.zarr", data=X)
    for limit in (da.ones(()), dask.delayed(1.0), da.ones(3)):

        def call(limit=limit):
            clip_zarr(tmp_path / "x.zarr", tmp_path / "y.zarr", limit)

        remedy = "give a number, for example with .compute()"
        assert_refused(TypeError, "is not computed", remedy, call)


@pytest.mark.parametrize("path", ["c\0d", "c\0d/e", "e/c\0", "file:///tmp/c\0d"], ids=repr)
def test_paths_with_nul_are_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    zarr.create_array("x.zarr", data=X)
    for call in (
        lambda: clip_zarr("x.zarr", path, 1.0),
        lambda: clip_zarr("x.zarr", zarr.storage.LocalStore(path), 1.0),
        lambda: clip_zarr("x.zarr", "y.zarr", 1.0, norms=path),
        lambda: clip_zarr(path, "y.zarr", 1.0),
        lambda: clip_zarr(zarr.storage.LocalStore(path), "y.zarr", 1.0),
        lambda: clip_zarr("x.zarr", "y.zarr", limits=path),
        lambda: verify_zarr(path),
    ):
        with pytest.raises(DaskClipError) as caught:
            call()
        assert str(caught.value).isprintable()
        assert "\\x00" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["x.zarr"]


def test_limits_with_a_unit_are_refused_from_storage(tmp_path):
    z = zarr.create_group(tmp_path / "x.zarr")
    for name in "ab":
        z.create_array(name, data=X)
    remedy = "give a bare number in the unit of t"
    for limit in quantities(1.0):
        for arguments in (
            {"clip_norm": limit},
            {"limits": limit},
            {"limits": {"a": limit, "b": 1}},
        ):

            def call(arguments=arguments):
                clip_zarr(tmp_path / "x.zarr", tmp_path / "y.zarr", **arguments)

            assert_refused(TypeError, "has the unit ", remedy, call)
    for limit in quantities(np.ones((4, 1))):

        def call(limit=limit):
            clip_zarr(tmp_path / "x.zarr", tmp_path / "y.zarr", axes=1, limits={"a": limit, "b": 1})

        assert_refused(TypeError, "has the unit ", remedy, call)
    assert [p.name for p in tmp_path.iterdir()] == ["x.zarr"]
