"""Groups in one run: arrays clipped by their own norms or by one, the rest copied byte for byte."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import zarr
from oracle import ARRAYS, BY_GLOBAL_NORM, CASES, argument, array
from reference import bits
from servers import BIN
from sizes import SMALL
from stores import files_of, some, stopping_at, stored
from zarr.storage import MemoryStore

from daskclip import (
    clip_by_global_norm,
    clip_by_norm,
    clip_zarr,
    norm,
    plan_zarr,
    stats_zarr,
    verify_zarr,
)
from daskclip.errors import (
    DaskClipError,
    InvalidValueError,
    MemoryBudgetError,
    SourceError,
    TargetError,
    VerificationError,
)
from daskclip.worker.context import PROCESS
from daskclip.worker.pool import LocalPool

SIZES = SMALL | {"block_nbytes": 128}
SHAPES = {
    "bias": (7,), "layers/0/kernel": (9, 14), "layers/0/bias": (5,), "layers/1/kernel": (4, 6, 5),
    "scale": (), "empty": (0, 3), "values": (6, 2),
}  # fmt: skip
NAMES = sorted(SHAPES)


def make(path, zarr_format=3, **options):
    """Make a nested group of floating and other arrays; returns the values of the floating ones."""
    group = zarr.create_group(path, zarr_format=zarr_format, attributes={"run": 7})
    values = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        dtype = ["f4", ">f8", "f2", "c8"][i % 4]
        one = group.create_array(
            name, shape=shape, chunks=tuple(max(1, n // 2) for n in shape), dtype=dtype,
            attributes={"unit": "1"}, **options,
        )  # fmt: skip
        values[name] = some(shape, dtype, i)
        one[...] = values[name]
    indices = group.create_array("indices", shape=(6,), chunks=(4,), dtype="i8")
    indices[:] = np.arange(6)
    dense = group.create_array("dense_shape", shape=(2,), chunks=(2,), dtype="i4")
    dense[:] = [100, 2]
    return values


def read_member(path, name):
    return zarr.open_group(path, mode="r")[name][...]


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("consolidated", [False, True])
def test_every_array_is_clipped_by_its_own_norm(tmp_path, zarr_format, consolidated):
    values = make(tmp_path / "x", zarr_format)
    if consolidated:
        zarr.consolidate_metadata(tmp_path / "x")
    report = clip_zarr(tmp_path / "x", tmp_path / "y", 1.5)
    assert (report.arrays, report.copied, report.slices) == (len(SHAPES), 2, len(SHAPES))
    clipped = {name: clip_by_norm(x, 1.5) for name, x in values.items()}
    for name, x in clipped.items():
        assert bits(read_member(tmp_path / "y", name)) == bits(x)
    assert report.clipped == sum(bits(clipped[n]) != bits(values[n]) for n in NAMES) > 3
    before, after = stored(tmp_path / "x"), stored(tmp_path / "y")
    assert before.keys() == after.keys()
    same = [k for k in before if before[k] == after[k]]
    metadata = [k for k in before if k.split("/")[-1] in ("zarr.json", ".zarray", ".zattrs")]
    carried = [k for k in before if k.split("/")[0] in ("indices", "dense_shape", ".zmetadata")]
    assert {*metadata, *carried} <= set(same)
    assert verify_zarr(tmp_path / "y", tmp_path / "x").slices == len(SHAPES)
    again = clip_zarr(tmp_path / "x", tmp_path / "y", 1.5)
    assert (again.status, again.bytes_read, again.digest) == ("up to date", 0, report.digest)


@pytest.mark.parametrize("memory", ["tight", "ample"])
@pytest.mark.parametrize("shards", [False, True])
def test_one_norm_of_all_arrays(tmp_path, memory, shards, small):
    values = make(tmp_path / "x", **({"shards": None} if shards else {}))
    limit = {"tight": 4096, "ample": "512MiB"}[memory]
    report = clip_zarr(tmp_path / "x", tmp_path / "y", 2.0, global_norm=True, memory=limit)
    clipped, norm = clip_by_global_norm([values[n] for n in NAMES], 2.0)
    assert (report.slices, report.clipped, report.largest_norm) == (1, 1, norm)
    assert report.passes == 2
    for name, x in zip(NAMES, clipped, strict=True):
        assert bits(read_member(tmp_path / "y", name)) == bits(x)
    assert verify_zarr(tmp_path / "y", tmp_path / "x").slices == 1
    again = clip_zarr(tmp_path / "y", tmp_path / "z", 2.0, global_norm=True)
    assert again.clipped == 0
    assert again.digest == report.digest


@pytest.mark.parametrize("empty", ["a", "z"])
@pytest.mark.parametrize("how", [{}, {"pictures": True}, {"nonfinite": "raise"}])
def test_one_norm_where_some_arrays_are_empty(tmp_path, empty, how):
    group, x = zarr.create_group(tmp_path / "x"), some((6, 4), "f4", 1)
    group.create_array(empty, shape=(3, 0, 2), chunks=(1, 1, 1), dtype="f8")
    group.create_array("b", shape=x.shape, chunks=(2, 4), dtype="f4")[...] = x
    report = clip_zarr(tmp_path / "x", tmp_path / "y", 1.0, global_norm=True, **how)
    assert (report.slices, report.clipped) == (1, 1)
    assert bits(read_member(tmp_path / "y", "b")) == bits(clip_by_norm(x, 1.0))
    assert verify_zarr(tmp_path / "y", tmp_path / "x").slices == 1
    everything = clip_zarr(
        tmp_path / "x", tmp_path / "z", 1.0, global_norm=True, include=empty, **how
    )
    assert (everything.slices, everything.clipped, everything.largest_norm) == (1, 0, 0.0)


def can_be_stored(case):
    """Whether a recorded case has arrays and a limit that storage takes, and no given norm."""
    takes = any(case["inputs"]) and "bfloat16" not in case["dtypes"]
    return case["use_norm"] is None and takes and argument(case["clip_norm"]) >= 0


STORED = [name for name in BY_GLOBAL_NORM if can_be_stored(CASES[name])]


def test_most_recorded_global_norms_can_be_stored():
    assert len(STORED) > 10


@pytest.mark.parametrize("name", STORED)
def test_recorded_global_norms_through_storage(tmp_path, name):
    case = CASES[name]
    arrays = {
        f"{i:02}": array(key, dtype)
        for i, (key, dtype) in enumerate(zip(case["inputs"], case["dtypes"], strict=True))
        if key is not None
    }
    group = zarr.create_group(tmp_path / "x")
    for key, x in arrays.items():
        chunks = tuple(max(1, n // 2) for n in x.shape)
        group.create_array(key, shape=x.shape, chunks=chunks, dtype=x.dtype)[...] = x
    limit = argument(case["clip_norm"])
    report = clip_zarr(tmp_path / "x", tmp_path / "y", limit, global_norm=True)
    expected, norm = clip_by_global_norm(list(arrays.values()), limit)
    for key, x in zip(arrays, expected, strict=True):
        assert bits(read_member(tmp_path / "y", key)) == bits(x)
    if np.isfinite(norm):
        assert report.largest_norm == norm
    else:
        assert report.nonfinite == 1
    assert len(ARRAYS) > 1


def test_zarr_has_nothing_to_warn_of_in_what_is_written(tmp_path):
    make(tmp_path / "x")
    clip_zarr(tmp_path / "x", tmp_path / "y", 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = dict(zarr.open_group(tmp_path / "y", mode="r").members(max_depth=None))
    assert {n for n, a in found.items() if isinstance(a, zarr.Array)} > set(NAMES)


def test_patterns_choose_arrays(tmp_path):
    values = make(tmp_path / "x")
    report = clip_zarr(tmp_path / "x", tmp_path / "y", 1.0, include="layers/*", exclude=["*/bias"])
    assert (report.arrays, report.copied) == (2, len(SHAPES))
    for name, x in values.items():
        chosen = name in ("layers/0/kernel", "layers/1/kernel")
        assert bits(read_member(tmp_path / "y", name)) == bits(
            clip_by_norm(x, 1.0) if chosen else x
        )


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_coordinates_are_carried(tmp_path, zarr_format):
    group = zarr.create_group(tmp_path / "x", zarr_format=zarr_format)

    def add(name, shape, dims, **attributes):
        named = {"dimension_names": dims} if zarr_format == 3 else {}
        attributes |= {} if zarr_format == 3 else {"_ARRAY_DIMENSIONS": dims}
        one = group.create_array(
            name, shape=shape, chunks=shape, dtype="f8", attributes=attributes, **named
        )
        one[...] = 100.0

    add("time", (3,), ["time"])
    add("in/time", (3,), ["time"])
    add("latitude", (3, 2), ["y", "x"])
    add("height", (3,), ["time"])
    add("sst", (3, 3, 2), ["time", "y", "x"], coordinates="latitude missing")
    report = clip_zarr(tmp_path / "x", tmp_path / "y", 1.0)
    assert (report.arrays, report.copied) == (2, 3)
    untouched = {
        n for n in ("time", "in/time", "latitude") if read_member(tmp_path / "y", n).max() == 100
    }
    assert untouched == {"time", "in/time", "latitude"}
    assert read_member(tmp_path / "y", "height").max() < 1


@pytest.mark.parametrize("how", ["own", "global", "in place"])
def test_a_run_of_a_group_that_is_stopped_anywhere(tmp_path, small, monkeypatch, how):
    make(tmp_path / "whole")
    options = {"global_norm": how == "global", "memory": 4096}
    whole = clip_zarr(tmp_path / "whole", tmp_path / "wanted", 1.0, **options)
    wanted, left = files_of(tmp_path / "wanted"), stopping_at(monkeypatch)
    for lines in range(1, 1000):
        folder = tmp_path / str(lines)
        folder.mkdir()
        make(folder / "x")
        target = None if how == "in place" else folder / "y"

        def run(folder=folder, target=target):
            return clip_zarr(folder / "x", target, 1.0, in_place=target is None, **options)

        left[0] = lines
        try:
            run()
            break
        except KeyboardInterrupt:
            left[0] = 0
        report = run()
        assert report.bytes_read < whole.bytes_read
        assert files_of(target or folder / "x") == wanted
    assert lines > 10


def test_blocks_of_a_thousand_small_arrays_share_tasks_and_records(tmp_path, monkeypatch):
    group = zarr.create_group(tmp_path / "x")
    group.create_array("0000", shape=(4,), chunks=(4,), dtype="f4")[:] = 1
    for i in range(1, 1000):
        shutil.copytree(tmp_path / "x" / "0000", tmp_path / "x" / f"{i:04}")
    submit, made = LocalPool.submit, []

    def counting(self, function, calls, avoid=()):
        made.extend([function.__name__] * len(calls))
        return submit(self, function, calls, avoid)

    monkeypatch.setattr(LocalPool, "submit", counting)
    report = clip_zarr(tmp_path / "x", tmp_path / "y", 1.0)
    assert 60 < made.count("run_batch") < 250
    lines = (tmp_path / "y" / "0000" / ".daskclip").read_bytes().splitlines()
    assert len(lines) < 150
    assert (report.arrays, report.clipped) == (1000, 1000)


def test_nothing_is_held_after_a_run(tmp_path):
    # workers of other tests, which ran in this process, may have left without a word
    before = {*PROCESS._buffers}
    make(tmp_path / "x")
    clip_zarr(tmp_path / "x", tmp_path / "y", 1.0)
    assert before == {*PROCESS._buffers}
    (tmp_path / "x" / "bias" / "c" / "0").write_bytes(b"no zstd")
    with pytest.raises(OSError, match="chunk c/0"):
        clip_zarr(tmp_path / "x", tmp_path / "z", 1.0)
    assert before == {*PROCESS._buffers}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("nonfinite", ["propagate", "omit"])
def test_a_norm_that_is_not_finite_makes_what_is_not_stored_nan(tmp_path, value, nonfinite):
    group, x = zarr.create_group(tmp_path / "x"), np.float32([1, value, 2])
    group.create_array("a", shape=(3,), chunks=(2,), dtype="f4")[...] = x
    group.create_array("b", shape=(4,), chunks=(2,), dtype="f8")
    clip_zarr(tmp_path / "x", tmp_path / "y", 1.0, global_norm=True, nonfinite=nonfinite)
    counts = not (nonfinite == "omit" and np.isnan(value))
    assert np.isnan(read_member(tmp_path / "y", "b")).all() == counts
    assert verify_zarr(tmp_path / "y", tmp_path / "x").slices == 1


def test_chunks_that_are_not_stored_stay_so(tmp_path):
    make(tmp_path / "x")
    group = zarr.open_group(tmp_path / "x")
    group.create_array("none", shape=(8, 8), chunks=(2, 2), dtype="f4")
    group.create_array("some ints", shape=(8, 8), chunks=(2, 2), dtype="i4")[:2, :2] = 1
    for global_norm in (False, True):
        report = clip_zarr(
            tmp_path / "x", tmp_path / f"{global_norm}", 1.0, global_norm=global_norm
        )
        assert stored(tmp_path / "x").keys() == stored(tmp_path / f"{global_norm}").keys()
        assert report.slices == (1 if global_norm else len(SHAPES) + 1)
        verify_zarr(tmp_path / f"{global_norm}", tmp_path / "x")


@pytest.mark.parametrize("name", ["layers/0/kernel/c/0/1", "indices/c/1", "layers/0/zarr.json"])
def test_verify_finds_a_change_in_any_array(tmp_path, name):
    make(tmp_path / "x")
    clip_zarr(tmp_path / "x", tmp_path / "y", 1.0)
    path = tmp_path / "y" / name
    path.write_bytes(path.read_bytes().replace(b"0", b"1") + b" ")
    with pytest.raises(VerificationError):
        verify_zarr(tmp_path / "y")


def test_the_digest_knows_which_array_a_chunk_belongs_to(tmp_path):
    digests = set()
    for order in ([1.0, 2.0], [2.0, 1.0]):
        path = tmp_path / f"x{order}"
        group = zarr.create_group(path)
        for name, value in zip("ab", order, strict=True):
            group.create_array(name, shape=(2,), chunks=(2,), dtype="f4")[:] = value
        digests.add(clip_zarr(path, tmp_path / f"y{order}", 10.0).digest)
    assert len(digests) == 2


def test_in_place_is_written_only_if_there_is_something_to_clip(tmp_path):
    values = make(tmp_path / "x")
    before = stored(tmp_path / "x")
    assert clip_zarr(tmp_path / "x", None, 1e9, in_place=True).status == "nothing to clip"
    assert stored(tmp_path / "x") == before
    for name in ("bias/notes.txt", "layers/.y.daskclip"):
        (tmp_path / "x" / name).write_text("mine")
        with pytest.raises(TargetError, match=f"{name} is no part"):
            clip_zarr(tmp_path / "x", None, 1.0, in_place=True)
        (tmp_path / "x" / name).unlink()
    assert clip_zarr(tmp_path / "x", None, 1.0, in_place=True).status == "clipped"
    for name, x in values.items():
        assert bits(read_member(tmp_path / "x", name)) == bits(clip_by_norm(x, 1.0))
    assert os.listdir(tmp_path) == ["x"]


def test_a_group_from_another_store(tmp_path):
    store = MemoryStore()
    values = make(store)
    clip_zarr(zarr.open_group(store, mode="r"), tmp_path / "y", 1.0)
    for name, x in values.items():
        assert bits(read_member(tmp_path / "y", name)) == bits(clip_by_norm(x, 1.0))


def packed(group):
    group.create_array("p", shape=(2,), chunks=(2,), dtype="i2", attributes={"scale_factor": 0.1})
    group.create_array("f", shape=(2,), chunks=(2,), dtype="f4")


def unknown(group):
    packed(group)
    path = group.store.root / "f" / "zarr.json"
    document = json.loads(path.read_text())
    document["codecs"].append({"name": "foo"})
    path.write_text(json.dumps(document))


def integers(group):
    group.create_array("i", shape=(2,), chunks=(2,), dtype="i2")


REFUSED = {
    "an empty group": (lambda group: None, {}, SourceError, "is an empty group"),
    "no floating array": (integers, {}, SourceError, "no floating point or complex array .* i;"),
    "packed integers": (packed, {}, TypeError, "is packed as int16 with scale_factor"),
    "a codec nobody knows": (unknown, {}, SourceError, "^array f of source .*foo.*exclude it"),
    "a pattern for nothing": (
        integers, {"include": "q*"}, InvalidValueError, "'q.' matches no array .* it has i"
    ),
    "include that is no text": (integers, {"include": [1]}, TypeError, "include 1 is no text"),
    "exclude that is no list": (integers, {"exclude": 1}, TypeError, "exclude 1 is no text"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_clipped_is_said_on_one_line(tmp_path, what):
    build, options, kind, words = REFUSED[what]
    build(zarr.create_group(tmp_path / "x"))
    with pytest.raises(kind, match=words) as caught:
        clip_zarr(tmp_path / "x", tmp_path / "y", 1.0, **options)
    assert isinstance(caught.value, DaskClipError)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["x"]


def test_an_axis_that_an_array_has_not_is_told_with_its_name(tmp_path):
    make(tmp_path / "x")
    with pytest.raises(np.exceptions.AxisError, match="array bias: axis 1 is out of bounds"):
        clip_zarr(tmp_path / "x", tmp_path / "y", 1.0, axes=1)


def test_a_slice_of_axes_is_taken_of_each_array(tmp_path):
    values = make(tmp_path / "x")
    several = ["layers/*kernel", "values"]
    report = clip_zarr(tmp_path / "x", tmp_path / "y", 1.0, slice(1, None), include=several)
    assert (report.arrays, report.slices) == (3, 9 + 4 + 6)
    assert (report.axes, report.rows()["clip_norm"]) == ("1:", "1 over axes 1:")
    for name, x in values.items():
        wanted = clip_by_norm(x, 1.0, slice(1, None)) if x.ndim > 1 and x.size else x
        assert bits(read_member(tmp_path / "y", name)) == bits(wanted)
    assert verify_zarr(tmp_path / "y", tmp_path / "x").slices == report.slices
    for how in ({"axes": slice(1, None, None)}, {"axes": slice(np.int8(1), None)}):
        again = clip_zarr(tmp_path / "x", tmp_path / "y", 1.0, include=several, **how)
        assert (again.status, again.axes) == ("up to date", "1:")
    stats = stats_zarr(tmp_path / "x", slice(1, None), include=several)
    assert (stats.slices, stats.axes) == (report.slices, "1:")
    assert "axes 1:" in stats.rows()["source"]
    with pytest.raises(InvalidValueError, match=r"array bias: axes .* takes no axis of a 1-d"):
        clip_zarr(tmp_path / "x", tmp_path / "z", 1.0, slice(1, None))


def test_each_array_has_its_limits_under_a_slice_of_axes(tmp_path):
    values = make(tmp_path / "x")
    names = ["layers/1/kernel", "values"]
    limits = {name: norm(values[name], slice(1, None), keepdims=True) / 2 for name in names}
    how = {"axes": slice(1, None), "limits": limits, "include": names}
    clip_zarr(tmp_path / "x", tmp_path / "y", **how)
    for name, one in limits.items():
        norms = norm(read_member(tmp_path / "y", name), slice(1, None), keepdims=True)
        assert (norms <= one).all()


@pytest.mark.parametrize("global_norm", [False, True])
def test_memory_that_is_too_small_is_told_for_the_array_that_needs_most(tmp_path, global_norm):
    group = zarr.create_group(tmp_path / "x")
    for name, n in {"a": 1, "b": 3, "c": 2}.items():
        group.create_array(name, shape=(n << 20, 2), chunks=(n << 20, 2), dtype="f4")
    how = {"axes": None if global_norm else 1, "global_norm": global_norm}
    with pytest.raises(MemoryBudgetError, match=r"array b: .* give memory='[0-9]+MiB'") as caught:
        plan_zarr(tmp_path / "x", tmp_path / "y", 1.0, memory="48MiB", **how)
    enough = re.search("memory='(.*)'", str(caught.value))[1]
    assert plan_zarr(tmp_path / "x", tmp_path / "y", 1.0, memory=enough, **how).threads == 1


def test_patterns_are_for_groups(tmp_path):
    make(tmp_path / "x")
    with pytest.raises(InvalidValueError, match="is an array"):
        clip_zarr(tmp_path / "x" / "bias", tmp_path / "y", 1.0, include="b*")


def test_a_group_is_not_replaced_by_an_array(tmp_path):
    make(tmp_path / "x")
    make(tmp_path / "y")
    with pytest.raises(TargetError, match="is no zarr array"):
        clip_zarr(tmp_path / "x" / "bias", tmp_path / "y", 1.0, overwrite=True)


def test_a_group_on_the_command_line(tmp_path):
    make(tmp_path / "x")
    words = [
        BIN / "daskclip", "run", tmp_path / "x", tmp_path / "y",
        "--clip-norm", "1", "--global", "--exclude", "layers/*", "--exclude", "empty", "--json",
    ]  # fmt: skip
    report, planned = (
        json.loads(subprocess.run([*map(str, w)], capture_output=True, text=True).stdout)
        for w in (words, [words[0], "plan", words[2], tmp_path / "other", *words[4:]])
    )
    assert planned["projected_memory"] == report["projected_memory"] <= planned["memory"]
    assert (report["arrays"], report["copied"], report["slices"]) == (3, 6, 1)
    again = clip_zarr(tmp_path / "x", tmp_path / "z", 1.0, global_norm=True)
    assert again.rows()["clip_norm"] == "1 over all arrays"
    assert report["parameters"]["exclude"] == ["layers/*", "empty"]


def test_arrays_without_the_named_dimensions_are_copied(tmp_path):
    group = zarr.create_group(tmp_path / "x")
    kinds = {"a": ["time", "y"], "b": ["y", "x"], "c": ["z"], "d": None}
    values = {}
    for i, (name, dims) in enumerate(kinds.items()):
        shape = (4,) * len(dims or "xy")
        values[name] = some(shape, "f4", i) * 100
        one = group.create_array(name, shape=shape, chunks=shape, dtype="f4", dimension_names=dims)
        one[...] = values[name]
    report = clip_zarr(tmp_path / "x", tmp_path / "y", 1.0, dim=["x", "time"])
    assert (report.arrays, report.copied, report.slices) == (2, 2, 8)
    assert report.rows()["clip_norm"] == "1 over dim x,time"
    for name, axes in {"a": 0, "b": 1}.items():
        assert bits(read_member(tmp_path / "y", name)) == bits(
            clip_by_norm(values[name], 1.0, axes)
        )
    for name in "cd":
        assert bits(read_member(tmp_path / "y", name)) == bits(values[name])
    report = clip_zarr(tmp_path / "x", tmp_path / "each", 0.5, dim=[])
    assert report.rows()["clip_norm"] == "0.5 over axes none"
    for name, x in values.items():
        assert bits(read_member(tmp_path / "each", name)) == bits(clip_by_norm(x, 0.5, []))
    with pytest.raises(InvalidValueError, match=r"dim 'lat' is not a dimension.*time, y, x, z"):
        clip_zarr(tmp_path / "x", tmp_path / "z", 1.0, dim="lat")
    different = r"array a keeps the dimensions .* have no norms in common"
    with pytest.raises(InvalidValueError, match=different):
        clip_zarr(tmp_path / "x", tmp_path / "z", 1.0, dim="y", global_norm=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_arrays_killed_at_fifty_moments(tmp_path):
    rng = np.random.default_rng(0)
    group = zarr.create_group(tmp_path / "x")
    for i in range(1000):
        size = int(4096 * 1000 ** rng.random() / 40)
        one = group.create_array(f"{i % 7}/{i:04}", shape=(size,), chunks=(size,), dtype="f4")
        one[:] = rng.standard_normal(size)
    code = "import sys; from daskclip import clip_zarr; clip_zarr(*sys.argv[1:3], 1.0)"

    def start(target):
        return subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x"), str(target)])

    begun = time.monotonic()
    assert start(tmp_path / "wanted").wait() == 0
    whole = time.monotonic() - begun
    wanted, chance, killed = files_of(tmp_path / "wanted"), random.Random(0), 0
    while killed < 50:
        process = start(tmp_path / "y")
        try:
            process.wait(chance.uniform(0, whole / 3))  # finished windows are kept
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        if process.returncode == 0:
            assert files_of(tmp_path / "y") == wanted
            subprocess.run(["rm", "-r", tmp_path / "y"], check=True)
    assert start(tmp_path / "y").wait() == 0
    assert files_of(tmp_path / "y") == wanted
