"""Chunks that are made again: from futures, where annotations say, and with the same bits."""

import dask
import dask.array as da
import numpy as np
import pytest
from distributed import Client, Scheduler, SpecCluster, Worker, get_worker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import BFLOAT16, DTYPES, bits
from servers import local_client, local_cluster

import daskclip.lazy.graph
from daskclip import clip_by_global_norm, clip_by_norm, global_norm, norm
from daskclip.lazy.recipes import chunk_recipes

X = np.random.default_rng(0).standard_normal((8, 6))


@pytest.fixture(params=[True, False], ids=["optimized", "as it is"])
def optimize_graph(request):
    return request.param


@pytest.fixture
def two_passes(monkeypatch):
    """Hold no chunks, however small they are."""
    monkeypatch.setattr(daskclip.lazy.graph, "HELD_NBYTES", -1)


STEADY = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.too_slow],  # on a machine that does much else
}


def all_results(x):
    """Results of every form of the operation, of an array in memory or of a lazy one."""
    results = [*clip_by_norm(x, 1.0, return_norm=True), clip_by_norm(x, 0.5, 0), norm(x, 0)]
    results += [norm(x), global_norm([x, x]), clip_by_norm(x, 1.0, 0, nonfinite="raise")]
    clipped, total = clip_by_global_norm([x, x[::-1]], 1.0)
    return [*results, *clipped, total, *clip_by_global_norm([x], 1.0, 2.5)[0]]


def assert_numpys_bits(x, **kwargs):
    """Compute everything with the bits of NumPy's results for the same array."""
    (plain,) = dask.compute(x, **kwargs)
    got = dask.compute(*all_results(x), **kwargs)
    assert [bits(y) for y in got] == [bits(y) for y in all_results(plain)]


# ---- futures


@pytest.fixture(scope="module")
def client():
    with local_client(2) as client:
        yield client


def add(i, value):
    return np.full((2, 6), i + 1.0) + value["to add"][0]


def sources(client):
    """Arrays whose graphs hold futures, in every way that Dask offers."""
    p = client.persist(da.from_array(X, (3, 2)))
    scattered = client.scatter(np.arange(6.0))
    array = client.submit(np.copy, X)
    made = [da.from_delayed(dask.delayed(add)(i, {"to add": [scattered]}), (2, 6), float)
            for i in range(3)]  # fmt: skip
    raw = {
        ("raw", 0): (np.add, client.submit(np.ones, 4), 1),
        ("raw", 1): client.submit(np.ones, 3),
    }
    return {
        "persisted": p,
        "derived": (2 * p)[::-1, 1:].rechunk(3),
        "half persisted": da.concatenate([p, da.from_array(X, 2)]),
        "centred": p - p.mean(axis=0),
        "persisted delayed": da.from_delayed(
            client.persist(dask.delayed(np.copy)(X)), (8, 6), float
        ),
        "scattered": da.concatenate(made),
        "future": da.from_delayed(array, (8, 6), float).rechunk(2),
        "delayed future": da.from_delayed(dask.delayed(array), (8, 6), float).rechunk(3),
        "argument": p.map_blocks(lambda x, y: x + y[0], scattered, dtype=float),
        "keyword": p.map_blocks(lambda x, y: x + y[0, 0], y=array, dtype=float),
        "tuples": da.Array(raw, "raw", ((4, 3),), dtype=float).reshape(7, 1),
    }


SOURCES = (
    "persisted", "derived", "half persisted", "centred", "persisted delayed", "scattered",
    "future", "delayed future", "argument", "keyword", "tuples",
)  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.filterwarnings("ignore:Sending large graph")
def test_futures_give_numpys_bits(client, two_passes, source, optimize_graph):
    assert_numpys_bits(sources(client)[source], optimize_graph=optimize_graph)


@pytest.mark.filterwarnings("ignore:Sending large graph")
def test_futures_of_other_processes_give_numpys_bits(two_passes):
    with local_cluster(2) as cluster, Client(cluster) as client:
        found = sources(client)
        for source in ("derived", "scattered", "tuples"):
            assert_numpys_bits(found[source])


def test_labelled_arrays_of_futures_are_clipped(client, two_passes):
    xr = pytest.importorskip("xarray", reason="xarray is not installed")
    from daskclip.xarray import clip_by_norm as clip_labelled

    x = client.persist(xr.DataArray(da.from_array(X, (3, 2)), dims=["a", "b"]))
    assert bits(clip_labelled(x, 1.0).values) == bits(clip_by_norm(X, 1.0))


def test_futures_are_inputs_and_their_chunks_are_not_held(client):
    """What is made of a small scattered array may be large: it is made again."""
    found = sources(client)
    for recipe in chunk_recipes(found["persisted"])[0].values():
        assert (recipe.graph, recipe.inputs) == ({}, [recipe.key])
    for recipe in chunk_recipes(found["scattered"])[0].values():
        assert recipe.key in recipe.graph
        assert len(recipe.inputs) == 1


# ---- annotations


def on_able_worker(block_id):
    """Chunk that only a worker with the resource can make."""
    if not get_worker().state.total_resources.get("ABLE"):
        raise RuntimeError(f"made on {get_worker().name}")
    return np.full(4, block_id[0] + 1.0)


@pytest.fixture(scope="module")
def able():
    """Three workers, of which one has a resource."""
    own = {"able": {"ABLE": 1}, "other": {}, "third": {"MEMORY": 1}}
    workers = {
        name: {"cls": Worker, "options": {"nthreads": 1, "host": "127.0.0.1", "resources": what}}
        for name, what in own.items()
    }
    options = {"host": "127.0.0.1", "port": 0, "dashboard_address": "127.0.0.1:0"}
    scheduler = {"cls": Scheduler, "options": options}
    with SpecCluster(scheduler=scheduler, workers=workers) as cluster, Client(cluster) as client:
        client.wait_for_workers(3)
        yield client


def able_array(**annotations):
    with dask.annotate(**annotations):
        return da.map_blocks(on_able_worker, chunks=((4,) * 12,), dtype=float, meta=np.empty(0))


WAYS = {
    "resource": {"resources": {"ABLE": 1}},
    "by key": {"resources": lambda key: {"ABLE": 1}},
    "worker": {"workers": ["able"], "retries": 2, "priority": 3},
    "worker by key": {"workers": lambda key: ["able"]},
}


MADE = np.repeat(np.arange(1.0, 13), 4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mix", [False, True], ids=["plain", "mixed"])
def test_chunks_are_made_where_they_can_be(able, two_passes, way, mix, optimize_graph):
    if optimize_graph and "by key" in way:
        pytest.skip("Dask cannot fuse layers whose annotations are functions")
    x, expected = able_array(**WAYS[way]), MADE
    if mix:
        x, expected = (x + 1)[::-1].rechunk(5), (MADE + 1)[::-1]
    # Dask's low-level fusion drops all annotations
    with dask.config.set({"optimization.fuse.active": False}):
        got = dask.compute(*all_results(x), optimize_graph=optimize_graph)
    assert [bits(y) for y in got] == [bits(y) for y in all_results(expected)]


def on_other_worker(x):
    if get_worker().name != "other":
        raise RuntimeError(f"made on {get_worker().name}")
    return x + 1


def contradicting(**annotations):
    x = able_array(resources={"ABLE": 1})
    with dask.annotate(**annotations):
        return x.map_blocks(on_other_worker, dtype=float, meta=np.empty(0))


def test_chunks_that_no_worker_can_make_alone_are_held(able, two_passes):
    x = contradicting(workers=["other"])
    got = dask.compute(*all_results(x), optimize_graph=False)
    assert [bits(y) for y in got] == [bits(y) for y in all_results(MADE + 1)]


def second_pass(x, **kwargs):
    y = clip_by_norm(x, 1.0, **kwargs)
    return y.dask.layers[y.name]


def test_the_second_pass_says_what_its_tasks_say(two_passes):
    layer = second_pass(able_array(resources={"ABLE": 1}, priority=2, retries=1, note="mine"))
    expected = {"resources": {"ABLE": 1}, "priority": 2, "retries": 1, "note": "mine"}
    assert layer.annotations == expected
    assert second_pass(da.ones(9, chunks=2)).annotations is None
    with dask.annotate(priority=7, workers=["a"]):
        assert second_pass(da.ones(9, chunks=2)).annotations == {"priority": 7, "workers": ["a"]}


def test_annotations_of_several_layers_are_merged(two_passes):
    with dask.annotate(priority=3, retries=1, resources={"A": 1}):
        x = da.ones(8, chunks=2)
    with dask.annotate(priority=1, retries=5, allow_other_workers=False):
        x = (x + 1)[::-1]
    with dask.annotate(priority=2):
        layer = second_pass(x)
    expected = {
        "priority": 3, "retries": 5, "resources": {"A": 1}, "allow_other_workers": False,
    }  # fmt: skip
    assert layer.annotations == expected


def test_chunks_have_the_annotations_of_their_own_layers(two_passes):
    """An annotation may hold for some of the chunks only, or differ from chunk to chunk."""
    with dask.annotate(workers=["a"]):
        a = da.zeros(24, chunks=2)
    with dask.annotate(priority=lambda key: key[1]):
        b = da.ones(24, chunks=2)
    parts = [a, b, da.full(4, 2.0)]
    layer = second_pass(da.concatenate(parts))
    keys = sorted(layer.keys(), key=lambda key: key[1])
    said = [{k: layer.annotations[k](key) for k in ("workers", "priority")} for key in keys]
    expected = [{"workers": ["a"], "priority": None}] * 12
    expected += [{"workers": None, "priority": i} for i in range(12)]
    assert said == [*expected, {"workers": None, "priority": None}]


@pytest.mark.parametrize(
    "annotations",
    [{"workers": ["b"]}, {"resources": {"B": 1}}, {"workers": ["a"], "allow_other_workers": True}],
    ids=str,
)
def test_places_that_contradict_keep_the_chunks(annotations):
    with dask.annotate(workers=["a"]):
        x = da.ones(8, chunks=2)
    with dask.annotate(**annotations):
        y = x[::-1]
    for z, active in ((y, {}), (x, annotations)):
        with dask.annotate(**active):
            recipes, held = chunk_recipes(z)
        assert held == {z.name}
        for recipe in recipes.values():
            assert (recipe.graph, recipe.inputs) == ({}, [recipe.key])
            assert dict(recipe.annotations) == active


# ---- any graph

integers = st.integers


def random_array(draw):
    """Dask array of two dimensions with a random graph; parts of it may be persisted."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.tuples(integers(1, 9), integers(1, 7)))
    seed = draw(integers(0, 999))

    def chunks():
        return tuple(draw(integers(1, n)) for n in x.shape)

    def block(i=0):
        """Values of a dtype that NumPy cannot draw, too."""
        values = np.random.default_rng(seed + i).standard_normal(shape)
        return values.astype(dtype)

    x = da.from_array(block(), tuple(draw(integers(1, n)) for n in shape))
    for i in range(draw(integers(0, 3))):
        step = draw(
            st.sampled_from(("slice", "rechunk", "add", "delayed", "persist", "mix", "mean"))
        )
        if step == "slice":
            x = x[::-1, draw(integers(0, x.shape[1] - 1)) :]
        elif step == "rechunk":
            x = x.rechunk(chunks())
        elif step == "add" or (step == "mean" and dtype == BFLOAT16):
            x = x + x[:, ::-1]
        elif step == "mean":
            x = (x - x.mean(axis=0)).astype(dtype)
        elif step == "persist":
            x = x.persist(**draw(st.sampled_from(({}, {"optimize_graph": False}))))
        elif step == "mix":
            x = da.concatenate([x, x[:1].persist(), x[1:]], axis=0)
        else:
            made = dask.delayed(block, pure=False)(i)
            x = da.concatenate([x[:1], da.from_delayed(made, shape, dtype)[:, : x.shape[1]]])
            x = x[:, : min(x.shape[1], shape[1])]
    return x


def check_random_array(data):
    draw = data.draw
    axes, limit = draw(st.sampled_from((None, 0, 1, []))), draw(st.sampled_from((0.1, 1.0, 9.0)))

    def results(t):
        clipped, total = clip_by_global_norm([t, t[:1]], limit)
        clipped += clip_by_norm(t, limit, axes, return_norm=True)
        return [*clipped, total, norm(t, axes), clip_by_norm(t, norm(t) / 3)]

    # not in a strategy, since Dask draws random numbers of its own
    x, options = random_array(draw), {"optimize_graph": draw(st.booleans())}
    with dask.config.set(split_every=draw(integers(2, 4))):
        (plain,) = dask.compute(x, **options)
        got = dask.compute(*results(x), **options)
        assert [bits(y) for y in got] == [bits(y) for y in results(plain)]


def check_examples(number):
    settings(max_examples=number, **STEADY)(given(st.data())(check_random_array))()


# threads of the cluster draw random numbers of their own
other_threads = pytest.mark.filterwarnings("ignore:Do not use the `random` module")


@other_threads
@pytest.mark.parametrize("held", [-1, 200])
@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_any_graph_gives_numpys_bits(monkeypatch, scheduler, held):
    monkeypatch.setattr(daskclip.lazy.graph, "HELD_NBYTES", held)
    with dask.config.set(scheduler=scheduler):
        check_examples(20)


@other_threads
@pytest.mark.filterwarnings("ignore:Sending large graph")
def test_any_graph_with_futures_gives_numpys_bits(client, two_passes):
    check_examples(8)
