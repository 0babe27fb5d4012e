"""Exact sums and rescaled blocks by compiled loops, where numba is installed.

All of it is optional: what a function leaves to NumPy, it answers with None or False.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from daskclip.blocks import boxes, index, tile_shape
from daskclip.loops import SHORT, compiled
from daskclip.partials import NAN, SLICES, Partial, canonical

Array = npt.NDArray[Any]

LEAST = 1 << 18  # bytes of a block above which compiled loops pay
LONGEST = 1 << 20  # elements of a row that is clipped while it is in the cache
LIMBS = {4: (-11, 24), 8: (-69, 138)}  # by itemsize: position of the first, how many


class _Grid(NamedTuple):
    """A block as reduced, kept, reduced and kept axes, in the order of memory."""

    flat: Array
    """All memory from the first element to the last, never writeable: one type to compile for."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements; the last axis longer than 1 has stride 1."""
    order: list[int]
    """Axes longer than 1."""


def partial_norm(x: Array, axes: tuple[int, ...], omit_nan: bool) -> Partial | None:
    """`exact.partial_norm`, or None where that is left to NumPy."""
    if x.nbytes <= LEAST or not (x.flags.aligned and compiled()):
        return None
    if x.dtype.kind == "c":  # pairs of real elements along one more axis
        pairs = as_strided(x.real, (*x.shape, 2), (*x.strides, x.itemsize // 2))
        made = partial_norm(pairs, (*axes, x.ndim), False)
        if made is None or (omit_nan and (made.flags & NAN).any()):
            return None
        return made._replace(limbs=made.limbs[..., 0], flags=made.flags[..., 0])
    shape = tuple(1 if k in axes else n for k, n in enumerate(x.shape))
    parts = []
    for kept in boxes(shape, tile_shape(shape, SLICES)):
        part = x[index(tuple(slice(None) if k in axes else s for k, s in enumerate(kept)))]
        grid = _grid(part, axes)
        if grid is None or grid.shape[2] < SHORT:
            return None
        parts.append((kept, *_sum(grid, part, axes)))
    low = min((first for _, limbs, first, _ in parts if len(limbs)), default=0)
    high = max((first + len(limbs) for _, limbs, first, _ in parts), default=0)
    total, flags = np.zeros((max(high - low, 0), *shape), np.uint32), np.empty(shape, np.uint8)
    for kept, limbs, first, found in parts:
        if len(limbs):
            total[(slice(first - low, first - low + len(limbs)), *kept)] = limbs
        flags[kept] = found & ~np.uint8(NAN) if omit_nan else found
    return Partial(total, low, flags, math.prod(x.shape[k] for k in axes))


def rescale(x: Array, factor: Array, out: Array) -> bool:
    """Multiply by factors of 29 bits, rounding toward zero; False where it is left to NumPy."""
    if x.nbytes <= LEAST or x.dtype != np.float32 or not compiled():
        return False
    factor = factor.reshape((1,) * (x.ndim - factor.ndim) + factor.shape)
    axes = tuple(k for k, n in enumerate(factor.shape) if n == 1)
    grid, target = _grid(x, axes), _grid(out, axes)
    if grid is None or target is None or grid.shape != target.shape or grid.order != target.order:
        return False
    inside = _same_memory(x, out)
    if inside is None:
        return False
    order = [*grid.order, *(k for k in range(x.ndim) if k not in grid.order)]
    factors = np.ascontiguousarray(factor.transpose(order)).reshape(grid.shape[1], grid.shape[3])
    written = as_strided(out, target.flat.shape, target.flat.strides)
    source = None if inside else grid.flat
    compiled()["rescale"](source, written, grid.shape, grid.strides, target.strides, factors)
    return True


def clip_rows(
    x: Array, clip_norm: float, axes: tuple[int, ...], out: Array
) -> tuple[Array, Array, Array] | None:
    """Clip float32 slices that are rows of memory, each while it is in the cache.

    Factors and norms of all slices, and which of them are left to NumPy; None for all.
    """
    kept = x.ndim - len(axes)
    n = math.prod(x.shape[kept:])
    if x.nbytes <= LEAST or not (SHORT <= n <= LONGEST and 2.0**-100 < clip_norm < 2.0**200):
        return None
    rows = sorted(axes) == [*range(kept, x.ndim)] and out.flags.c_contiguous
    inside = _same_memory(x, out)
    if not (rows and x.flags.c_contiguous and x.dtype == np.float32 and inside is not None):
        return None
    grid = _grid(x, axes)
    if grid is None or not compiled():
        return None
    factor, norm = np.empty((2, x.size // n))
    left = np.empty(x.size // n, bool)
    data = (grid.flat, grid.flat.view("u4"), out.reshape(-1), factor, norm, left)
    compiled()["clip_rows"](data, (clip_norm, *math.frexp(clip_norm)), inside or None)
    return factor, norm, left


def _same_memory(x: Array, out: Array) -> bool | None:
    """Whether two arrays are the same memory; None if they only overlap."""
    if x.ctypes.data == out.ctypes.data and x.strides == out.strides:
        return True
    return None if np.may_share_memory(x, out) else False


def _grid(x: Array, axes: tuple[int, ...]) -> _Grid | None:
    plain = x.dtype in (np.float32, np.float64) and x.dtype.isnative and x.flags.aligned
    order = sorted((k for k in range(x.ndim) if x.shape[k] > 1), key=lambda k: -x.strides[k])
    if not (plain and x.size) or any(
        s <= 0 or s % x.itemsize for s in map(x.strides.__getitem__, order)
    ):
        return None
    shape, strides, place, span = [1, 1, 1, 1], [1, 1, 1, 1], 4, 1
    for k in reversed(order):
        n, stride, odd = x.shape[k], x.strides[k] // x.itemsize, k not in axes
        span += (n - 1) * stride
        if place < 4 and place % 2 == odd and stride == shape[place] * strides[place]:
            shape[place] *= n  # goes on where the axis inside ends
            continue
        if place == 4 and stride != 1:
            return None
        place -= 1 if place % 2 != odd else 2
        if place < 0:
            return None
        shape[place], strides[place] = n, stride
    return _Grid(
        as_strided(x, (span,), (x.itemsize,), writeable=False), tuple(shape), tuple(strides), order
    )


def _sum(grid: _Grid, x: Array, axes: tuple[int, ...]) -> tuple[Array, int, Array]:
    """Limbs, position of the first one, and flags, of the shape of ``x`` with axes of size 1."""
    low, count = LIMBS[x.itemsize]
    slices = grid.shape[1] * grid.shape[3]
    sums, flags = np.zeros((slices, count), np.int64), np.zeros(slices, np.uint8)
    used = np.array([count, 0])
    bits, wide = grid.flat.view(f"u{x.itemsize}"), x.itemsize == 8 or None
    compiled()["sums"](grid.flat, bits, grid.shape, grid.strides, (sums, flags, used), wide)
    limbs, first = canonical(sums[:, used[0] : used[1]].T, low + int(used[0]))
    kept = [k for k in grid.order if k not in axes]
    lengths, order = [x.shape[k] for k in kept], np.argsort(kept)
    shape = [1 if k in axes else n for k, n in enumerate(x.shape)]
    moved = limbs.reshape(len(limbs), *lengths).transpose([0, *(order + 1)])
    flags = flags.reshape(lengths).transpose(order).reshape(shape)
    return moved.reshape(len(limbs), *shape), first, flags
