"""Memory of lazy clipping of 1 GiB and of 512 MiB, measured in separate processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

SCRIPT = Path(__file__).parents[1] / "support" / "lazy_memory.py"
# everything: sliced, concatenated and rechunked; split: each stored chunk feeds 18 of the source
SOURCES = ["zarr", "stored", "rechunked", "split", "sliced", "concatenated", "chain", "centred"]


def make(folder, bands):
    """Make an array of float32 in chunks of 4 MiB, 16 in each band."""
    path = folder / "x.zarr"
    z = zarr.create_array(
        path, shape=(1024 * bands, 16384), chunks=(1024, 1024), dtype="f4", compressors=None
    )
    band = np.random.default_rng(0).standard_normal((1024, 16384), np.float32)
    for i in range(bands):
        z[1024 * i : 1024 * (i + 1)] = band + i / 8
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """1 GiB."""
    path = make(tmp_path_factory.mktemp("lazy-memory"), 16)
    yield path
    shutil.rmtree(path.parent)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """512 MiB."""
    path = make(tmp_path_factory.mktemp("lazy-memory-half"), 8)
    yield path
    shutil.rmtree(path.parent)


def held(store, kind, scheduler):
    """Peak memory above the start, in MB, of each process that computes."""
    target = store.with_name("y.zarr")
    try:
        done = subprocess.run(
            [sys.executable, SCRIPT, store, target, kind, scheduler],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    finally:
        shutil.rmtree(target, ignore_errors=True)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [*SOURCES, "everything", "zarr over 0", "zarr over 1", "everything over 0"]
)
def test_threads_hold_150_mb_at_most(store, kind):
    assert max(held(store, kind, "threads")) <= 150


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", [*SOURCES, "everything", "zarr over 0", "everything over 0"])
def test_each_of_two_workers_holds_100_mb_at_most(store, half, kind):
    # of the whole, some take two minutes
    source = half if kind in ("rechunked", "split", "sliced", "chain", "centred") else store
    assert max(held(source, kind, "distributed")) <= 100


@pytest.mark.slow
def test_the_plain_way_holds_the_array(store):
    """So that the tests above can fail."""
    assert max(held(store, "plain", "threads")) > 700


@pytest.mark.slow
@pytest.mark.distributed
def test_the_plain_way_holds_the_array_on_two_workers(store):
    assert sum(held(store, "plain", "distributed")) > 700
