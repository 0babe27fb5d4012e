"""Sources whose layers are fused with the second pass, and the same bits as from recipes."""

import pickle
from collections import Counter
from contextlib import nullcontext

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from dask.blockwise import Blockwise
from dask.highlevelgraph import MaterializedLayer
from reference import bits

import daskclip.lazy.graph
from daskclip import clip_by_global_norm, clip_by_norm

X = np.random.default_rng(0).standard_normal((12, 10))
CHUNKS = ((4, 3, 5), (3, 7))


@pytest.fixture(autouse=True)
def two_passes(monkeypatch):
    """Hold no chunks, however small they are."""
    monkeypatch.setattr(daskclip.lazy.graph, "HELD_NBYTES", -1)


def second_pass(x, **kwargs):
    y = clip_by_norm(x, 1.0, **kwargs)
    return y.dask.layers[y.name]


def is_fused(x):
    return isinstance(second_pass(x), Blockwise)


def stored(x=X):
    return da.from_zarr(zarr.create_array({}, data=x, chunks=(4, 3)))


def each_in_pairs(x):
    """As `map_blocks` passes it several arrays."""
    return da.map_blocks(np.add, x, da.ones(x.shape, chunks=x.chunks), dtype=x.dtype)


ROOTS = {
    "zarr": stored,
    "memory": lambda: da.from_array(X, CHUNKS),
    "persisted": lambda: (da.from_array(X, CHUNKS) + 1).persist(scheduler="sync"),
    "made": lambda: da.full((12, 10), 0.7, chunks=CHUNKS),
    "by number": lambda: da.map_blocks(
        lambda block_id: np.full((4, 5), 1.0 + block_id[0]), chunks=((4,) * 3, (5,) * 2),
        dtype=float, meta=np.empty((0, 0)),
    ),
}  # fmt: skip
ONE_TO_ONE = {
    "elementwise": lambda x: x * 1.5 + 0.1,
    "transposed": lambda x: x.T,
    "mapped": lambda x: x.map_blocks(np.cbrt),
    "with places": lambda x: x.map_blocks(
        lambda block, block_info=None: block + block_info[0]["chunk-location"][0], dtype=x.dtype
    ),
    "pairs": each_in_pairs,
    "row": lambda x: x - da.from_array(np.arange(x.shape[1]) / 8, x.chunks[1:]),
    "twice": lambda x: da.where(x > 0, x, -x / 2),
    "doubled": lambda x: x + x,
    "single": lambda x: (x.astype("f4") - 1).astype(float),
}
OTHERS = {
    "sliced": lambda x: x[::-1, 1:] if x.shape[1] > 4 else x[1:],
    "rechunked": lambda x: x.rechunk((3, 4)),
    "broadcast": lambda x: x * (da.from_array(np.arange(x.shape[1]), x.chunks[1:]) + 1),
    "mirrored": lambda x: (y := x[:7, :7].rechunk(3)) + y.T,
    "centred": lambda x: x - x.mean(axis=0),
    "halves": lambda x: da.concatenate([x[:3], x[3:]]),
    "product": lambda x: x @ x.T,
    "random": lambda x: x + da.random.default_rng(1).random(x.shape, chunks=x.chunks),
    "kept": lambda x: x.persist(scheduler="sync", optimize_graph=False),
}
ANNOTATIONS = [
    {}, {"priority": 1}, {"priority": 2, "retries": 3}, {"workers": ["a"]}, {"note": "mine"},
    {"resources": {"A": 1}}, {"workers": ["a"], "allow_other_workers": True},
    {"priority": lambda key: 4},
]  # fmt: skip


def random_source(rng, steps, annotated):
    """Source of some steps, and whether all of its layers can be fused."""

    def annotate():
        chosen = ANNOTATIONS[rng.integers(len(ANNOTATIONS))] if annotated else {}
        return dask.annotate(**chosen) if chosen else nullcontext()

    names = [str(rng.choice([*ROOTS]))]
    with annotate():
        x = ROOTS[names[0]]()
    for _ in range(rng.integers(4)):
        names.append(str(rng.choice([*steps])))
        with annotate():
            x = steps[names[-1]](x)
    return x, names


def results(x, axes):
    clipped, total = clip_by_global_norm([x, x[:2]], 0.5)
    return [*clip_by_norm(x, 0.5, axes, return_norm=True), clip_by_norm(x, 0.5, axes), *clipped,
            total]  # fmt: skip


def annotations(layer):
    """What a layer says of each of its tasks."""
    said = (layer.annotations or {}).items()
    return {
        k: {kind: found for kind, v in said if (found := v(k) if callable(v) else v)}
        for k in layer.get_output_keys()
    }


@pytest.mark.parametrize("seed", range(60))
def test_any_source_gives_the_bits_keys_and_annotations_of_recipes(monkeypatch, seed):
    rng = np.random.default_rng(seed)
    x, names = random_source(rng, ONE_TO_ONE | OTHERS, annotated=seed % 2)
    axes = [None, 0, 1][rng.integers(3)]
    options = {"scheduler": "sync", "optimize_graph": seed % 3 > 0 and not seed % 2}
    fused = [*results(x, axes), clip_by_norm(x, 0.5)]
    monkeypatch.setattr(daskclip.lazy.graph, "fuse_source", lambda *args: None)
    made = [*results(x, axes), clip_by_norm(x, 0.5)]
    assert [y.__dask_keys__() for y in fused] == [y.__dask_keys__() for y in made], names
    for y, z in zip(fused, made, strict=True):
        said = [annotations(t.dask.layers[t.name]) for t in (y, z)]
        assert said[0] == said[1], names
    # apart, since their keys are the same
    fused, made = (dask.compute(*each, **options) for each in (fused, made))
    assert [bits(y) for y in fused] == [bits(y) for y in made], names


@pytest.mark.parametrize("seed", range(30))
def test_sources_of_blockwise_layers_are_fused_and_hold_no_chunk(seed):
    x, names = random_source(np.random.default_rng(seed), ONE_TO_ONE, annotated=False)
    y = clip_by_norm(x, 0.5)
    assert is_fused(x), names
    for name in y.dask.dependencies[y.name]:
        layer = y.dask.layers[name]
        # arrays in memory, and what reads chunks from storage
        is_data = isinstance(layer, MaterializedLayer) and not y.dask.dependencies[name]
        assert is_data or name.startswith("scale-"), names


@pytest.mark.parametrize("step", sorted(OTHERS.keys() - {"kept"}))
def test_other_sources_have_recipes(step):
    assert not is_fused(OTHERS[step](stored() + 1))


@pytest.mark.parametrize("optimize_graph", [True, False])
@pytest.mark.parametrize("axes", [None, 0, 1])
def test_each_chunk_is_made_twice_and_each_scale_once(monkeypatch, axes, optimize_graph):
    """Fused with the layer of the scales, each chunk would make its own."""
    made, finalize = Counter(), daskclip.lazy.graph.finalize

    def make(block_id):
        made[block_id] += 1
        return np.full((4, 5), 1.0 + block_id[0])

    def count(total, *args, **kwargs):
        made["scale"] += 1
        return finalize(total, *args, **kwargs)

    monkeypatch.setattr(daskclip.lazy.graph, "finalize", count)
    x = da.map_blocks(make, chunks=((4,) * 3, (5,) * 4), dtype=float, meta=np.empty((0, 0)))
    limit = da.from_array(np.array(0.5)) * 2
    y = clip_by_norm((x + 1).T, limit, axes)
    y.compute(scheduler="sync", optimize_graph=optimize_graph)
    assert made.pop("scale") == {None: 1, 0: 3, 1: 4}[axes]
    assert made == dict.fromkeys(np.ndindex(3, 4), 2)


def test_the_second_pass_takes_few_bytes_a_chunk():
    x = da.ones((10**6,), chunks=100) + 1
    assert len(pickle.dumps(second_pass(x))) <= 5 * x.npartitions
