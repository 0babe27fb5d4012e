"""Random calls in memory, lazily and from storage, compared with each other and with exact numbers.

Runs for 180 seconds, or ``DIFFERENTIAL_SECONDS``, from a random seed, or ``DIFFERENTIAL_SEED``:

    DIFFERENTIAL_SECONDS=1800 pytest -m slow tests/batteries/test_differential.py -s

A failure names its seed and case; ``DIFFERENTIAL_CASE`` runs this case alone.
"""

import math
import os
import secrets
import sys
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from budgets import assert_least_memory_is_named
from reference import (
    BFLOAT16,
    DTYPES,
    EXPONENTS,
    bits,
    integer,
    is_ideal,
    is_rounded,
    native,
    root,
    slices,
    totals,
)
from sizes import SMALL, resize
from stores import least_memory, read
from strategies import LAYOUTS, ORDS, bits_of, parts_as_integers
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec

from daskclip import (
    clip_by_global_norm,
    clip_by_norm,
    clip_zarr,
    global_norm,
    norm,
    plan_zarr,
    verify_zarr,
)
from daskclip.errors import InvalidValueError, NonFiniteError
from daskclip.lazy import graph

SECONDS = float(os.environ.get("DIFFERENTIAL_SECONDS", "180"))
SEED = int(os.environ.get("DIFFERENTIAL_SEED", "0")) or secrets.randbelow(2**32)
CASE = os.environ.get("DIFFERENTIAL_CASE")
COMPRESSORS = (
    None,
    ZstdCodec(),
    BloscCodec(cname="lz4"),
    GzipCodec(level=1),
    [ZstdCodec(), Crc32cCodec()],
    Crc32cCodec(),
)


class Draw:
    """Random choices."""

    def __init__(self, *seed):
        self.rng = np.random.default_rng(seed)

    def one_of(self, *values):
        return values[self.rng.integers(len(values))]

    def often(self, share=0.5):
        return bool(self.rng.random() < share)

    def integer(self, low, high):
        return int(self.rng.integers(low, high, endpoint=True))

    def chunks(self, shape):
        return tuple(self.integer(1, max(1, n)) for n in shape)

    def parts(self, shape):
        """Chunks of Dask: of any lengths, some empty."""
        cuts = (sorted(self.integer(0, n) for _ in range(self.integer(0, 3))) for n in shape)
        return tuple(tuple(np.diff([0, *c, n]).tolist()) for c, n in zip(cuts, shape, strict=True))


# ---- what is clipped


def shape_of(draw):
    if draw.often(0.1):
        return (draw.integer(500, 1100),)
    if draw.often(0.15):
        shape = (draw.one_of(17, 40, 130), draw.integer(1, 9))
        return shape[:: draw.one_of(1, -1)]
    return tuple(draw.integer(draw.one_of(0, 1), 9) for _ in range(draw.integer(0, 3)))


def values_of(draw, shape, dtype):
    """Numbers of any magnitude and spread, zeros of both signs, NaN of any bits, infinities."""
    real = (*shape, 2) if dtype.kind == "c" else shape
    low, high = EXPONENTS[native(np.zeros((), dtype)).dtype.name]
    centre, spread = draw.integer(low, high), draw.one_of(0, 1, 4, 20, 60, high - low)
    centre = draw.one_of(centre, 0, low, high)
    exponent = draw.rng.integers(centre - spread, centre + spread, real, endpoint=True)
    fraction = draw.one_of(np.ones(real), draw.rng.uniform(1, 2, real), np.full(real, 1.5))
    x = np.ldexp(fraction, np.clip(exponent, low, high)) * draw.rng.choice([-1.0, 1.0], real)
    x = np.where(draw.rng.random(real) < draw.one_of(0.0, 0.2, 1.0), 0.0 * x, x)
    with np.errstate(over="ignore"):
        x = x.astype(np.float32 if dtype.name == "complex64" else np.float64)
        x = x.view(dtype).reshape(shape) if dtype.kind == "c" else x.astype(dtype)
    number = parts_as_integers(x)
    number[np.isinf(native(x)).ravel()] = bits_of(1.0, dtype)
    if draw.often(0.4):
        sign = number.dtype.type(1) << number.dtype.type(8 * number.itemsize - 1)
        signs = draw.rng.integers(0, 2, number.shape).astype(number.dtype) * sign
        payload = draw.rng.integers(1, 100, number.shape).astype(number.dtype)
        # ml_dtypes warns of a signaling NaN
        quiet = bits_of(math.nan, dtype) if draw.often() or dtype == BFLOAT16 else 0
        nan = bits_of(math.inf, dtype) | quiet | payload | signs
        share = draw.one_of(0.0, 0.02, 0.3)
        number[:] = np.where(draw.rng.random(number.shape) < share, nan, number)
        inf = bits_of(math.inf, dtype) | signs
        share = draw.one_of(0.0, 0.02, 0.3)
        number[:] = np.where(draw.rng.random(number.shape) < share, inf, number)
    return x


@dataclass
class Call:
    """Arguments of a call, and what is known of its slices."""

    x: np.ndarray
    axes: tuple[int, ...]
    ord: float
    nonfinite: str
    limits: np.ndarray | float
    """A limit for all slices, or an array that broadcasts against the norms."""

    @property
    def how(self):
        """Keyword arguments of `clip_by_norm`."""
        given = {"axes": self.axes, "ord": self.ord, "nonfinite": self.nonfinite}
        each = isinstance(self.limits, np.ndarray)
        return given | ({"limits": self.limits} if each else {"clip_norm": self.limits})

    def each_limit(self):
        kept = tuple(1 if a in self.axes else n for a, n in enumerate(self.x.shape))
        return np.broadcast_to(self.limits, kept)

    def counted(self):
        """The values whose norms are taken: omitted NaN and infinity count as 0."""
        left_out = ~np.isfinite(self.x)
        return np.where(left_out, self.x.dtype.type(0), self.x)


def limits_of(draw, counted, axes, ord, *, below_zero):
    """Limits around the norms, or far from them."""
    exact = totals(counted, axes, ord)
    norms = [n for n in map(root, exact.ravel()[:20]) if math.isfinite(n)] or [1.0]

    def one():
        n = draw.one_of(*norms)
        around = (n, math.nextafter(n, 0), min(math.nextafter(n, math.inf), sys.float_info.max))
        far = (0.0, -0.0, 5e-324, 1e-310, 1e-40, 1e30, 1e300, math.inf)
        odd = (-1.0, -math.inf, math.nan) if below_zero else ()
        limit = draw.one_of(draw.one_of(*around), draw.rng.uniform(0, 1.5) * n, None)
        return draw.one_of(*far, *odd) if limit is None else min(float(limit), sys.float_info.max)

    if draw.often(0.6):
        return one()
    shape = tuple(n if draw.often(0.7) else 1 for n in exact.shape)
    shape = shape[draw.integer(0, len(shape)) :]
    return np.resize(np.array([one() for _ in range(8)]), shape)


def call_of(draw, dtypes, *, below_zero):
    dtype = draw.one_of(*dtypes)
    ord = 2 if dtype.kind == "c" else draw.one_of(2, *ORDS)
    shape = shape_of(draw)
    axes = tuple(a for a in range(len(shape)) if draw.often())
    x = values_of(draw, shape, dtype)
    call = Call(x, axes, ord, draw.one_of("propagate", "propagate", "omit", "raise"), 0.0)
    call.limits = limits_of(draw, call.counted(), axes, ord, below_zero=below_zero)
    return call


# ---- what the contract says


def expect(call, y, norms):
    """Require norms, the bound and every element to be what the contract says."""
    exact = totals(call.counted(), call.axes, call.ord)
    quiet, limits = bits_of(math.nan, call.x.dtype), call.each_limit()
    assert (y.dtype, y.shape) == (call.x.dtype, call.x.shape)
    assert norms.shape == exact.shape
    for at, part in slices(call.x.shape, call.axes):
        x, clipped, limit = np.asarray(call.x[part]), np.asarray(y[part]), float(limits[at])
        parts, result = (parts_as_integers(native(a)) for a in (x, clipped))
        nan, inf = (f(native(x)).ravel() for f in (np.isnan, np.isinf))
        is_nan = nan.any() and call.nonfinite == "propagate"
        # an element of which one part is NaN is omitted whole
        both = nan.reshape(-1, 2).any(axis=1).repeat(2) if x.dtype.kind == "c" else nan
        is_infinite = (inf if call.nonfinite == "propagate" else inf & ~both).any()
        if is_nan:
            assert math.isnan(norms[at])
        elif is_infinite:
            assert norms[at] == math.inf
        else:
            assert is_rounded(norms[at], exact[at])
        if limit == math.inf:
            assert np.array_equal(result, parts)
        elif is_nan or math.isnan(limit):
            assert (result == quiet).all()
        elif is_infinite:
            assert (result[inf] == quiet).all()
            assert np.array_equal(result[nan], parts[nan])
            sign = parts.dtype.type(1) << parts.dtype.type(8 * parts.itemsize - 1)
            finite = ~(nan | inf)
            assert np.array_equal(result[finite], parts[finite] & sign)
        else:
            expect_finite(call, x, clipped, exact[at], limit)


def expect_finite(call, x, y, total, limit):
    """The same for a slice whose norm is finite, where NaN is omitted."""
    nan, inf = np.isnan(native(x)), np.isinf(native(x))
    before, after = (parts_as_integers(native(a)) for a in (x, y))
    assert np.array_equal(after[nan.ravel()], before[nan.ravel()])
    is_within = total <= integer(max(limit, 0.0)) ** 2
    if is_within:
        assert bits(x) == bits(y)
        return
    # NaN and what is omitted with it aside, the bound is exact and each element the nearest
    counted = Call(x, (), 2, "omit", 0.0).counted()
    result = np.where(np.isfinite(x), y, y.dtype.type(0))
    assert totals(result, None, call.ord).item() <= integer(max(limit, 0.0)) ** 2
    finite = ~(nan | inf)
    both = np.isfinite(x)[..., None] & finite
    assert is_ideal(result[both.all(axis=-1)], counted[both.all(axis=-1)], total, limit)


def has_refused_slice(call):
    bad = ~np.isfinite(call.x)
    return bool((bad & np.not_equal(call.each_limit(), math.inf)).any())


# ---- one case each


def check_arrays(draw, folder, monkeypatch):
    """In memory and lazily, for every layout."""
    call = call_of(draw, DTYPES, below_zero=True)
    layout = LAYOUTS[draw.one_of(*sorted(LAYOUTS))]
    x, parts = np.asarray(layout(call.x)), draw.parts(call.x.shape)
    # chunks that share slices are held and read once, or made again
    monkeypatch.setattr(graph, "HELD_NBYTES", draw.one_of(0, 2**24))

    def clip(t, **how):
        return clip_by_norm(t, **call.how | how, return_norm=True)

    def lazily(**how):
        scheduler = draw.one_of("sync", "sync", "threads")
        with dask.config.set(split_every=draw.integer(2, 4)):
            return dask.compute(*clip(da.from_array(x, parts), **how), scheduler=scheduler)

    if call.nonfinite == "raise":
        if has_refused_slice(call):
            for refused in (clip, lambda t: lazily()):
                with pytest.raises(NonFiniteError):
                    refused(x)
            return call
        call.nonfinite = draw.one_of("propagate", "omit")
    y, norms = clip(call.x)
    kept = norms.reshape(tuple(1 if a in call.axes else n for a, n in enumerate(x.shape)))
    expect(call, y, kept)
    for other in (clip(x), lazily()):
        assert [bits(np.asarray(a)) for a in other] == [bits(y), bits(norms)]
    if call.nonfinite == "propagate":
        assert bits(np.asarray(norm(da.from_array(x, parts), call.axes, ord=call.ord))) == bits(
            norms
        )
    # an infinite slice gets NaN among zeros, which then spreads
    if call.nonfinite == "omit" or not np.isinf(native(call.x)).any():
        assert bits(clip(y)[0]) == bits(y)
    return call


def stored_array(draw, path, x, dtype):
    """Store an array in any format, and return its path."""
    options = {"zarr_format": 3, "compressors": draw.one_of(*COMPRESSORS)}
    chunks = draw.chunks(x.shape)
    if draw.often(0.3) and x.size:
        options["shards"] = tuple(c * draw.integer(1, 3) for c in chunks) or None
    elif draw.often(0.3):
        order = tuple(int(a) for a in draw.rng.permutation(x.ndim))
        options["filters"] = [TransposeCodec(order=order)] if x.ndim > 1 else None
    elif draw.often(0.3):
        options = {"zarr_format": 2, "order": draw.one_of("C", "F")}
    array = zarr.create_array(
        path, shape=x.shape, chunks=chunks, dtype=dtype,
        config={"write_empty_chunks": draw.often()}, **options,
    )  # fmt: skip
    array[...] = x
    return path


def check_storage(draw, folder, monkeypatch):
    """From storage, with blocks of a few chunks, in one pass and in two."""
    call = call_of(draw, [d for d in DTYPES if d != BFLOAT16], below_zero=False)
    dtype = call.x.dtype.newbyteorder(draw.one_of("<", ">"))
    source = stored_array(draw, folder / "x", call.x, dtype)
    call.x = np.asarray(native(read(source))).view(call.x.dtype).reshape(call.x.shape)
    resize(monkeypatch, **SMALL | {"block_nbytes": draw.one_of(64, 256, 4096)})
    how = {"clip_norm": None} | call.how
    if isinstance(call.limits, np.ndarray) and call.limits.size and draw.often():
        how["limits"] = stored_array(draw, folder / "limits", call.limits, "f8")
    least = least_memory(source, **how)
    how["memory"] = draw.one_of(least, 2 * least, 2**30)
    refuse_limits(draw, source, folder, call, how)
    if call.nonfinite == "raise":
        if has_refused_slice(call):
            with pytest.raises(NonFiniteError):
                clip_zarr(source, folder / "y", **how)
            assert not (folder / "y").exists()
            return call
        call.nonfinite = "omit"
    report = clip_zarr(source, folder / "y", **how)
    y, norms = clip_by_norm(call.x, **call.how, return_norm=True)
    y, norms = np.asarray(y), np.asarray(norms)
    expect(call, y, norms.reshape(call.each_limit().shape))
    found = read(folder / "y")
    assert found.dtype == read(source).dtype
    assert bits(found) == bits(y)
    above = int((norms > call.each_limit().reshape(norms.shape)).sum())
    finite = norms[np.isfinite(norms)]
    if finite.size == norms.size:
        # a norm that is rounded to its limit may be above it
        assert above <= report.clipped <= norms.size
    assert report.slices == norms.size
    assert verify_zarr(folder / "y", source=source, limits=how.get("limits")).slices == norms.size
    assert clip_zarr(source, folder / "y", **how).status == "up to date"
    again = how | {"memory": 2**30}
    if report.clipped == 0 and report.nonfinite == 0:
        assert clip_zarr(source, None, in_place=True, **again).status == "nothing to clip"
    return call


def refuse_limits(draw, source, folder, call, how):
    """Require that a limit below 0 or NaN is refused, and leaves nothing."""
    wrong = draw.one_of(-1.0, -math.inf, math.nan, -5e-324)
    given = {k: v for k, v in how.items() if k not in ("clip_norm", "limits")}
    if draw.often() or not call.x.size:
        given["clip_norm"] = wrong
    else:
        limits = np.ones(call.each_limit().shape)
        limits.flat[draw.integer(0, limits.size - 1)] = wrong
        stored = draw.often()
        given |= {"memory": 2**30, "missing": "fill", "nonfinite": "propagate"}
        given["limits"] = stored_array(draw, folder / "bad", limits, "f8") if stored else limits
    with pytest.raises(InvalidValueError, match=r"give 0 or more"):
        clip_zarr(source, folder / "y", **given)
    assert not (folder / "y").exists()
    assert not (folder / ".y.daskclip").exists()


def check_groups(draw, folder, monkeypatch):
    """Several arrays with one norm, in memory, lazily and from storage."""
    dtypes = [d for d in DTYPES if d != BFLOAT16]
    arrays = [values_of(draw, shape_of(draw), draw.one_of(*dtypes)) for _ in range(3)]
    resize(monkeypatch, **SMALL)
    group = zarr.create_group(folder / "x")
    for i, x in enumerate(arrays):
        array = group.create_array(
            f"{i}", shape=x.shape, chunks=draw.chunks(x.shape), dtype=x.dtype
        )
        array[...] = x
    # zarr does not store chunks of -0.0
    arrays = [np.asarray(group[f"{i}"][...]) for i in range(len(arrays))]
    total = sum(int(totals(np.where(np.isfinite(x), x, 0), None, 2).item()) for x in arrays)
    limit = draw.one_of(0.0, 1e-310, 1.0, 1e30, math.inf, 0.5 * min(root(total), 1e308))
    clipped, found = clip_by_global_norm(arrays, limit)
    if all(np.isfinite(x).all() for x in arrays):
        assert is_rounded(float(found), total)
        after = sum(int(totals(y, None, 2).item()) for y in clipped)
        assert limit == math.inf or after <= max(integer(limit) ** 2, 0)
    elif limit < math.inf:
        for y in clipped:
            assert (parts_as_integers(native(y)) == bits_of(math.nan, y.dtype)).all()
    lazy = [da.from_array(x, draw.parts(x.shape)) for x in arrays]
    lazily = dask.compute(*clip_by_global_norm(lazy, limit), scheduler="sync")
    assert [bits(a) for a in lazily[0]] == [bits(a) for a in clipped]
    assert bits(np.asarray(lazily[1])) == bits(np.asarray(found))
    assert bits(np.asarray(global_norm(lazy))) == bits(np.asarray(found))
    clip_zarr(folder / "x", folder / "y", limit, global_norm=True)
    written = zarr.open_group(folder / "y", mode="r")
    for i, y in enumerate(clipped):
        assert bits(np.asarray(written[f"{i}"][...])) == bits(y)
    assert verify_zarr(folder / "y", source=folder / "x").slices == 1
    return arrays, limit


def check_budgets(draw, folder, monkeypatch):
    """Plans of large arrays of which nothing is stored."""
    group = zarr.create_group(folder / "x")
    arrays = {}
    for i in range(draw.integer(1, 3)):
        ndim = draw.integer(1, 3)
        chunks = [10 ** draw.integer(0, 3) for _ in range(ndim)]
        # one axis as long as a chunk may be
        chunks[draw.integer(0, ndim - 1)] *= max(1, 10**6 // math.prod(chunks))
        shape = [c * draw.one_of(1, 2, 3, 5, 1000) for c in chunks]
        arrays[i] = {"shape": shape, "chunks": chunks, "dtype": draw.one_of("f4", "f8", "f2")}
        group.create_array(f"{i}", **arrays[i])
    shared, threads = draw.often(0.3), draw.integer(1, 6)
    axis = min(len(a["shape"]) for a in arrays.values()) - 1
    axes = None if shared else draw.one_of(None, 0, axis, [])
    scheduler = draw.one_of("threads", "sync")

    def plan(mib):
        with dask.config.set(num_workers=threads, scheduler=scheduler):
            return plan_zarr(
                folder / "x", folder / "y", 1.0, axes, memory=f"{mib}MiB", global_norm=shared
            )

    assert_least_memory_is_named(plan, draw.integer(20, 2000))
    return arrays, axes, shared, threads


CHECKS = [check_arrays] * 5 + [check_storage] * 4 + [check_groups] + [check_budgets] * 2


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:strategies")
def test_random_calls_keep_the_contract(tmp_path):
    stop, done = time.monotonic() + SECONDS, 0
    for number in count() if CASE is None else [int(CASE)]:
        if time.monotonic() > stop:
            break
        draw, folder = Draw(SEED, number), tmp_path / f"{number}"
        folder.mkdir()
        check = draw.one_of(*CHECKS)
        with pytest.MonkeyPatch.context() as patch:
            try:
                check(draw, folder, patch)
            except BaseException:
                print(f"DIFFERENTIAL_SEED={SEED} DIFFERENTIAL_CASE={number} {check.__name__}")
                raise
        remove(folder)
        done += 1
    print(f"{done} cases of DIFFERENTIAL_SEED={SEED}")
    assert done


def remove(folder: Path):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
