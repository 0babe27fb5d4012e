"""Plans over shape x unit x axes x memory x threads."""

import math
import re
import tracemalloc
from itertools import chain, pairwise

import dask
import numpy as np
import pytest
from budgets import assert_least_memory_is_named, refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import bits
from sizes import resize
from stores import create, read

from daskclip import clip_by_norm, clip_zarr, plan_zarr, stats_zarr
from daskclip.errors import MemoryBudgetError
from daskclip.grid import without_axes
from daskclip.plan import plan_group
from daskclip.plan.choose import make_plan
from daskclip.plan.sizing import Layout, Machine
from daskclip.report import MIB

many = settings(max_examples=60, derandomize=True, deadline=None)
TALL = {"shape": (10**9, 256, 1024), "unit": (1, 256, 1024), "itemsize": 4, "sum_nbytes": 80}
HOST = {"memory": 2**30, "processes": 1, "threads": 2, "fewest": 2}


@st.composite
def requests(draw):
    """Arguments of `make`.

    A plan knows integers only: huge elements make a few of them as heavy as a real array.
    """
    ndim = draw(st.integers(0, 3))
    itemsize = draw(st.sampled_from([2**10, 2**18, 2**20, 2**22]))
    lengths = st.lists(st.integers(0, 12), min_size=ndim, max_size=ndim)
    threads = draw(st.integers(1, 5))
    return {
        "shape": tuple(draw(lengths)),
        "axes": tuple(a for a in range(ndim) if draw(st.booleans())),
        "unit": tuple(max(1, n // 2) for n in draw(lengths)),
        "itemsize": itemsize,
        "sum_nbytes": draw(st.sampled_from([1, itemsize // 8, itemsize, 4 * itemsize])),
        "memory": draw(st.integers(20, 400)) * MIB + draw(st.integers(0, MIB)),
        "processes": draw(st.integers(1, 3)),
        "threads": threads,
        "fewest": draw(st.sampled_from([1, threads])),
    }


def make(**arguments):
    """A plan from the fields of a layout and of a machine."""
    machine = {name: arguments.pop(name) for name in HOST}
    return make_plan(Layout(**arguments), Machine(**machine))


def planned(request, **changes):
    """The plan, or None where it is refused."""
    try:
        return make(**{**request, **changes})
    except MemoryBudgetError:
        return None


@st.composite
def plans(draw):
    return planned(draw(requests())) or planned(draw(requests()), memory=2**40)


def pieces(plan):
    """Every (slab, block)."""
    each = plan.blocks // plan.slabs if plan.blocks else 0
    return [(slab, block) for slab in range(plan.slabs) for block in range(each)]


@many
@given(plans())
def test_blocks_tile_the_array(plan):
    covered = np.zeros(plan.shape, int)
    for piece in pieces(plan):
        covered[plan.region(*piece)] += 1
    assert (covered == 1).all()


@many
@given(plans())
def test_blocks_are_numbered_slab_by_slab(plan):
    assert [plan.number(*piece) for piece in pieces(plan)] == [*range(plan.blocks)]
    assert plan.tasks == plan.passes * plan.blocks


@many
@given(plans())
def test_blocks_are_whole_units(plan):
    for piece in pieces(plan):
        for s, u, n in zip(plan.region(*piece), plan.unit, plan.shape, strict=True):
            assert s.start % u == 0
            assert s.stop % u == 0 or s.stop == n


@many
@given(plans())
def test_blocks_of_a_slab_share_their_slices(plan):
    kept = {}
    for slab, block in pieces(plan):
        region = plan.region(slab, block)
        place = tuple((s.start, s.stop) for a, s in enumerate(region) if a not in plan.axes)
        kept.setdefault(slab, set()).add(place)
    assert all(len(places) == 1 for places in kept.values())
    assert len(set(chain(*kept.values()))) == len(kept)


@many
@given(plans())
def test_one_pass_means_that_blocks_hold_their_slices_whole(plan):
    assert plan.passes == (1 if all(plan.block[a] >= plan.shape[a] for a in plan.axes) else 2)
    assert plan.bytes_read == plan.passes * math.prod(plan.shape) * plan.itemsize


@many
@given(requests())
def test_the_budget_is_kept_or_refused_with_a_remedy_that_works(request_):
    try:
        plan = make(**request_)
    except MemoryBudgetError as error:
        text = str(error)
    else:
        assert plan.projected_memory <= request_["memory"]
        return
    assert f"memory {request_['memory'] / MIB:.1f} MiB" in text
    assert "\n" not in text
    enough = int(re.search(r"memory='(\d+)MiB'", text)[1]) * MIB
    assert enough > request_["memory"]
    assert planned(request_, memory=enough)


@many
@given(requests(), st.lists(st.integers(20 * MIB, 2**30), min_size=2, max_size=2))
def test_more_memory_never_means_more_passes(request_, memories):
    request_["fewest"] = request_["threads"]
    few, more = (planned(request_, memory=m) for m in sorted(memories))
    if few:
        assert more.passes <= few.passes


@many
@given(requests())
def test_more_memory_never_means_more_passes_step_by_step(request_):
    request_["fewest"] = request_["threads"]
    found = [planned(request_, memory=m * MIB) for m in (20, 24, 32, 48, 64, 100, 200, 2**20)]
    passes = [3 if plan is None else plan.passes for plan in found]
    assert all(a >= b for a, b in pairwise(passes))
    slabs = math.prod(
        -(-n // u)
        for a, (n, u) in enumerate(zip(request_["shape"], request_["unit"], strict=True))
        if a not in request_["axes"]
    )
    if slabs >= request_["processes"] * request_["threads"]:
        assert passes[-1] == 1


@many
@given(requests())
def test_threads_are_the_most_for_which_a_unit_fits(request_):
    plan = planned(request_)
    if plan and plan.threads < request_["threads"]:
        assert plan.threads >= request_["fewest"] == 1
        assert not planned(request_, threads=plan.threads + 1, fewest=plan.threads + 1)
    if not plan:
        assert not planned(request_, threads=request_["fewest"])


@st.composite
def groups(draw):
    """Layouts by name, a machine, and whether there is a global norm."""
    number, shared = draw(st.integers(1, 4)), draw(st.booleans())
    all_ = [draw(requests()) for _ in range(number)]
    machine = {name: all_[0].pop(name) for name in HOST}
    machine["fewest"] = draw(st.sampled_from([1, machine["threads"]]))
    layouts = {f"{i}": {k: v for k, v in r.items() if k not in HOST} for i, r in enumerate(all_)}
    if shared:
        keep_alike(layouts.values(), tuple(draw(st.lists(st.integers(0, 12), max_size=2))))
    limits = draw(st.sampled_from([0, 0, 8, 2**20]))
    return {k: Layout(**v, limits_nbytes=limits) for k, v in layouts.items()}, machine, shared


def keep_alike(layouts, kept):
    """Let layouts reduce all axes they have, and keep others before them."""
    for layout in layouts:
        units = tuple(max(1, u) for u in layout["unit"])
        layout["axes"] = tuple(range(len(kept), len(kept) + len(layout["shape"])))
        layout["unit"] = tuple(1 + sum(units) % (k + 2) for k, _ in enumerate(kept)) + units
        layout["shape"] = kept + layout["shape"]


@many
@given(groups(), st.integers(20, 2000))
def test_arrays_with_norms_in_common_have_the_same_kept_positions(group, mib):
    layouts, machine, shared = group
    machine = Machine(**machine | {"memory": mib * MIB})
    try:
        plan = plan_group(layouts, {}, machine, shared)
    except MemoryBudgetError:
        return
    if not shared:
        return
    plans = [*plan.plans.values()]
    assert len({without_axes(p.block, p.axes) for p in plans}) == 1
    assert len({(p.slabs, p.slices, p.passes, p.threads, p.state) for p in plans}) == 1
    assert (plan.slabs, plan.slices) == (plans[0].slabs, plans[0].slices)
    for p in plans:
        for b, u, n in zip(p.block, p.unit, p.shape, strict=True):
            assert b % u == 0 or b >= n
        assert p.passes == 2 or p.is_whole


@settings(many, max_examples=300)
@given(groups(), st.integers(20, 2000))
def test_a_refusal_names_the_least_memory_that_works(group, mib):
    layouts, machine, shared = group

    def plan(mib):
        return plan_group(layouts, {}, Machine(**machine | {"memory": mib * MIB}), shared)

    assert_least_memory_is_named(plan, mib)


def test_slabs_of_one_block_are_proposed_where_they_need_less_than_a_chunk():
    layout = {"shape": (3, 10**6), "unit": (1, 10**6), "itemsize": 4, "sum_nbytes": 80}
    with pytest.raises(MemoryBudgetError, match=r"blocks of a whole slab \(3, 1") as caught:
        make(**layout, axes=(0,), **HOST | {"memory": 80 * MIB, "fewest": 1})
    least = int(re.search(r"memory='(\d+)MiB'", str(caught.value))[1])
    assert least < 100
    assert make(**layout, axes=(0,), **HOST | {"memory": least * MIB, "fewest": 1}).passes == 1
    with pytest.raises(MemoryBudgetError):
        make(**layout, axes=(0,), **HOST | {"memory": (least - 1) * MIB, "fewest": 1})


def test_64_threads_fit_the_default_memory():
    plan = make(**TALL, **HOST | {"threads": 64, "fewest": 1, "memory": 2**29}, axes=(1, 2))
    assert 1 < plan.threads < 64
    with pytest.raises(MemoryBudgetError, match=r"64 threads need .* workers of fewer threads"):
        make(**TALL, **HOST | {"threads": 64, "fewest": 64, "memory": 2**29}, axes=(1, 2))


@pytest.mark.parametrize(
    ("axes", "memory", "passes", "slabs"),
    [
        ((0,), 2**29, 2, 1),
        ((0,), 2**40, 2, 1),
        ((1,), 2**29, 1, 245),
        ((0, 1), 2**29, 2, 1),
        ((), 2**29, 1, 245),
    ],
)
def test_passes_and_slabs_of_a_tall_matrix(axes, memory, passes, slabs):
    plan = make(
        shape=(10**6, 1024),
        axes=axes,
        unit=(1024, 1024),
        itemsize=4,
        sum_nbytes=80,
        memory=memory,
        processes=1,
        threads=2,
        fewest=2,
    )
    assert (plan.passes, plan.slabs) == (passes, slabs)


@pytest.mark.parametrize("axes", [(), (0,), (1, 2), (0, 1, 2)])
def test_a_petabyte_is_planned_in_the_memory_of_a_gigabyte(axes):
    tracemalloc.start()
    try:
        plan = make(axes=axes, **TALL, **HOST)
        last = plan.region(plan.slabs - 1, plan.blocks // plan.slabs - 1)
        highest = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert plan.nbytes == 10**9 * 2**20
    assert [s.stop for s in last] == [10**9, 256, 1024]
    assert highest < MIB


def test_sums_of_any_spread_have_room_unless_they_take_threads_away():
    thin = {"shape": (400, 1000, 1000), "unit": (1, 1000, 1000), "itemsize": 8, "axes": (0,)}
    host = HOST | {"threads": 2, "fewest": 1, "sum_nbytes": 544}
    assert make(**thin, **host | {"memory": 2**33}).state == 0
    usual = make(**thin, **host | {"memory": 2**30})
    assert usual.state == 80
    assert usual.threads == 2
    assert usual.projected_memory <= 2**30


def test_sums_that_take_more_than_was_planned_are_given_room(tmp_path, monkeypatch):
    resize(
        monkeypatch, process_nbytes=0, thread_nbytes=0, slice_nbytes=0, block_nbytes=2**17,
        usual_sum_nbytes=8,
    )  # fmt: skip
    values = np.ldexp(1.0, np.arange(-512, 512).repeat(1024)).reshape(64, 2**14)
    x = create(tmp_path / "x", values, (1, 2**14))
    expected = bits(clip_by_norm(values, 1.0, 0))

    def clip(mib):
        memory = f"{mib}MiB"
        report = clip_zarr(x, tmp_path / f"y{mib}", 1.0, 0, memory=memory)
        assert bits(read(tmp_path / f"y{mib}")) == expected
        assert stats_zarr(x, 0, memory=memory).slices == 2**14
        return report

    with dask.config.set(num_workers=4):
        assert plan_zarr(x, tmp_path / "y", 1.0, 0, memory="2MiB").state == 8
        least = refusal(clip, 2)
        assert refusal(clip, least - 1) == least
        with pytest.raises(MemoryBudgetError, match=rf"give memory='{least}MiB'"):
            stats_zarr(x, 0, memory=f"{least - 1}MiB")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]
        states = set()
        for more in (least, 2 * least, 3 * least, 20 * least):
            assert refusal(clip, more) is None
            states.add(plan_zarr(x, tmp_path / "y", 1.0, 0, memory=f"{more}MiB").state)
    assert states == {0, 8}
