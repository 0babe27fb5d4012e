"""The lazy operation: what is computed, when, how often, and under which keys."""

import os
import subprocess
import sys
from collections import Counter

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from reference import BFLOAT16, bits

from daskclip import IndexedSlices, clip_by_global_norm, clip_by_norm, global_norm, norm
from daskclip.lazy.recipes import chunk_recipes

X = np.random.default_rng(0).standard_normal((30, 20)).astype(np.float32)
MIB = 2**20


def counting_array(chunks, calls, shape=(MIB,)):
    """Dask array of chunks of 4 MiB that counts how often each is computed."""

    def make(block_id):
        calls[block_id] += 1
        return np.full(shape, block_id[0] + 1, np.float32)

    sizes = ((shape[0],) * chunks, *((n,) for n in shape[1:]))
    return da.map_blocks(
        make, chunks=sizes, dtype=np.float32, meta=np.empty((0,) * len(shape), np.float32)
    )


def compute(*arrays):
    return dask.compute(*arrays, scheduler="sync")


def test_nothing_is_computed_before_it_is_asked_for():
    calls = Counter()
    x = counting_array(6, calls)
    limit = norm(x) / 2
    clip_by_norm(x, limit, 0, return_norm=True)
    clip_by_norm(x, 1.0, [], nonfinite="raise")
    clip_by_global_norm([x, IndexedSlices(x, None)], limit, global_norm([x, X]))
    assert not calls
    compute(limit)
    assert calls


def test_two_passes_make_each_chunk_twice():
    calls = Counter()
    compute(*clip_by_norm(counting_array(6, calls), 1.0, return_norm=True))
    assert calls == Counter({(i,): 2 for i in range(6)})


def test_clipping_a_list_makes_each_chunk_twice_or_once_with_a_given_norm():
    calls = Counter()
    x = counting_array(6, calls)
    compute(*clip_by_global_norm([x], 1.0))
    assert calls == Counter({(i,): 2 for i in range(6)})
    calls.clear()
    compute(*clip_by_global_norm([x], 1.0, 9.0))
    assert calls == Counter({(i,): 1 for i in range(6)})


@pytest.mark.parametrize("axes", [1, []])
def test_slices_inside_a_chunk_take_one_pass(axes):
    calls = Counter()
    compute(*clip_by_norm(counting_array(6, calls, (1000, 4)), 1.0, axes, return_norm=True))
    assert calls == Counter({(i, 0): 1 for i in range(6)})


def test_norms_take_one_pass():
    calls = Counter()
    x = counting_array(6, calls, (1000,))
    for lazy in (norm(x), norm(x, 0), norm(x, []), global_norm([x])):
        calls.clear()
        compute(lazy)
        assert calls == Counter({(i,): 1 for i in range(6)})


def test_few_small_chunks_are_held_not_made_again():
    calls = Counter()
    compute(clip_by_norm(counting_array(3, calls, (1000,)), 1.0))
    assert calls == Counter({(i,): 1 for i in range(3)})


@pytest.mark.parametrize("chunks", [9, 40])
def test_a_mean_is_made_once_not_for_each_chunk(chunks):
    calls = Counter()
    x = counting_array(chunks, calls, (MIB // 2,))
    compute(clip_by_norm(x - x.mean(), 1.0))
    # for the mean and the first pass, and for the second
    assert set(calls.values()) <= {2, 3}


def test_persisted_chunks_are_used_as_they_are():
    calls = Counter()
    x = counting_array(6, calls).persist(scheduler="sync")
    calls.clear()
    y, z = compute(clip_by_norm(x, 1.0), clip_by_norm(2 * x, 1.0))
    assert not calls
    assert bits(y) == bits(clip_by_norm(x.compute(), 1.0))
    assert bits(z) == bits(clip_by_norm(2 * x.compute(), 1.0))


def sources(x):
    """The same array, derived from others in every way that Dask offers."""
    lazy = da.from_array(x, (7, 6))
    memory = zarr.create_array({}, data=x, chunks=(4, 20))
    return {
        "elementwise": (lazy + 1) - 1,
        "rechunked": lazy.rechunk((11, 3)),
        "sliced": da.from_array(np.pad(x, 3), 5)[3:-3, 3:-3],
        "concatenated": da.concatenate([lazy[:13], lazy[13:]]),
        "stacked": da.stack([lazy[i] for i in range(len(x))]),
        "transposed": lazy.T.T,
        "reshaped": lazy.reshape(-1).reshape(x.shape),
        "indexed": lazy[np.arange(len(x))[::-1]][::-1],
        "overlapping": lazy.map_overlap(lambda b: b, depth=1, boundary=0.0, dtype=x.dtype),
        "delayed": da.from_delayed(dask.delayed(np.copy)(x), x.shape, x.dtype),
        "persisted": lazy.persist(scheduler="sync"),
        "zarr": da.from_zarr(memory),
        "centred and back": (lazy - lazy.sum()) + lazy.sum(),
    }


@pytest.mark.parametrize("axes", [None, 1])
@pytest.mark.parametrize("source", sources(X))
def test_every_kind_of_source_gives_numpys_bits(source, axes):
    x = sources(X)[source]
    y, value = clip_by_norm(x, 1.5, axes, return_norm=True)
    x, y, value = compute(x, y, value)
    expected, norms = clip_by_norm(x, 1.5, axes, return_norm=True)
    assert bits(y) == bits(expected)
    assert bits(value) == bits(norms)


@pytest.mark.parametrize("axes", [None, 0, 1, []])
def test_arrays_of_unknown_chunk_sizes_are_clipped(axes):
    x = da.from_array(X, (7, 6))
    x = x[(x > 0).any(axis=1)]
    assert np.isnan(x.shape[0])
    y, value = clip_by_norm(x, 1.5, axes, return_norm=True)
    x, y, value = compute(x, y, value)
    expected, norms = clip_by_norm(x, 1.5, axes, return_norm=True)
    assert bits(y) == bits(expected)
    assert bits(value) == bits(norms)


def test_a_slice_of_unknown_place_is_named_by_its_chunk():
    x = da.from_array(np.where(X > 1, np.nan, X), (7, 20))
    x = x[~(x < -9).any(axis=1)]
    assert np.isnan(x.shape[0])
    with pytest.raises(
        FloatingPointError, match=r"^slice \[[^n]*\] holds nan .* \(chunk \(\d, 0\)\)"
    ):
        compute(clip_by_norm(x, 1.0, 1, nonfinite="raise"))


def test_a_mask_of_unknown_chunks_can_be_clipped_as_a_list():
    x = da.from_array(X, (7, 6))
    x = x[x > 0]
    (y,), value = clip_by_global_norm([x], 1.5)
    x, y, value = compute(x, y, value)
    assert bits(y) == bits(clip_by_norm(x, 1.5))
    assert value == norm(x)


@pytest.mark.parametrize(
    "make",
    [
        {"chunks": (7, 6), "zarr_format": 2},
        {"chunks": (7, 6), "zarr_format": 2, "dtype": ">f4", "order": "F"},
        {"chunks": (7, 6), "zarr_format": 3},
        {"chunks": (5, 5), "shards": (10, 10), "zarr_format": 3},
        {"chunks": (4, 4), "shards": (8, 20), "zarr_format": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("axes", [None, 0])
def test_zarr_arrays_become_lazy(tmp_path, make, axes):
    z = zarr.create_array(tmp_path / "x.zarr", shape=X.shape, **{"dtype": X.dtype, **make})
    z[...] = X
    y, value = clip_by_norm(z, 1.5, axes, return_norm=True)
    assert isinstance(y, da.Array)
    assert y.chunksize == (z.shards or z.chunks)
    assert y.dtype == z.dtype
    (listed,), total = clip_by_global_norm([z], 1.5)
    y, value, again, listed, total = compute(y, value, norm(z, axes), listed, total)
    assert bits(y) == bits(clip_by_norm(X, 1.5, axes))
    assert bits(value) == bits(again) == bits(norm(X, axes))
    assert bits(listed) == bits(clip_by_norm(X, 1.5))
    assert total == norm(X)


@pytest.mark.parametrize("shape", [(), (0, 3)])
def test_zarr_arrays_of_one_or_no_element(shape):
    z = zarr.create_array({}, data=np.full(shape, 3.0))
    assert bits(clip_by_norm(z, 1.0).compute()) == bits(clip_by_norm(np.full(shape, 3.0), 1.0))


@pytest.mark.parametrize("nonfinite", ["propagate", "raise"])
@pytest.mark.parametrize(
    "limit",
    [1.5, 0.1, 0.0, -1.0, np.inf, np.nan, np.float16(0.1), np.float32(0.1), np.int8(2), True],
)
def test_a_lazy_limit_gives_the_same_bits(limit, nonfinite):
    lazy = da.from_array(np.array(limit))
    arrays = [X, da.from_array(X, (7, 20)), da.from_array(X, (7, 6))]
    results = [clip_by_norm(x, lazy, 1, nonfinite=nonfinite) for x in arrays]
    assert {bits(y) for y in compute(*results)} == {bits(clip_by_norm(X, limit, 1))}
    results = [clip_by_global_norm([x], lazy)[0][0] for x in arrays]
    assert {bits(y) for y in compute(*results)} == {bits(clip_by_norm(X, limit))}


def test_a_limit_that_depends_on_the_array():
    x = da.from_array(X, (7, 6))
    y, limit = compute(clip_by_norm(x, norm(x) / 3), norm(x) / 3)
    assert bits(y) == bits(clip_by_norm(X, limit))


@pytest.mark.parametrize("chunks", [(7, 20), (7, 6)])
def test_no_limit_lets_even_raise_pass(chunks):
    x = da.from_array(np.where(X > 1, np.nan, X), chunks)
    y = clip_by_norm(x, da.from_array(np.array(np.inf)), 1, nonfinite="raise")
    assert bits(y.compute()) == bits(x.compute())


@pytest.mark.parametrize("chunks", [(7, 20), (7, 6)])
def test_raise_happens_when_computed(chunks):
    x = X.copy()
    x[16, 3] = np.nan
    y, value = clip_by_norm(da.from_array(x, chunks), 1.0, 1, nonfinite="raise", return_norm=True)
    for lazy in (y, value):
        with pytest.raises(
            FloatingPointError, match=r"^slice \[16, :\] .* \(chunk \(2, 0\)\); use "
        ):
            lazy.compute()


@pytest.mark.parametrize("chunks", [(7, 20), (7, 6)])
def test_a_name_is_a_prefix_and_changes_nothing_else(chunks):
    x = da.from_array(X, chunks)
    plain, named = clip_by_norm(x, 1.0, 1), clip_by_norm(x, 1.0, 1, "gradient")
    assert named.name.startswith("gradient-")
    assert named.name != plain.name
    assert bits(named.compute()) == bits(plain.compute())
    (named,), _ = clip_by_global_norm([x], 1.0, name="gradient")
    assert named.name.startswith("gradient-")
    assert bits(clip_by_norm(X, 1.0, 1, "gradient")) == bits(clip_by_norm(X, 1.0, 1))


def test_results_of_different_calls_have_different_names():
    x = da.from_array(X, (7, 6))
    calls = [
        clip_by_norm(x, limit, axes, nonfinite=policy)
        for limit in (1.0, 2.0, 0.0, np.inf, np.nan, da.from_array(np.array(1.0)))
        for axes in (None, 0, 1, [])
        for policy in ("propagate", "omit", "raise")
    ]
    calls += [clip_by_norm(x.rechunk(5), 1.0), clip_by_norm(x + 1, 1.0)]
    calls += [
        clip_by_global_norm([x, *more], c)[0][0] for c in (1.0, 2.0) for more in ([], [x], [X])
    ]
    calls += [norm(x, a, keepdims=k) for a in (None, 0, 1, []) for k in (False, True)]
    calls += [global_norm([x]), global_norm([x, x]), global_norm([x, X])]
    names = [c.name for c in calls]
    assert len(set(names)) == len(names)


def make_all(folder):
    """Names and graph keys of many calls on newly built arrays."""
    z = zarr.create_array(
        f"{folder}/x.zarr", shape=(6, 4), chunks=(2, 2), dtype="f4", overwrite=True
    )
    results = []
    for x in (
        da.from_array(X, (7, 6)),
        da.from_array(X.astype(BFLOAT16), 7),
        da.ones((8, 6)).rechunk(3),
    ):
        limit = da.from_array(np.array(1.5))
        results += clip_by_norm(x, 1.0, return_norm=True)
        results += clip_by_norm(x, limit, 1, return_norm=True, nonfinite="raise")
        results += [clip_by_norm(x, 1.0, [], "name"), norm(x, 0), global_norm([x, X])]
        (y, w, s), value = clip_by_global_norm([x, X, IndexedSlices(x, None)], 1.0, limit)
        results += [y, w, s.values, value]
    results += [clip_by_norm(z, 1.0), norm(z)]
    # layers that Dask itself names by chance would differ from call to call
    return [
        (r.name, sorted(map(str, r.dask.layers)), sorted(map(str, r.__dask_keys__())))
        for r in results
    ]


def test_equal_calls_have_equal_keys(tmp_path):
    assert make_all(tmp_path) == make_all(tmp_path)


def test_equal_calls_have_equal_keys_in_every_process(tmp_path):
    command = [sys.executable, __file__, str(tmp_path)]
    outputs = [
        subprocess.run(
            command,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in "12"
    ]
    assert outputs[0] == outputs[1] == f"{make_all(tmp_path)}\n"


if __name__ == "__main__":
    print(make_all(sys.argv[1]))


def halves(x):
    return da.concatenate([x[:5], x[5:]])


@pytest.mark.parametrize(
    "source",
    [
        lambda x: x,
        halves,
        lambda x: halves(x[::-1, 1:]).rechunk((3, 5)),
        lambda x: ((x + 1) * 2).rechunk((2, 1)),
    ],
    ids=["plain", "concatenated", "mixed", "split"],
)
def test_the_second_pass_holds_no_chunk_of_the_source(source):
    x = source(da.random.default_rng(0).random((40, 20), chunks=(4, 4)))
    made, held = chunk_recipes(x)
    assert not held
    assert all(not recipe.inputs for recipe in made.values())


def test_the_second_pass_holds_a_mean():
    x = da.random.default_rng(0).random((40, 20), chunks=(2, 4))
    centred = x - x.mean(axis=0)
    made, held = chunk_recipes(centred)
    assert all(len(recipe.inputs) == 1 for recipe in made.values())
    assert len(held) == 1
    assert {k[0] for k in made} == {centred.name}
