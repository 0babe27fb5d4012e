"""Zarr arrays to clip, and the files of the results."""

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

# budgets that lead to one pass and to two, where blocks do not hold slices whole
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
    """Create an array that holds ``values``, with every chunk stored, and return its path."""
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

    The record of the run is left out, which differs between equal arrays.
    """
    return {
        f"{path.relative_to(folder)}{'/' if path.is_dir() else ''}": (
            path.read_bytes() if path.is_file() else None
        )
        for path in sorted(folder.rglob("*"))
        if path.name != ".daskclip"
    }


def finished(folder):
    """`stored` without the files that an unfinished run keeps for the next one."""
    return {k: v for k, v in stored(folder).items() if not k.split("/")[0].endswith(".daskclip")}


def files_of(folder):
    """Bytes of the files of an array except the journal, by key."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != ".daskclip"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def clipped(source, target, axes=None, clip_norm=1.0, **options):
    """Clip and check that the result has NumPy's bits; returns the report."""
    x = read(source)
    report = clip_zarr(source, target, clip_norm, axes, **options)
    policy = options.get("nonfinite", "propagate")
    assert bits(read(target)) == bits(clip_by_norm(x, clip_norm, axes, nonfinite=policy))
    return report


def least_memory(source, axes=None, clip_norm=1.0, **how):
    """The smallest budget for which there is a plan."""
    array, absent = zarr.open_array(source, mode="r"), Path(source).parent / "absent"

    def fits(memory):
        try:
            return bool(plan_zarr(array, absent, clip_norm, axes, memory=memory, **how))
        except MemoryBudgetError:
            return False

    return 1 + bisect.bisect_left(range(1, 2**20), True, key=fits)


def memory_of(budget, source, axes=None, clip_norm=1.0, **how):
    """The smallest budget if it is ``"tight"``, else one that everything fits."""
    return least_memory(source, axes, clip_norm, **how) if budget == "tight" else 2**30


def stopping_at(monkeypatch):
    """List of one number: journal lines after which a run is interrupted; 0 for never."""
    append, left = Journal.append, [0]

    def stopping(self, entry):
        append(self, entry)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", stopping)
    return left


@contextmanager
def overlaid(folder):
    """Mount an overlay over the files in the folder ``lower``, whose folders cannot be moved."""
    for name in ("upper", "work"):
        (folder / name).mkdir()
    options = ",".join(f"{name}dir={folder / name}" for name in ("lower", "upper", "work"))
    with mounted(folder, options, "overlay") as point:
        yield point


@contextmanager
def mounted(folder, options, kind="tmpfs"):
    """Mount a file system in ``folder``; skips the test where mounting is refused."""
    point = folder / "mount"
    point.mkdir()
    mount = ["mount", "-t", kind, "-o", options, kind, str(point)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is refused here: {done.stderr.strip()}")
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)
