"""Saved norms are right, and complete or absent; a run that has them reads the source once."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import zarr
from command_line import run
from distributed import Client
from reference import bits
from servers import local_cluster
from stores import create, read, some, stopping_at, stored
from zarr.storage import MemoryStore

from daskclip import clip_by_norm, clip_zarr, norm, plan_zarr, stats_zarr, verify_zarr
from daskclip.engine.saved_norms import SUMS
from daskclip.errors import (
    DaskClipError,
    InvalidTypeError,
    InvalidValueError,
    MemoryBudgetError,
    SourceChangedError,
    SourceError,
    SourceNotFoundError,
    TargetExistsError,
)
from daskclip.storage import Hierarchy, StoredArray
from daskclip.target.journal import Journal

SHAPE, CHUNKS = (20, 24), (4, 4)
pytestmark = pytest.mark.usefixtures("small")

PLANS = [(0, 2), (1, 2), (None, 2), (0, 1), (1, 1), ((), 1)]  # axes and passes


def memory_for_passes(source, axes, passes):
    """A budget that leads to that many passes."""
    for memory in (2**k for k in range(8, 20)):
        try:
            if plan_zarr(source, f"{source}-no", 1.0, axes, memory=memory).passes == passes:
                return memory
        except MemoryBudgetError:
            pass
    raise AssertionError("no budget gives so many passes")


@pytest.fixture
def source(tmp_path):
    return create(tmp_path / "x", some(SHAPE, "f8"), CHUNKS, dimension_names=("row", None))


@pytest.fixture
def chunk_reads(monkeypatch):
    """List with an entry for each read of a region."""
    reads, original = [], StoredArray.read

    def reading(*args, **kwargs):
        reads.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(StoredArray, "read", reading)
    return reads


@pytest.mark.parametrize(("axes", "passes"), PLANS)
@pytest.mark.parametrize("ord", [1, 2, np.inf])
def test_saved_norms_are_the_norms(source, tmp_path, axes, passes, ord):
    memory, path = memory_for_passes(source, axes, passes), tmp_path / "norms"
    saved = stats_zarr(source, axes, ord=ord, memory=memory, save_norms=path)
    plain = stats_zarr(source, axes, ord=ord, memory=memory)
    assert (saved.slices, saved.quantiles, saved.bytes_read) == (
        plain.slices, plain.quantiles, plain.bytes_read,
    )  # fmt: skip
    kept = zarr.open_array(path, mode="r")
    assert bits(kept[...]) == bits(norm(some(SHAPE, "f8"), axes, ord=ord))
    taken = {None: (0, 1), (): ()}.get(axes, (axes,))
    names = [n for a, n in enumerate(["row", None]) if a not in taken]
    assert list(kept.metadata.dimension_names or names) == names
    assert kept.attrs["axes"] == list(taken)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["norms", "x"]


@pytest.mark.parametrize(("axes", "passes"), PLANS)
def test_a_run_with_saved_norms_reads_once_and_writes_the_same(
    source, tmp_path, axes, passes, chunk_reads
):
    memory, path = memory_for_passes(source, axes, passes), tmp_path / "norms"
    stats_zarr(source, axes, memory=memory, save_norms=path)
    plain = clip_zarr(source, tmp_path / "a", 2.0, axes, memory=memory)
    planned = plan_zarr(source, tmp_path / "b", 2.0, axes, memory=memory, norms=path)
    assert (planned.passes, planned.bytes_read) == (1, plain.bytes_read // passes)
    for limit in (2.0, "p40"):
        target, twin = tmp_path / f"y{limit}", tmp_path / f"z{limit}"
        before = len(chunk_reads)
        report = clip_zarr(source, target, limit, axes, memory=memory, norms=path)
        assert len(chunk_reads) - before <= planned.blocks
        assert (report.passes, report.bytes_read) == (1, planned.bytes_read)
        other = clip_zarr(source, twin, report.clip_norm, axes, memory=memory)
        assert (report.digest, report.clipped, report.slices, report.largest_norm) == (
            other.digest, other.clipped, other.slices, other.largest_norm,
        )  # fmt: skip
        assert stored(target) == stored(twin)
        assert verify_zarr(target, source).slices == report.slices
    again = clip_zarr(source, tmp_path / "y2.0", 2.0, axes, memory=memory, norms=path)
    assert again.status == "up to date"


def test_a_slice_of_axes_is_saved_as_the_axes_that_it_takes(source, tmp_path):
    stats_zarr(source, slice(1, None), save_norms=tmp_path / "norms")
    report = clip_zarr(source, tmp_path / "y", 2.0, axes=-1, norms=tmp_path / "norms")
    assert report.axes == (1,)
    again = clip_zarr(source, tmp_path / "y", 2.0, slice(-1, None), norms=tmp_path / "norms")
    assert again.status == "up to date"


@pytest.mark.parametrize("passes", [1, 2])
def test_saved_norms_in_place_and_where_little_is_stored(tmp_path, passes):
    sparse = zarr.create_array(tmp_path / "x", shape=SHAPE, chunks=CHUNKS, dtype="f4")
    sparse[4:8, 8:12] = some((4, 4), "f4")
    memory = memory_for_passes(tmp_path / "x", 0, passes)
    measured = stats_zarr(tmp_path / "x", 0, memory=memory, save_norms=tmp_path / "norms")
    assert bits(read(tmp_path / "norms")) == bits(norm(sparse[...], 0))
    expected = clip_by_norm(sparse[...], 2.0, 0)
    how = {"memory": memory, "norms": tmp_path / "norms"}
    report = clip_zarr(tmp_path / "x", None, 2.0, 0, in_place=True, **how)
    assert (report.passes, report.bytes_read) == (1, measured.bytes_read)
    assert bits(read(tmp_path / "x")) == bits(expected)
    again = clip_zarr(tmp_path / "x", None, 2.0, 0, in_place=True, **how)
    assert (again.status, again.clipped) == ("up to date", report.clipped)
    for call in (clip_zarr, plan_zarr):
        with pytest.raises(SourceChangedError):
            call(tmp_path / "x", tmp_path / "w", 2.0, 0, **how)
    assert not (tmp_path / "w").exists()


def test_a_run_with_saved_norms_that_is_stopped_anywhere(source, tmp_path, monkeypatch):
    left, memory = stopping_at(monkeypatch), memory_for_passes(source, 0, 2)
    how = {"memory": memory, "norms": tmp_path / "norms"}
    stats_zarr(source, 0, memory=memory, save_norms=tmp_path / "norms")
    clip_zarr(source, tmp_path / "y", 2.0, 0, memory=memory)
    for number in range(1, 100, 3):
        left[0], target = number, tmp_path / f"y{number}"
        try:
            clip_zarr(source, target, 2.0, 0, **how)
            break
        except KeyboardInterrupt:
            assert not target.exists()
        if number == 1:
            with pytest.raises(TargetExistsError, match=r"has norms .*norms and not None; finish"):
                clip_zarr(source, target, 2.0, 0, memory=memory)
        clip_zarr(source, target, 2.0, 0, **how)
        assert stored(target) == stored(tmp_path / "y")
    assert number > 12


@pytest.mark.parametrize("passes", [1, 2])
def test_norms_appear_complete_or_not_at_all(source, tmp_path, monkeypatch, passes):
    append, memory, path = Journal.append, memory_for_passes(source, 0, passes), tmp_path / "norms"

    def stopping(self, entry):
        append(self, entry)
        if getattr(entry, "total", None) is None:
            assert not path.exists()
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", stopping)
        with pytest.raises(DaskClipError, match=r"^reading .* failed: .*No space left"):
            stats_zarr(source, 0, memory=memory, save_norms=path)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    stats_zarr(source, 0, memory=memory, save_norms=path)
    with pytest.raises(TargetExistsError, match=r"^target .*norms exists; remove it"):
        stats_zarr(source, 0, memory=memory, save_norms=path)


def test_a_killed_process_leaves_no_norms(tmp_path):
    create(tmp_path / "x", some((64, 64), "f4"), (1, 64))
    code = """
import os, signal, sys
from daskclip import stats_zarr
from daskclip.worker import tasks
save = tasks.save_norms
def saving(*args):
    done = save(*args)
    os.kill(os.getpid(), signal.SIGKILL)
tasks.save_norms = saving
stats_zarr(sys.argv[1], 1, save_norms=sys.argv[2])
"""
    command = [sys.executable, "-c", code, tmp_path / "x", tmp_path / "norms"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.iterdir()) == [".norms.daskclip", "x"]
    stats_zarr(tmp_path / "x", 1, save_norms=tmp_path / "norms")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["norms", "x"]
    assert bits(read(tmp_path / "norms")) == bits(norm(some((64, 64), "f4"), 1))


@pytest.mark.parametrize("known", [True, False])
def test_norms_of_another_state_of_the_source_are_refused(source, tmp_path, monkeypatch, known):
    memory = memory_for_passes(source, 0, 2)
    stats_zarr(source, 0, memory=memory, save_norms=tmp_path / "norms")
    state = Hierarchy.fingerprint(Hierarchy.open(source), changes=True)
    zarr.open_array(source, mode="r+")[0, 0] += 1.0
    if not known:  # unknown from the files: the remaining pass detects it by the sums
        monkeypatch.setattr(Hierarchy, "fingerprint", lambda *_, **__: state)
    with pytest.raises(SourceChangedError, match="saved; save them" if known else "between the"):
        clip_zarr(source, tmp_path / "y", 2.0, 0, memory=memory, norms=tmp_path / "norms")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["norms", "x"]


def wrong(tmp_path, source):
    """Refused calls: arguments, error class and pattern of the message."""
    group = zarr.create_group(tmp_path / "group")
    group.create_array("a", shape=(4,), chunks=(2,), dtype="f4")
    damaged = tmp_path / "damaged"
    of_group = tmp_path / "of-group"
    stats_zarr(group, 0, save_norms=of_group)
    stats_zarr(source, 0, save_norms=damaged)
    record = damaged / SUMS / "journal"
    os.truncate(record, record.stat().st_size - 5)
    good = tmp_path / "norms"
    return [
        ((source, 1, 1.0, {"norms": good}), InvalidValueError, r"axes \[0\] and not \[1\]; save"),
        ((source, 0, 1.0, {"norms": good, "ord": 1}), InvalidValueError, "ord 2.0 and not 1.0"),
        (
            (source, 0, 1.0, {"norms": good, "nonfinite": "omit", "missing": "error"}),
            InvalidValueError,
            "nonfinite propagate and not omit, missing fill and not error; save them again with",
        ),
        ((source, 0, 1.0, {"norms": tmp_path / "no"}), SourceNotFoundError, "no do not exist"),
        (
            (source, 0, 1.0, {"norms": source}),
            SourceError,
            "x holds no norms of .*; check the path$",
        ),
        ((source, 0, 1.0, {"norms": damaged}), SourceError, "damaged are damaged; save them"),
        ((source, 0, 1.0, {"norms": "s3://a/b"}), DaskClipError, "a/b"),
        ((source, 0, 1.0, {"norms": 3}), InvalidTypeError, "norms 3 is not a path"),
        (
            (source, 0, None, {"norms": good, "limits": np.ones((1, 24))}),
            InvalidValueError,
            "norms do not go with limits; leave out one of them",
        ),
        (
            (tmp_path / "group", 0, 1.0, {"norms": of_group, "include": "a"}),
            InvalidValueError,
            r"include \[\] and not \['a'\]; save them again",
        ),
    ]


def test_norms_that_are_refused(source, tmp_path):
    stats_zarr(source, 0, save_norms=tmp_path / "norms")
    for (x, axes, limit, how), kind, words in wrong(tmp_path, source):
        for function in (clip_zarr, plan_zarr):
            with pytest.raises(kind, match=words) as caught:
                function(x, tmp_path / "y", limit, axes, **how)
            assert "\n" not in str(caught.value)
    for path, words in ((source / "new", "lies inside the source"), (tmp_path / "a/b", "folder")):
        with pytest.raises(DaskClipError, match=words):
            stats_zarr(source, save_norms=path)
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("place", ["x", ".", "file", "other", "clipped", "empty sums", "norms"])
def test_what_holds_no_norms_is_not_to_be_removed(source, tmp_path, place):
    (tmp_path / "file").touch()
    create(tmp_path / "other", some(SHAPE, "f8"), CHUNKS)
    clip_zarr(source, tmp_path / "clipped", 1.0, 0)
    (tmp_path / "empty sums" / SUMS).mkdir(parents=True)
    stats_zarr(source, 0, save_norms=tmp_path / "norms")
    # norms are an array too, and may be a source
    of = tmp_path / "norms" if place == "norms" else source
    for function in (clip_zarr, plan_zarr):
        with pytest.raises(SourceError, match=r"; check the path$") as caught:
            function(of, tmp_path / "y", 1.0, 0, norms=tmp_path / place)
        assert "remov" not in str(caught.value)


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("url", [None, "memory://norms/x"])
def test_no_command_is_given_for_a_store_of_this_process(tmp_path, changed, url):
    store = url or MemoryStore()
    array = zarr.create_array(store, data=some(SHAPE, "f8"), chunks=CHUNKS, overwrite=True)
    if changed:
        stats_zarr(store, 0, save_norms=tmp_path / "norms")
        array[0, 0] = 5.0
    with pytest.raises(DaskClipError, match=r"save them .*with stats_zarr") as caught:
        clip_zarr(store, tmp_path / "y", 1.0, 0, norms=tmp_path / "norms")
    assert "daskclip stats" not in str(caught.value)


def test_sums_that_are_damaged_are_refused(source, tmp_path):
    memory = memory_for_passes(source, 0, 2)
    stats_zarr(source, 0, memory=memory, save_norms=tmp_path / "norms")
    path = next((tmp_path / "norms" / SUMS).glob("sums-*"))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"^norms .* are damaged; save them again"):
        clip_zarr(source, tmp_path / "y", 2.0, 0, memory=memory, norms=tmp_path / "norms")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["norms", "x"]


def test_too_little_memory_for_the_plan_of_the_norms(source, tmp_path):
    memory = memory_for_passes(source, 0, 2)
    stats_zarr(source, 0, memory="1MiB", save_norms=tmp_path / "norms")
    with pytest.raises(MemoryBudgetError, match=r"that norms .* need with .*; give memory='"):
        clip_zarr(source, tmp_path / "y", 2.0, 0, memory=memory, norms=tmp_path / "norms")


@pytest.mark.distributed
@pytest.mark.parametrize("passes", [1, 2])
def test_saved_norms_on_two_processes(source, tmp_path, passes):
    with local_cluster(2) as two, Client(two):
        memory = memory_for_passes(source, 0, passes)
        stats_zarr(source, 0, memory=memory, save_norms=tmp_path / "norms")
        clip_zarr(source, tmp_path / "y", 2.0, 0, memory=memory, norms=tmp_path / "norms")
    assert bits(read(tmp_path / "norms")) == bits(norm(some(SHAPE, "f8"), 0))
    clip_zarr(source, tmp_path / "z", 2.0, 0)
    assert stored(tmp_path / "y") == stored(tmp_path / "z")


def test_saved_norms_on_the_command_line(source, tmp_path):
    norms, how = tmp_path / "norms", ("--axes", "0", "--memory", memory_for_passes(source, 0, 2))
    done = run("stats", source, *how, "--save-norms", norms)
    assert done.exit_code == 0, done.output
    done = run(
        "run", source, tmp_path / "y", *how, "--clip-norm", "p50", "--norms", norms, "--json"
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["passes"], report["parameters"]["norms"]) == (1, str(norms))
    done = run("run", source, tmp_path / "z", "--axes", 1, "--clip-norm", 1, "--norms", norms)
    assert (done.exit_code, done.output.count("\n")) == (3, 1)
    assert done.output.startswith("daskclip: norms ")
