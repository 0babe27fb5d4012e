"""Exact sums as numbers of 32-bit limbs, and adding them up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from daskclip.orders import ORDERS

Array = npt.NDArray[Any]

LIMB = 32
MASK = np.int64(2**LIMB - 1)
NAN, INF = 1, 2
SLICES = 1 << 13  # that are worked on at a time


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


def combine(parts: Sequence[Partial]) -> Partial:
    """Sum of several partials of the same kept shape, in any order and grouping.

    Examples
    --------
    >>> from daskclip.exact import partial_norm
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
    low = min(p.low for p in full)
    ord = parts[0].ord
    sums = np.zeros((max(p.low + len(p.limbs) for p in full) - low, *flags.shape), np.int64)
    for p in full:
        place = slice(p.low - low, p.low - low + len(p.limbs))
        if not ORDERS[ord].largest:
            sums[place] += p.limbs
            continue
        other = np.zeros_like(sums)
        other[place] = p.limbs
        _take_larger(sums, other)
    limbs, low = canonical(sums, low)
    return Partial(limbs, low, flags, terms, ord)


def _take_larger(limbs: Array, other: Array) -> None:
    """Replace the numbers that are smaller than the others."""
    differ = limbs != other
    top = len(limbs) - 1 - differ[::-1].argmax(axis=0, keepdims=True)  # the first that differs
    larger = np.take_along_axis(other, top, 0) > np.take_along_axis(limbs, top, 0)
    np.copyto(limbs, other, where=larger)


def combine_all(parts: Sequence[Partial]) -> Partial:
    """Sum of squares over all slices of several partials, as one slice of shape ().

    Examples
    --------
    >>> from daskclip.exact import partial_norm
    >>> combine_all([partial_norm(np.float32([[3], [4]]), (1,))]).limbs.tolist()
    [25]
    """
    single = [Partial(np.zeros((0,), np.uint32), 0, np.zeros((), np.uint8), 0)]
    for p in parts:
        flags = np.bitwise_or.reduce(p.flags, axis=None)
        limbs = p.limbs.sum(axis=tuple(range(1, p.limbs.ndim)), dtype=np.int64)
        sums, low = canonical(limbs, p.low)
        single.append(Partial(sums, low, np.asarray(flags, np.uint8), p.terms * p.flags.size))
    return combine(single)


def canonical(sums: Array, low: int) -> tuple[Array, int]:
    """Carry, then cut the limbs that are zero in every slice."""
    shape = sums.shape[1:]
    flat = sums.reshape(len(sums), math.prod(shape))
    limbs = np.empty((len(sums) + 2, flat.shape[1]), np.uint32)
    for start in range(0, flat.shape[1], SLICES):
        part = slice(start, start + SLICES)
        carry: Any = 0
        for i in range(len(limbs)):
            if i < len(sums):
                carry = flat[i, part] + carry
            limbs[i, part] = carry & MASK
            carry = carry >> LIMB
    used = np.flatnonzero(limbs.any(axis=1))
    if not used.size:
        return np.zeros((0, *shape), np.uint32), 0
    # a copy, so that no more than what is left stays in memory
    kept = limbs[used[0] : used[-1] + 1].copy()
    return kept.reshape(len(kept), *shape), low + int(used[0])
