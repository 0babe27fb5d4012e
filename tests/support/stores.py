"""Zarr arrays to clip, and what is left of them on disk."""

import bisect
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import zarr
from reference import bits

from daskclip import clip_by_norm, clip_zarr, plan_zarr
from daskclip.errors import MemoryBudgetError
from daskclip.target.journal import Journal

# budgets for one pass and for two, over axes that a slab of blocks does not hold whole
BUDGETS = {1: "ample", 2: "tight"}
# name: options of `zarr.create_array` for an array of two dimensions in chunks of (2, 4)
FORMATS = {
    "format 3": {"zarr_format": 3},
    "format 2": {"zarr_format": 2},
    "shards": {"zarr_format": 3, "shards": (4, 8)},
}


def some(shape, dtype, seed=0):
    """Values of mixed magnitude, with zeros of both signs."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    parts = (*shape, 2) if dtype.kind == "c" else shape
    x = np.array(rng.standard_normal(parts) * np.exp2(rng.integers(-8, 8, parts)))
    x[rng.random(parts) < 0.1] = 0.0
    x = np.copysign(x, rng.standard_normal(parts))
    return (x.view("c16")[..., 0] if dtype.kind == "c" else x).astype(dtype)


def create(path, values, chunks, **options):
    """Array at ``path`` that holds ``values``, with every chunk stored; returns its path."""
    array = zarr.create_array(
        path,
        shape=values.shape,
        dtype=values.dtype,
        chunks=chunks,
        config={"write_empty_chunks": True},
        **options,
    )
    array[...] = values
    return path


def read(path):
    """All values of an array, as an ndarray."""
    return np.asarray(zarr.open_array(path, mode="r")[...])


def stored(folder):
    """Bytes of every file below a folder, by relative path; folders end with a slash.

    The record of the run that made an array is left out: no two are the same.
    """
    return {
        f"{path.relative_to(folder)}{'/' if path.is_dir() else ''}": (
            path.read_bytes() if path.is_file() else None
        )
        for path in sorted(folder.rglob("*"))
        if path.name != ".daskclip"
    }


def finished(folder):
    """`stored` without what an unfinished run keeps for the next one."""
    return {k: v for k, v in stored(folder).items() if not k.split("/")[0].endswith(".daskclip")}


def files_of(folder):
    """Bytes of the files of an array but the journal, by key."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != ".daskclip"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def clipped(source, target, axes=None, clip_norm=1.0, **options):
    """Clip; the result must be NumPy's, to the bit."""
    x = read(source)
    report = clip_zarr(source, target, clip_norm, axes, **options)
    policy = options.get("nonfinite", "propagate")
    assert bits(read(target)) == bits(clip_by_norm(x, clip_norm, axes, nonfinite=policy))
    return report


def least_memory(source, axes=None, clip_norm=1.0, **how):
    """The smallest budget that there is a plan for."""
    array, absent = zarr.open_array(source, mode="r"), Path(source).parent / "absent"

    def fits(memory):
        try:
            return bool(plan_zarr(array, absent, clip_norm, axes, memory=memory, **how))
        except MemoryBudgetError:
            return False

    return 1 + bisect.bisect_left(range(1, 2**20), True, key=fits)


def memory_of(budget, source, axes=None, clip_norm=1.0, **how):
    """The smallest budget, or one that everything fits."""
    return least_memory(source, axes, clip_norm, **how) if budget == "tight" else 2**30


def stopping_at(monkeypatch):
    """A list of the number of lines of journals after which a run is interrupted; 0 for never."""
    append, left = Journal.append, [0]

    def stopping(self, entry):
        append(self, entry)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", stopping)
    return left


@contextmanager
def mounted(folder, options):
    """A file system of its own in ``folder``; the test is skipped where mounting is refused."""
    point = folder / "mount"
    point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is refused here: {done.stderr.strip()}")
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)
