"""Hypothesis strategies: arrays, limits, and the layouts and chunks that must not change a bit."""

import math
import sys
from dataclasses import dataclass
from functools import cache

import dask
import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import BFLOAT16, DTYPES, EXPONENTS, FORMATS, native, root, totals

ORDS = (2, 1, math.inf)
# one step off the native layout each; ml_dtypes has no swapped bfloat16
LAYOUTS = {
    "c": lambda x: x,
    "f": lambda x: x.copy(order="F"),
    "strided": lambda x: x.repeat(2, axis=-1)[..., ::2] if x.ndim else x,
    "reversed": lambda x: np.flip(np.flip(x).copy()),
    "swapped": lambda x: x if x.dtype == BFLOAT16 else x.astype(x.dtype.newbyteorder()),
}
# cached, because drawing from a strategy that exists is several times faster
integers = cache(st.integers)
one_of = cache(lambda *values: st.sampled_from(values))
flags = st.booleans()
# functions from the norm of a slice to a limit beside it, or far from all norms
limits = (
    one_of(lambda n: n, lambda n: math.nextafter(n, 0), lambda n: math.nextafter(n, 1e308))
    | st.floats(0, 1.5).map(lambda k: lambda n: k * n)
    | one_of(0.0, -1.0, 5e-324, 1e-300, 1e-38, 1e30, 1e300).map(lambda c: lambda n: c)
    | st.floats(0, 1e308).map(lambda c: lambda n: c)
)


@dataclass(frozen=True)
class Case:
    """One call, and the chunks to spread it over."""

    plain: np.ndarray
    """Native and contiguous."""
    x: np.ndarray
    """The same elements in another layout."""
    axes: tuple[int, ...]
    clip_norm: float
    chunks: tuple[tuple[int, ...], ...]
    split_every: int

    def __repr__(self):
        return (
            f"Case({self.x!r}, strides={self.x.strides}, axes={self.axes}, "
            f"clip_norm={self.clip_norm!r}, chunks={self.chunks}, split_every={self.split_every})"
        )

    def compute(self, function, scheduler):
        """Compute the list that a function returns for the Dask array."""
        with dask.config.set(split_every=self.split_every):
            results = function(da.from_array(self.x, self.chunks))
            return dask.compute(*results, scheduler=scheduler)


@cache
def shapes():
    """Shapes of up to three dimensions, some empty, some longer than a tile of the kernel."""
    short = st.lists(integers(0, 6), max_size=3).map(tuple)
    long = st.tuples(one_of(17, 40, 90), integers(0, 6), integers(1, 3)).flatmap(
        lambda shape: st.permutations(shape[: shape[2]])
    )
    return short | long.map(tuple) | st.tuples(integers(500, 1100))


@cache
def partitions(n):
    """Chunks of an axis, some of them empty."""
    cuts = st.lists(integers(0, n), max_size=4)
    return cuts.map(lambda c: tuple(np.diff([0, *sorted(c), n]).tolist()))


def elements(draw, shape, dtype):
    """Values around one power of two of the dtype's range, with zeros of both signs."""
    name = native(np.zeros((), dtype)).dtype.name
    significant, lowest = FORMATS[name]
    highest = EXPONENTS[name][1]
    centre = draw(integers(lowest, highest))
    spread = draw(one_of(0, 1, 4, 30, highest - lowest))
    rng = np.random.default_rng(draw(integers(0, 2**32)))
    real = (*shape, 2) if dtype.kind == "c" else shape
    exponent = rng.integers(centre - spread, centre + spread, real, endpoint=True)
    mantissa = draw(one_of("random", "ones", "small"))
    if mantissa == "random":
        fraction = 1 + rng.integers(0, 2 ** (significant - 1), real) * 2.0 ** (1 - significant)
    else:
        fraction = np.ones(real) if mantissa == "ones" else 1 + rng.integers(0, 2, real) / 2
    x = np.ldexp(fraction, np.clip(exponent, lowest, highest)) * rng.choice([-1.0, 1.0], real)
    x = np.where(rng.random(real) < draw(one_of(0.0, 0.3, 1.0)), 0.0 * x, x)
    parts = x.astype(np.float32 if dtype.name == "complex64" else x.dtype)
    return parts.view(dtype).reshape(shape) if dtype.kind == "c" else parts.astype(dtype)


def make_nonfinite(draw, x):
    """Make some elements NaN or infinite, in one or both parts of complex ones.

    NaN has any sign and payload, and is quiet or not; quiet in bfloat16, since ml_dtypes warns of
    the other kind.
    """
    for at in draw(st.lists(integers(0, x.size - 1), min_size=1, max_size=3)):
        value = draw(one_of(math.nan, math.inf, -math.inf))
        x.flat[at] = complex(1.0, value) if x.dtype.kind == "c" and draw(flags) else value
        if math.isnan(value) and draw(flags):
            bits = parts_as_integers(x)
            size = 8 * bits.itemsize
            payload = 2 ** draw(integers(0, FORMATS[native(x).dtype.name][0] - 2))
            infinite = bits_of(math.nan if x.dtype == BFLOAT16 else math.inf, x.dtype)
            number = infinite | payload | draw(flags) << (size - 1)
            at = at if x.dtype.kind != "c" else 2 * at + draw(flags)
            bits[at] = number


def parts_as_integers(x):
    """The bits of the real and imaginary parts of a contiguous array, as a view."""
    size = x.itemsize // (2 if x.dtype.kind == "c" else 1)
    return x.reshape(-1).view(f"u{size}")


def bits_of(value, dtype):
    """The bits of a number in the real part of a dtype, as an integer."""
    return int(parts_as_integers(np.full(1, value, dtype))[0])


@st.composite
def cases(draw, special=False, ord=2):
    """A `Case` for a norm; with ``special``, some elements are NaN or infinite."""
    dtype = draw(one_of(*(d for d in DTYPES if ord == 2 or d.kind != "c")))
    shape = draw(shapes())
    plain = elements(draw, shape, dtype)
    axes = tuple(k for k in range(len(shape)) if draw(flags))
    norms = totals(plain, axes, ord).ravel()
    norm = root(norms[draw(integers(0, 99)) % len(norms)]) if len(norms) else 1.0
    clip_norm = min(draw(limits)(norm if math.isfinite(norm) else 1.0), sys.float_info.max)
    if special and plain.size:
        make_nonfinite(draw, plain)
    layout = LAYOUTS[draw(one_of(*sorted(LAYOUTS)))]
    chunks = tuple(draw(partitions(n)) for n in shape)
    x = np.asarray(layout(plain))
    return Case(plain, x, axes, clip_norm, chunks, draw(integers(2, 4)))


def for_each_ord(examples, others, special=False, **drawn):
    """Test a property of a `Case` for each norm: ``examples`` cases of order 2, ``others`` else.

    The decorated function takes ``case``, ``ord``, and a value of each strategy in ``drawn``.
    """

    def decorate(check):
        def test(ord):
            number = examples if ord == 2 else others

            @settings(max_examples=number, derandomize=True, deadline=None)
            @given(case=cases(special, ord), **drawn)
            def of_all_cases(**values):
                check(ord=ord, **values)

            of_all_cases()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return pytest.mark.parametrize("ord", ORDS)(test)

    return decorate
