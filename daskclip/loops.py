"""The loops of `kernels`, which numba compiles at their first use.

Elements are scaled so that the largest of a run lies below 1, and their squares are cut on the
grids 2**-50, 2**-100 and 2**-150 by adding numbers so large that float64 rounds to the grid. What
is cut off is an integer in the bits of the sum: no order of adding those changes anything, so the
loops run on vectors. Elements too small for the grids of their run are summed after the others.

Types are those of numba: ``wide`` is True for float64 and None for float32, which leaves out what
is not needed; ``bits`` are the elements of ``x`` as unsigned integers.
"""

from __future__ import annotations

import math
from functools import cache
from threading import Lock
from typing import Any

import numpy as np

from daskclip.partials import INF, LIMB, MASK, NAN

SHORT = 16  # terms of a run, at least
RUN = 1 << 12  # terms of a run, at most: 2**12 integers below 2**50 fit an int64
LANES = 1 << 10  # runs side by side, at most
ROWS = 1 << 7  # terms of each
GRIDS = (50, 100, 150)
ADDED = tuple(math.ldexp(1.5, 52 - bits) for bits in GRIDS)
TINY = 2.0**-LIMB
_LOCK = Lock()


def compiled() -> dict[str, Any]:
    """Loops by name; none without numba."""
    with _LOCK:
        return _load()


@cache
def _load() -> dict[str, Any]:
    try:
        from numba import njit
        from numba.extending import register_jitable
    except ImportError:
        return {}
    for helper in (
        two_product, _format, _scan, _cut, _squares, _put, _row, _scan_lanes, _add_lanes, _lanes,
        _multiply, _power, _decide,
    ):  # fmt: skip
        register_jitable(helper)
    made = {}
    for name, loop in (("sums", _sums), ("rescale", _rescale), ("clip_rows", _clip_rows)):
        try:
            made[name] = njit(nogil=True, cache=True)(loop)
        except RuntimeError:  # no folder for compiled code that can be written
            made[name] = njit(nogil=True)(loop)
    return made


def two_product(a: Any, b: Any) -> Any:
    """A · b as the rounded product and its error (Dekker, Veltkamp)."""
    p = a * b
    a1, b1 = a * 134217729.0, b * 134217729.0  # 2**27 + 1
    a1, b1 = a1 - (a1 - a), b1 - (b1 - b)
    a2, b2 = a - a1, b - b1
    return p, ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2


def _format(wide: Any) -> Any:
    """Where the exponent is in twice the bits, its bias, how far the grids reach, first limb."""
    return (24, 126, 26, -11) if wide is None else (53, 1022, 22, -69)


def _scan(bits: Any, stop: Any) -> Any:
    """Largest magnitude below ``stop``, and the smallest but zero, less one: twice their bits."""
    kind = bits.dtype.type
    top, least = kind(0), kind(-1)
    for i in range(bits.size):
        b = kind(bits[i] << kind(1))
        b = b if b < stop else kind(0)
        top, least = max(top, b), min(least, kind(b - kind(1)))
    return top, least


def _cut(v: Any, wide: Any) -> Any:
    """The square of ``v`` on the three grids: integers, each with the bits of what was added."""
    p, e = (v * v, 0.0) if wide is None else two_product(v, v)
    t = p + ADDED[0]
    first = np.float64(t).view(np.int64)
    r = p - (t - ADDED[0])
    t = r + ADDED[1]
    second, third = np.float64(t).view(np.int64), np.int64(0)
    if wide is not None:
        e += r - (t - ADDED[1])  # not zero for tiny v only, and exact
        t = e + ADDED[1]
        second += np.float64(t).view(np.int64)
        third = np.float64((e - (t - ADDED[1])) + ADDED[2]).view(np.int64)
    return first, second, third


def _squares(x: Any, bits: Any, scale: Any, start: Any, span: Any, wide: Any) -> Any:
    """Sums of the squares of a run, or of its elements whose bits lie in a span."""
    kind = bits.dtype.type
    s0 = s1 = s2 = np.int64(0)
    for i in range(x.size):
        a = x[i]
        if span is not None:
            a = a if kind(kind(bits[i] << kind(1)) - start) < span else x.dtype.type(0)
        first, second, third = _cut(np.float64(a) * scale, wide)
        s0, s1, s2 = s0 + first, s1 + second, s2 + third
    return s0, s1, s2


def _put(limbs: Any, used: Any, exponent: Any, n: Any, parts: Any, wide: Any) -> None:
    """Add the sums of ``n`` squares, scaled by 2**-exponent, to the limbs of a slice."""
    for k in range(2 if wide is None else 3):
        added = np.float64(ADDED[k]).view(np.int64)
        part = parts[k] - n * added * (2 if k == 1 and wide is not None else 1)
        place = 2 * exponent - GRIDS[k] - LIMB * _format(wide)[3]
        i, shift = place >> 5, place & 31
        low, high = (part & MASK) << shift, (part >> LIMB) << shift
        limbs[i] += low & MASK
        limbs[i + 1] += (low >> LIMB) + (high & MASK)
        limbs[i + 2] += high >> LIMB
        used[0], used[1] = min(used[0], i), max(used[1], i + 3)


def _row(x: Any, bits: Any, limbs: Any, used: Any, wide: Any) -> Any:
    """Add the squares of a run, from the largest as far down as the grids reach, and again."""
    kind = bits.dtype.type
    shift, bias, deep, _ = _format(wide)
    stop, found = kind(kind(2 * bias + 3) << kind(shift)), 0
    top, least = _scan(bits, kind(-1))
    if top >= stop:
        for i in range(bits.size):
            b = kind(bits[i] << kind(1))
            found |= (NAN if b > stop else INF) if b >= stop else 0
        top, least = _scan(bits, stop)
    whole = found == 0
    while top:
        e = np.int64(top >> kind(shift))
        start = kind(kind(max(e - deep, 0)) << kind(shift))
        scale = math.ldexp(1.0, int(bias - e))
        last = start == 0 or least >= start - kind(1)
        if whole and last:
            parts = _squares(x, bits, scale, None, None, wide)
        else:
            parts = _squares(x, bits, scale, start, kind(stop - start), wide)
        _put(limbs, used, e - bias, x.size, parts, wide)
        if last:
            break
        stop, whole = start, False
        top, least = _scan(bits, stop)
    return found


def _scan_lanes(bits: Any, top: Any, least: Any) -> None:
    kind = bits.dtype.type
    for j in range(bits.size):
        b = kind(bits[j] << kind(1))
        top[j], least[j] = max(top[j], b), min(least[j], kind(b - kind(1)))


def _add_lanes(x: Any, scale: Any, s: Any, wide: Any) -> None:
    for j in range(x.size):
        first, second, third = _cut(np.float64(x[j]) * scale[j], wide)
        # one array, or the compiler would have too many overlaps to rule out
        s[j] += first
        s[LANES + j] += second
        if wide is not None:
            s[2 * LANES + j] += third


def _lanes(x: Any, bits: Any, rows: Any, lanes: Any, scratch: Any, into: Any, wide: Any) -> None:
    """Add the squares of runs side by side; lane j belongs to slice base + (first + j) % period."""
    kind = bits.dtype.type
    shift, bias, deep, _ = _format(wide)
    (begin, n, stride), (base, first, period, width) = rows, lanes
    top, least, scale, s = scratch
    sums, flags, used = into
    top[:], least[:], s[:] = 0, kind(-1), 0
    for i in range(begin, begin + n * stride, stride):
        _scan_lanes(bits[i : i + width], top, least)
    for j in range(width):
        scale[j] = math.ldexp(1.0, int(bias - np.int64(top[j] >> kind(shift))))
    for i in range(begin, begin + n * stride, stride):
        _add_lanes(x[i : i + width], scale, s, wide)
    for j in range(width):
        e, k = np.int64(top[j] >> kind(shift)), base + (first + j) % period
        start = kind(kind(max(e - deep, 0)) << kind(shift))
        if e <= 2 * bias + 2 and (start == 0 or least[j] >= start - kind(1)):
            parts = (s[j], s[LANES + j], s[2 * LANES + j])
            _put(sums[k], used, e - bias, n, parts, wide)
        else:  # by itself
            i, stop = begin + j, begin + j + (n - 1) * stride + 1
            lane, lane_bits = x[i:stop:stride].copy(), bits[i:stop:stride].copy()
            flags[k] |= _row(lane, lane_bits, sums[k], used, wide)


def _sums(x: Any, bits: Any, shape: Any, strides: Any, into: Any, wide: Any) -> None:
    sums, flags, used = into
    n, period = shape[2:]
    top, least = np.empty(LANES, bits.dtype), np.empty(LANES, bits.dtype)
    scratch = (top, least, np.empty(LANES), np.empty(3 * LANES, np.int64))
    # several rows of a narrow matrix side by side
    fold = max(1, min(LANES // period, n // SHORT)) if strides[2] == period else 1
    rest = n % fold
    for r, k in np.ndindex(shape[0], shape[1]):
        begin = r * strides[0] + k * strides[1]
        if period == 1:
            for i in range(begin, begin + n, RUN):
                stop = min(i + RUN, begin + n)
                flags[k] |= _row(x[i:stop], bits[i:stop], sums[k], used, wide)
            continue
        for i in range(0, n - rest, fold * ROWS):
            count = min(ROWS, (n - rest - i) // fold)
            for j in range(0, fold * period, LANES):
                lanes = (k * period, j, period, min(LANES, fold * period - j))
                at = (begin + i * strides[2] + j, count, fold * strides[2])
                _lanes(x, bits, at, lanes, scratch, into, wide)
        if rest:
            at, lanes = (
                (begin + (n - rest) * strides[2], 1, 1),
                (k * period, 0, period, rest * period),
            )
            _lanes(x, bits, at, lanes, scratch, into, wide)


def _multiply(a: Any, factor: Any) -> Any:
    """The product cut to the 24 bits of a float32."""
    bits = np.float64(np.float64(a) * factor).view(np.int64) & np.int64(-(1 << 29))
    return np.float32(np.int64(bits).view(np.float64))


def _rescale(x: Any, out: Any, shape: Any, strides: Any, steps: Any, factors: Any) -> None:
    columns = shape[3] > 1
    count = shape[3] if columns else shape[2]
    for r, k, i in np.ndindex(shape[0], shape[1], shape[2] if columns else 1):
        a = r * strides[0] + k * strides[1] + i * strides[2]
        b = r * steps[0] + k * steps[1] + i * steps[2]
        target = out[b : b + count]
        source = target if x is None else x[a : a + count]
        if columns:
            for j in range(count):
                target[j] = _multiply(source[j], factors[k, j])
        else:
            factor = factors[k, 0]
            for j in range(count):
                target[j] = _multiply(source[j], factor)


def _power(exponent: Any) -> Any:
    return np.int64((exponent + 1023) << 52).view(np.float64)


def _decide(limbs: Any, stop: Any, limit: Any) -> Any:
    """Factor, norm and whether both are certain, from a sum to 100 bits; see `factor`."""
    top, carry = -1, np.int64(0)
    for i in range(stop):
        carry += limbs[i]
        limbs[i] = carry & MASK
        carry >>= LIMB
        top = i if limbs[i] else top
    if top < 4:  # zero, or too small for five limbs
        return 1.0, 0.0, top < 0
    a, b, c = limbs[top] / TINY, np.float64(limbs[top - 1]), limbs[top - 2] * TINY
    t = a + b
    high = t + c
    low = (b - (t - a)) + (c - (high - t)) + (limbs[top - 3] + limbs[top - 4] * TINY) * TINY**2
    place = 16 * (top - 1 + _format(None)[3])
    first = math.sqrt(high)
    square, error = two_product(first, first)
    delta = (((high - square) - error) + low) / (2.0 * first)
    root = first + delta
    rest = (first - root) + delta
    norm = root * _power(place)
    certain = root + rest * (1 + 2.0**-40) == root
    clip_norm, mantissa, exponent = limit
    square, error = two_product(clip_norm, clip_norm)
    size = high * _power(2 * place)
    over = (size - square) + (low * _power(2 * place) - error)
    certain = certain and abs(over) > size * 2.0**-90
    if over <= 0:
        return 1.0, norm, certain
    q = mantissa / root
    product, error = two_product(q, root)
    correction = (((mantissa - product) - error) - q * rest) / root
    bits = np.float64(q + (correction - q * 2.0**-29)).view(np.int64)
    cut = bits & 0xFFFFFF
    factor = np.int64(bits - cut).view(np.float64) * _power(exponent - place)
    return factor, norm, certain and 8 < cut < 0xFFFFF8


def _clip_rows(data: Any, limit: Any, inside: Any) -> None:
    x, bits, out, factor, norm, left = data
    n = x.size // norm.size
    limbs, used = np.zeros(24, np.int64), np.zeros(2, np.int64)
    for k in range(norm.size):
        limbs[:], used[:], found = 0, 0, 0
        for i in range(k * n, (k + 1) * n, RUN):
            stop = min(i + RUN, (k + 1) * n)
            found |= _row(x[i:stop], bits[i:stop], limbs, used, None)
        f, norm[k], certain = _decide(limbs, used[1] + 1, limit)
        factor[k], left[k] = f, found != 0 or not certain
        if not left[k] and (inside is None or f != 1.0):
            target = out[k * n : (k + 1) * n]
            source = x[k * n : (k + 1) * n] if inside is None else target
            for j in range(n):
                target[j] = _multiply(source[j], f)
