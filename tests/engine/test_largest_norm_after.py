"""What the report says of the slices of a result: the bound of their norms, zeros and counts."""

import json
import math

import numpy as np
import pytest
import zarr
from command_line import run
from distributed import Client
from reference import integer, root, totals
from servers import local_cluster
from stores import BUDGETS, create, memory_of, read, some, stopping_at

from daskclip import clip_zarr, verify_zarr
from daskclip.errors import VerificationError
from daskclip.storage import durable

pytestmark = pytest.mark.usefixtures("small")
POLICIES = ["propagate", "omit", "zero"]


def spread(dtype, seed, nonfinite):
    """Slices of several sizes along the first axis; some are zero, and some may not be finite."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    sizes = np.exp2(rng.integers(-6, 6, 24)).astype(dtype)
    values = some((20, 24), dtype, seed) * sizes
    values[:, 6] = -0.0
    if nonfinite:
        values[3, 5], values[4, 7], values[5, 7] = math.nan, math.inf, math.nan
    return values


def norms_of(x, ord):
    """Squares of the exact norms over the first axis, in units of `squares`; None if infinite."""
    parts = np.isfinite(x).all(axis=0)
    found = totals(np.where(np.isfinite(x), x, 0), (0,), ord)[0]
    return [n if finite else None for n, finite in zip(found, parts, strict=True)]


def expected_bound(before, limits):
    """The bound as it is documented, slice by slice."""
    bounds = [0.0]
    for total, limit in zip(before, limits, strict=True):
        is_above = math.isfinite(limit) and total > integer(limit) ** 2
        above = math.nextafter(root(total), math.inf) if total else 0.0
        bounds.append(float(limit) if is_above else min(above, float(limit)))
    return max(bounds)


def assert_bound(bound, y, ord):
    """Require a bound in exact arithmetic."""
    after = norms_of(y, ord)
    assert math.isnan(bound) == (None in after)
    assert math.isnan(bound) or max(after) <= integer(bound) ** 2


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("each", [False, True], ids=["one limit", "limits"])
@pytest.mark.parametrize(("dtype", "ord"), [("f2", 2), ("f4", 1), (">f8", math.inf), ("c8", 2)])
def test_the_bound_holds_exactly(tmp_path, passes, each, dtype, ord):
    for seed in range(4):
        values, where = spread(dtype, seed, nonfinite=False), tmp_path / str(seed)
        where.mkdir()
        x, before = create(where / "x", values, (4, 4)), norms_of(values, ord)
        # beside one of the norms, so that slices are equal to their limit, or just below
        near = sorted(map(root, before))[(5 * seed) % 24]
        limit = [near, math.nextafter(near, 0), math.nextafter(near, 1e9), 1e9][seed % 4]
        limits = np.full((1, 24), limit)
        if each:
            limits[0] = np.array([*map(root, before)]) * np.resize([1, 2, 0.5], 24)
        how = {"ord": ord, "limits": limits} if each else {"ord": ord}
        given = {"axes": 0, "clip_norm": None if each else limit}
        memory = memory_of(BUDGETS[passes], x, given["axes"], given["clip_norm"], **how)
        report = clip_zarr(x, where / "y", **given, memory=memory, **how)
        assert report.passes == passes
        assert report.largest_norm_after == expected_bound(before, limits[0])
        assert_bound(report.largest_norm_after, read(where / "y"), ord)
        assert (report.zeros, report.zeroed) == (sum(n == 0 for n in before), 0)
        found = verify_zarr(where / "y", limits=how.get("limits"))
        assert found.largest_norm_after == report.largest_norm_after
        normal = clip_zarr(x, where / "z", **given, normalize=True, memory=memory, **how)
        assert_bound(normal.largest_norm_after, read(where / "z"), ord)
        assert normal.largest_norm_after <= limits.max()
        verify_zarr(where / "z", x, limits=how.get("limits"))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("limit", [2.0, 0.0, math.inf])
def test_slices_that_are_not_finite(tmp_path, passes, policy, limit):
    values = spread("f4", 0, nonfinite=True)
    x = create(tmp_path / "x", values, (4, 4))
    memory = memory_of(BUDGETS[passes], x, 0)
    report = clip_zarr(x, tmp_path / "y", limit, 0, nonfinite=policy, memory=memory)
    bound = report.largest_norm_after
    zeroed = 2 if policy == "zero" and limit < math.inf else 0
    assert (report.nonfinite, report.zeroed) == (1 if policy == "omit" else 2, zeroed)
    assert report.zeros == 1
    assert math.isnan(bound) == (not zeroed)
    assert_bound(bound, read(tmp_path / "y"), 2)
    found = verify_zarr(tmp_path / "y", x)
    assert repr(found.largest_norm_after) == repr(bound)


def test_an_exact_norm_just_above_its_rounded_one(tmp_path):
    # the exact norm is a little above 1, to which it is rounded
    values = np.array([[1.0], [2.0**-30]])
    create(tmp_path / "x", values, (1, 1))
    report = clip_zarr(tmp_path / "x", tmp_path / "y", 5.0, 0)
    assert (report.largest_norm, report.clipped) == (1.0, 0)
    assert report.largest_norm_after == math.nextafter(1, 2)
    assert_bound(report.largest_norm_after, values, 2)


@pytest.mark.parametrize(("limit", "expected"), [(0.0, 0.0), (5e-324, 5e-324), (1e300, 1e-323)])
def test_subnormal_norms(tmp_path, limit, expected):
    create(tmp_path / "x", np.array([5e-324, 0.0]), (1,))
    report = clip_zarr(tmp_path / "x", tmp_path / "y", limit)
    assert report.largest_norm_after == expected


def test_slices_that_are_not_stored_are_zero(tmp_path):
    x = zarr.create_array(tmp_path / "x", shape=(8, 8), chunks=(4, 4), dtype="f4")
    report = clip_zarr(tmp_path / "x", tmp_path / "y", 2.0, 1)
    assert (report.zeros, report.largest_norm_after) == (8, 0.0)
    x[:4, :4] = 3
    report = clip_zarr(tmp_path / "x", tmp_path / "z", 2.0, 1)
    assert (report.zeros, report.largest_norm_after) == (4, 2.0)
    zarr.create_array(tmp_path / "empty", shape=(0, 4), chunks=(1, 4), dtype="f4")
    report = clip_zarr(tmp_path / "empty", tmp_path / "none", 2.0, 1)
    assert (report.zeros, report.largest_norm_after) == (0, 0.0)


@pytest.mark.parametrize("nonfinite", [False, True])
@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_groups_and_global_norms(tmp_path, nonfinite, limit):
    group, values = zarr.create_group(tmp_path / "x"), {}
    for name, dtype in {"a": "f2", "b": "f4", "c": "f8"}.items():
        values[name] = spread(dtype, ord(name), nonfinite and name == "b")
        group.create_array(name, data=values[name], chunks=(4, 4))
    own = clip_zarr(tmp_path / "x", tmp_path / "own", limit, 0, nonfinite="zero")
    assert (own.zeros, own.zeroed) == (3, 2 * nonfinite)
    for name in values:
        assert_bound(own.largest_norm_after, read(tmp_path / "own" / name), 2)
    assert own.largest_norm_after == limit if limit < 1 else own.largest_norm_after < limit
    whole = clip_zarr(tmp_path / "x", tmp_path / "whole", limit, global_norm=True)
    written = [read(tmp_path / "whole" / name).astype("f8").ravel() for name in values]
    assert_bound(whole.largest_norm_after, np.concatenate(written)[:, None], 2)
    assert math.isnan(whole.largest_norm_after) == nonfinite
    for target in ("own", "whole"):
        verify_zarr(tmp_path / target, tmp_path / "x")


@pytest.mark.parametrize("memory", [None, 2**14])
@pytest.mark.parametrize("limit", [3.0, 1e6])
def test_joint_norms(tmp_path, memory, limit):
    group, values = zarr.create_group(tmp_path / "x"), {}
    for name, dtype in {"a": "f2", "b": "f4", "c": "f8"}.items():
        values[name] = spread(dtype, ord(name), name == "b").T.copy()
        group.create_array(name, data=values[name], chunks=(4, 4))
    how = {"global_norm": True, "nonfinite": "zero"} | ({"memory": memory} if memory else {})
    report = clip_zarr(tmp_path / "x", tmp_path / "y", limit, slice(1, None), **how)
    assert report.passes == (2 if memory else 1)
    assert (report.slices, report.zeros, report.zeroed) == (24, 1, 2)
    before = np.concatenate([x.astype("f8").T for x in values.values()])
    finite = np.where(np.isfinite(before).all(axis=0), before, 0)
    assert report.largest_norm_after == expected_bound(norms_of(finite, 2), [limit] * 24)
    written = [read(tmp_path / "y" / name).astype("f8").T for name in values]
    assert_bound(report.largest_norm_after, np.concatenate(written), 2)
    found = verify_zarr(tmp_path / "y", tmp_path / "x")
    assert found.largest_norm_after == report.largest_norm_after


@pytest.mark.parametrize("passes", [1, 2])
def test_a_resumed_run_gives_the_same_figures(tmp_path, monkeypatch, passes):
    x = create(tmp_path / "x", spread("f4", 3, nonfinite=True), (4, 4))
    how = {"nonfinite": "zero", "memory": memory_of(BUDGETS[passes], x, 0)}
    names = "zeros", "zeroed", "clipped", "largest_norm_after", "digest"
    whole = clip_zarr(x, tmp_path / "whole", 2.0, 0, **how)
    stop = stopping_at(monkeypatch)
    for lines in range(1, 5):
        stop[0], target = lines, tmp_path / f"y{lines}"
        while True:
            try:
                report = clip_zarr(x, target, 2.0, 0, **how)
                break
            except KeyboardInterrupt:
                stop[0] = lines
        for name in names:
            assert getattr(report, name) == getattr(whole, name)
        stop[0] = 0
        again = clip_zarr(x, target, 2.0, 0, **how)
        assert again.largest_norm_after == whole.largest_norm_after


def test_all_forms_of_a_report(tmp_path):
    x = create(tmp_path / "x", spread("f4", 0, nonfinite=True), (4, 4))
    words = ["--clip-norm", 0.1, "--axes", 0, "--nonfinite"]
    done = run("run", x, tmp_path / "y", *words, "zero", "--report", tmp_path / "r.json")
    assert "norms after  at most 0.1\n" in done.stdout
    assert "non-finite   2, 2 made zeros\n" in done.stdout
    assert "\nzero         1\n" in done.stdout
    fields = json.loads((tmp_path / "r.json").read_text())
    assert (fields["largest_norm_after"], fields["zeros"], fields["zeroed"]) == (0.1, 1, 2)
    assert "exact norms   at most 0.1\n" in run("verify", tmp_path / "y").stdout
    report = clip_zarr(x, tmp_path / "y", 0.1, 0, nonfinite="zero")
    assert report.status == "up to date"
    assert "at most 0.1<" in report._repr_html_()
    done = run("run", x, tmp_path / "z", *words, "propagate", "--json")
    assert json.loads(done.stdout)["largest_norm_after"] == "nan"
    report = clip_zarr(x, tmp_path / "z", 0.1, 0)
    assert report.status == "up to date"
    assert math.isnan(report.largest_norm_after)
    assert "norms after  not finite" in str(report)


def change_bound(target, change):
    """Change the bound in the record of a run, whose checksum is made anew."""
    path = target / ".daskclip"
    *lines, last = path.read_bytes().splitlines(keepends=True)
    record = json.loads(last[9:])
    record["report"]["largest_norm_after"] = change(record["report"]["largest_norm_after"])
    text = json.dumps(record).encode()
    path.write_bytes(b"".join(lines) + b"%08x %s\n" % (durable.digest(text), text))


@pytest.mark.parametrize("limits", [None, np.full((1, 24), 2.0)], ids=["one limit", "limits"])
def test_verification_proves_the_bound_from_the_files(tmp_path, limits):
    x = create(tmp_path / "x", spread("f4", 0, nonfinite=False), (4, 4))
    clip_norm = 2.0 if limits is None else None
    clip_zarr(x, tmp_path / "y", clip_norm, 0, limits=limits)
    assert verify_zarr(tmp_path / "y", limits=limits).largest_norm_after == 2.0
    change_bound(tmp_path / "y", lambda bound: bound / 2)
    with pytest.raises(VerificationError, match=r"above the largest_norm_after 1\.0 of its"):
        verify_zarr(tmp_path / "y", limits=limits)
    change_bound(tmp_path / "y", lambda bound: math.nan)
    assert math.isnan(verify_zarr(tmp_path / "y", limits=limits).largest_norm_after)


def test_verification_finds_what_became_no_zeros(tmp_path):
    x = create(tmp_path / "x", spread("f4", 0, nonfinite=True), (4, 4))
    clip_zarr(x, tmp_path / "y", math.inf, 0, nonfinite="zero")
    change_bound(tmp_path / "y", lambda bound: 1e9)
    with pytest.raises(VerificationError, match="reach nan"):
        verify_zarr(tmp_path / "y")


@pytest.mark.distributed
def test_a_cluster_gives_the_same_figures(tmp_path):
    x = create(tmp_path / "x", spread("f8", 0, nonfinite=True), (4, 4))
    with local_cluster(2) as two, Client(two):
        for passes in (1, 2):
            memory = memory_of(BUDGETS[passes], x, 0)
            report = clip_zarr(x, tmp_path / f"y{passes}", 2.0, 0, memory=memory, nonfinite="zero")
            assert (report.zeros, report.zeroed, report.largest_norm_after) == (1, 2, 2.0)
            assert verify_zarr(tmp_path / f"y{passes}").largest_norm_after == 2.0
