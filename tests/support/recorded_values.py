"""Arrays, layouts and limits of the recorded cases, made of integers only.

Nothing depends on NumPy's distributions, or on the order in which cases are made.
"""

import math
import sys

import numpy as np
from reference import BFLOAT16, native

MAX = sys.float_info.max
REALS = {
    "float16": np.dtype("f2"), "bfloat16": BFLOAT16, "float32": np.dtype("f4"),
    "float64": np.dtype("f8"),
}  # fmt: skip
COMPLEX = {"complex64": "float32", "complex128": "float64"}
# bits of the fraction and of the exponent
FIELDS = {"float16": (10, 5), "bfloat16": (7, 8), "float32": (23, 8), "float64": (52, 11)}


class Draw:
    """Choices from one stream of integers."""

    def __init__(self, *seed):
        self.rng = np.random.Generator(np.random.PCG64(seed))

    def below(self, n):
        return int(self.rng.integers(0, n))

    def between(self, low, high):
        return low + self.below(high - low + 1)

    def chance(self, percent):
        return self.below(100) < percent

    def one_of(self, *values):
        return values[self.below(len(values))]

    def many(self, low, high, shape):
        return self.rng.integers(low, high, shape, endpoint=True)

    def order(self, n):
        """A permutation."""
        left = list(range(n))
        return [left.pop(self.below(len(left))) for _ in range(n)]

    def some(self, n):
        """A part of the first integers."""
        return tuple(k for k in range(n) if self.chance(50))


# ---- elements


def elements(draw, name, shape):
    """An array of a dtype; complex ones are pairs of real ones."""
    if name not in COMPLEX:
        return reals(draw, name, shape)
    return reals(draw, COMPLEX[name], (*shape, 2)).view(name).reshape(shape)


def reals(draw, name, shape):
    """Floats made of their fields, around one exponent or over the whole range."""
    fraction_bits, exponent_bits = FIELDS[name]
    last = (1 << exponent_bits) - 2
    centre = draw.one_of(
        last // 2 + draw.between(-12, 12), last // 2, draw.below(last + 1), last, draw.below(3)
    )
    spread = draw.one_of(0, 1, 4, 30, 30, 120, last, "softmax", "log-normal")
    if spread == "softmax":
        exponent = centre - draw.many(0, 64, shape) ** 2 // 64
    elif spread == "log-normal":
        exponent = centre + draw.many(-12, 12, (4, *shape)).sum(axis=0)
    else:
        exponent = draw.many(centre - spread, centre + spread, shape)
    if shape and draw.chance(30):  # slices of different sizes
        axis = draw.below(len(shape))
        exponent = exponent + draw.many(
            -40, 40, tuple(n if k == axis else 1 for k, n in enumerate(shape))
        )
    exponent = np.clip(exponent, 0, last)
    every = (1 << fraction_bits) - 1
    fraction = draw.many(0, every, shape)
    kind = draw.one_of("random", "random", "random", "powers of two", "few bits", "full")
    if kind == "powers of two":
        fraction = 0 * fraction
    elif kind == "few bits":
        fraction &= every & ~(every >> 2)
    elif kind == "full":
        fraction |= every & ~3
    # subnormal numbers of all sizes
    fraction >>= np.where(exponent == 0, draw.many(0, fraction_bits, shape), 0)
    sign = {"both": draw.many(0, 1, shape), "+": 0, "-": 1}[draw.one_of("both", "both", "+", "-")]
    if draw.chance(40):
        zeros = draw.many(0, 99, shape) < draw.one_of(30, 97, 100)
        exponent, fraction = np.where(zeros, 0, exponent), np.where(zeros, 0, fraction)
    return from_fields(name, sign, exponent, fraction)


def from_fields(name, sign, exponent, fraction):
    fraction_bits, exponent_bits = FIELDS[name]
    bits = np.asarray(exponent).astype(np.uint64) << np.uint64(fraction_bits)
    bits |= np.asarray(fraction).astype(np.uint64)
    bits |= np.asarray(sign).astype(np.uint64) << np.uint64(fraction_bits + exponent_bits)
    dtype = REALS[name]
    return np.asarray(bits).astype(f"u{dtype.itemsize}").view(dtype)


def whole_numbers(draw, name, shape):
    """Small integers times a power of two, whose norms are often floats or just above one."""
    real = COMPLEX.get(name, name)
    values = draw.many(-4, 4, (*shape, 2) if name in COMPLEX else shape)
    values = np.ldexp(values.astype(np.float64), draw.between(-12, 12)).astype(REALS[real])
    if values.size and draw.chance(50):
        values.flat[draw.below(values.size)] = dust(draw, real)
    return values.view(name).reshape(shape) if name in COMPLEX else values


def dust(draw, real):
    """An element so small that it changes a sum only far behind its leading bits."""
    exponent = draw.one_of(0, draw.below((1 << FIELDS[real][1] - 1) // 2))
    return from_fields(real, draw.below(2), exponent, 1)


def rows_near_ties(draw, name, ord):
    """Rows whose norms are floats, or midpoints between two floats, or just beside."""
    real, power = COMPLEX.get(name, name), 1 if ord == 1 else 2
    if ord == math.inf:  # a maximum is always a float
        return whole_numbers(draw, name, (draw.between(1, 5), draw.one_of(2, 5, 64)))
    significant = FIELDS[real][0] + 1
    bits, unit = (19, 0) if real == "float16" else (53, 8)
    width = draw.one_of(64, 64, 100, 514)
    rows = np.zeros((draw.between(1, 4), width), np.float64)
    kind, step = draw.one_of("float", "float", "halfway", "beneath"), draw.one_of(-1, 0, 0, 1)
    if real == "float64" and power == 2 and draw.chance(40):
        kind = "subnormal"
    for row in rows:
        norm = (1 << bits) + draw.below(1 << bits) // draw.one_of(1, 1 << bits // 2)
        norm = norm | 1 if kind == "halfway" else norm & ~1
        left = (norm << unit) ** power + step
        if kind == "beneath" and unit:  # halfway from a power of two to the float below it
            left = ((1 << bits + unit) - (1 << unit - 1)) ** power + step
        if kind == "subnormal":  # a quarter of a square below halfway, or three above
            norm = draw.one_of(draw.below(1 << draw.between(20, 51)), (1 << 52) - 1)
            left = norm * norm + norm + draw.one_of(0, 1)
        numbers = []
        while left and len(numbers) < 63:
            part = left if power == 1 else math.isqrt(left)
            cut = max(0, part.bit_length() - significant)
            part = part >> cut << cut
            numbers.append(math.ldexp(part, -1074 if kind == "subnormal" else -unit - 10))
            left -= part**power
        row[draw.order(width)[: len(numbers)]] = numbers
    if real != "float16" and kind != "subnormal":
        rows = np.ldexp(rows, draw.one_of(0, 0, draw.between(-40, 30)))
    rows = rows.astype(REALS[real])
    for row in rows if kind != "subnormal" else ():
        at = draw.below(width)
        if not row[at] and draw.chance(50):
            row[at] = dust(draw, real)
    return rows.view(name) if name in COMPLEX else rows


def make_nonfinite(draw, x):
    """Make some elements NaN or infinite, in one or both parts of complex ones."""
    if not x.size:
        return
    parts = x.view(f"f{x.itemsize // 2}") if x.dtype.kind == "c" and x.ndim else x
    if draw.chance(30):
        parts[draw.many(0, 99, parts.shape) < draw.one_of(2, 30)] = math.nan
        return
    for _ in range(draw.between(1, 3)):
        parts.flat[draw.below(parts.size)] = draw.one_of(math.nan, math.inf, -math.inf)


# ---- layouts: the same elements elsewhere in memory, with NaN around and between


def _among_nan(x, before, after, step):
    shape = [b + n * s + a for n, b, a, s in zip(x.shape, before, after, step, strict=True)]
    parent = np.full(shape, math.nan, x.dtype)
    region = tuple(slice(b, b + n * s, s) for n, b, s in zip(x.shape, before, step, strict=True))
    part = parent[(*region, ...)]
    part[...] = x
    return part


def permuted(draw, x):
    order = draw.order(x.ndim)
    return x.transpose(order).copy().transpose(np.argsort(order)) if order else x


def strided(draw, x):
    step = [draw.one_of(1, 2, 3) for _ in x.shape]
    return _among_nan(x, [0] * x.ndim, [0] * x.ndim, step)


def part_of_another(draw, x):
    before, after = draw.many(0, 3, (2, x.ndim)).tolist()
    return _among_nan(x, before, after, [1] * x.ndim)


def reversed_axes(draw, x):
    axes = draw.some(x.ndim)
    return np.flip(np.flip(x, axes).copy(), axes)


def broadcast(draw, x):
    for k in draw.some(x.ndim):
        x = np.broadcast_to(x.take([0], k), x.shape) if x.shape[k] else x
    return x


def unaligned(draw, x):
    memory = np.empty(x.nbytes + 8, np.uint8)
    start = draw.one_of(1, 1, 3)
    view = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


LAYOUTS = (
    lambda draw, x: x,
    lambda draw, x: x,
    lambda draw, x: x.copy(order="F"),
    # ml_dtypes has no swapped bfloat16
    lambda draw, x: x if x.dtype == BFLOAT16 else x.astype(x.dtype.newbyteorder()),
    permuted,
    strided,
    part_of_another,
    reversed_axes,
    broadcast,
    unaligned,
)


def laid_out(draw, x):
    return np.asarray(draw.one_of(*LAYOUTS)(draw, x))


# ---- limits


def size_of(x, axes, ord, draw):
    """Norm of some slice, nearly rounded correctly; 0 if it is empty."""
    index = tuple(
        slice(None) if k in axes else draw.below(max(n, 1)) for k, n in enumerate(x.shape)
    )
    a = native(x[index]) if x.size else np.zeros(0)
    a = np.abs(a.astype(np.float64)).ravel()
    a = a[np.isfinite(a)]
    top = float(a.max(initial=0.0))
    if top == 0 or ord == math.inf:
        return top
    exponent = math.frexp(top)[1]
    with np.errstate(all="ignore"):
        a = np.ldexp(a, -exponent)
        if ord == 1:
            size = math.fsum(a)
        else:
            high = (a.view(np.int64) & -(1 << 27)).view(np.float64)
            low = a - high
            size = math.sqrt(math.fsum(np.concatenate([high * high, 2 * high * low, low * low])))
        return min(float(np.ldexp(size, exponent)), MAX)


def beside(n, steps):
    """A float so many steps from another one that is not negative."""
    for _ in range(abs(steps)):
        n = math.nextafter(n, math.copysign(math.inf, steps))
    return n


def fewer_bits(draw, x, axes, ord):
    """Where the results of one slice begin to be rounded toward zero, or near there."""
    real = native(x[..., None][:0]).dtype.name
    fraction_bits, exponent_bits = FIELDS[real]
    lowest = 2 - (1 << (exponent_bits - 1)) - fraction_bits
    terms = math.prod(x.shape[k] for k in axes) * (2 if x.dtype.kind == "c" else 1)
    room = {1: float(terms), 2: math.sqrt(terms), math.inf: 1.0}[ord]
    return math.ldexp(room, lowest + (64 if real == "float64" else 30))


def limit_for(draw, x, axes, ord):
    n = size_of(x, axes, ord, draw)
    kind = draw.below(10)
    if kind < 2:
        return beside(n, draw.between(-2, 2))
    if kind < 5:
        share = draw.one_of(0.3, 0.5, 0.999, 2.0**-10, draw.below(1537) / 1024)
        return min(n * share, MAX)
    if kind == 5:  # factors of few bits
        return min(math.ldexp(n, -29) * draw.between(1, 1 << 29), MAX)
    if kind == 6:
        near = fewer_bits(draw, x, axes, ord)
        return draw.one_of(beside(near, draw.between(-1, 1)), near * 2.0 ** draw.between(-30, 3))
    if kind == 7:  # any float
        exponent, fraction = draw.below(2047), draw.below(1 << 52)
        return float(from_fields("float64", 0, exponent, fraction))
    return draw.one_of(
        0.0, -1.0, -math.inf, math.inf, math.nan, 5e-324, 1e-310, 1e-300, 1e-45, 1e-38, 1e-6,
        0.01, 1.0, 1e4, 1e30, 1e300, MAX,
    )  # fmt: skip


def limits_of_slices(draw, x, axes, ord):
    """Limits of a shape that broadcasts against the norms."""
    kept = [1 if k in axes else n for k, n in enumerate(x.shape)]
    shape = tuple(n if draw.chance(70) else 1 for n in kept)[draw.below(x.ndim + 1) :]
    values = [limit_for(draw, x, axes, ord) for _ in range(draw.between(1, 6))]
    at = draw.many(0, len(values) - 1, shape)
    with np.errstate(over="ignore"):
        return np.asarray(values)[at].astype(draw.one_of("f8", "f8", "f8", "f4", ">f8"))
