"""From storage to storage: NumPy's bits for any plan, each chunk once, nothing after a failure."""

import asyncio
import json
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from pathlib import Path
from threading import Event, Lock

import dask
import numpy as np
import pytest
import zarr
from distributed import Client
from reference import bits
from servers import local_cluster
from sizes import resize
from stores import FORMATS, clipped, create, finished, least_memory, memory_of, read, some, stored

from daskclip import clip_by_norm, clip_zarr, norm, plan_zarr, verify_zarr
from daskclip.engine import passes
from daskclip.errors import (
    NonFiniteError,
    SourceError,
    StorageError,
)
from daskclip.storage import StoredArray, files
from daskclip.target.journal import Journal
from daskclip.worker import tasks
from daskclip.worker.context import PROCESS

# neither chunks nor shards divide the shape
SHAPE, CHUNKS, SHARDS = (9, 7, 7), (2, 4, 3), (4, 4, 3)
AXES = [None, 0, (0, 2), -1, ()]
DTYPES = ["f2", "f4", "f8", "c8", "c16"]
LAYOUTS = {**FORMATS, "shards": {"zarr_format": 3, "shards": SHARDS}}


@pytest.fixture(scope="module")
def two():
    """Two worker processes."""
    with local_cluster(2) as cluster:
        yield cluster


@pytest.fixture
def client(two):
    with Client(two) as client:
        yield client


@pytest.fixture
def four():
    with local_cluster(4) as cluster, Client(cluster):
        yield


def source_of(folder, layout="format 3", dtype="f4", values=None):
    values = some(SHAPE, dtype) if values is None else values
    return create(folder / "x", values, CHUNKS, **LAYOUTS[layout])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_results_are_those_of_numpy_with_little_memory(tmp_path, layout, axes):
    x = source_of(tmp_path, layout)
    memory = least_memory(x, axes)
    planned = plan_zarr(x, tmp_path / "y", 1.0, axes, memory=memory)
    assert planned.passes == (1 if axes == () else 2)
    assert planned.blocks > planned.window
    report = clipped(x, tmp_path / "y", axes, memory=memory)
    assert (report.passes, report.blocks) == (planned.passes, planned.blocks)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axes", [None, 0, -1], ids=str)
def test_results_are_those_of_numpy_with_much_memory(tmp_path, layout, axes):
    with dask.config.set(num_workers=1):  # more threads share the slices of few blocks
        report = clipped(source_of(tmp_path, layout), tmp_path / "y", axes)
    assert report.passes == 1


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", [None, 0], ids=str)
def test_results_are_those_of_numpy_for_every_dtype(tmp_path, dtype, axes):
    x = source_of(tmp_path, dtype=dtype)
    clipped(x, tmp_path / "y", axes, memory=least_memory(x, axes))


@pytest.mark.usefixtures("small")
def test_both_passes_take_several_slabs_and_windows(tmp_path):
    x = create(tmp_path / "x", some((20, 24), "f4"), (2, 8))
    report = clipped(x, tmp_path / "y", 0, memory=least_memory(x, 0))
    planned = plan_zarr(x, tmp_path / "z", 1.0, 0, memory=least_memory(x, 0))
    assert report.passes == 2
    assert planned.slabs > 1
    assert planned.blocks // planned.slabs > planned.window


SCHEDULERS = {
    "threads": {"scheduler": "threads"},
    "3 threads": {"scheduler": "threads", "num_workers": 3},
    "synchronous": {"scheduler": "synchronous"},
    "array default": {},
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("settings", SCHEDULERS)
def test_results_are_those_of_numpy_on_any_scheduler(tmp_path, settings):
    x = source_of(tmp_path, "shards")
    with dask.config.set(SCHEDULERS[settings]):
        clipped(x, tmp_path / "y", 0, memory=least_memory(x, 0))


@pytest.mark.usefixtures("small")
def test_a_thread_pool_of_the_caller_is_used_and_left_open(tmp_path):
    x = source_of(tmp_path)
    with ThreadPoolExecutor(3) as pool, dask.config.set(pool=pool):
        assert plan_zarr(x, tmp_path / "y", 1.0).threads == 3
        clipped(x, tmp_path / "y", 0, memory=least_memory(x, 0))
        assert pool.submit(int).result() == 0


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_results_are_those_of_numpy_on_the_scheduler_of_processes(tmp_path):
    x = source_of(tmp_path)
    with dask.config.set(scheduler="processes", num_workers=2):
        clipped(x, tmp_path / "y", 0, memory=least_memory(x, 0))


@pytest.mark.distributed
@pytest.mark.usefixtures("small", "client")
@pytest.mark.parametrize(
    ("layout", "axes"),
    [("shards", 0), ("shards", None), ("format 3", 0), ("format 2", -1), ("format 2", ())],
)
def test_results_are_those_of_numpy_on_two_processes(tmp_path, layout, axes):
    x = source_of(tmp_path, layout)
    memory = least_memory(x, axes)
    planned = plan_zarr(x, tmp_path / "y", 1.0, axes, memory=memory)
    assert (planned.processes, planned.threads) == (2, 1)
    assert clipped(x, tmp_path / "y", axes, memory=memory).passes == planned.passes


@pytest.mark.distributed
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("times", [1, 2])
def test_results_lost_on_their_way_are_fetched_again(tmp_path, client, monkeypatch, times):
    # a race in distributed that happens by chance
    x = source_of(tmp_path)
    gather, calls = client._gather_remote, []

    async def cancelled(*args):
        if "run_batch" in str(client._gather_keys):
            calls.append(None)
            if len(calls) <= times:
                asyncio.current_task().cancel()
        return await gather(*args)

    monkeypatch.setattr(client, "_gather_remote", cancelled)
    clipped(x, tmp_path / "y", 0, memory=least_memory(x, 0))
    assert len(calls) > times


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("small", "four")
@pytest.mark.parametrize(
    ("layout", "budget"),
    [
        ("shards", "ample"),
        ("format 3", "ample"),
        ("shards", "tight"),
        ("format 3", "tight"),
    ],
)
def test_four_workers_give_numpys_result_20_times_of_20(tmp_path, monkeypatch, layout, budget):
    # windows of many blocks, so that all workers write at once
    resize(monkeypatch, window_blocks=16)
    x = source_of(tmp_path, layout)
    memory = memory_of(budget, x, 0)
    wanted = bits(clip_by_norm(read(x), 1.0, 0))
    for n in range(20):
        clip_zarr(x, tmp_path / f"y{n}", 1.0, 0, memory=memory)
        assert bits(read(tmp_path / f"y{n}")) == wanted


def file_accesses(monkeypatch, name):
    """Count how often each chunk file is read or written."""
    counts, lock = Counter(), Lock()
    original = getattr(files, name)

    def counting(*args):
        with lock:
            counts[Path(args[0], *args[1:2] if name == "write" else ())] += 1
        return original(*args)

    monkeypatch.setattr(files, name, counting)
    return counts


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axes", [None, 0, -1], ids=str)
def test_every_unit_is_written_once(tmp_path, monkeypatch, layout, axes):
    x = source_of(tmp_path, layout)
    memory = least_memory(x, axes)
    written = file_accesses(monkeypatch, "write")
    clip_zarr(x, tmp_path / "y", 1.0, axes, memory=memory)
    made = [k for k, v in stored(tmp_path / "y").items() if v is not None]
    keys = sorted(str(path).partition(".daskclip/")[2].partition("/")[2] for path in written)
    assert keys == [k for k in made if k not in ("zarr.json", ".zarray", ".zattrs")]
    assert set(written.values()) == {1}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", ["format 2", "format 3"])
@pytest.mark.parametrize("axes", [None, 0, -1], ids=str)
def test_every_chunk_is_read_once_a_pass(tmp_path, monkeypatch, layout, axes):
    x = source_of(tmp_path, layout)
    memory = least_memory(x, axes)
    got = file_accesses(monkeypatch, "read")
    report = clip_zarr(x, tmp_path / "y", 1.0, axes, memory=memory)
    assert len(got) == math.prod(-(-n // c) for n, c in zip(SHAPE, CHUNKS, strict=True))
    assert set(got.values()) == {report.passes}
    assert all(x in path.parents for path in got)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("axes", [None, 0, -1], ids=str)
@pytest.mark.parametrize("budget", ["tight", "ample"])
def test_the_report_says_what_was_done(tmp_path, axes, budget):
    x = source_of(tmp_path)
    values = read(x)
    norms = norm(values, axes)
    limit = float(np.median(norms)) * 1.001
    memory = memory_of(budget, x, axes)
    report = clip_zarr(x, tmp_path / "y", limit, axes, memory=memory)
    planned = plan_zarr(x, tmp_path / "z", limit, axes, memory=memory)
    assert report.source == str(x)
    assert report.target == str(tmp_path / "y")
    assert report.clip_norm == limit
    assert report.axes == planned.axes
    assert report.slices == planned.slices == norms.size
    assert report.clipped == (norms > limit).sum()
    assert report.nonfinite == 0
    assert (report.smallest_norm, report.largest_norm) == (norms.min(), norms.max())
    assert report.passes == planned.passes
    assert report.blocks == planned.blocks
    assert report.bytes_read == values.nbytes * report.passes == planned.bytes_read
    assert report.bytes_written == values.nbytes
    assert report.projected_memory == planned.projected_memory <= memory
    assert report.seconds > 0
    assert report.peak_memory >= 0
    fields = json.loads(report.to_json())
    assert fields.keys() == type(report).__dataclass_fields__.keys()
    assert fields["largest_norm"] == report.largest_norm
    text = str(report)
    assert f"{report.slices:,}" in text
    assert f"{report.clipped:,}" in text
    assert str(x) in text


@pytest.mark.parametrize(
    ("shape", "axes", "slices"), [((0, 5), 0, 5), ((5, 0), 0, 0), ((0,), None, 1)]
)
def test_the_report_of_an_array_without_elements(tmp_path, shape, axes, slices):
    create(tmp_path / "x", np.empty(shape, "f4"), tuple(max(1, n) for n in shape))
    report = clip_zarr(tmp_path / "x", tmp_path / "y", 1.0, axes)
    norms = norm(np.empty(shape, "f4"), axes)
    assert report.slices == norms.size == slices
    assert report.largest_norm == (0.0 if slices else None)
    assert (report.clipped, report.bytes_written) == (0, 0)


def test_figures_beyond_json_are_written_as_texts(tmp_path):
    create(tmp_path / "x", np.array([[1.5e308, 1.5e308], [1.0, 2.0]]), (1, 2))
    report = clip_zarr(tmp_path / "x", tmp_path / "y", math.inf, 1)
    assert (report.largest_norm, report.nonfinite, report.clipped) == (math.inf, 0, 0)
    fields = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert (fields["largest_norm"], fields["clip_norm"]) == ("inf", "inf")


NONFINITE = some(SHAPE, "f4")
NONFINITE[5, 4, 3], NONFINITE[3, 6, 4] = math.nan, -math.inf


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("axes", [None, 0, -1], ids=str)
@pytest.mark.parametrize("policy", ["propagate", "omit"])
def test_slices_with_nan_and_infinity_are_those_of_numpy(tmp_path, axes, policy):
    x = source_of(tmp_path, values=NONFINITE)
    report = clipped(x, tmp_path / "y", axes, memory=least_memory(x, axes), nonfinite=policy)
    counted = np.where(np.isnan(NONFINITE), 0, NONFINITE) if policy == "omit" else NONFINITE
    norms = norm(counted, axes)
    finite = norms[np.isfinite(norms)]
    assert report.nonfinite == norms.size - finite.size
    assert report.largest_norm == (finite.max() if finite.size else None)
    assert report.smallest_norm == (finite.min() if finite.size else None)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("budget", ["tight", "ample"])
def test_raise_names_the_slice_and_the_chunk_and_leaves_nothing(tmp_path, budget):
    values = some(SHAPE, "f4")
    values[5, 4, 3] = math.nan
    x = source_of(tmp_path, values=values)
    before = stored(tmp_path)
    memory = memory_of(budget, x, 0)
    with pytest.raises(NonFiniteError, match=r"\b4, 3\b.*\b2, 1, 1\b") as caught:
        clip_zarr(x, tmp_path / "y", 1.0, 0, memory=memory, nonfinite="raise")
    assert "\n" not in str(caught.value)
    assert stored(tmp_path) == before


def test_raise_is_quiet_about_finite_arrays_and_limits_that_change_nothing(tmp_path):
    x = source_of(tmp_path, values=NONFINITE)
    clip_zarr(x, tmp_path / "y", math.inf, nonfinite="raise")
    assert bits(read(tmp_path / "y")) == bits(NONFINITE)
    (tmp_path / "finite").mkdir()
    finite = source_of(tmp_path / "finite")
    clip_zarr(finite, tmp_path / "z", 1.0, nonfinite="raise")
    assert bits(read(tmp_path / "z")) == bits(clip_by_norm(read(finite), 1.0))


CHUNK = {"format 3": "c/2/1/0", "format 2": "2.1.0", "shards": "c/1/1/0"}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", ["tight", "ample"])
def test_a_missing_chunk_is_named_and_nothing_is_left(tmp_path, layout, budget):
    x = source_of(tmp_path, layout)
    (x / CHUNK[layout]).unlink()
    before = stored(tmp_path)
    memory = memory_of(budget, x, 0)
    with pytest.raises(SourceError, match=rf"chunk {CHUNK[layout]} of {x} is missing") as caught:
        clip_zarr(x, tmp_path / "y", 1.0, 0, memory=memory, missing="error")
    assert "\n" not in str(caught.value)
    assert stored(tmp_path) == before
    clipped(x, tmp_path / "y", 0, memory=memory, missing="fill")


SPARSE = [(0, 0), (1, 1), (2, 0), (3, 1)]  # chunks, and not as many in every row or column


@pytest.fixture
def task_counts(monkeypatch):
    """Number of task calls, by function."""
    counts = Counter()

    def counting(function):
        def counted(*args):
            counts[function.__name__] += 1
            return function(*args)

        return wraps(function)(counted)

    for name in ("sum_block", "rescale_block", "clip_slab", "compare_slab", "copy_block"):
        monkeypatch.setattr(tasks, name, counting(getattr(tasks, name)))
    return counts


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("budget", ["tight", "ample"])
@pytest.mark.parametrize("axes", [None, 0, 1])
@pytest.mark.parametrize("odd", [0.0, np.nan])
@pytest.mark.parametrize("in_place", [False, True])
def test_only_what_is_stored_is_looked_at(tmp_path, task_counts, budget, axes, odd, in_place):
    x = tmp_path / "x"
    array = zarr.create_array(
        x, shape=(30, 20), chunks=(2, 4), dtype="f4", zarr_format=2 + bool(odd)
    )
    for i, j in SPARSE:
        array[8 * i : 8 * i + 2, 8 * j : 8 * j + 4] = some((2, 4), "f4", seed=i) + 1
    array[8, 8] += odd
    values, memory = read(x), memory_of(budget, x, axes)
    y = x if in_place else tmp_path / "y"
    with np.errstate(invalid="ignore"):
        wanted = clip_by_norm(values, 1.0, axes)
    report = clip_zarr(x, None if in_place else y, 1.0, axes, memory=memory, in_place=in_place)
    norms = norm(values, axes).ravel()
    assert bits(read(y)) == bits(wanted)
    finite = norms[np.isfinite(norms)]
    assert (report.slices, report.nonfinite) == (norms.size, norms.size - finite.size)
    assert report.clipped == (finite > 1).sum()
    if finite.size:
        assert (report.smallest_norm, report.largest_norm) == (finite.min(), finite.max())
    most = 7 * len(SPARSE)  # a slab of few blocks is processed whole
    assert 0 < task_counts["sum_block"] + task_counts["clip_slab"] <= most
    if not odd:
        assert task_counts["rescale_block"] <= most
    assert verify_zarr(y).slices == norms.size


def test_what_was_clipped_in_one_pass_is_verified_in_one(tmp_path, task_counts):
    x = create(tmp_path / "x", some((64, 16), "f4"), (2, 16))
    clip_zarr(x, tmp_path / "y", 1.0, 1)
    verify_zarr(tmp_path / "y", x)
    assert task_counts["clip_slab"] == task_counts["compare_slab"] > 0
    assert task_counts["sum_block"] == 0


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("odd", [0.0, np.nan])
def test_missing_chunks_and_a_run_that_is_stopped_anywhere(tmp_path, monkeypatch, odd):
    x = tmp_path / "x"
    array = zarr.create_array(x, shape=(30, 20), chunks=(2, 4), dtype="f4")
    for i, j in SPARSE:
        array[8 * i : 8 * i + 2, 8 * j : 8 * j + 4] = some((2, 4), "f4", seed=i) + 1
    array[8, 8] += odd
    append, lines = Journal.append, []

    def stopping(self, entry):
        append(self, entry)
        lines.append(entry)
        if len(lines) == stop:
            raise KeyboardInterrupt

    stop = 0
    with dask.config.set(scheduler="synchronous"):
        memory = least_memory(x, 0)
        monkeypatch.setattr(Journal, "append", stopping)
        # what is done is not journalled earlier where the disk is slow
        monkeypatch.setattr(passes, "RECORD_S", math.inf)
        with np.errstate(invalid="ignore"):
            clipped(x, tmp_path / "wanted", 0, memory=memory)
        number = len(lines)
        for stop in range(1, number):
            lines.clear()
            with pytest.raises(KeyboardInterrupt):
                clip_zarr(x, tmp_path / f"y{stop}", 1.0, 0, memory=memory)
            clip_zarr(x, tmp_path / f"y{stop}", 1.0, 0, memory=memory)
            assert stored(tmp_path / f"y{stop}") == stored(tmp_path / "wanted")
            assert len(lines) == number
    assert number > 8


def broken(folder, layout, damage):
    """A source with one chunk that cannot be decoded."""
    x = source_of(folder, layout)
    chunk = x / CHUNK[layout]
    data = bytearray(chunk.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[:8] = bytes(b ^ 0xFF for b in data[:8])
        data[-8:] = bytes(b ^ 0xFF for b in data[-8:])
    chunk.write_bytes(data)
    return x


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_broken_chunk_stops_the_run_and_is_named(tmp_path, layout, damage):
    axes = 0 if damage == "cut" else ()
    x = broken(tmp_path, layout, damage)
    before = stored(tmp_path)
    match = rf"reading block \[.*\] of {x} failed at chunk {CHUNK[layout]}: .*"
    with pytest.raises(StorageError, match=match) as caught:
        clip_zarr(x, tmp_path / "y", 1.0, axes, memory=least_memory(x, axes))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    assert finished(tmp_path) == before


def test_no_block_writes_after_another_one_failed(tmp_path, monkeypatch):
    x = create(tmp_path / "x", some((4, 4), "f4"), (2, 4))
    (x / "c/0/0").write_bytes(b"broken")
    before = stored(tmp_path)
    failed = Event()
    original = StoredArray.read

    def one_after_the_other(array, region, *args):
        if region[0].start:
            assert failed.wait(60)
        try:
            return original(array, region, *args)
        except Exception:
            failed.set()
            raise

    monkeypatch.setattr(StoredArray, "read", one_after_the_other)
    resize(monkeypatch, block_nbytes=32)
    with pytest.raises(StorageError), dask.config.set(scheduler="threads", num_workers=2):
        clip_zarr(x, tmp_path / "y", 1.0, 1)
    assert failed.is_set()
    assert finished(tmp_path) == before


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["broken", "nan"])
def test_a_failure_on_workers_makes_no_target(tmp_path, monkeypatch, client, kind):
    # blocks of many chunks, so that others are running when the first fails
    resize(monkeypatch, block_nbytes=4 * 256)
    values = some((6, 256), "f4")
    values[0, 0] = math.nan if kind == "nan" else 1.0
    x = create(tmp_path / "x", values, (1, 4))
    if kind == "broken":
        (x / "c/0/0").write_bytes(b"broken")
    before = stored(tmp_path)
    assert plan_zarr(x, tmp_path / "y", 1.0, 1).blocks == 6
    with pytest.raises(NonFiniteError if kind == "nan" else StorageError) as caught:
        clip_zarr(x, tmp_path / "y", 1.0, 1, nonfinite="raise")
    assert "\n" not in str(caught.value)
    # a worker of one thread runs this after the block that it had begun
    for address in client.nthreads():
        assert client.submit(abs, -1, workers=[address], pure=False).result() == 1
    assert (stored if kind == "nan" else finished)(tmp_path) == before


def test_a_target_opens_as_part_of_its_group(tmp_path):
    group = zarr.create_group(tmp_path / "group")
    group.create_array("x", data=some(SHAPE, "f4"), chunks=CHUNKS)
    clipped(tmp_path / "group" / "x", tmp_path / "group" / "y")
    assert sorted(group.array_keys()) == ["x", "y"]


def test_a_process_keeps_nothing_of_runs_that_ended(tmp_path):
    source = create(tmp_path / "x", np.ones((4, 4), np.float32), (2, 4))
    # a cluster in this process may have ended without a worker that drains
    running, buffers = {*PROCESS._running}, {*PROCESS._buffers}
    clip_zarr(source, tmp_path / "y", 1.0, axes=1)
    assert PROCESS._running.keys() == running
    assert PROCESS._buffers.keys() == buffers
    assert PROCESS._drained.maxlen
