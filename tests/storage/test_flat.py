"""Flat sources: .npy and .safetensors files, memory maps and arrays in memory."""

import json
import os
import pickle
import sys
import tempfile
from pathlib import Path

import dask
import numpy as np
import pytest
import zarr
from command_line import assert_fails, run
from flat import INDEX, TENSORS, npy, npy_of, safetensors, safetensors_of, shards
from reference import bits
from servers import local_cluster, missing
from stores import files_of, read, some

from daskclip import (
    clip_by_global_norm,
    clip_by_norm,
    clip_zarr,
    open_flat,
    plan_zarr,
    stats_zarr,
    verify_zarr,
)
from daskclip.errors import (
    DaskClipError,
    DTypeError,
    InvalidValueError,
    SourceError,
    TargetError,
    TargetExistsError,
)
from daskclip.storage.foreign import arrays

DTYPES = ["f2", "f4", "f8", "c8", "c16", ">f2", ">f4", ">f8", ">c8", ">c16"]
SHAPES = [(), (0,), (7,), (50, 3), (3, 50), (5, 6, 7), (0, 4), (4, 0), (1, 1), (1, 100)]


@pytest.fixture
def tiny(monkeypatch):
    """Chunks of a few elements."""
    monkeypatch.setattr(arrays, "CHUNK_NBYTES", 64)


def assert_clipped(source, x, target, axes=None):
    """Clip, and compare bits, byte order and a second run; returns the report."""
    report = clip_zarr(source, target, 1.0, axes)
    y = zarr.open_array(target, mode="r")
    assert bits(y[...]) == bits(clip_by_norm(x, 1.0, axes).astype(y.dtype))
    assert y.metadata.zarr_format == 3
    assert type(y.compressors[0]).__name__ == "ZstdCodec"
    assert clip_zarr(source, target, 1.0, axes).status == "up to date"
    verify_zarr(target, source)
    return report


# --- .npy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_npy_file_is_clipped_as_its_array(tmp_path, tiny, dtype, order):
    x = np.asarray(some((20, 6), dtype), order=order)
    path = npy(tmp_path / "x.npy", x)
    assert_clipped(path, x, tmp_path / "y", axes=1)
    assert np.load(path).tobytes() == x.tobytes()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_npy_file_of_any_shape(tmp_path, tiny, shape, order):
    x = np.asarray(some(shape, "f4"), order=order)
    assert_clipped(npy(tmp_path / "x.npy", x), x, tmp_path / "y", axes=None if not shape else -1)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_an_npy_file_of_any_version(tmp_path, version):
    x = some((5, 6), "f4")
    assert_clipped(npy(tmp_path / "X.NPY", x, version), x, tmp_path / "y")


def test_an_npy_file_that_numpy_writes_is_clipped_by_its_path_or_url(tmp_path, monkeypatch):
    x = some((5, 6), "f4")
    np.save(tmp_path / "x.npy", x)
    monkeypatch.chdir(tmp_path)
    for i, source in enumerate(("x.npy", Path("x.npy"), f"file://{tmp_path}/x.npy")):
        assert assert_clipped(source, x, f"y{i}").source == str(tmp_path / "x.npy")
    done = run("run", "x.npy", "z", "--clip-norm", 1, "--axes", 1)
    assert done.exit_code == 0, done.stderr
    assert bits(read(tmp_path / "z")) == bits(clip_by_norm(x, 1.0, 1))
    assert run("stats", "x.npy").exit_code == 0
    assert run("plan", "x.npy", "w", "--clip-norm", 1).exit_code == 0


@pytest.mark.parametrize("order", ["C", "F"])
def test_chunks_are_ranges_of_the_file(tmp_path, order):
    shape = (3000, 700) if order == "C" else (700, 3000)
    x = np.asarray(np.zeros(shape, "f4"), order=order)
    array = open_flat(npy(tmp_path / "x.npy", x))
    assert array.chunks == ((1497, 700) if order == "C" else (700, 1497))
    # a row that is larger than a chunk is cut too
    wide = open_flat(npy(tmp_path / "w.npy", np.zeros((2, 3 << 20), "f2")))
    assert wide.chunks == (1, 1 << 21)


@pytest.mark.parametrize(
    "x",
    [
        np.zeros(3, "i4"), np.zeros(3, "?"), np.zeros(3, "u1"), np.zeros(3, "M8[s]"),
        np.zeros(3, "U3"), np.zeros(3, "S3"), np.zeros(3, [("a", "f4")]), np.zeros(3, "V2"),
        np.zeros(3, np.longdouble),
    ],
    ids=lambda x: str(x.dtype),
)  # fmt: skip
def test_other_dtypes_are_refused_with_their_names(tmp_path, x):
    path = npy(tmp_path / "x.npy", x)
    for source in (path, x):
        with pytest.raises(TypeError, match="float32") as caught:
            clip_zarr(source, tmp_path / "y", 1.0)
        assert caught.value.exit_code == 3
        assert str(x.dtype) in str(caught.value)


def test_pickled_objects_are_refused_and_not_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return exec, ("raise SystemExit('loaded')",)

    np.save(tmp_path / "x.npy", np.array([Bomb()], object), allow_pickle=True)
    done = run("run", tmp_path / "x.npy", tmp_path / "y", "--clip-norm", 1)
    assert_fails(done, 3, "dtype object", "; store it as")


HEADERS = {
    "empty": b"",
    "no dict": b"[1, 2]",
    "call": b"__import__('os').system('false')",
    "no shape": b"{'descr': '<f4', 'fortran_order': False}",
    "more": b"{'descr': '<f4', 'fortran_order': False, 'shape': (5, 6), 'a': 1}",
    "list as shape": b"{'descr': '<f4', 'fortran_order': False, 'shape': [5, 6]}",
    "negative": b"{'descr': '<f4', 'fortran_order': False, 'shape': (-5, -6)}",
    "huge": b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 6)}",
    "overflowing": b"{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296)}",
    "1e30 empty": b"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 1" + b"0" * 30 + b")}",
    "digits": b"{'descr': '<f4', 'fortran_order': False, 'shape': (1" + b"0" * 9000 + b",)}",
    "many axes": b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"1," * 65 + b")}",
    "float": b"{'descr': '<f4', 'fortran_order': False, 'shape': (5., 6)}",
    "no bool": b"{'descr': '<f4', 'fortran_order': 'no', 'shape': (5, 6)}",
    "no dtype": b"{'descr': 'f9', 'fortran_order': False, 'shape': (5, 6)}",
    "odd dtype": b"{'descr': [[]], 'fortran_order': False, 'shape': (5, 6)}",
    "nesting": b"(" * 9000,
    "signs": b"-" * 9000 + b"1",
    "lists": b"[" * 150 + b"]" * 150,
    "sums": b"1" + b"+1j" * 3000,
    "escape": b"{'descr': '\\d', 'fortran_order': False, 'shape': (5, 6)}",
    "NUL": b"\0" * 40,
    "long": b" " * 20_000,
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_damaged_npy_header_is_refused_in_one_line(tmp_path, kind):
    path = npy_of(tmp_path / "x.npy", HEADERS[kind], some((5, 6), "f4"))
    done = run("run", path, tmp_path / "y", "--clip-norm", 1)
    assert_fails(done, 3, str(path), "; check ")


@pytest.mark.parametrize("left", [*range(12), 40, 127, 128, 200, 247])
def test_an_npy_file_that_is_cut_off_is_refused_in_one_line(tmp_path, left):
    path = npy(tmp_path / "x.npy", some((5, 6), "f4"))
    os.truncate(path, left)
    done = run("run", path, tmp_path / "y", "--clip-norm", 1)
    assert_fails(done, 3, str(path), "; check the file")


# --- identity -------------------------------------------------------------------------------------


def test_a_file_that_changed_is_another_source(tmp_path):
    x = some((5, 6), "f4")
    path = npy(tmp_path / "x.npy", x)
    clip_zarr(path, tmp_path / "y", 1.0)
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(TargetExistsError):
        clip_zarr(path, tmp_path / "y", 1.0)
    assert clip_zarr(path, tmp_path / "y", 1.0, overwrite=True).status == "clipped"


@pytest.mark.parametrize("change", ["write", "replace", "cut"])
def test_a_file_that_changes_during_a_run_is_noticed(tmp_path, tiny, monkeypatch, change):
    x = some((50, 6), "f4")
    path, other = npy(tmp_path / "x.npy", x), npy(tmp_path / "other.npy", x + 1)
    original = arrays.read_range

    def changing(path, offset, buffer):
        found = original(path, offset, buffer)
        monkeypatch.setattr(arrays, "read_range", original)
        if change == "replace":
            os.replace(other, path)
        elif change == "write":
            os.utime(path)
        else:
            os.truncate(path, 200)
        return found

    monkeypatch.setattr(arrays, "read_range", changing)
    with pytest.raises(SourceError, match=r"changed|shorter") as caught:
        clip_zarr(path, tmp_path / "y", 1.0, 1)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == sorted({"x.npy", *(["other.npy"] * other.exists())})


def test_an_interrupted_run_is_resumed_and_not_of_another_file(tmp_path, tiny, small, monkeypatch):
    from stores import stopping_at

    x = some((50, 6), "f4")
    path = npy(tmp_path / "x.npy", x)
    left = stopping_at(monkeypatch)
    left[0] = 3
    with pytest.raises(KeyboardInterrupt):
        clip_zarr(path, tmp_path / "y", 1.0, 1)
    times = path.stat()
    os.utime(path, ns=(0, 0))
    with pytest.raises(TargetExistsError, match="changed since"):
        clip_zarr(path, tmp_path / "y", 1.0, 1)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(TargetExistsError, match="changed since"):  # by its change time
        clip_zarr(path, tmp_path / "y", 1.0, 1)


def test_a_resumed_run_has_the_bits_of_a_whole_one(tmp_path, tiny, small, monkeypatch):
    from stores import stopping_at

    x = some((50, 6), "f4")
    path = npy(tmp_path / "x.npy", x)
    left = stopping_at(monkeypatch)
    for stop in range(1, 30):
        left[0] = stop
        try:
            clip_zarr(path, tmp_path / "y", 1.0, 1)
            break
        except KeyboardInterrupt:
            pass
    assert stop > 2
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(x, 1.0, 1))


# --- places ---------------------------------------------------------------------------------------


def test_in_place_and_over_the_source_are_refused(tmp_path):
    path = npy(tmp_path / "x.npy", some((5, 6), "f4"))
    before = path.read_bytes()
    done = run("run", path, "--in-place", "--clip-norm", 1)
    assert_fails(done, 3, "is a flat file, which is not clipped in place")
    for flags in ([], ["--overwrite"]):
        assert_fails(run("run", path, path, "--clip-norm", 1, *flags), 3, "choose another")
    group = zarr.create_group(tmp_path / "g")
    group.create_array("a", data=some((5, 6), "f4"))
    os.rename(path, inside := tmp_path / "g/x.npy")
    done = run("run", inside, tmp_path / "g", "--clip-norm", 1, "--overwrite")
    assert_fails(done, 3, "choose another")
    assert inside.read_bytes() == before


def test_a_folder_or_a_pipe_with_the_name_of_a_flat_file(tmp_path):
    x = some((5, 6), "f4")
    zarr.create_array(tmp_path / "x.npy", data=x)
    clip_zarr(tmp_path / "x.npy", tmp_path / "y", 1.0)
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(x, 1.0))
    os.mkfifo(tmp_path / "p.npy")
    assert_fails(run("run", tmp_path / "p.npy", tmp_path / "z", "--clip-norm", 1), 3)


def test_a_link_to_a_file_is_followed(tmp_path):
    x = some((5, 6), "f4")
    npy(tmp_path / "blob", x)
    os.symlink("blob", tmp_path / "x.npy")
    assert_clipped(tmp_path / "x.npy", x, tmp_path / "y")


def test_limits_may_be_flat_too(tmp_path):
    x, limits = some((5, 6), "f4"), np.linspace(0.5, 2, 5)[:, None]
    path = npy(tmp_path / "limits.npy", limits)
    clip_zarr(npy(tmp_path / "x.npy", x), tmp_path / "y", axes=1, limits=path)
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(x, axes=1, limits=limits))


# --- arrays in memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["C", "F", "step", "reversed", "broadcast", "0-d", "read-only"])
def test_a_numpy_array_is_clipped(tmp_path, tiny, view):
    x = some((20, 6), "f4")
    x = {
        "C": x, "F": np.asfortranarray(x), "step": x[::2, ::3], "reversed": x[::-1],
        "broadcast": np.broadcast_to(x[0], (9, 6)), "0-d": x[0, 0, ...], "read-only": x,
    }[view]  # fmt: skip
    x.flags.writeable = view not in ("read-only", "broadcast")
    assert "in memory" in assert_clipped(x, x.copy(), tmp_path / "y").source
    changed = x.copy()
    changed[...] += 1
    with pytest.raises(TargetExistsError):
        clip_zarr(changed, tmp_path / "y", 1.0)


def test_an_array_in_memory_stays_in_this_process(tmp_path):
    with dask.config.set(scheduler="processes"), pytest.raises(DaskClipError, match="processes"):
        clip_zarr(some((5, 6), "f4"), tmp_path / "y", 1.0)


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
@pytest.mark.parametrize("part", ["whole", "rows", "columns", "transposed", "of npy"])
def test_a_memory_map_is_read_from_its_file(tmp_path, tiny, mode, part):
    x = some((40, 6), "f4")
    (tmp_path / "raw").write_bytes(b"\0" * 12 + x.tobytes())
    source = np.memmap(tmp_path / "raw", "f4", mode, 12, (40, 6))
    if part == "of npy":
        source = np.load(npy(tmp_path / "x.npy", x), mmap_mode=mode)
    cut = {"rows": np.s_[3:31], "columns": np.s_[:, 2:5]}.get(part, np.s_[:])
    source, x = source[cut], x[cut]
    if part == "transposed":
        source, x = source.T, x.T
    report = assert_clipped(source, x, tmp_path / "y", axes=1)
    in_file = mode != "c" and part != "columns"
    assert report.source.startswith(str(tmp_path)) == in_file


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_memory_map_is_read_by_other_processes(tmp_path, mode):
    x = some((40, 6), "f4")
    source = np.load(npy(tmp_path / "x.npy", x), mmap_mode=mode)[3:]
    with dask.config.set(scheduler="processes"):
        assert_clipped(source, x[3:], tmp_path / "y", 1)


def test_a_memory_map_that_was_written_is_another_source(tmp_path):
    np.save(tmp_path / "x.npy", some((40, 6), "f4"))
    x = np.load(tmp_path / "x.npy", mmap_mode="r+")
    x[0] = 3
    clip_zarr(x, tmp_path / "y", 1.0, 1)
    assert clip_zarr(x, tmp_path / "y", 1.0, 1).status == "up to date"
    x[0] = 5
    with pytest.raises(TargetExistsError):
        clip_zarr(x, tmp_path / "y", 1.0, 1)
    assert clip_zarr(x, tmp_path / "y", 1.0, 1, overwrite=True).largest_norm > 12


def test_a_memory_map_whose_file_was_replaced_keeps_its_values(tmp_path):
    values = some((40, 6), "f4")
    npy(tmp_path / "x.npy", values)
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    os.replace(npy(tmp_path / "o.npy", values + 1), tmp_path / "x.npy")
    assert_clipped(x, values, tmp_path / "y")


@pytest.mark.parametrize("x", [np.ma.masked_array([1.0], [True]), np.recarray(1, "f4"), [1.0], 1.0])
def test_what_only_looks_like_an_array_is_refused(tmp_path, x):
    with pytest.raises(SourceError, match="give a path"):
        clip_zarr(x, tmp_path / "y", 1.0)


# --- .safetensors ---------------------------------------------------------------------------------


def tensors(seed=0):
    """A tensor of each dtype."""
    rng = np.random.default_rng(seed)
    found = {}
    for i, name in enumerate(TENSORS):
        dtype = pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name
        found[f"layer.{i}"] = (rng.standard_normal((6, 5)) * 4).astype(dtype)
    found |= {"scalar": np.float32(3), "empty": np.zeros((0, 4), "f4"), "in/a/b": some((9,), "f8")}
    return {name: np.asarray(x) for name, x in found.items()}


def assert_group_clipped(source, x, target):
    """Clip a group of tensors and compare each; returns the report."""
    report = clip_zarr(source, target, 1.0)
    written = open_flat_or_zarr(target)
    assert written.keys() == x.keys()
    for name, values in x.items():
        wanted = clip_by_norm(values, 1.0) if values.dtype.kind not in "biu" else values
        assert bits(written[name]) == bits(wanted), name
    assert clip_zarr(source, target, 1.0).status == "up to date"
    verify_zarr(target, source)
    return report


def open_flat_or_zarr(path):
    """Values of all arrays of a group, by name."""
    from daskclip.storage import Hierarchy

    everything = Hierarchy.open(path).arrays
    return {n: a.read(tuple(slice(0, k) for k in a.shape)) for n, a in everything.items()}


def test_a_safetensors_file_is_a_group(tmp_path, tiny):
    x = tensors()
    path = safetensors(tmp_path / "x.safetensors", x, {"format": "pt"})
    report = assert_group_clipped(path, x, tmp_path / "y")
    kept = sum(values.dtype.kind in "biu" for values in x.values())
    assert (report.arrays, report.copied) == (len(x) - kept, kept)
    assert zarr.open_group(tmp_path / "y").attrs["format"] == "pt"
    codecs = zarr.open_array(tmp_path / "y/layer.6", mode="r").compressors
    assert type(codecs[0]).__name__ == "ZstdCodec"


def test_a_folder_of_shards_is_a_group(tmp_path, tiny):
    x = tensors()
    names = [*x]
    folder = shards(tmp_path / "x", [{n: x[n] for n in names[i::3]} for i in range(3)])
    assert_group_clipped(folder, x, tmp_path / "y")
    # a file that was touched is another source
    os.utime(folder / "model-00002-of-00003.safetensors")
    with pytest.raises(TargetExistsError):
        clip_zarr(folder, tmp_path / "y", 1.0)


def test_shards_may_be_links_as_in_a_cache(tmp_path):
    x = {"a": some((5, 6), "f4")}
    folder = shards(tmp_path / "x", [x])
    os.rename(folder / "model-00001-of-00001.safetensors", tmp_path / "blob")
    os.symlink("../blob", folder / "model-00001-of-00001.safetensors")
    assert_group_clipped(folder, x, tmp_path / "y")


@pytest.mark.skipif(bool(missing("safetensors")), reason=missing("safetensors"))
def test_a_file_of_the_safetensors_package(tmp_path):
    from safetensors.numpy import load_file, save_file

    x = {"a": some((5, 6), "f4"), "b": some((7,), "f2"), "n": np.arange(5)}
    save_file(x, tmp_path / "x.safetensors", {"format": "np"})
    assert_group_clipped(tmp_path / "x.safetensors", x, tmp_path / "y")
    # and ours can be read by it
    loaded = load_file(safetensors(tmp_path / "z.safetensors", x))
    assert all(bits(loaded[name]) == bits(x[name]) for name in x)


def test_one_norm_of_all_tensors(tmp_path, tiny):
    x = {"a": some((5, 6), "f4"), "b": some((7,), "f2"), "c": some((30, 2), "f8")}
    clip_zarr(safetensors(tmp_path / "x.safetensors", x), tmp_path / "y", 1.0, global_norm=True)
    wanted, _ = clip_by_global_norm([*x.values()], 1.0)
    for name, values in zip(x, wanted, strict=True):
        assert bits(read(tmp_path / "y" / name)) == bits(values)


def test_float8_is_refused_or_carried_over(tmp_path, tiny):
    x = {"a": some((5, 6), "f4"), "w": np.zeros((30, 30), "V1")}
    path = safetensors(tmp_path / "x.safetensors", x)
    done = run("run", path, tmp_path / "y", "--clip-norm", 1)
    assert_fails(done, 3, "array w", "exclude it")
    report = clip_zarr(path, tmp_path / "y", 1.0, exclude="w")
    assert report.arrays == 1
    document = json.loads((tmp_path / "y/w/zarr.json").read_text())
    assert (document["data_type"], document["shape"]) == ("float8_e4m3fn", [30, 30])
    assert (tmp_path / "y/w/c/0/0").read_bytes() == bytes(60)
    verify_zarr(tmp_path / "y", path)
    assert clip_zarr(path, tmp_path / "y", 1.0, exclude="w").status == "up to date"


def test_bfloat16_without_ml_dtypes_is_refused_or_carried_over(tmp_path, monkeypatch):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = {"a": some((5, 6), "f4"), "w": some((5, 6), "f4").astype(ml_dtypes.bfloat16)}
    path = safetensors(tmp_path / "x.safetensors", x)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    done = run("run", path, tmp_path / "y", "--clip-norm", 1)
    assert_fails(done, 3, "array w", "ml_dtypes", "install")
    clip_zarr(path, tmp_path / "y", 1.0, exclude="w")
    assert (tmp_path / "y/w/c/0/0").read_bytes() == x["w"].tobytes()


def header(**tensor):
    return {"a": {"dtype": "F32", "shape": [5, 6], "data_offsets": [0, 120]} | tensor}


TENSOR_HEADERS = {
    "no object": [1],
    "no dict": {"a": 1},
    "no dtype": {"a": {"shape": [5, 6], "data_offsets": [0, 120]}},
    "unknown dtype": header(dtype="F4"),
    "list as dtype": header(dtype=["F32"]),
    "shorter": header(shape=[5, 5]),
    "longer": header(shape=[5, 7], data_offsets=[0, 140]),
    "huge": header(shape=[2**40, 2**40], data_offsets=[0, 2**82]),
    "negative": header(shape=[-5, -6]),
    "float": header(shape=[5.0, 6]),
    "bool": header(shape=[True, 30]),
    "one offset": header(data_offsets=[120]),
    "backwards": header(data_offsets=[120, 0]),
    "hole": header(shape=[29], data_offsets=[4, 120]),
    "rest": header(shape=[29], data_offsets=[0, 116]),
    "many axes": header(shape=[1] * 70 + [30]),
    "huge and empty": header(shape=[0, 10**30], data_offsets=[0, 0]),
    "overlap": header(shape=[20], data_offsets=[0, 80])
    | {"b": {"dtype": "F32", "shape": [20], "data_offsets": [40, 120]}},
    "same": header() | {"b": {"dtype": "F32", "shape": [5, 6], "data_offsets": [0, 120]}},
    "metadata": {"__metadata__": {"a": 1}} | header(),
    **{
        f"name {name!r}": {name: header()["a"]}
        for name in ("", ".", "..", "../x", "/x", "x/", "a//b", "zarr.json", ".zarray", "a\0b",
                     ".daskclip", "\ud800", "x" * 300, "a\nb")
    },
    "inside": header(shape=[15], data_offsets=[0, 60])
    | {"a/b": {"dtype": "F32", "shape": [15], "data_offsets": [60, 120]}},
}  # fmt: skip


@pytest.mark.parametrize("kind", TENSOR_HEADERS)
def test_a_damaged_safetensors_header_is_refused_in_one_line(tmp_path, kind):
    text = json.dumps(TENSOR_HEADERS[kind]).encode()
    path = safetensors_of(tmp_path / "x.safetensors", text, {"a": some((5, 6), "f4")})
    done = run("run", path, tmp_path / "y", "--clip-norm", 1)
    assert_fails(done, 3, str(path), "; check ")
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize(
    "data",
    [b"", b"\1", b"\xff" * 8, b"\xff" * 100, b"\2" + b"\0" * 7 + b"[]", b"\2" + b"\0" * 7 + b"{}"]
    + [n.to_bytes(8, "little") + b"[" * n for n in (10, 1000, 100_000)],
    ids=len,
)  # fmt: skip
def test_a_file_that_is_no_safetensors_file_is_refused_in_one_line(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    assert_fails(run("run", path, tmp_path / "y", "--clip-norm", 1), 3, str(path), "; ")


@pytest.mark.parametrize(
    "index",
    [
        "[]", "{}", "{", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": "no.safetensors"}}',
        '{"weight_map": {"b": "model-00001-of-00001.safetensors"}}',
    ],
)  # fmt: skip
def test_a_damaged_index_is_refused_in_one_line(tmp_path, index):
    folder = shards(tmp_path / "x", [{"a": some((5, 6), "f4")}])
    (folder / INDEX).write_text(index)
    done = run("run", folder, tmp_path / "y", "--clip-norm", 1)
    assert_fails(done, 3, str(folder), "; ")


# --- as zarr's own arrays -------------------------------------------------------------------------


def test_a_flat_file_is_opened_as_a_lazy_array(tmp_path, tiny):
    x = some((40, 6), "f4")
    array = open_flat(npy(tmp_path / "x.npy", np.asfortranarray(x)))
    assert bits(array[...]) == bits(x)
    assert bits(array[3:9, 1:4]) == bits(x[3:9, 1:4])
    assert bits(clip_by_norm(array, 1.0, 1).compute()) == bits(clip_by_norm(x, 1.0, 1))
    assert array.read_only
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0
    assert_clipped(array, x, tmp_path / "y")


def test_a_safetensors_file_is_opened_as_a_group(tmp_path, tiny):
    x = tensors()
    group = open_flat(safetensors(tmp_path / "x.safetensors", x, {"format": "pt"}))
    assert group.attrs["format"] == "pt"
    assert {name for name, _ in group.members(max_depth=None)} == {*x, "in", "in/a"}
    for name, values in x.items():
        assert bits(group[name][...]) == bits(values), name
        assert bits(pickle.loads(pickle.dumps(group[name]))[...]) == bits(values), name
    lazy = clip_by_norm(group["layer.10"], 1.0)
    assert bits(lazy.compute()) == bits(clip_by_norm(x["layer.10"], 1.0))
    assert_group_clipped(group, x, tmp_path / "y")
    assert_clipped(group["layer.11"], x["layer.11"], tmp_path / "z")


@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")
def test_keys_of_the_store_are_those_it_lists(tmp_path, tiny):
    x = {"c": some((9, 5), "f4"), "d/c": some((3,), "f8"), "s": np.float32(1)}
    x["e"] = np.zeros((0, 2))
    path = safetensors(tmp_path / "x.safetensors", {k: np.asarray(v) for k, v in x.items()})
    store = open_flat(path).store
    import asyncio

    from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
    from zarr.core.buffer import default_buffer_prototype

    async def look():
        keys = [key async for key in store.list()]
        assert len(keys) == len({*keys})
        for key in keys:
            assert await store.exists(key)
            whole = (await store.get(key, default_buffer_prototype())).to_bytes()
            for wanted, part in (
                (RangeByteRequest(3, 9), whole[3:9]),
                (OffsetByteRequest(5), whole[5:]),
                (SuffixByteRequest(7), whole[-7:]),
            ):
                got = await store.get(key, default_buffer_prototype(), wanted)
                assert got.to_bytes() == part
        for prefix in ("", "c", "c/", "c/c", "d", "d/c/c/0", "x"):
            listed = [key async for key in store.list_prefix(prefix)]
            assert sorted(listed) == sorted(k for k in keys if k.startswith(prefix))
        for key in ("c/c/9/0", "c/c/0", "c/c/00/0", "x/c/0", "c/c/0/-1", "e/c/0/0", "s/c/0", ""):
            assert not await store.exists(key)
            assert await store.get(key, default_buffer_prototype()) is None
        assert {name async for name in store.list_dir("c")} == {"zarr.json", "c"}

    asyncio.run(look())


def test_an_array_of_bfloat16_is_opened_and_clipped(tmp_path):
    x = some((4, 6), "f4").astype(pytest.importorskip("ml_dtypes").bfloat16)
    array = open_flat(x)
    assert (bits(array[...]), array.dtype) == (bits(x), x.dtype)
    assert bits(clip_by_norm(array, 1.0, 1).compute()) == bits(clip_by_norm(x, 1.0, 1))
    clip_zarr(x, tmp_path / "y", 1.0, 1)
    verify_zarr(tmp_path / "y", x)


def test_stores_are_equal_where_their_arrays_are(tmp_path):
    path, x = npy(tmp_path / "x.npy", some((9, 6), "f4")), some((9, 6), "f4")
    mapped = np.load(path, mmap_mode="r")
    stores = [open_flat(a).store for a in (path, mapped[1:4], mapped[2:5], x)]
    assert [[a == b for a in stores] for b in stores] == np.eye(4, dtype=bool).tolist()
    assert open_flat(path).store == stores[0] == pickle.loads(pickle.dumps(stores[0]))
    assert open_flat(mapped[1:4]).store == stores[1]


def test_a_file_that_was_written_again_is_opened_again(tmp_path):
    path = npy(tmp_path / "x.npy", some((9, 6), "f4"))
    array = open_flat(path)
    npy(path, some((6, 9), "f8"))
    with pytest.raises(SourceError, match="open it again"):
        clip_zarr(array, tmp_path / "y", 1.0)


def test_what_is_not_flat_is_not_opened_as_such(tmp_path):
    zarr.create_array(tmp_path / "x", data=some((5, 6), "f4"))
    with pytest.raises(SourceError, match=r"zarr\.open"):
        open_flat(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        open_flat(tmp_path / "no.npy")


def test_flat_sources_are_measured_and_planned(tmp_path, tiny):
    x = some((40, 6), "f4")
    path = npy(tmp_path / "x.npy", x)
    assert stats_zarr(path, axes=1).slices == 40
    stats_zarr(path, axes=1, save_norms=tmp_path / "n")
    clip_zarr(path, tmp_path / "y", 1.0, 1, norms=tmp_path / "n")
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(x, 1.0, 1))
    assert plan_zarr(path, tmp_path / "z", 1.0, 1).shape == (40, 6)
    clip_zarr(path, tmp_path / "z", "p50", 1)
    with pytest.raises(InvalidValueError, match="is an array"):
        clip_zarr(path, tmp_path / "w", 1.0, include="a")


def files_but_journals(folder):
    return {key: data for key, data in files_of(folder).items() if ".daskclip/" not in key}


@pytest.mark.distributed
def test_a_cluster_writes_the_same_files(tmp_path):
    x = some((700, 900), "f8")
    path = npy(tmp_path / "x.npy", np.asfortranarray(x))
    parts = shards(tmp_path / "s", [{"a": x}, {"b": some((9, 5), "f2"), "n": np.arange(5)}])
    sources = {"file": path, "map": np.load(path, mmap_mode="r"), "folder": parts}
    for name, source in sources.items():
        clip_zarr(source, tmp_path / name, 1.0, 0, exclude="n" if name == "folder" else None)
    with local_cluster(2) as cluster, cluster.get_client():
        for name, source in sources.items():
            target = tmp_path / f"{name} again"
            clip_zarr(source, target, 1.0, 0, exclude="n" if name == "folder" else None)
            verify_zarr(target, source)
            assert files_but_journals(target) == files_but_journals(tmp_path / name)
        lazy = clip_by_norm(open_flat(path), 1.0, 0)
        assert bits(lazy.compute()) == bits(clip_by_norm(x, 1.0, 0))


def test_errors_of_dtypes_and_places_are_of_their_kinds(tmp_path):
    path = npy(tmp_path / "x.npy", np.zeros(3, "i4"))
    with pytest.raises(DTypeError):
        clip_zarr(path, tmp_path / "y", 1.0)
    with pytest.raises(TargetError):
        clip_zarr(npy(tmp_path / "f.npy", np.zeros(3)), None, 1.0, in_place=True)


@pytest.mark.parametrize("name", ["y.npy", "Y.SAFETENSORS"])
def test_targets_are_not_named_like_flat_files(tmp_path, name):
    np.save(tmp_path / "x.npy", np.ones((4, 3), "f4"))
    with pytest.raises(TargetError, match="would be a folder with the name of a flat file"):
        clip_zarr(tmp_path / "x.npy", tmp_path / name, 1.0)
    assert {path.name for path in tmp_path.iterdir()} == {"x.npy"}


def test_flat_files_are_not_clipped_in_place(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((4, 3), "f4"))
    with pytest.raises(TargetError, match=r"x\.npy is a flat file, which is not clipped in place"):
        clip_zarr(tmp_path / "x.npy", None, 1.0, in_place=True)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="there is no file system in memory")
def test_changes_through_a_map_of_a_file_in_memory_are_found():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        np.save(f"{folder}/x.npy", np.ones((4, 3), "f4"))
        mapped = np.load(f"{folder}/x.npy", mmap_mode="r+")
        for source in (mapped, f"{folder}/x.npy"):
            mapped[:] = 1
            target = f"{folder}/y{type(source).__name__}"
            clip_zarr(source, target, 1.0, axes=1)
            assert clip_zarr(source, target, 1.0, axes=1).status == "up to date"
            mapped[:] = 100  # the times of a file on tmpfs stay
            with pytest.raises(TargetExistsError):
                clip_zarr(source, target, 1.0, axes=1)


def test_an_empty_array_may_be_very_long(tmp_path):
    path = npy(tmp_path / "x.npy", np.empty((0, 3), "f4"), shape=(0, 2**62))
    assert clip_zarr(path, tmp_path / "y", 1.0).slices == 1
    assert [key for key in open_flat(path).store._keys("") if key != "zarr.json"] == []


def test_keys_below_a_prefix_are_those_of_all_that_begin_with_it(tmp_path):
    names = ["a", "a.b", "b/c", "b/cc", "b/c.d/e"]
    path = safetensors(tmp_path / "x.safetensors", dict.fromkeys(names, some((4,), "f4")))
    store = open_flat(path).store
    keys = [*store._keys("")]
    for prefix in {key[:end] for key in keys for end in range(len(key) + 1)}:
        assert [*store._keys(prefix)] == [key for key in keys if key.startswith(prefix)]


def test_a_missing_shard_is_said(tmp_path):
    folder = shards(tmp_path / "x", [{"a": some((4,), "f4")}, {"b": some((4,), "f4")}])
    os.remove(min(folder.glob("*.safetensors")))
    with pytest.raises(SourceError, match=r"\(file .*safetensors is missing\)"):
        clip_zarr(folder, tmp_path / "y", 1.0)


def test_a_long_header_of_the_first_format_is_refused_without_advice_on_python(tmp_path):
    path = tmp_path / "x.npy"
    path.write_bytes(b"\x93NUMPY\1\0\xff\xff{" + b" " * 70_000)
    with pytest.raises(SourceError, match="its header has more than 10000 bytes"):
        clip_zarr(path, tmp_path / "y", 1.0)
    path.write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(SourceError, match="its first bytes are not those of one"):
        clip_zarr(path, tmp_path / "y", 1.0)
