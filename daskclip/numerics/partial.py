"""Exact sums over the slices of blocks, as numbers of 32-bit limbs, and their addition."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from daskclip.errors import MemoryBudgetError
from daskclip.grid import Box, box_index, box_shape, boxes, tile_shape
from daskclip.numerics.compiled import Array, Block, DType, format_of

LIMB = 32  # bits
TERMS = 63  # bits of the number of elements of any array
NAN, INF = 1, 2  # and 4 for NaN that is omitted, which the kernel sets and reads
NONFINITE = NAN | INF
SCRATCH = 1 << 18  # bytes of limbs that the kernel fills at a time
SLICES = 1 << 13  # slices that are added at a time: 1 MB of limbs

Limbs = npt.NDArray[np.uint32]
Sums = npt.NDArray[np.int64]


class Order(NamedTuple):
    """Norm of a slice by the magnitudes of its elements: a sum of powers, or the largest."""

    power: int
    """Power of the magnitudes that is summed; the norm is the root of the sum."""
    largest: bool
    """Whether the largest magnitude is taken instead of a sum."""
    error_gain: Callable[[int], float]
    """Largest change of the norm if each of ``n`` elements changes by at most 1, by ``n``."""


ORDERS = {
    1.0: Order(1, False, float),
    2.0: Order(2, False, math.sqrt),
    math.inf: Order(1, True, lambda terms: 1.0),
}
"""Supported vector norms, by ``ord``."""


class Partial(NamedTuple):
    """Exact sums of the slices of one or several blocks, from which their norms are computed.

    They are sums of squares for ord 2 and of magnitudes for ord 1; for ord inf, they are the
    largest magnitudes. Equal sums have equal fields: leading and trailing limbs that are zero in
    all slices are cut.
    """

    limbs: Limbs
    """Limbs of shape (k, *kept): the sum is Σ limbs[i] · 2**(32 · (low + i))."""
    low: int
    """Position of the first limb."""
    flags: npt.NDArray[np.uint8]
    """Flags of shape kept: NAN and INF where such elements occur; the sum leaves them out. Another
    one says that NaN is omitted."""
    terms: int
    """Elements per slice; complex ones count twice."""
    ord: float = 2
    """Key of `ORDERS`."""

    def reshape(self, kept: tuple[int, ...]) -> Partial:
        """Return the same sums for another form of the kept shape."""
        limbs = self.limbs.reshape(len(self.limbs), *kept)
        return self._replace(limbs=limbs, flags=self.flags.reshape(kept))

    def part(self, box: Box) -> Partial:
        """Return the sums of a part of the kept positions."""
        inside = box_index(box)
        return self._replace(limbs=self.limbs[(slice(None), *inside)], flags=self.flags[inside])


def kept_shape(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    """Shape of the norms of an array: 1 along reduced axes."""
    return tuple(1 if axis in axes else n for axis, n in enumerate(shape))


def term_count(shape: Sequence[int], axes: Sequence[int], dtype: DType) -> int:
    """Number of terms that each slice of an array has: two for a complex element."""
    return math.prod(shape[axis] for axis in axes) * (2 if dtype.kind == "c" else 1)


def state_nbytes(dtype: DType) -> int:
    """Bytes that the exact sum of a slice takes at most, for values of any spread.

    Examples
    --------
    >>> [state_nbytes(np.dtype(name)) for name in ("float16", "float32", "complex128")]
    [20, 80, 536]
    """
    _, digits, lowest, *_ = format_of(dtype)
    highest = 3 - lowest - digits  # in every IEEE 754 format values lie below 2**highest
    # squares are multiples of 2**(2 * lowest), and their sums below 2**(2 * highest + TERMS)
    return 4 * ((2 * highest + TERMS - 1) // LIMB - 2 * lowest // LIMB + 1)


def partial_norm(
    x: Array, axes: tuple[int, ...], *, omit_nan: bool = False, ord: float = 2, max_nbytes: int = 0
) -> Partial:
    """Exact sums of ``x`` over ``axes``, from which norms are computed.

    Parameters
    ----------
    x : ndarray
        Floating point or complex elements.
    axes : tuple of int
        Axes to reduce, not negative, without repetition.
    omit_nan : bool
        Leave out NaN elements, and set no flag for them.
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
    use: 4 to 6 limbs for data of ordinary spread, `state_nbytes` at most.

    Examples
    --------
    >>> partial_norm(np.float32([[3, 4]]), (1,)).limbs.tolist()
    [[[25]]]
    """
    kept, (*_, first, count) = kept_shape(x.shape, axes), format_of(x.dtype)
    step = tile_shape(kept, SCRATCH // (4 * count))
    filled = np.zeros(count * math.prod(step), np.uint32)
    found = np.empty(math.prod(step), np.uint8)
    flags, parts = np.zeros(kept, np.uint8), []
    block = Block(x.dtype, limbs=filled, flags=found)
    for box in boxes(kept, step) if x.size else ():
        shape = box_shape(box)
        slices = math.prod(shape)
        region = tuple(slice(None) if k in axes else s for k, s in enumerate(box))
        block.describe(x[box_index(region)], shape)
        sum_slices(block, x.dtype, ord, omit_nan)
        flags[box] = found[:slices].reshape(shape)
        low, stop = block.used
        if low < stop:
            # before the copy: values of all exponents take 25 times the limbs of ordinary ones
            _require_room(stop - low, max_nbytes)
            some = filled[low * slices : stop * slices]
            parts.append((box, first + low, some.copy().reshape(-1, *shape)))
            some[:] = 0  # faster than pages of new zeros
    # boxes with other exponents have other limbs
    low = min((low for _, low, _ in parts), default=0)
    count = max((start - low + len(limbs) for _, start, limbs in parts), default=0)
    _require_room(count, max_nbytes)
    total = np.zeros((count, *kept), np.uint32)
    for box, start, limbs in parts:
        total[(slice(start - low, start - low + len(limbs)), *box)] = limbs
    return Partial(total, low, flags, term_count(x.shape, axes, x.dtype), ord)


def sum_slices(block: Block, dtype: DType, ord: float, omit_nan: bool) -> None:
    """Run the kernel on an array that ``block`` describes."""
    block.power, block.largest, _ = ORDERS[ord]
    block.omit = omit_nan
    block.paired = omit_nan and dtype.kind == "c"
    block.run("sum_slices")


def combine(parts: Sequence[Partial], max_nbytes: int = 0) -> Partial:
    """Sum of several partials of the same kept shape, the same for any order and grouping.

    If a sum takes more than ``max_nbytes`` bytes a slice, MemoryBudgetError is raised; 0 allows
    any number.

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
    # the position of sums that are all zero says nothing
    full, ord = [p for p in parts if len(p.limbs)], parts[0].ord
    low = min((p.low for p in full), default=0)
    count = max((p.low + len(p.limbs) - low for p in full), default=0)
    _require_room(count, max_nbytes)
    limbs = np.empty((count + 1, flags.size), np.uint32)
    for start in range(0, flags.size, SLICES):
        some = slice(start, start + SLICES)
        # int64 has room for 2**31 limbs, and the last row for what is carried
        sums = np.zeros((count + 1, limbs[0, some].size), np.int64)
        for p in full:
            rows = slice(p.low - low, p.low - low + len(p.limbs))
            added = p.limbs.reshape(len(p.limbs), -1)[:, some]
            if ORDERS[ord].largest:
                other = np.zeros_like(sums)
                other[rows] = added
                _take_larger(sums, other)
            else:
                sums[rows] += added
        _carry(sums)
        limbs[:, some] = sums
    limbs, low = _without_zeros(limbs.reshape(count + 1, *flags.shape), low)
    return Partial(limbs, low, flags, terms, ord)


def no_sums(kept: tuple[int, ...]) -> Partial:
    """Sums of no elements, for a kept shape: 0 each."""
    return Partial(np.zeros((0, *kept), np.uint32), 0, np.zeros(kept, np.uint8), 0)


def nan_if_infinite(partial: Partial) -> Partial:
    """Turn the flag INF into NAN: the factor of several arrays with an infinite norm is NaN."""
    flags = np.where(partial.flags & NONFINITE, np.uint8(NAN), partial.flags)
    return partial._replace(flags=flags)


def _require_room(limbs: int, max_nbytes: int) -> None:
    """Refuse sums of more limbs than the memory budget has room for."""
    if max_nbytes and 4 * limbs > max_nbytes:
        raise MemoryBudgetError(
            f"exact sums of values of this spread take {4 * limbs} bytes a slice, and the plan "
            f"allows {max_nbytes}; plan for more"
        )


def _take_larger(sums: Sums, other: Sums) -> None:
    """Replace each number in ``sums`` by the one in ``other`` if that is larger."""
    differ = sums != other
    top = len(sums) - 1 - differ[::-1].argmax(axis=0, keepdims=True)  # highest limb that differs
    larger = np.take_along_axis(other, top, 0) > np.take_along_axis(sums, top, 0)
    np.copyto(sums, other, where=larger)


def _carry(sums: Sums) -> None:
    """Carry sums of limbs, so that each fits into a limb again."""
    for i in range(len(sums) - 1):
        sums[i + 1] += sums[i] >> LIMB
        sums[i] &= (1 << LIMB) - 1


def _without_zeros(limbs: Limbs, low: int) -> tuple[Limbs, int]:
    """Cut the first and last limbs that are zero in every slice."""
    used = np.flatnonzero(limbs.reshape(len(limbs), -1).any(axis=1))
    if not used.size:
        return limbs[:0], 0
    return limbs[used[0] : used[-1] + 1], low + int(used[0])
