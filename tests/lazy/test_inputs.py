"""Arguments of the lazy operation: names of stored arrays, blocks, and what is no array."""

import pathlib
import pickle
import re
import subprocess
import sys
from importlib.util import find_spec

import dask
import dask.array as da
import numcodecs
import numpy as np
import pandas as pd
import pytest
import zarr
from fsspec.implementations.reference import ReferenceFileSystem
from reference import bits
from servers import local_client
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec
from zarr.storage import FsspecStore, LoggingStore, MemoryStore, ZipStore

import daskclip.lazy.graph
from daskclip import clip_by_global_norm, clip_by_norm, global_norm, norm
from daskclip.errors import DaskClipError, DTypeError, StorageError
from daskclip.lazy import inputs
from daskclip.storage import StoredArray

X = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)


# ---- names of stored arrays


def stored(store, values=X):
    array = zarr.create_array(store, shape=values.shape, chunks=(2, 2), dtype=values.dtype)
    array[...] = values
    return array


def reference_array(folder, values):
    """Array behind a store of references to the files of another one."""
    z = stored(str(folder), values)
    names = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    references = {str(name): [str(folder / name)] for name in names}
    options = {"asynchronous": True}
    files = ReferenceFileSystem(
        references, remote_protocol="file", remote_options=options, **options
    )
    return zarr.open_array(FsspecStore(files, path="/"), mode="r"), z


def test_arrays_of_stores_of_the_same_text_have_their_own_names(tmp_path):
    a, _ = reference_array(tmp_path / "a", X)
    b, _ = reference_array(tmp_path / "b", 2 * X)
    assert str(a.store) == str(b.store)
    for function in (norm, lambda z: clip_by_norm(z, 1.0), lambda z: global_norm([z])):
        got = dask.compute(function(a), function(b))
        assert [bits(y) for y in got] == [bits(function(x)) for x in (X, 2 * X)]


def test_endpoints_are_told_apart():
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install daskclip[s3]")
    names = set()
    for port in (1, 2, 2):
        options = {"endpoint_url": f"http://127.0.0.1:{port}", "anon": True}
        store = FsspecStore.from_url("s3://bucket/key", storage_options=options, read_only=True)
        # opening an array would ask a server for its metadata
        known = zarr.create_array({}, shape=(4,), dtype="f4", chunks=(2,)).metadata
        array = zarr.Array(zarr.AsyncArray(known, zarr.storage.StorePath(store)))
        names.add(norm(array).name)
    assert len(names) == 2


class OneAddress(MemoryStore):
    """Store in memory at the address of an earlier one, which is its text."""

    def __str__(self):
        return "memory://140737353"


def test_a_persisted_norm_is_not_that_of_a_later_store():
    kept = []
    with local_client(1):
        for i in range(3):
            array = stored(OneAddress(), X + np.float32(i))
            kept.append(norm(array).persist())
            assert kept[-1].compute() == norm(X + np.float32(i))
            del array


class Unpicklable(MemoryStore):
    def __str__(self):
        return "memory://140737353"

    def __reduce__(self):
        raise TypeError("cannot pickle a connection")


def test_stores_that_nothing_tells_apart_are_unique(tmp_path):
    arrays = [stored(Unpicklable(), X), stored(Unpicklable(), 2 * X)]
    arrays.append(zarr.open_array(LoggingStore(stored(tmp_path / "a.zarr", 3 * X).store)))
    got = dask.compute(*[norm(array) for array in arrays], scheduler="sync")
    assert got == (norm(X), norm(2 * X), norm(3 * X))


def test_a_zip_file_that_is_being_written_is_left_alone(tmp_path):
    with ZipStore(tmp_path / "a.zip", mode="w") as store:
        array = stored(store)
        assert bits(clip_by_norm(array, 1.0).compute(scheduler="sync")) == bits(
            clip_by_norm(X, 1.0)
        )
    assert bits(zarr.open_array(ZipStore(tmp_path / "a.zip"), mode="r")[...]) == bits(X)


def zipped(folder):
    with ZipStore(folder / "a.zip", mode="w") as store:
        stored(store)
    return zarr.open_array(ZipStore(folder / "a.zip", mode="r"), mode="r")


OPENERS = {
    "folder": lambda folder: zarr.open_array(folder / "a.zarr", mode="r"),
    "url": lambda folder: zarr.open_array(f"file://{folder}/a.zarr", mode="r"),
    "zip": lambda folder: zarr.open_array(ZipStore(folder / "a.zip", mode="r"), mode="r"),
}


def names(folder):
    return {key: norm(opener(folder)).name for key, opener in OPENERS.items()}


def test_equal_arrays_have_equal_names_in_every_process(tmp_path):
    stored(tmp_path / "a.zarr")
    zipped(tmp_path)
    here = names(tmp_path)
    assert here == names(tmp_path)
    command = [sys.executable, __file__, str(tmp_path)]
    there = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert there == f"{here}"


if __name__ == "__main__":
    print(names(pathlib.Path(sys.argv[1])))


# ---- what is read of stored arrays

CODECS = {
    "none": {"compressors": None},
    "blosc": {"compressors": BloscCodec(cname="lz4", shuffle="bitshuffle")},
    "zstd": {"compressors": ZstdCodec(checksum=True)},
    "gzip": {"compressors": [GzipCodec(), Crc32cCodec()]},
    "transposed": {"filters": TransposeCodec(order=(1, 0)), "compressors": BloscCodec()},
    "shards": {"chunks": (3, 2), "shards": (6, 4), "compressors": BloscCodec()},
    "format 2": {"zarr_format": 2, "compressors": numcodecs.Blosc(), "order": "F"},
    "format 2 with filters": {"zarr_format": 2, "filters": [numcodecs.Shuffle(4)]},
    "lossy": {"dtype": "<f4", "zarr_format": 2, "filters": [numcodecs.BitRound(9)]},
}


def random_stored(folder, seed, codecs):
    """Array of random shape and bits, some chunks of which are not stored."""
    rng = np.random.default_rng(seed)
    shape, chunks = rng.integers(1, 15, 2).tolist(), rng.integers(1, 9, 2).tolist()
    usual = {"dtype": rng.choice(["<f4", ">f4", "<f8"]), "chunks": chunks}
    fill = rng.choice([0.0, -0.0, np.nan, 2.5])
    z = zarr.create_array(folder, shape=shape, fill_value=fill, **(usual | CODECS[codecs]))
    values = rng.standard_normal(shape).astype(z.dtype)
    values[rng.random(shape) < 0.1] = rng.choice([np.nan, -0.0, np.inf])
    part = slice(int(rng.integers(shape[0])), None), slice(int(rng.integers(1, shape[1] + 1)))
    z[part] = values[part]
    return z


def read_by_us(z):
    source = inputs.as_array(z).dask.layers[f"original-{inputs.as_array(z).name}"]
    return isinstance(next(iter(source.values())), StoredArray)


@pytest.mark.parametrize("codecs", CODECS)
@pytest.mark.parametrize("seed", range(8))
def test_stored_arrays_are_read_with_zarrs_bits(tmp_path, codecs, seed):
    z = random_stored(tmp_path / "x.zarr", seed, codecs)
    assert read_by_us(z) == (codecs != "lossy")
    x = inputs.as_array(z)
    assert (x.dtype, x._meta.dtype, x.shape) == (z.dtype, z.dtype, z.shape)
    lazy, again = dask.compute(x, pickle.loads(pickle.dumps(x)))
    assert bits(lazy) == bits(again) == bits(z[...])
    assert (lazy.dtype, bits(lazy)) == (z.dtype, bits(da.from_zarr(z).compute()))
    for axes in (None, 0):
        assert bits(clip_by_norm(z, 0.5, axes).compute()) == bits(clip_by_norm(z[...], 0.5, axes))


@pytest.mark.parametrize("axes", [0, 1])
def test_stored_limits_are_cut_to_the_chunks_of_the_array(tmp_path, axes):
    """Dask fuses cuts with the functions that it knows to read."""
    limits = np.abs(X).max(axis=axes, keepdims=True).astype(float)
    z = zarr.create_array(tmp_path / "limits.zarr", data=limits, chunks=(4, 3))
    for x in (da.from_array(X, (5, 1)), da.from_array(X, (1, 3))):
        y = clip_by_norm(x, axes=axes, limits=z)
        assert bits(y.compute()) == bits(clip_by_norm(X, axes=axes, limits=limits))


@pytest.mark.parametrize("shape", [(), (1,), (0, 3)])
def test_stored_arrays_of_one_or_no_element_are_read(tmp_path, shape):
    z = zarr.create_array(tmp_path / "x.zarr", data=np.full(shape, 3.0))
    assert read_by_us(z)
    assert bits(clip_by_norm(z, 1.0).compute()) == bits(clip_by_norm(np.full(shape, 3.0), 1.0))


def test_other_stores_are_read_by_zarr(tmp_path):
    assert read_by_us(stored(tmp_path / "a.zarr"))
    assert not read_by_us(stored(MemoryStore()))
    assert not read_by_us(reference_array(tmp_path / "b", X)[0])


def test_a_damaged_chunk_is_named(tmp_path):
    z = zarr.create_array(tmp_path / "x.zarr", data=X, chunks=(2, 4), compressors=BloscCodec())
    (tmp_path / "x.zarr/c/1/0").write_bytes(b"short")
    with pytest.raises(StorageError, match=r"^reading block \[2:4, 0:4\] of .*x.zarr failed at ch"):
        clip_by_norm(z, 1.0).compute()


# ---- blocks that are not what their array says


class Duck:
    """Array of another library."""

    dtype, shape, ndim, size = X.dtype, X.shape, X.ndim, X.size

    def __array__(self, *args, **kwargs):
        return X

    def __getitem__(self, index):
        return self


def wrong(make, shape=X.shape, dtype="f4"):
    """Array of one block, which ``make`` returns when it is computed."""
    return da.from_delayed(dask.delayed(make, pure=False)(), shape, dtype)


def split(make, shape=X.shape, dtype="f4"):
    """The block beside a right one, so that the axes are split."""
    right = da.from_array(np.ones(shape, dtype), (2, -1))
    return da.concatenate([right, wrong(make, shape, dtype), right])


def mapped(make, shape=X.shape, dtype="f4"):
    return da.ones(shape, dtype, chunks=2).map_blocks(
        lambda x: make(), dtype=dtype, meta=np.empty((0,) * len(shape), dtype)
    )


FORMS = {
    "one pass": lambda x: clip_by_norm(x, 1.0, []),
    "two passes": lambda x: clip_by_norm(x, 1.0),
    "norms": lambda x: clip_by_norm(x, 1.0, return_norm=True)[1],
    "raise": lambda x: clip_by_norm(x, 1.0, nonfinite="raise"),
    "raise in one pass": lambda x: clip_by_norm(x, 1.0, [], nonfinite="raise"),
    "norm": norm,
    "global norm": lambda x: global_norm([X, x]),
    "list": lambda x: clip_by_global_norm([X, x], 1.0)[0][1],
    "list with a norm": lambda x: clip_by_global_norm([X, x], 1.0, 2.0)[0][1],
}


def refused(form, x):
    with pytest.raises(TypeError) as caught:
        FORMS[form](x).compute(scheduler="sync")
    assert isinstance(caught.value, DTypeError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(params=[-1, 2**24], ids=["made again", "held"])
def held(request, monkeypatch):
    monkeypatch.setattr(daskclip.lazy.graph, "HELD_NBYTES", request.param)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", [wrong, split, mapped])
def test_blocks_of_another_type_are_refused(held, place, form):
    masked = np.ma.masked_array(X, X > 0)
    for make, kind in ((lambda: masked, "MaskedArray"), (lambda: np.ma.masked, "Masked"),
                       (Duck, "Duck"), (lambda: [1.0], "list"), (lambda: pd.Series(X[0]), "Series"),
                       (lambda: None, "NoneType")):  # fmt: skip
        text = refused(form, place(make))
        assert kind in text
        assert text.endswith("convert them to numpy.ndarray, masked ones with .filled(numpy.nan)")
    # word for word what other masked arrays get
    with pytest.raises(DTypeError) as caught:
        clip_by_norm(masked, 1.0)
    assert refused(form, place(lambda: masked)) == str(caught.value)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", [wrong, split, mapped])
def test_blocks_of_another_dtype_are_refused(held, place, form):
    for dtype in ("f8", "i4", "c8", "O", "?"):
        text = refused(form, place(lambda dtype=dtype: X.astype(dtype)))
        assert f"dtype {np.dtype(dtype)} " in text
        assert "dtype float32;" in text


@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_another_number_of_axes_are_refused(held, form):
    with pytest.raises(ValueError, match=r"^a block of shape \(6, 4\) .* 3 dimensions; ") as caught:
        FORMS[form](wrong(lambda: X, (6, 4, 1))).compute(scheduler="sync")
    assert isinstance(caught.value, DaskClipError)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [5.0, np.float64(5.0)], ids=["float", "float64"])
def test_numbers_are_blocks_of_shape_0(held, form, value):
    got = FORMS[form](wrong(lambda: value, (), float)).compute()
    assert bits(got) == bits(FORMS[form](np.array(5.0)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", [wrong, split])
def test_blocks_of_the_other_byte_order_give_the_same_bits(held, place, form):
    x, swapped = place(lambda: X), place(lambda: X.astype(">f4"))
    got = FORMS[form](swapped).compute()
    assert bits(got) == bits(FORMS[form](x).compute())
    assert got.dtype.isnative


@pytest.mark.parametrize("limit", [5, np.float32(5), np.array(5.0)], ids=repr)
def test_lazy_limits_may_be_numbers(limit):
    lazy = wrong(lambda: limit, (), np.asarray(limit).dtype)
    for x in (X, da.from_array(X, 2)):
        for got in (clip_by_norm(x, lazy), clip_by_norm(x, limits=lazy),
                    clip_by_global_norm([x], lazy)[0][0]):  # fmt: skip
            assert bits(got.compute()) == bits(clip_by_norm(X, 5.0))
        assert clip_by_global_norm([x], 1.0, lazy)[1].compute() == 5.0


@pytest.mark.parametrize(
    "block", [np.ma.masked_array(1.0, True), np.array(1j), np.array("1"), "1", [1.0]], ids=repr
)
def test_blocks_of_lazy_limits_are_checked(block):
    lazy = wrong(lambda: block, (), float)
    for x in (X, da.from_array(X, 2)):
        results = [clip_by_norm(x, lazy), clip_by_norm(x, limits=lazy)]
        results += [clip_by_global_norm([x], lazy)[0][0], clip_by_global_norm([x], 1.0, lazy)[1]]
        for got in results:
            with pytest.raises(DTypeError):
                got.compute(scheduler="sync")


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1), (6, 4), (0, 1)], ids=str)
@pytest.mark.parametrize("stated", [(6, 1), (1, 4), (6, 4)], ids=str)
@pytest.mark.parametrize("chunks", [-1, 2])
def test_blocks_of_limits_of_another_shape_are_refused(chunks, shape, stated):
    axes = [axis for axis in (0, 1) if stated[axis] == 1]
    lazy = wrong(lambda: np.ones(shape, "f4"), stated)
    for x in (X, da.from_array(X, chunks)):
        if shape == stated:
            got = clip_by_norm(x, axes=axes, limits=lazy)
            assert bits(got.compute()) == bits(clip_by_norm(X, 1.0, axes))
            continue
        # cut in two, each part has a block of its own
        parts = da.concatenate([lazy[:2], lazy[2:]]) if stated[0] > 2 else lazy
        for limits, found in ((lazy, f"{shape} is in a chunk of shape {stated};"), (parts, "(")):
            got = clip_by_norm(x, axes=axes, limits=limits)
            with pytest.raises(ValueError, match=r"^a block of shape .*; give an") as caught:
                got.compute(scheduler="sync")
            assert isinstance(caught.value, DaskClipError)
            assert f"a block of shape {found}" in str(caught.value)


def test_limits_may_have_chunks_of_unknown_sizes():
    some = np.array([True, False, True, True, False, True])
    x = da.from_array(X, (2, -1))[da.from_array(some, 2)]
    want = clip_by_norm(X[some], axes=[], limits=X[some])
    assert bits(clip_by_norm(x, axes=[], limits=x).compute(scheduler="sync")) == bits(want)
    one = da.ones((1, 1))
    assert bits(clip_by_norm(x, axes=1, limits=one).compute()) == bits(
        clip_by_norm(x, 1.0, 1).compute()
    )


def test_blocks_side_by_side_of_different_shapes_are_refused():
    made = [wrong(lambda n=n: np.ones((n, 4), "f4")) for n in (6, 5)]
    x = da.concatenate(made, axis=1)
    for lazy in (clip_by_norm(x, 1.0, 1), norm(x, 1), clip_by_norm(x, 1.0, 1, nonfinite="raise")):
        with pytest.raises(DaskClipError, match=r"shapes \(5, 1\) and \(6, 1\); give the array"):
            lazy.compute(scheduler="sync")


def test_a_source_that_changes_its_shape_is_refused(monkeypatch):
    """Factors for more slices than there are would be read from memory that is not theirs."""
    monkeypatch.setattr(daskclip.lazy.graph, "HELD_NBYTES", -1)
    shapes = iter([(2, 4), (2, 4), (500, 4), (500, 4)])
    made = [wrong(lambda: np.ones(next(shapes), "f4"), (2, 4)) for _ in range(2)]
    x = da.concatenate(made, axis=1)
    with pytest.raises(ValueError, match=r"of shape \(500, 4\) .* persist it or store it$"):
        clip_by_norm(x, 1.0, 1).compute(scheduler="sync")


# ---- what is no array


class Tensor:
    """What torch does where its own memory cannot be NumPy's."""

    def __init__(self, **fields):
        self.__dict__ |= fields

    def __array__(self, *args, **kwargs):
        raise RuntimeError("Can't call numpy() on Tensor.\nUse another one instead.")


Tensor.__module__ = "torch"
Tensor.__qualname__ = "Tensor"


class Tracer:
    """Array whose values are not known yet, as under jax.jit."""

    def __array__(self, *args, **kwargs):
        raise NotImplementedError("Cannot convert a symbolic tensor\nto a numpy array")


OPEN = "open it with zarr.open_array, or use clip_zarr"
NO_ARRAYS = [
    ("path", "str", OPEN),
    (b"path", "bytes", OPEN),
    (pathlib.Path("x.zarr"), "PosixPath", OPEN),
    (zarr.group({}), "Group", "pass one of its arrays, or use clip_zarr"),
    (zarr.create_group({}).store, "MemoryStore", "pass one of its arrays, or use clip_zarr"),
    (zarr.create_array({}, data=X).async_array, "AsyncArray", "make a zarr.Array of it"),
    (zarr.group({})._async_group, "AsyncGroup", "make a zarr.Group of it"),
    (dask.delayed(X), "Delayed", "make an array of it with dask.array.from_delayed"),
    (Tensor(requires_grad=True), "torch.Tensor", "pass its .detach().numpy()"),
    (Tensor(dtype="torch.bfloat16"), "torch.Tensor", "pass its .float().numpy()"),
    (Tensor(device="cuda:0", dtype="torch.float32"), "torch.Tensor", "pass its .cpu().numpy()"),
    (
        Tensor(device="cuda:0", dtype="torch.bfloat16", requires_grad=True),
        "torch.Tensor",
        "pass its .detach().cpu().float().numpy()",
    ),
    (Tensor(layout="torch.sparse_coo"), "torch.Tensor", "convert it to one"),
    (Tracer(), "Tracer", "convert it to one"),
    ([Tensor()], "list", "convert it to one"),
    (None, "NoneType", "convert it to one"),
    ({1.0}, "set", "convert it to one"),
    ({"a": X}, "dict", "convert it to one"),
    ((x for x in X), "generator", "convert it to one"),
    (object(), "object", "convert it to one"),
    (np, "module", "convert it to one"),
    (pd.NA, "NAType", "convert it to one"),
]


@pytest.mark.parametrize(("t", "kind", "remedy"), NO_ARRAYS, ids=range(len(NO_ARRAYS)))
def test_what_is_no_array_is_named(t, kind, remedy):
    calls = [
        lambda: clip_by_norm(t, 1.0),
        lambda: norm(t),
        lambda: clip_by_norm(X, limits=t),
    ]
    if t is not None:
        calls += [lambda: global_norm([X, t]), lambda: clip_by_global_norm([t], 1.0)]
    for call in calls[: 2 if t is None else None]:
        with pytest.raises(TypeError) as caught:
            call()
        text = str(caught.value)
        assert isinstance(caught.value, DaskClipError)
        assert text.startswith("an object of type ")
        assert kind in text.partition(" is not an array")[0]
        assert text.endswith(remedy)
        assert "\n" not in text


def test_objects_of_xarray_are_no_arrays():
    xr = pytest.importorskip("xarray", reason="xarray is not installed")
    lazy = xr.DataArray(da.from_array(X, 2), dims=["x", "y"])
    for t, remedy in (
        (lazy, "; pass its .data, or use daskclip.xarray"),
        (lazy.variable, "; pass its .data"),
        (lazy.to_dataset(name="data"), "; use daskclip.xarray"),
        (lazy.compute().to_dataset(name="data"), "; use daskclip.xarray"),
        (xr.DataTree(), "; use daskclip.xarray"),
    ):
        for call in (lambda t=t: clip_by_norm(t, 1.0), lambda t=t: global_norm([t])):
            with pytest.raises(DaskClipError, match=f"{re.escape(remedy)}$"):
                call()


def test_a_future_is_no_array():
    with local_client(1) as c:
        t = c.scatter(X)
        with pytest.raises(
            DaskClipError, match=r"Future is not an array .* dask.array.from_delayed$"
        ):
            clip_by_norm(t, 1.0)
        with pytest.raises(DaskClipError, match=r"^clip_norm "):
            clip_by_norm(X, t)
        del t


OTHER_ARRAYS = """
import dask_array, numpy
from daskclip import clip_by_norm
x = dask_array.ones((4,), chunks=2)
for arguments in ((x, 1.0), (numpy.ones(4), x.sum())):
    try:
        clip_by_norm(*arguments)
    except TypeError as error:
        print(error)
"""


@pytest.mark.skipif(find_spec("dask_array") is None, reason="dask-array is not installed")
def test_an_array_of_the_package_dask_array_is_named():
    # in a process of its own: the package changes the names of all Dask arrays when it is imported
    command = [sys.executable, "-c", OTHER_ARRAYS]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    array, limit = done.stdout.splitlines()
    assert array.startswith("an object of type dask_array.")
    assert array.endswith("; make it with dask.array")
    assert "is not computed; give a number" in limit


def test_what_is_lazy_is_not_computed():
    def fail():
        raise AssertionError("computed")

    lazy = dask.delayed(fail)()
    with pytest.raises(DaskClipError, match=r"is not computed; give a number, .* \.compute\(\)$"):
        clip_by_norm(X, lazy)
    xr = pytest.importorskip("xarray", reason="xarray is not installed")
    with pytest.raises(DaskClipError, match="is not computed"):
        clip_by_norm(X, xr.DataArray(da.from_delayed(lazy, (), float)))
    assert bits(clip_by_norm(X, xr.DataArray(1.0))) == bits(clip_by_norm(X, 1.0))


@pytest.mark.parametrize(
    "t", [np.array([None]), pd.DataFrame({"a": [1.0], "b": ["x"]}), ["a"], [None]], ids=repr
)
def test_arrays_of_objects_are_refused(t):
    with pytest.raises(DTypeError, match=r"dtype (object|str32) cannot be clipped"):
        clip_by_norm(t, 1.0)


def test_series_are_arrays():
    assert bits(clip_by_norm(pd.Series(X[0]), 1.0)) == bits(clip_by_norm(X[0], 1.0))
