"""Saved norms of groups, joint and one by one, in folders and in object stores."""

import numpy as np
import pytest
import zarr
from joint import values
from reference import bits
from sizes import SMALL, resize
from stores import stopping_at, stored
from zarr.storage import ObjectStore

from daskclip import clip_zarr, global_norm, norm, plan_zarr, stats_zarr, verify_zarr
from daskclip.errors import DaskClipError, InvalidValueError, MemoryBudgetError, TargetExistsError

obstore = pytest.importorskip("obstore.store")
AXES = slice(1, None)
SHAPES = {"a": (12, 3, 4), "in/b": (12, 5), "in/deep/c": (12, 2)}


@pytest.fixture
def arrays(tmp_path):
    rng = np.random.default_rng(1)
    group, found = zarr.create_group(tmp_path / "x"), {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        found[name] = values(rng, shape, ["f4", "f8", "f2"][i])
        chunks = (i + 1, *(2 for _ in shape[1:]))
        group.create_array(name, shape=shape, chunks=chunks, dtype=found[name].dtype)[...] = found[
            name
        ]
    group.create_array("n", shape=(3,), chunks=(2,), dtype="i4")[:] = [1, 2, 3]
    return found


def bucket():
    """An object store in memory."""
    return ObjectStore(obstore.MemoryStore())


@pytest.fixture(params=["folder", "store"])
def place(request, tmp_path):
    """Where norms are saved."""
    if request.param == "folder":
        return str(tmp_path / "norms")
    return bucket()


def budget(source, passes, **how):
    for memory in (*range(32, 4096, 8), 2**20):
        try:
            if plan_zarr(source, f"{source}-no", 1.0, AXES, memory=memory, **how).passes == passes:
                return memory
        except MemoryBudgetError:
            pass
    raise AssertionError("no budget gives so many passes")


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("joint", [False, True])
def test_a_group_with_saved_norms_is_read_once(arrays, tmp_path, monkeypatch, place, passes, joint):
    resize(monkeypatch, **SMALL)
    how = {"global_norm": joint}
    how["memory"] = budget(tmp_path / "x", passes, **how)
    saved = stats_zarr(tmp_path / "x", AXES, save_norms=place, **how)
    if joint:
        found = zarr.open_array(place, mode="r")
        assert bits(found[...]) == bits(global_norm([*arrays.values()], axes=AXES))
    else:
        found = zarr.open_group(place, mode="r")
        for name, x in arrays.items():
            assert bits(found[name][...]) == bits(norm(x, AXES))
        assert "n" not in found
    plain = clip_zarr(tmp_path / "x", tmp_path / "plain", 1.5, AXES, **how)
    for limit in (1.5, "p50"):
        target = tmp_path / f"y{limit}"
        report = clip_zarr(tmp_path / "x", target, limit, AXES, norms=place, **how)
        assert (report.passes, report.slices) == (1, saved.slices)
        assert report.bytes_read <= min(plain.bytes_read, sum(x.nbytes for x in arrays.values()))
        assert verify_zarr(target, tmp_path / "x").slices == saved.slices
        again = clip_zarr(tmp_path / "x", target, limit, AXES, norms=place, **how)
        assert again.status == "up to date"
    assert stored(tmp_path / "y1.5") == stored(tmp_path / "plain")
    with pytest.raises(InvalidValueError, match=f"global_norm {joint} and not {not joint}; save"):
        clip_zarr(tmp_path / "x", tmp_path / "z", 1.0, AXES, norms=place, global_norm=not joint)
    with pytest.raises(TargetExistsError, match="exists; remove it"):
        stats_zarr(tmp_path / "x", AXES, save_norms=place, **how)


@pytest.mark.parametrize("joint", [False, True])
def test_norms_that_were_stopped_leave_nothing_in_the_way(
    arrays, tmp_path, monkeypatch, place, joint
):
    resize(monkeypatch, **SMALL)
    left = stopping_at(monkeypatch)
    how = {"global_norm": joint, "memory": budget(tmp_path / "x", 2, global_norm=joint)}
    for number in range(1, 100, 2):
        left[0] = number
        try:
            stats_zarr(tmp_path / "x", AXES, save_norms=place, **how)
            break
        except KeyboardInterrupt:
            with pytest.raises(DaskClipError, match=r"do not exist|holds no norms"):
                plan_zarr(tmp_path / "x", tmp_path / "y", 1.0, AXES, norms=place, **how)
    left[0] = 0
    assert number > 2
    clip_zarr(tmp_path / "x", tmp_path / "y", 1.0, AXES, norms=place, **how)
    monkeypatch.undo()
    clip_zarr(tmp_path / "x", tmp_path / "z", 1.0, AXES, global_norm=joint)
    assert stored(tmp_path / "y") == stored(tmp_path / "z")


def test_norms_of_an_array_in_a_store(tmp_path):
    x = np.float32([[3, 4], [6, 8]])
    array = zarr.create_array(tmp_path / "x", shape=x.shape, chunks=(1, 2), dtype="f4")
    array[...] = x
    store = bucket()
    stats_zarr(array, 1, save_norms=store)
    assert zarr.open_array(store, mode="r")[...].tolist() == [5.0, 10.0]
    report = clip_zarr(array, tmp_path / "y", "p50", 1, norms=store)
    assert (report.passes, report.clip_norm) == (1, 5.0)
