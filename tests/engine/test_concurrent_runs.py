"""Runs at the same time: one of them makes a target, the others are refused."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from reference import bits
from stores import clipped, create, read, some, stored

from daskclip import clip_by_norm, clip_zarr
from daskclip.errors import (
    DaskClipError,
    TargetExistsError,
)
from daskclip.storage import StoredArray
from daskclip.target import directory as publish

SHAPE, CHUNKS = (9, 7, 7), (2, 4, 3)


def source_of(folder):
    return create(folder / "x", some(SHAPE, "f4"), CHUNKS)


def test_a_second_run_on_the_same_target_is_refused(tmp_path, monkeypatch):
    x = source_of(tmp_path)
    original, seen = StoredArray.read, []

    def run_again(*args):
        if not seen:
            seen.append(None)
            with pytest.raises(TargetExistsError, match="being written by another run") as caught:
                clip_zarr(x, tmp_path / "y", 2.0)
            seen.append(caught.value.exit_code)
        return original(*args)

    monkeypatch.setattr(StoredArray, "read", run_again)
    clipped(x, tmp_path / "y")
    assert seen == [None, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y"]


@pytest.mark.parametrize("step", ["mkdir", "flock"])
def test_a_run_that_starts_while_another_one_ends_is_refused(tmp_path, monkeypatch, step):
    x = source_of(tmp_path)
    owner = publish.fcntl if step == "flock" else Path
    original, done = getattr(owner, step), []

    def after_a_whole_run(*args, **kwargs):
        result = original(*args, **kwargs) if step == "mkdir" else None
        if not done and (step == "flock" or args[0].name == ".y.daskclip"):
            done.append(None)
            clip_zarr(x, tmp_path / "y", 1.0)
        return result if step == "mkdir" else original(*args, **kwargs)

    monkeypatch.setattr(owner, step, after_a_whole_run)
    with pytest.raises(TargetExistsError):
        clip_zarr(x, tmp_path / "y", 2.0)
    assert done
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(x), 1.0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y"]


def test_a_target_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    x = source_of(tmp_path)
    original = StoredArray.read

    def make_target(*args):
        (tmp_path / "y").mkdir(exist_ok=True)
        (tmp_path / "y" / "file").touch()
        return original(*args)

    monkeypatch.setattr(StoredArray, "read", make_target)
    with pytest.raises(TargetExistsError, match="meanwhile"):
        clip_zarr(x, tmp_path / "y", 1.0)
    assert stored(tmp_path / "y") == {"file": b""}
    shutil.rmtree(tmp_path / "y")
    clipped(x, tmp_path / "y")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y"]


def at_once(number, run):
    """Results or errors of threads that start together."""
    barrier = Barrier(number)

    def start(n):
        barrier.wait()
        try:
            return run(n)
        except DaskClipError as error:
            return error

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(start, range(number)))


def test_of_runs_on_one_target_at_once_one_wins(tmp_path):
    x = source_of(tmp_path)
    wanted = bits(read(x))
    for n in range(10):
        target = tmp_path / f"y{n}"
        # different limits that change nothing, so that a late run is not up to date with the first
        results = at_once(3, lambda i, target=target: clip_zarr(x, target, 1e9 + i))
        errors = [r for r in results if isinstance(r, DaskClipError)]
        assert [type(e) for e in errors] == [TargetExistsError] * 2
        assert bits(read(target)) == wanted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", *(f"y{n}" for n in range(10))]


def test_runs_on_several_targets_at_once(tmp_path):
    x = source_of(tmp_path)
    wanted = bits(clip_by_norm(read(x), 1.0))
    for n in range(5):
        at_once(4, lambda i, n=n: clip_zarr(x, tmp_path / f"y{n}-{i}", 1.0))
    targets = [p for p in tmp_path.iterdir() if p != x]
    assert len(targets) == 20
    assert all(bits(read(target)) == wanted for target in targets)


def test_what_an_earlier_run_left_does_not_stop_the_next(tmp_path):
    x = source_of(tmp_path)
    work = tmp_path / ".y.daskclip"
    create(work / "0123456789abcdef", some(SHAPE, "f4", seed=1), CHUNKS)
    (work / "lock").touch()
    clipped(x, tmp_path / "y")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y"]
