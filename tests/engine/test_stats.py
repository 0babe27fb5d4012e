"""Statistics of norms: counts as NumPy gives them, for any plan, and a quantile as the limit."""

import json
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import zarr
from command_line import run
from sizes import resize
from stores import create, finished, read, stored

from daskclip import clip_zarr, norm, plan_zarr, stats_zarr, verify_zarr
from daskclip.errors import InvalidTypeError, InvalidValueError, NonFiniteError, TargetExistsError
from daskclip.numerics.histogram import RELATIVE_ERROR
from daskclip.worker import tasks

SHAPE, CHUNKS = (40, 6, 7), (3, 4, 3)
AXES = [None, 0, (1, 2), (0, 2), -1, ()]


def values(dtype="f4"):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(SHAPE) * np.exp(rng.standard_normal((SHAPE[0], 1, 1)))
    x[3], x[5, 2, 1], x[9, 1, 1], x[9, 2, 2] = 0.0, np.nan, np.inf, np.nan
    x[11, 0, 0] = -np.inf
    return x.astype(dtype)


@pytest.fixture
def source(tmp_path):
    return create(tmp_path / "x", values(), CHUNKS)


def comparable(report):
    """Figures of a report that do not depend on the plan."""
    other = ("source", "bytes_read", "seconds", "projected_memory")
    return {k: v for k, v in json.loads(report.to_json()).items() if k not in other}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("axes", AXES)
def test_stats_are_those_of_the_norms(source, axes):
    found = stats_zarr(source, axes, memory="100KiB")
    norms = np.atleast_1d(norm(values(), axes))
    finite = norms[np.isfinite(norms)]
    assert found.slices == norms.size
    assert found.nan == np.isnan(norms).sum()
    assert found.infinite == np.isinf(norms).sum()
    assert found.zeros == (norms == 0).sum()
    assert found.bytes_read == values().nbytes
    if not finite.size:
        assert (found.quantiles, found.clips, found.smallest_norm) == ({}, {}, None)
        return
    assert (found.smallest_norm, found.largest_norm) == (finite.min(), finite.max())
    for name, value in found.quantiles.items():
        rank = max(1, -(-finite.size * Fraction(name[1:]) // 100))
        wanted = np.sort(finite)[int(rank) - 1]
        assert abs(value - wanted) <= RELATIVE_ERROR * wanted
    for limit, clips in found.clips.items():
        wide = float(limit) * np.array([1 - 2 * RELATIVE_ERROR, 1 + 2 * RELATIVE_ERROR])
        assert (finite > wide[1]).sum() <= clips <= (finite > wide[0]).sum()
        if float(limit) in (1.0, 2.0, 5.0, 10.0, 20.0, 50.0):
            assert clips == (finite > float(limit)).sum()
    place = norm(values(), axes)
    assert [w["norm"] for w in found.worst] == np.sort(finite)[::-1][:10].tolist()
    assert all(place[tuple(w["index"])] == w["norm"] for w in found.worst)
    for along in found.along:
        assert along["part"] == 1
    assert sum(n for *_, n in found.histogram) == (finite > 0).sum()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("memory", ["4KiB", "100KiB"])
def test_stats_depend_on_no_chunks(source, tmp_path, axes, memory, monkeypatch):
    if axes in (0, (0, 2)):  # several slabs, in one pass or in two
        passes = plan_zarr(source, tmp_path / "y", 1.0, axes, memory=memory).passes
        assert passes == (2 if memory == "4KiB" else 1)
    wanted = comparable(stats_zarr(source, axes, memory=memory))
    other = create(tmp_path / "other", values(), SHAPE)
    resize(monkeypatch, block_nbytes=1 << 20)
    found = comparable(stats_zarr(other, axes))
    assert found == wanted


def test_the_largest_norms_along_an_axis(source):
    found = stats_zarr(source, (1, 2))
    norms = norm(values(), (1, 2))
    (along,) = found.along
    assert (along["axis"], along["length"]) == (0, SHAPE[0])
    assert along["largest"] == np.where(np.isfinite(norms), norms, 0.0).tolist()


def test_stats_write_nothing(source, tmp_path):
    before = stored(tmp_path)
    stats_zarr(source, 0)
    assert run("stats", source, "--axes", 1).exit_code == 0
    assert stored(tmp_path) == before


@pytest.mark.parametrize("axes", [None, 0, 1])
def test_what_is_not_stored_is_zeros(tmp_path, axes):
    x = zarr.create_array(tmp_path / "x", shape=(400, 9), chunks=(3, 3), dtype="f4")
    x[7:9, 4] = 5.0
    found = stats_zarr(x, axes)
    norms = np.atleast_1d(norm(x[...], axes))
    assert found.zeros == (norms == 0).sum()
    assert found.slices == norms.size
    assert found.largest_norm == norms.max()
    assert found.worst[0]["norm"] == norms.max()
    empty = zarr.create_array(tmp_path / "e", shape=(0, 9), chunks=(3, 3), dtype="f4")
    assert stats_zarr(empty, axes).slices == np.atleast_1d(norm(empty[...], axes)).size


def test_stats_under_omit_and_raise(source):
    omitted = stats_zarr(source, (1, 2), nonfinite="omit")
    assert (omitted.nan, omitted.infinite) == (0, 2)
    with pytest.raises(NonFiniteError):
        stats_zarr(source, (1, 2), nonfinite="raise")


def test_norms_that_exceed_float64(tmp_path):
    x = np.full((3, 2), 1.7e308)
    x[0] = 1.0
    found = stats_zarr(create(tmp_path / "x", x, (1, 2)), 1)
    assert (found.infinite, found.largest_norm, found.slices) == (0, np.inf, 3)
    assert json.loads(found.to_json())["worst"][0]["norm"] == "inf"


def test_stats_are_printed_as_text_and_json(source, tmp_path):
    done = run("stats", source, "--axes", "1,2", "--progress", "none")
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert rows["slices"].strip() == "40"
    assert rows["clip_norm 1"].strip().endswith("% of 40 slices")
    report = tmp_path / "report.json"
    done = run("stats", source, "--axes", "1,2", "--json", "--report", report, "--progress", "none")
    assert report.read_text() == done.stdout
    wanted = comparable(stats_zarr(source, (1, 2)))
    assert {k: v for k, v in json.loads(done.stdout).items() if k in wanted} == wanted


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("axes", "memory"), [(0, "4KiB"), ((1, 2), "100KiB"), ((), "100KiB")], ids=["two", "one", "all"]
)
@pytest.mark.parametrize("percent", ["p50", "p99.9", "p100"])
def test_a_quantile_is_the_limit(source, tmp_path, axes, memory, percent):
    done = clip_zarr(source, tmp_path / "y", percent, axes, memory=memory)
    norms = norm(values(), axes)
    finite = np.sort(norms[np.isfinite(norms)])
    share = 1 - float(percent[1:]) / 100
    # norms within the error of the limit may be on either side of it
    assert (finite > done.clip_norm * (1 + 2 * RELATIVE_ERROR)).sum() <= finite.size * share
    assert (finite >= done.clip_norm * (1 - 2 * RELATIVE_ERROR)).sum() >= int(finite.size * share)
    assert done.clipped == (finite > done.clip_norm).sum()
    assert done.parameters["clip_norm"] == percent
    same = clip_zarr(source, tmp_path / "z", done.clip_norm, axes, memory=memory)
    assert same.digest == done.digest
    assert done.passes == same.passes + 1
    assert done.bytes_read == same.bytes_read + values().nbytes
    assert verify_zarr(tmp_path / "y", source).clip_norm == done.clip_norm
    assert clip_zarr(source, tmp_path / "y", percent, axes).status == "up to date"


@pytest.mark.usefixtures("small")
def test_a_resumed_run_keeps_the_quantile(source, tmp_path, monkeypatch):
    wanted = clip_zarr(source, tmp_path / "wanted", "p90", (1, 2), memory="100KiB")
    original, left = tasks.clip_slab, [3]

    def clip_slab(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(tasks, "clip_slab", clip_slab)
    with pytest.raises(KeyboardInterrupt):
        clip_zarr(source, tmp_path / "y", "p90", (1, 2), memory="100KiB")
    monkeypatch.setattr(tasks, "clip_slab", original)
    monkeypatch.setattr(tasks, "count_slab", None)  # it is not measured again
    with pytest.raises(TargetExistsError, match="has clip_norm p90 and not p99"):
        clip_zarr(source, tmp_path / "y", "p99", (1, 2), memory="100KiB")
    done = clip_zarr(source, tmp_path / "y", "p90", (1, 2), memory="100KiB")
    assert (done.clip_norm, done.digest) == (wanted.clip_norm, wanted.digest)
    assert read(tmp_path / "y").tobytes() == read(tmp_path / "wanted").tobytes()


@pytest.mark.parametrize("percent", ["p", "p101", "p-1", "pnan", "99", "p1e1", "", "p٣"])
def test_what_is_no_quantile_is_refused(source, tmp_path, percent):
    with pytest.raises(InvalidTypeError, match="give a number, or 'p' and a percentage"):
        clip_zarr(source, tmp_path / "y", percent)


def test_no_quantile_without_a_finite_slice(source, tmp_path):
    before = stored(tmp_path)
    with pytest.raises(InvalidValueError, match="no finite slice"):
        clip_zarr(source, tmp_path / "y", "p99")
    assert finished(tmp_path) == before
    assert plan_zarr(source, tmp_path / "y", "p99").passes == 1
    assert run("run", source, tmp_path / "y", "--clip-norm", "p99").exit_code == 3
    assert run("run", source, tmp_path / "y", "--clip-norm", "q99").exit_code == 2


# in a process of its own, which holds nothing but what stats_zarr holds
MEASURE = """
import json, resource, sys
import daskclip, dask
from daskclip.engine import cluster as workers
small, large = sys.argv[1:]
with dask.config.set(num_workers=2):
    daskclip.stats_zarr(small, 1, memory="128MiB")
    before = workers.memory_used()
    report = daskclip.stats_zarr(large, 1, memory="128MiB")
    after = workers.memory_used()
(was, _), (_, most) = *before.values(), *after.values()
print(json.dumps([most - was, report.projected_memory, report.quantiles, report.slices]))
"""


@pytest.mark.slow
def test_ten_million_norms_in_bounded_memory(tmp_path):
    n, rng = 10_000_000, np.random.default_rng(0)
    small = create(tmp_path / "small", np.ones((1000, 2), "f4"), (100, 2))
    large = zarr.create_array(tmp_path / "x", shape=(n, 4), chunks=(100_000, 4), dtype="f4")
    norms = np.empty(n)
    for i in range(0, n, 1_000_000):
        x = rng.standard_normal((1_000_000, 4)) * np.exp(2 * rng.standard_normal((1_000_000, 1)))
        large[i : i + 1_000_000] = x
        norms[i : i + 1_000_000] = np.linalg.norm(x.astype("f4").astype("f8"), axis=1)
    command = [sys.executable, "-c", MEASURE, small, tmp_path / "x"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    held, projected, quantiles, slices = json.loads(done.stdout)
    assert slices == n
    assert held <= projected <= 128 * 2**20
    for name, value in quantiles.items():
        wanted = np.percentile(norms, float(name[1:]), method="inverted_cdf")
        assert abs(value / wanted - 1) <= RELATIVE_ERROR, name
    clipped = clip_zarr(tmp_path / "x", tmp_path / "y", "p99", 1)
    assert (
        abs(clipped.clipped / n - 0.01)
        <= (
            (norms > quantiles["p99"] * (1 - 2 * RELATIVE_ERROR))
            & (norms <= quantiles["p99"] * (1 + 2 * RELATIVE_ERROR))
        ).sum()
        / n
    )


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("first", [True, False])
def test_pictures_of_a_resumed_run_are_whole_or_none(source, tmp_path, monkeypatch, first):
    options = {"clip_norm": 2.0, "axes": (1, 2), "memory": "100KiB"}
    wanted = clip_zarr(source, tmp_path / "wanted", **options, pictures=True).pictures
    original, left = tasks.clip_slab, [5]

    def clip_slab(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(tasks, "clip_slab", clip_slab)
    with pytest.raises(KeyboardInterrupt):
        clip_zarr(source, tmp_path / "y", **options, pictures=first)
    monkeypatch.setattr(tasks, "clip_slab", original)
    found = clip_zarr(source, tmp_path / "y", **options, pictures=True).pictures
    if not first:
        assert found is None  # the histograms of the first windows were not journalled
        return
    names = ("histogram", "worst", "along", "zeros")
    as_stored = json.loads(json.dumps([wanted[k] for k in names]))
    assert json.loads(json.dumps([found[k] for k in names])) == as_stored


@pytest.mark.distributed
def test_stats_on_a_cluster_are_the_same(source):
    wanted = run("stats", source, "--axes", "1,2", "--json", "--progress", "none").stdout
    done = run("stats", source, "--axes", "1,2", "--json", "--progress", "none", "--workers", 2)
    same = [k for k in json.loads(wanted) if k not in ("seconds", "projected_memory")]
    assert [json.loads(done.stdout)[k] for k in same] == [json.loads(wanted)[k] for k in same]
