"""Cases whose results are recorded bit by bit, made of integers only.

Every element, limit, layout and chunk comes from the integers of one PCG64 stream, seeded by the
names of the case: no case depends on another one or on NumPy's distributions.

    python tests/recorded.py                 all digests, as data/recorded_bits.json has them
    python tests/recorded.py GROUP           those of the cases of a group, against the recorded
    python tests/recorded.py GROUP NUMBER    one case and its results in full
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import dask
import dask.array as da
import numpy as np
from reference import BFLOAT16, native

from daskclip import clip_by_global_norm, clip_by_norm, global_norm, norm

RECORDED = Path(__file__).parents[1] / "data" / "recorded_bits.json"
GROUP = 10  # cases whose digests are one entry
CAP = 4000  # elements of an array of any shape
LAZY = 5  # percent of the cases that are repeated in chunks
LENGTHS = (1, 2, 3, 5, 16, 17, 64, 100, 130)
MAX = sys.float_info.max
REALS = {
    "float16": np.dtype("f2"), "bfloat16": BFLOAT16, "float32": np.dtype("f4"),
    "float64": np.dtype("f8"),
}  # fmt: skip
COMPLEX = {"complex64": "float32", "complex128": "float64"}
# bits of the fraction and of the exponent
FIELDS = {"float16": (10, 5), "bfloat16": (7, 8), "float32": (23, 8), "float64": (52, 11)}
KINDS = [
    *((name, ord) for name in REALS for ord in (1, 2, math.inf)),
    *((name, 2) for name in COMPLEX),
]


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


@dataclass(frozen=True)
class Case:
    """One call, and the chunks that it is repeated in."""

    x: np.ndarray | list
    """An array, or a list that is clipped by its global norm."""
    axes: tuple[int, ...] | None
    limit: float | np.ndarray
    """``clip_norm``, or ``limits`` if it is an array."""
    ord: float = 2
    nonfinite: str = "propagate"
    use_norm: float | None = None
    chunks: Sequence | None = None
    split_every: int = 2

    def __repr__(self):
        told = [f"{key}={value!r}" for key, value in vars(self).items() if key != "x"]
        xs = self.x if isinstance(self.x, list) else [self.x]
        seen = [f"{x!r} of shape {x.shape}, {x.dtype.str}, strides {x.strides}" for x in xs]
        return "\n".join([*told, *seen])


# ---- elements


def elements(draw, name, shape):
    """An array of a dtype; complex ones are pairs of real ones."""
    if name not in COMPLEX:
        return reals(draw, name, shape)
    return reals(draw, COMPLEX[name], (*shape, 2)).view(name).reshape(shape)


def reals(draw, name, shape):
    """Floats by their fields, around one exponent or over the whole range."""
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
    """Small integers times a power of two: norms that are often floats, or just above one."""
    real = COMPLEX.get(name, name)
    values = draw.many(-4, 4, (*shape, 2) if name in COMPLEX else shape)
    values = np.ldexp(values.astype(np.float64), draw.between(-12, 12)).astype(REALS[real])
    if values.size and draw.chance(50):
        values.flat[draw.below(values.size)] = dust(draw, real)
    return values.view(name).reshape(shape) if name in COMPLEX else values


def dust(draw, real):
    """An element that only moves a sum far behind its first bits."""
    exponent = draw.one_of(0, draw.below((1 << FIELDS[real][1] - 1) // 2))
    return from_fields(real, draw.below(2), exponent, 1)


def rows_near_ties(draw, name, ord):
    """Rows with norms that are floats, or halfway between two of them, or just beside."""
    real, power = COMPLEX.get(name, name), 1 if ord == 1 else 2
    if ord == math.inf:  # there are no such rows
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


def spoil(draw, x):
    """Make some elements NaN or infinite, of complex ones both parts or one."""
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


# ---- cases


def case_of(draw, x, axes, ord, **how):
    """A case with the layout, the limit and the chunks still to be drawn."""
    x = laid_out(draw, x)
    if "limit" not in how:
        how["limit"] = limit_for(draw, x, axes, ord)
    how.setdefault("nonfinite", draw.one_of("propagate", "propagate", "omit"))
    if draw.chance(LAZY):
        how.update(chunks=chunks_of(draw, x.shape), split_every=draw.between(2, 4))
    if len(axes) == x.ndim and draw.chance(30):
        axes = None
    return Case(x, axes, ord=ord, **how)


def chunks_of(draw, shape):
    """Few chunks, some of them empty."""
    left, chunks = 6, []
    for n in shape:
        cuts = sorted(draw.below(n + 1) for _ in range(draw.below(min(left, 4))))
        left //= len(cuts) + 1
        chunks.append(tuple(np.diff([0, *cuts, n]).tolist()))
    return tuple(chunks)


def any_shape(draw):
    shape = [draw.one_of(*LENGTHS) for _ in range(draw.one_of(0, 1, 1, 1, 2, 2, 2, 3, 3, 4))]
    while math.prod(shape) > CAP:
        shape[shape.index(max(shape))] = draw.one_of(1, 2, 3, 5)
    if shape and draw.chance(4):
        shape[draw.below(len(shape))] = 0
    return tuple(shape)


def any_case(draw, name, ord):
    x = elements(draw, name, any_shape(draw))
    return case_of(draw, x, draw.some(x.ndim), ord)


def special_case(draw, name, ord):
    shape, axes = draw.one_of(*RUNS)
    if draw.chance(60):
        shape = any_shape(draw)
        axes = draw.some(len(shape))
    x = elements(draw, name, shape)
    spoil(draw, x)
    return case_of(draw, x, axes, ord, nonfinite=draw.one_of("propagate", "omit"))


def limits_case(draw, name, ord):
    x = elements(draw, name, any_shape(draw))
    if draw.chance(20):
        spoil(draw, x)
    axes = draw.some(x.ndim)
    return case_of(draw, x, axes, ord, limit=limits_of_slices(draw, x, axes, ord))


def near_case(draw, name, ord):
    """The limit is the norm or a step from it, or the factor has few bits."""
    kind = draw.below(4)
    if kind == 0:
        x = elements(draw, name, any_shape(draw))
    elif kind == 1:
        x = whole_numbers(draw, name, any_shape(draw))
    else:
        x = rows_near_ties(draw, name, ord)
    axes = draw.some(x.ndim) if kind < 2 else (1,)
    if kind == 3:
        x, axes = x.T.copy(), (0,)
    n = size_of(x, axes, ord, draw)
    limit = draw.one_of(
        n,
        n,
        n,
        beside(n, draw.one_of(-1, 1)),
        beside(n, draw.between(-3, 3)),
        math.ldexp(n, -draw.between(1, 30)),
        min(math.ldexp(n, -29) * draw.between(1, 1 << 29), MAX),
        min(math.ldexp(n, -8) * draw.between(1, 1 << 8), MAX),
    )
    return case_of(draw, x, axes, ord, limit=limit)


def tiny_case(draw, name, ord):
    """Results that are subnormal."""
    x = elements(draw, name, (draw.one_of(1, 3, 17), draw.one_of(1, 2, 5, 64, 100, 130, 513)))
    x = x if draw.chance(60) else x.T.copy()
    axes = draw.one_of((0,), (1,), (0, 1))
    near = fewer_bits(draw, x, axes, ord)
    limit = draw.one_of(
        beside(near, draw.between(-2, 2)),
        beside(near, draw.between(-2, 2)),
        near * 2.0 ** draw.between(-30, 2),
        near * draw.between(1, 1 << 20) * 2.0**-20,
        near * draw.between(1, 1 << 30) * 2.0**-30,
        draw.one_of(near * 2.0**-64, draw.between(1, 1 << 12) * 5e-324, 1e-310),
    )
    return case_of(draw, x, axes, ord, limit=limit)


def far_case(draw, name, ord):
    """Norms far above the limit: factors whose exponents lie below -900."""
    shape = (draw.one_of(1, 3, 17), draw.one_of(1, 2, 5, 64, 100, 130))
    x = elements(draw, name, shape)
    parts = native(x)
    sign, exponent = draw.many(0, 1, parts.shape), draw.many(1990, 2046, parts.shape)
    large = from_fields("float64", sign, exponent, draw.many(0, (1 << 52) - 1, parts.shape))
    parts = np.where(draw.many(0, 99, parts.shape) < draw.one_of(100, 50, 3), large, parts)
    x = np.ascontiguousarray(parts).view(name)[..., 0]
    axes = draw.one_of((), (0,), (1,), (0, 1))
    few = draw.between(1, 1 << draw.between(1, 30)) * 5e-324
    limit = draw.one_of(5e-324, 1e-310, 1e-300, few, few, few * 2.0**40, math.ldexp(1.0, -900))
    if draw.chance(30):
        limit = np.asarray([draw.one_of(limit, few, 1.0, 1e300) for _ in range(x.shape[1])])
        limit = limit[:1] if 1 in axes else limit
    return case_of(draw, x, axes, ord, limit=limit)


RUNS = (
    ((513,), (0,)), ((1100,), (0,)), ((4097,), (0,)), ((3, 4097), (1,)), ((4097, 3), (0,)),
    ((1100, 7), (0,)), ((7, 1100), (1,)), ((513, 17), (0,)), ((17, 513), (1,)),
    ((2**13 + 50, 2), (1,)), ((2, 2**13 + 50), (0,)), ((2**13 + 50, 1), (1,)), ((2**13 + 50,), ()),
    ((4, 50, 30), (1,)), ((4, 50, 30), (0, 2)), ((20, 3, 20), (0, 2)), ((4, 20, 3, 20), (1, 3)),
    ((4, 20, 3, 20), (0, 2)), ((999, 2), (0,)), ((35, 60), (0,)),
)  # fmt: skip
CARRIES = (((40_000,), (0,)), ((3, 20_000), (1,)), ((20_000, 3), (0,)), ((1000, 20), (0,)))
LONG = (
    ((20_000,), (0,)), ((100, 200), (1,)), ((200, 100), (0,)), ((20, 1000), (1,)),
    ((1000, 20), (0,)), ((20, 10, 100), (0, 2)), ((10, 20, 10, 10), (1, 3)), ((1111, 18), (1,)),
)  # fmt: skip
LARGE = (
    ((300_000,), (0,)), ((600, 500), (1,)), ((600, 500), (0,)), ((3, 100, 1000), (0, 2)),
    ((260, 1031), (0,)), ((20, 30, 50, 10), (1, 3)), ((75_000, 4), (0,)), ((75_000, 4), (1,)),
    ((16, 2**13 + 50), (0,)), ((2**13 + 50, 36), (1,)), ((300, 1000), (0, 1)),
)  # fmt: skip
HUGE = (((1100, 1000), (0,)), ((1100, 1000), (1,)), ((1100, 1000), (0, 1)))


def carries_case(draw, name, ord):
    """Many equal elements with all bits set: the largest sums that there are."""
    real = COMPLEX.get(name, name)
    fraction_bits, exponent_bits = FIELDS[real]
    last = (1 << exponent_bits) - 2
    exponent = min(last, max(0, last // 2 + draw.between(-16, 16)))
    value = from_fields(real, draw.below(2), exponent, (1 << fraction_bits) - 1)
    shape, axes = draw.one_of(*CARRIES)
    x = np.full((*shape, 2) if name in COMPLEX else shape, value)
    x = x.view(name)[..., 0] if name in COMPLEX else x
    if draw.chance(50):  # one is too small to be added with the others
        x.flat[draw.below(x.size)] = from_fields(real, 0, 0, 1)
    return case_of(draw, x, axes, ord)


def of_shapes(pairs):
    def make(draw, name, ord):
        shape, axes = draw.one_of(*pairs)
        x = elements(draw, name, shape)
        if draw.chance(10):
            spoil(draw, x)
        return case_of(draw, x, axes if draw.chance(70) else draw.some(x.ndim), ord)

    return make


def list_case(draw, name, ord):
    """Arrays of any dtypes, clipped by one factor."""
    names = [draw.one_of(*REALS, *COMPLEX) for _ in range(draw.between(2, 3))]
    xs = [elements(draw, one, any_shape(draw)) for one in names]
    x = draw.one_of(*xs)
    if draw.chance(10):
        spoil(draw, x)
    limit = limit_for(draw, x, tuple(range(x.ndim)), ord)
    use_norm = limit_for(draw, x, tuple(range(x.ndim)), ord) if draw.chance(20) else None
    xs = [laid_out(draw, x) for x in xs]
    chunks = [chunks_of(draw, x.shape) for x in xs] if draw.chance(LAZY) else None
    return Case(xs, None, limit, use_norm=use_norm, chunks=chunks)


# by name: what makes a case, how many there are of each kind, the kinds
THEMES = {
    "any": (any_case, 50, KINDS),
    "special": (special_case, 30, KINDS),
    "limits": (limits_case, 30, KINDS),
    "near": (near_case, 40, KINDS),
    "tiny": (tiny_case, 30, KINDS),
    "runs": (of_shapes(RUNS), 20, KINDS),
    "long": (of_shapes(LONG), 10, KINDS),
    "large": (of_shapes(LARGE), 2, KINDS),
    "carries": (carries_case, 20, KINDS),
    "far": (far_case, 30, [kind for kind in KINDS if kind[0] in ("float64", "complex128")]),
    "huge": (of_shapes(HUGE), 1, [("float64", 1), ("float64", 2), ("complex128", 2)]),
    "lists": (list_case, 200, [("mixed", 2)]),
}
# by their names: the arguments of `make`, with all numbers of the group
GROUPS = {
    f"{theme}/{name}/{ord}/{k // GROUP}": (theme, name, ord, range(k, min(k + GROUP, n)))
    for theme, (_, n, kinds) in THEMES.items()
    for name, ord in kinds
    for k in range(0, n, GROUP)
}


def make(theme, name, ord, number):
    """One case; any number makes one, beyond those that are recorded too."""
    names = [*REALS, *COMPLEX, "mixed"]
    draw = Draw([*THEMES].index(theme), names.index(name), (1, 2, math.inf).index(ord), number)
    return THEMES[theme][0](draw, name, ord)


# ---- results


def results(case):
    """What the public functions give, by name."""
    xs = case.x if isinstance(case.x, list) else [case.x]
    found = _results(case, xs)
    if case.chunks is not None:
        chunks = case.chunks if isinstance(case.x, list) else [case.chunks]
        lazy = [da.from_array(x, c) for x, c in zip(xs, chunks, strict=True)]
        with dask.config.set(split_every=case.split_every, scheduler="sync"):
            computed = dask.compute(_results(case, lazy))[0]
        found.update({f"lazy {key}": value for key, value in computed.items()})
    return found


def _results(case, xs):
    if isinstance(case.x, list):
        clipped, total = clip_by_global_norm(xs, case.limit, use_norm=case.use_norm)
        each = {f"clipped {i}": y for i, y in enumerate(clipped)}
        return {**each, "total": total, "global_norm": global_norm(xs)}
    how = {"ord": case.ord, "nonfinite": case.nonfinite, "return_norm": True}
    if np.ndim(case.limit):
        how["limits"] = case.limit
    else:
        how["clip_norm"] = case.limit
    clipped, norms = clip_by_norm(xs[0], axes=case.axes, **how)
    found = {"clipped": clipped, "norms": norms}
    if isinstance(clipped, da.Array):  # each graph takes a while
        return found
    return {**found, "norm": norm(xs[0], case.axes, ord=case.ord)}


def canonical(x):
    """Dtype, shape and bits of an array, with one NaN for all."""
    values = native(x)
    fraction_bits, exponent_bits = FIELDS[values.dtype.name]
    infinity = ((1 << exponent_bits) - 1) << fraction_bits
    bits = values.view(f"u{values.itemsize}")
    magnitude = (1 << (fraction_bits + exponent_bits)) - 1
    bits[(bits & bits.dtype.type(magnitude)) > infinity] = infinity | 1 << (fraction_bits - 1)
    dtype = np.asarray(x).dtype
    return f"{dtype.name} {dtype.isnative} {np.shape(x)}", bits.astype(f"<u{values.itemsize}")


def digest(found):
    """16 bytes in hexadecimal for all results of a case."""
    summed = blake2b(digest_size=16)
    for key, value in found.items():
        told, bits = canonical(value)
        summed.update(f"{key} {told} ".encode())
        summed.update(bits.tobytes())
    return summed.hexdigest()


def digest_of(group):
    """8 digits for a group, then 2 for each case."""
    theme, name, ord, numbers = GROUPS[group]
    each = [digest(results(make(theme, name, ord, k))) for k in numbers]
    whole = blake2b("".join(each).encode(), digest_size=4).hexdigest()
    return " ".join([whole, *(one[:2] for one in each)])


def differing(group, found, expected):
    """Numbers of the cases of a group whose digests differ; all if only the first part does."""
    numbers = GROUPS[group][3]
    pairs = zip(numbers, found.split()[1:], expected.split()[1:], strict=True)
    return [k for k, a, b in pairs if a != b] or [*numbers]


def main(group=None, number=None):
    if number is not None:
        theme, name, ord, _ = GROUPS[group]
        case = make(theme, name, ord, int(number))
        print(case)
        for key, value in results(case).items():
            print(f"{key}: {value!r}")
        return
    if group is not None:
        found, expected = digest_of(group), json.loads(RECORDED.read_text())[group]
        print(f"found    {found}\nrecorded {expected}")
        if found != expected:
            print("cases", differing(group, found, expected))
        return
    lines = (f"{json.dumps(key)}: {json.dumps(digest_of(key))}" for key in GROUPS)
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main(*sys.argv[1:])
