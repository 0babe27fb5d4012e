"""Arrays, their chunks and everything else that must not change a bit of the result."""

import math
from dataclasses import dataclass

import dask
import dask.array as da
import numpy as np
from hypothesis import strategies as st
from reference import BFLOAT16, DTYPES, FORMATS, native, root, squares

# one step off the native layout each; ml_dtypes has no swapped bfloat16
LAYOUTS = {
    "c": lambda x: x,
    "f": lambda x: x.copy(order="F"),
    "strided": lambda x: x.repeat(2, axis=-1)[..., ::2] if x.ndim else x,
    "reversed": lambda x: np.flip(np.flip(x).copy()),
    "swapped": lambda x: x if x.dtype == BFLOAT16 else x.astype(x.dtype.newbyteorder()),
}
SPECIAL = [math.nan, math.inf, -math.inf]


@dataclass(frozen=True)
class Case:
    """One call, and the ways to spread it over chunks."""

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
        """What a function of the Dask array gives, a list or an array."""
        with dask.config.set(split_every=self.split_every):
            results = function(da.from_array(self.x, self.chunks))
            return dask.compute(*results, scheduler=scheduler)


@st.composite
def shapes(draw):
    """Up to three dimensions, some of no length, some longer than one run of products."""
    ndim = draw(st.integers(0, 3))
    shape = draw(st.lists(st.integers(0, 6), min_size=ndim, max_size=ndim))
    if ndim and draw(st.booleans()):
        shape[draw(st.integers(0, ndim - 1))] = draw(st.sampled_from([17, 40, 90]))
    if ndim == 1 and draw(st.booleans()):
        shape = [draw(st.integers(500, 1100))]
    return tuple(shape)


@st.composite
def elements(draw, shape, dtype):
    """Values around one power of two of the dtype's range, with zeros of both signs."""
    name = native(np.zeros((), dtype)).dtype.name
    significant, lowest = FORMATS[name]
    highest = {"float16": 15, "float64": 1023}.get(name, 127)
    centre = draw(st.integers(lowest, highest))
    spread = draw(st.sampled_from([0, 1, 4, 30, highest - lowest]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    real = (*shape, 2) if dtype.kind == "c" else shape
    exponent = np.clip(
        rng.integers(centre - spread, centre + spread, real, endpoint=True), lowest, highest
    )
    mantissa = draw(st.sampled_from(["random", "ones", "small"]))
    if mantissa == "random":
        fraction = 1 + rng.integers(0, 2 ** (significant - 1), real) * 2.0 ** (1 - significant)
    else:
        fraction = np.ones(real) if mantissa == "ones" else 1 + rng.integers(0, 2, real) / 2
    x = np.ldexp(fraction, exponent) * rng.choice([-1.0, 1.0], real)
    zeros = rng.random(real) < draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))
    x = np.where(zeros, 0.0 * x, x)
    parts = x.astype(np.float32 if dtype.name == "complex64" else x.dtype)
    return parts.view(dtype).reshape(shape) if dtype.kind == "c" else parts.astype(dtype)


@st.composite
def cases(draw, special=False):
    """A `Case`; with ``special``, some elements are NaN or infinite."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(shapes())
    plain = draw(elements(shape, dtype))
    axes = tuple(k for k in range(len(shape)) if draw(st.booleans()))
    clip_norm = draw(limits(plain, axes))
    if special and plain.size:
        plain = plain.copy()
        for at in draw(st.lists(st.integers(0, plain.size - 1), min_size=1, max_size=3)):
            value = draw(st.sampled_from(SPECIAL))
            if dtype.kind == "c" and draw(st.booleans()):
                value = complex(1.0, value)
            plain.flat[at] = value
    layout = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    return Case(
        plain,
        np.asarray(layout(plain)),
        axes,
        clip_norm,
        tuple(draw(partitions(n)) for n in shape),
        draw(st.integers(2, 4)),
    )


@st.composite
def partitions(draw, n):
    """Chunks of an axis, some of them empty."""
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=4)))
    return tuple(np.diff([0, *cuts, n]).tolist())


@st.composite
def limits(draw, x, axes):
    """A limit beside the norm of one of the slices, or far from all."""
    norms = [root(t) for t in squares(x, axes).ravel()[:20]]
    norm = draw(st.sampled_from([n for n in norms if math.isfinite(n)] or [1.0]))
    return draw(
        st.sampled_from([norm, math.nextafter(norm, 0), math.nextafter(norm, 1e308)])
        | st.floats(0, 1.5).map(lambda k: norm * k)
        | st.sampled_from([0.0, -1.0, 5e-324, 1e-300, 1e-38, 1e30, 1e300])
        | st.floats(0, 1e308)
    )
