"""Cases whose results are recorded bit by bit, made of integers only.

Every element, limit, layout and chunk comes from the integers of one PCG64 stream, seeded by the
names of the case: no case depends on another one or on NumPy's distributions.

    python tests/support/recorded.py               all digests, as data/recorded_bits.json has them
    python tests/support/recorded.py GROUP         those of a group, compared with the recorded ones
    python tests/support/recorded.py GROUP NUMBER  one case and its results in full
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
from recorded_values import (
    COMPLEX,
    FIELDS,
    MAX,
    REALS,
    Draw,
    beside,
    elements,
    fewer_bits,
    from_fields,
    laid_out,
    limit_for,
    limits_of_slices,
    make_nonfinite,
    rows_near_ties,
    size_of,
    whole_numbers,
)
from reference import native

from daskclip import clip_by_global_norm, clip_by_norm, global_norm, norm

RECORDED = Path(__file__).parents[1] / "data" / "recorded_bits.json"
GROUP = 10  # cases whose digests are one entry
CAP = 4000  # elements of an array of any shape
LAZY = 5  # percent of the cases that are repeated in chunks
LENGTHS = (1, 2, 3, 5, 16, 17, 64, 100, 130)
KINDS = [
    *((name, ord) for name in REALS for ord in (1, 2, math.inf)),
    *((name, 2) for name in COMPLEX),
]


@dataclass(frozen=True)
class Case:
    """One call, and the chunks for its lazy repetition."""

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
        fields = [f"{key}={value!r}" for key, value in vars(self).items() if key != "x"]
        xs = self.x if isinstance(self.x, list) else [self.x]
        seen = [f"{x!r} of shape {x.shape}, {x.dtype.str}, strides {x.strides}" for x in xs]
        return "\n".join([*fields, *seen])


def case_of(draw, x, axes, ord, **how):
    """Draw layout, limit and chunks of a case."""
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
    make_nonfinite(draw, x)
    return case_of(draw, x, axes, ord, nonfinite=draw.one_of("propagate", "omit"))


def limits_case(draw, name, ord):
    x = elements(draw, name, any_shape(draw))
    if draw.chance(20):
        make_nonfinite(draw, x)
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
    """Many equal elements with all bits set, whose sums are the largest."""
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
            make_nonfinite(draw, x)
        return case_of(draw, x, axes if draw.chance(70) else draw.some(x.ndim), ord)

    return make


def list_case(draw, name, ord):
    """Arrays of any dtypes, clipped by one factor."""
    names = [draw.one_of(*REALS, *COMPLEX) for _ in range(draw.between(2, 3))]
    xs = [elements(draw, one, any_shape(draw)) for one in names]
    x = draw.one_of(*xs)
    if draw.chance(10):
        make_nonfinite(draw, x)
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
    """Make one case; numbers beyond the recorded ones are valid too."""
    names = [*REALS, *COMPLEX, "mixed"]
    draw = Draw([*THEMES].index(theme), names.index(name), (1, 2, math.inf).index(ord), number)
    return THEMES[theme][0](draw, name, ord)


# ---- results


def results(case):
    """Results of the public functions, by name."""
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
    """Dtype, shape and bits of an array, with all NaN replaced by one."""
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
        form, bits = canonical(value)
        summed.update(f"{key} {form} ".encode())
        summed.update(bits.tobytes())
    return summed.hexdigest()


def digest_of(group):
    """8 digits for a group, then 2 for each case."""
    theme, name, ord, numbers = GROUPS[group]
    each = [digest(results(make(theme, name, ord, k))) for k in numbers]
    whole = blake2b("".join(each).encode(), digest_size=4).hexdigest()
    return " ".join([whole, *(one[:2] for one in each)])


def differing(group, found, expected):
    """Numbers of the cases of a group with other digests; all if only the first part differs."""
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
