"""Exact sums over the slices of blocks, as numbers of 32-bit limbs, and adding them up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from daskclip.errors import MemoryBudgetError
from daskclip.grid import box_index, box_shape, boxes, ceil_div, tile_shape
from daskclip.numerics.compiled import FORMATS, Array, Block, real_dtype

LIMB = 32
MASK = np.int64(2**LIMB - 1)
NAN, INF = 1, 2
SCRATCH = 1 << 18  # bytes of limbs that the kernel fills at a time
SLICES = 1 << 13  # that are added up at a time


class Order(NamedTuple):
    """How the norm of a slice is made of the magnitudes of its elements."""

    power: int
    """The norm to this power is a sum, or the largest, of magnitudes to this power."""
    largest: bool
    """Whether the largest one is taken, and not the sum."""
    error_gain: Callable[[int], float]
    """How far an error of 1 in each of so many elements can move the norm."""


ORDERS = {
    1.0: Order(1, False, float),
    2.0: Order(2, False, math.sqrt),
    math.inf: Order(1, True, lambda terms: 1.0),
}
"""Supported vector norms, by ``ord``."""


class Partial(NamedTuple):
    """Exact sum of every slice of a block, or of several blocks, that its norm is made from.

    See `Order`: of squares, of magnitudes, or the largest magnitude for the order inf.

    Equal sums have equal fields: leading and trailing limbs that are zero in all slices are cut.
    """

    limbs: Array
    """uint32 of shape (k, *kept): the sum is Σ limbs[i] · 2**(32 · (low + i))."""
    low: int
    """Position of the first limb."""
    flags: Array
    """uint8 of shape kept: NAN and INF, for what was met; neither is in the sum."""
    terms: int
    """Elements per slice (two for a complex one)."""
    ord: float = 2
    """Key of `ORDERS`."""


def partial_norm(
    x: Array, axes: tuple[int, ...], *, omit_nan: bool = False, ord: float = 2, max_nbytes: int = 0
) -> Partial:
    """Exact sum over ``axes`` of ``x`` that its norm is made from.

    Parameters
    ----------
    x : ndarray
        Floating point or complex.
    axes : tuple of int
        Axes to reduce, not negative, without repetition.
    omit_nan : bool
        NaN elements do not count and set no flag.
    ord : float
        Key of `ORDERS`; complex arrays have 2 only.
    max_nbytes : int
        Bytes that the sum of a slice may take; 0 for any number.

    Returns
    -------
    Partial
        Reduced axes have size 1.

    Raises
    ------
    MemoryBudgetError
        If a sum takes more than ``max_nbytes`` bytes.

    Notes
    -----
    Holds up to 2 MB of scratch and twice the result, which has 4 bytes a slice for each limb in
    use: 4 to 6 limbs for data of ordinary spread, at most 20 for float32 and 136 for float64.

    Examples
    --------
    >>> partial_norm(np.float32([[3, 4]]), (1,)).limbs.tolist()
    [[[25]]]
    """
    kept = tuple(1 if k in axes else n for k, n in enumerate(x.shape))
    terms = math.prod(x.shape[k] for k in axes) * (2 if x.dtype.kind == "c" else 1)
    flags = np.zeros(kept, np.uint8)
    first, count = FORMATS[real_dtype(x.dtype).name][3:]
    step = tile_shape(kept, SCRATCH // (4 * count))
    filled, found = np.zeros((count, math.prod(step)), np.uint32), np.empty(step, np.uint8)
    block, parts = Block(x.dtype, limbs=filled, flags=found), []
    for box in boxes(kept, step) if x.size else ():
        over = tuple(slice(None) if k in axes else s for k, s in enumerate(box))
        shape = box_shape(box)
        block.describe(x[box_index(over)], shape)
        sum_slices(block, x.dtype, ord, omit_nan)
        slices = math.prod(shape)
        flags[box] = found.reshape(-1)[:slices].reshape(shape)
        low, stop = block.used
        if low < stop:
            _checked(stop - low, max_nbytes)
            some = filled.reshape(-1)[low * slices : stop * slices]
            parts.append((box, first + low, some.copy().reshape(-1, *shape)))
            some[:] = 0
    if len(parts) == 1 and parts[0][2].shape[1:] == kept:
        return Partial(parts[0][2], parts[0][1], flags, terms, ord)
    low = min((low for _, low, _ in parts), default=0)
    count = max((start - low + len(limbs) for _, start, limbs in parts), default=0)
    total = np.zeros((_checked(count, max_nbytes), *kept), np.uint32)
    for box, start, limbs in parts:
        total[(slice(start - low, start - low + len(limbs)), *box)] = limbs
    return Partial(total, low, flags, terms, ord)


def sum_slices(block: Block, dtype: np.dtype[Any], ord: float, omit_nan: bool) -> None:
    """Run the kernel on an array that ``block`` describes."""
    block.power, block.largest, _ = ORDERS[ord]
    block.omit = omit_nan
    block.paired = omit_nan and dtype.kind == "c"
    block.run("sum_slices")


def combine(parts: Sequence[Partial], max_nbytes: int = 0) -> Partial:
    """Sum of several partials of the same kept shape, in any order and grouping.

    Sums of more than ``max_nbytes`` bytes a slice are refused, unless it is 0.

    Notes
    -----
    Holds the result and 1 MB beside the parts.

    Examples
    --------
    >>> x = np.float32([3, 4, 12])
    >>> combine([partial_norm(x[:1], (0,)), partial_norm(x[1:], (0,))]).limbs.tolist()
    [[169]]
    """
    if len(parts) == 1:
        return parts[0]
    flags = np.bitwise_or.reduce([p.flags for p in parts])
    terms = sum(p.terms for p in parts)
    full = [p for p in parts if len(p.limbs)]
    if not full:
        return parts[0]._replace(flags=flags, terms=terms)
    low, ord = min(p.low for p in full), parts[0].ord
    count = _checked(max(p.low + len(p.limbs) for p in full) - low, max_nbytes)
    limbs = np.empty((count + 1, flags.size), np.uint32)
    for start in range(0, flags.size, SLICES):
        some = slice(start, start + SLICES)
        sums = np.zeros((count, limbs[0, some].size), np.int64)
        for p in full:
            place = slice(p.low - low, p.low - low + len(p.limbs))
            added = p.limbs.reshape(len(p.limbs), -1)[:, some]
            if not ORDERS[ord].largest:
                sums[place] += added
                continue
            other = np.zeros_like(sums)
            other[place] = added
            _take_larger(sums, other)
        _carry(sums, limbs[:, some])
    limbs, low = _trimmed(limbs.reshape(-1, *flags.shape), low)
    return Partial(limbs, low, flags, terms, ord)


def combine_all(parts: Sequence[Partial]) -> Partial:
    """Sum over all slices of several partials, as one slice of shape ().

    Examples
    --------
    >>> combine_all([partial_norm(np.float32([[3], [4]]), (1,))]).limbs.tolist()
    [25]
    """
    single = [Partial(np.zeros((0,), np.uint32), 0, np.zeros((), np.uint8), 0)]
    for p in parts:
        sums = p.limbs.sum(axis=tuple(range(1, p.limbs.ndim)), dtype=np.int64)
        carried = np.empty(len(sums) + 2, np.uint32)
        _carry(sums, carried)
        limbs, low = _trimmed(carried, p.low)
        flags = np.bitwise_or.reduce(p.flags, axis=None, dtype=np.uint8)
        single.append(Partial(limbs, low, np.asarray(flags), p.terms * p.flags.size))
    return combine(single)


def nan_if_infinite(partial: Partial) -> Partial:
    """Infinite slices count as NaN, as they do for a global norm."""
    return partial._replace(flags=np.where(partial.flags != 0, np.uint8(NAN), partial.flags))


def _take_larger(limbs: Array, other: Array) -> None:
    """Replace the numbers that are smaller than the others."""
    differ = limbs != other
    top = len(limbs) - 1 - differ[::-1].argmax(axis=0, keepdims=True)  # the first that differs
    larger = np.take_along_axis(other, top, 0) > np.take_along_axis(limbs, top, 0)
    np.copyto(limbs, other, where=larger)


def _checked(limbs: int, max_nbytes: int) -> int:
    """Number of limbs, if they take no more bytes than may be."""
    if max_nbytes and 4 * limbs > max_nbytes:
        raise MemoryBudgetError(
            f"exact sums of values of this spread take {4 * limbs} bytes a slice, and the memory "
            f"budget allows {max_nbytes}; give {ceil_div(4 * limbs, max_nbytes)} times the memory"
        )
    return limbs


def _carry(sums: Array, limbs: Array) -> None:
    """Turn sums of limbs, which are not negative, into limbs; there are more of those."""
    carry: Any = 0
    for i in range(len(limbs)):
        carry = carry + (sums[i] if i < len(sums) else 0)
        limbs[i] = carry & MASK
        carry = carry >> LIMB


def _trimmed(limbs: Array, low: int) -> tuple[Array, int]:
    """Cut the first and last limbs that are zero in every slice."""
    used = np.flatnonzero(limbs.reshape(len(limbs), -1).any(axis=1))
    if not used.size:
        return limbs[:0], 0
    return limbs[used[0] : used[-1] + 1], low + int(used[0])
