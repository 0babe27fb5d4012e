"""Arrays whose slices continue in one another: lists and groups for tests of joint norms."""

import math

import numpy as np
from reference import BFLOAT16

DTYPES = ["f2", BFLOAT16, "f4", ">f4", "f8", "c8", "c16"]


def joint_arrays(rng, dtypes, most=4):
    """Arrays of random shapes and dtypes that keep the same shape without the axes, and these."""
    kept = tuple(map(int, rng.integers(1, 7, rng.integers(1, 3))))
    count, arrays = rng.integers(1, most + 1), []
    own = [tuple(map(int, rng.integers(1, 6, rng.integers(0, 3)))) for _ in range(count)]
    form = rng.choice(["first", "last", "around"])
    if form == "around":
        own, kept = [tuple(map(int, rng.integers(1, 6, 2))) for _ in range(count)], kept[:1]
    for sizes in own:
        shape = {
            "first": kept + sizes, "last": sizes + kept, "around": sizes[:1] + kept + sizes[1:],
        }[form]  # fmt: skip
        arrays.append(values(rng, shape, dtypes[rng.integers(len(dtypes))]))
    k = len(kept)
    axes = {"first": slice(k, None), "last": slice(None, -k), "around": [0, -1]}
    return arrays, axes[form]


def values(rng, shape, dtype):
    """Random numbers of different sizes, some of them zero."""
    dtype = np.dtype(dtype)
    x = rng.standard_normal(shape) * rng.choice([0, 0.1, 1, 3], shape)
    if dtype.kind == "c":
        x = x + 1j * rng.standard_normal(shape)
    return np.asarray(x).astype(dtype)


def rows(x, axes):
    """The slices of an array as rows along a last axis."""
    taken = range(x.ndim)[axes] if isinstance(axes, slice) else [a % x.ndim for a in axes]
    kept = [a for a in range(x.ndim) if a not in taken]
    flat = x.transpose(*kept, *sorted(taken))
    return flat.reshape(*(x.shape[a] for a in kept), math.prod(x.shape[a] for a in taken))
