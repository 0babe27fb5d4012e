"""Random groups are clipped as NumPy clips their arrays, also after a run that was stopped."""

import tempfile
from pathlib import Path

import dask
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import bits
from sizes import resize
from stores import some, stopping_at

from daskclip import clip_by_global_norm, clip_by_norm, clip_zarr, verify_zarr
from daskclip.errors import MemoryBudgetError

PLAIN = st.just({"z": ({"shape": (3,), "chunks": (2,), "dtype": "f4"}, np.float32([3, 4, 0]), 8)})


@st.composite
def arrays(draw):
    """Options of an array, its values, and the number of leading rows to store."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 5, 8, 0]), max_size=3)))
    chunks = tuple(draw(st.integers(1, max(1, n))) for n in shape)
    dtype = draw(st.sampled_from(["f4", "f8", "f2", "c8", "i4"]))
    whole = draw(st.booleans()) and min(shape, default=0) > 0
    values = 10 * some(shape, dtype, draw(st.integers(0, 99)))
    if dtype != "i4" and values.size:
        values.flat[draw(st.integers(0, values.size - 1))] = draw(
            st.sampled_from([1.0, np.inf, np.nan])
        )
    fill = draw(st.sampled_from([0, 2])) if dtype != "i4" else 0
    rows = draw(st.sampled_from([8, 0, 1])) if shape else 1
    options = {"shape": shape, "chunks": chunks, "dtype": dtype, "fill_value": fill}
    return options | {"shards": tuple(2 * c for c in chunks) if whole else None}, values, rows


@st.composite
def groups(draw):
    """Arrays by name, with at least one that is clipped."""
    names = st.sampled_from(["a", "b", "c/a", "c/b", "d"])
    found = draw(st.dictionaries(names, arrays(), min_size=1, max_size=5))
    return found if any(o["dtype"] != "i4" for o, *_ in found.values()) else found | draw(PLAIN)


def store_group(path, group):
    """Store a group and return the values read back from it."""
    root = zarr.create_group(path)
    for name, (options, values, rows) in group.items():
        array = root.create_array(name, **options)
        if values.shape:
            array[:rows] = values[:rows]
        else:
            array[...] = values
    return {name: np.asarray(root[name][...]) for name in group}


HOW = {
    "own": {},
    "each": {"axes": []},
    "largest": {"ord": np.inf},
    "global": {"global_norm": True},
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    group=groups(),
    how=st.sampled_from(["global", *HOW]),
    memory=st.sampled_from(["1KiB", "8KiB", "64MiB"]),
    limit=st.sampled_from([0.5, 20.0, 1e30]),
    in_place=st.booleans(),
    stop=st.integers(0, 4),
)
def test_a_group_is_clipped_as_numpy_clips_its_arrays(group, how, memory, limit, in_place, stop):
    if any(o["dtype"] == "c8" for o, *_ in group.values()) and how == "largest":
        how = "own"
    options = HOW[how]
    with (
        tempfile.TemporaryDirectory() as folder,
        dask.config.set(num_workers=2),
        pytest.MonkeyPatch.context() as patch,
    ):
        resize(patch, process_nbytes=0, thread_nbytes=0)
        source, target = Path(folder) / "x", Path(folder) / ("x" if in_place else "y")
        values = store_group(source, group)
        floats = {n: x for n, x in values.items() if x.dtype.kind in "fc"}
        if how == "global":
            clipped, _ = clip_by_global_norm(list(floats.values()), limit)
            expected = dict(zip(floats, clipped, strict=True))
        else:
            expected = {n: clip_by_norm(x, limit, **options) for n, x in floats.items()}

        def run(memory):
            to = None if in_place else target
            return clip_zarr(source, to, limit, in_place=in_place, memory=memory, **options)

        left = stopping_at(patch)
        left[0] = stop
        try:
            report = run(memory)
        except (MemoryBudgetError, KeyboardInterrupt) as error:
            left[0] = 0
            report = run("512MiB" if isinstance(error, MemoryBudgetError) else memory)
        left[0] = 0
        for name, x in (values | expected).items():
            assert bits(zarr.open_array(target / name, mode="r")[...]) == bits(x), name
        if report.status == "clipped":
            verify_zarr(target, None if in_place else source)
