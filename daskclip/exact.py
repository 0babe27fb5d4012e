"""Exact sums of squares per slice, so that no order of summation can change a bit.

A float64 with at most 22 significant bits on a known grid is a *digit*: products of two digits add
up in float64 without rounding over 512 terms. Every element of a panel is cut into digits on the
grid of the panel's largest element,

    x      = d0 + d1 + ...        d_i a multiple of 2**(top - 22 * (i + 1))
    sum x² = sum of d_i · d_j     by weight i + j, each one an exact integer

and the integers go into limbs of 32 bits, one number per slice. Elements too small for the digits
of their panel are set aside and summed later on a grid of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from daskclip.blocks import Box, box_shape, boxes, ceil_div, index, tile_shape, tiles

Array = npt.NDArray[Any]

DIGIT = 22
RUN = 512  # terms of one float64 dot product: 2 * DIGIT + log2(RUN) <= 53
TILE = 1 << 13  # elements; five float64 tiles stay in the second-level cache
COLUMNS = 128  # columns of a tile at least: whole cache lines of its rows
PANEL = 1 << 18  # elements that share one grid: 2 * DIGIT + log2(PANEL) < 63, an int64
LIMB = 32
MASK = np.int64(2**LIMB - 1)
FAR = 400  # squares of elements beyond 2**±FAR leave float64's range

NAN, INF = 1, 2


class Partial(NamedTuple):
    """Exact sum of squares of every slice of a block, or of several blocks.

    Equal sums have equal fields: leading and trailing limbs that are zero in all slices are cut.
    """

    limbs: Array
    """uint32 of shape (k, *kept): the sum is Σ limbs[i] · 2**(32 · (low + i))."""
    low: int
    """Position of the first limb."""
    flags: Array
    """uint8 of shape kept: NAN and INF, for what was met; neither is in the sum."""
    terms: int
    """Squares per slice (two for a complex element)."""


def partial_norm(x: Array, axes: tuple[int, ...], *, omit_nan: bool = False) -> Partial:
    """Exact sum of squares of ``x`` over ``axes``.

    Parameters
    ----------
    x : ndarray
        Floating point or complex.
    axes : tuple of int
        Axes to reduce, not negative, without repetition.
    omit_nan : bool
        NaN elements do not count and set no flag.

    Returns
    -------
    Partial
        Reduced axes have size 1.

    Notes
    -----
    Holds some 1 MB of scratch and, per slice, 8 bytes for each limb in use: 4 to 6 limbs for
    data of ordinary spread, at most 20 for float32 and 136 for float64.

    Examples
    --------
    >>> partial_norm(np.float32([[3, 4]]), (1,)).limbs.tolist()
    [[[25]]]
    """
    if x.dtype.kind == "c":
        if omit_nan and np.isnan(x).any():
            x = np.where(np.isnan(x), 0, x)
        return combine([partial_norm(x.real, axes), partial_norm(x.imag, axes)])
    total = _Accumulator(x, axes)
    with np.errstate(all="ignore"):
        if x.size:
            total.add_block(x, omit_nan)
        limbs, low = _canonical(total.sums, total.low)
    kept = tuple(1 if k in axes else n for k, n in enumerate(x.shape))
    terms = math.prod(x.shape[k] for k in axes)
    return Partial(limbs.reshape(len(limbs), *kept), low, total.flags.reshape(kept), terms)


def combine(parts: Sequence[Partial]) -> Partial:
    """Sum of several partials of the same kept shape, in any order and grouping.

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
        return Partial(parts[0].limbs, 0, flags, terms)
    low = min(p.low for p in full)
    sums = np.zeros((max(p.low + len(p.limbs) for p in full) - low, *flags.shape), np.int64)
    for p in full:
        sums[p.low - low : p.low - low + len(p.limbs)] += p.limbs
    limbs, low = _canonical(sums, low)
    return Partial(limbs, low, flags, terms)


def combine_all(parts: Sequence[Partial]) -> Partial:
    """Sum over all slices of several partials, as one slice of shape ().

    Examples
    --------
    >>> combine_all([partial_norm(np.float32([[3], [4]]), (1,))]).limbs.tolist()
    [25]
    """
    single = [Partial(np.zeros((0,), np.uint32), 0, np.zeros((), np.uint8), 0)]
    for p in parts:
        flags = np.bitwise_or.reduce(p.flags, axis=None)
        limbs = p.limbs.sum(axis=tuple(range(1, p.limbs.ndim)), dtype=np.int64)
        sums, low = _canonical(limbs, p.low)
        single.append(Partial(sums, low, np.asarray(flags, np.uint8), p.terms * p.flags.size))
    return combine(single)


def _canonical(sums: Array, low: int) -> tuple[Array, int]:
    """Carry, then cut the limbs that are zero in every slice."""
    shape = sums.shape[1:]
    flat = sums.reshape(len(sums), math.prod(shape))
    limbs = np.empty((len(sums) + 2, flat.shape[1]), np.uint32)
    for start in range(0, flat.shape[1], TILE):
        part = slice(start, start + TILE)
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


def _magnitude(x: Array) -> float:
    """Largest magnitude; infinity and NaN win. By bits, since float16 compares slowly."""
    native = np.dtype(f"u{x.dtype.itemsize}")
    bits = x.view(x.dtype.str[0] + native.str[1:])
    top = (bits & native.type(np.iinfo(native).max // 2)).max()
    return float(np.array(top, native).view(x.dtype.newbyteorder("="))[()])


class _Accumulator:
    """Running sums of one block: int64 limbs with room for carries, in a window that grows."""

    def __init__(self, x: Array, axes: tuple[int, ...]) -> None:
        kept = [k for k in range(x.ndim) if k not in axes]
        self.shape = tuple(x.shape[k] for k in kept)
        self.sums: Array = np.zeros((0, *self.shape), np.int64)
        self.low = 0
        self.flags: Array = np.zeros(self.shape, np.uint8)
        self.aside: list[tuple[Array, Array]] = []
        slices = math.prod(self.shape)
        fastest = min(range(x.ndim), key=lambda k: (x.shape[k] == 1, abs(x.strides[k])), default=0)
        # slices lie along the rows or the columns of a tile, whichever reads memory in order
        self.rows = slices < 16 or (fastest in axes and x.size >= 16 * slices)
        self.order = [*kept, *sorted(axes)] if self.rows else [*sorted(axes), *kept]
        self.cut = len(kept) if self.rows else len(axes)
        digits = 4 if x.dtype.itemsize == 8 else 2
        self.pairs = [(i, j) for i in range(digits) for j in range(i, digits)]
        self.scratch = np.empty((digits + 1, TILE + 2 * TILE // RUN + RUN))

    def add_block(self, x: Array, omit_nan: bool = False) -> None:
        view = x.transpose(self.order)
        for where in self.panels(view.shape):
            at = where[: self.cut] if self.rows else where[self.cut :]
            panel = view[index(where)]
            before, after = math.prod(panel.shape[: self.cut]), math.prod(panel.shape[self.cut :])
            matrix = panel.reshape(before, after)
            top = _magnitude(matrix)
            if not math.isfinite(top):
                matrix = matrix.astype(np.float64)
                self.flag(np.isnan(matrix), np.isinf(matrix), at, omit_nan)
                np.nan_to_num(matrix, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
                top = _magnitude(matrix)
            if top:
                self.add_panel(matrix, top, at)
            if sum(len(values) for values, _ in self.aside) > PANEL:
                self.add_aside()
        self.add_aside()

    def panels(self, shape: tuple[int, ...]) -> Iterator[Box]:
        """Boxes of at most PANEL elements; columns stay tall, so that sums are few."""
        if self.rows:
            return tiles(shape, PANEL)
        wide = min(PANEL, max(COLUMNS, PANEL // math.prod(shape[: self.cut])))
        kept = tile_shape(shape[self.cut :], wide)
        return boxes(shape, (*tile_shape(shape[: self.cut], PANEL // math.prod(kept)), *kept))

    def flag(self, nan: Array, infinite: Array, at: Box, omit_nan: bool) -> None:
        over = 1 if self.rows else 0
        found = infinite.any(axis=over) * np.uint8(INF)
        if not omit_nan:
            found |= nan.any(axis=over) * np.uint8(NAN)
        self.flags[at] |= found.reshape(box_shape(at))

    def add_panel(self, matrix: Array, top: float, at: Box) -> None:
        e, scaled = math.frexp(top)[1], 0
        if abs(e) > FAR:
            near = np.ldexp(matrix, -e)
            if (lost := np.ldexp(near, e) != matrix).any():
                self.set_aside(matrix[lost], np.nonzero(lost), 0, at)
                near[lost] = 0.0
            matrix, scaled, e = near, e, 0
        # of the products of digits i and j; both orders for i < j
        units = [2 * e - DIGIT * (i + j + 2) + (i < j) for i, j in self.pairs]
        pairs = zip(self.pairs, units, strict=True)
        scale = np.array([math.ldexp(1.0 + (i < j), -u) for (i, j), u in pairs])
        height, width = matrix.shape
        step = min(width, TILE if self.rows else max(COLUMNS, TILE // height))
        lines = max(1, TILE // step)
        sums = np.zeros((len(units), height if self.rows else width), np.int64)
        for i in range(0, height, lines):
            for j in range(0, width, step):
                tile = matrix[i : i + lines, j : j + step]
                flat, digits = self.digits(tile, e)
                whole = flat == digits[-1]
                first = i if self.rows else j
                if not whole.all():
                    for d in digits:
                        d[~whole] = 0.0
                    small = np.nonzero(~self.unpadded(whole, tile))
                    self.set_aside(np.ldexp(tile[small], scaled), small, first, at)
                part = self.products(digits, tile.shape, scale)
                sums[:, first : first + part.shape[1]] += part
        sums = sums.reshape(len(units), *box_shape(at))
        self.add_integers(sums, [u + 2 * scaled for u in units], at)

    def unpadded(self, flat: Array, tile: Array) -> Array:
        """View of a padded scratch row as the matrix ``tile`` that was put there."""
        if self.rows:
            return flat.reshape(len(tile), -1)[:, : tile.shape[1]]
        return flat.reshape(-1, tile.shape[1])[: len(tile)]

    def digits(self, tile: Array, top: int) -> tuple[Array, list[Array]]:
        """Cut a matrix into digits; the first result is what the last of them should equal."""
        slices, n = tile.shape if self.rows else tile.shape[::-1]
        runs = ceil_div(n, RUN)
        flat, *digits = self.scratch[:, : slices * runs * ceil_div(n, runs)]
        if flat.size != tile.size:
            flat[:] = 0.0
        self.unpadded(flat, tile)[...] = tile
        for i, d in enumerate(digits):
            if i:
                np.subtract(flat, digits[i - 1], out=flat)
            # adding 1.5 · 2**(52 + g) rounds to a multiple of 2**g
            magic = math.ldexp(1.5, 52 + top - DIGIT * (i + 1))
            np.add(flat, magic, out=d)
            np.subtract(d, magic, out=d)
        return flat, digits

    def products(self, digits: list[Array], shape: tuple[int, ...], scale: Array) -> Array:
        """Scaled sums of the products of two digits, int64 of shape (pairs, slices)."""
        slices, n = shape if self.rows else shape[::-1]
        runs = ceil_div(n, RUN)
        dots = np.empty((len(scale), slices, runs) if self.rows else (len(scale), runs, slices))
        split = [d.reshape((slices, runs, -1) if self.rows else (runs, -1, slices)) for d in digits]
        for (i, j), out in zip(self.pairs, dots, strict=True):
            if self.rows:
                np.vecdot(split[i], split[j], out=out)
            else:
                np.einsum("rns,rns->rs", split[i], split[j], out=out)
        dots *= scale[:, None, None]
        sums: Array = dots.astype(np.int64).sum(axis=2 if self.rows else 1)
        return sums

    def set_aside(self, values: Array, small: tuple[Array, ...], first: int, at: Box) -> None:
        """Keep elements of a matrix, whose slices begin with ``first`` of the panel, for later."""
        numbers: Array = np.zeros((), np.int64)
        for s, n in zip(at, self.shape, strict=True):
            numbers = numbers[..., None] * n + np.arange(s.start, s.stop)
        self.aside.append((values, numbers.reshape(-1)[first + small[0 if self.rows else 1]]))

    def add_aside(self) -> None:
        while self.aside:
            values, numbers = map(np.concatenate, zip(*self.aside, strict=True))
            self.aside.clear()
            each = _Accumulator(values, ())
            each.add_block(values)
            self.cover(each.low, each.low + len(each.sums))
            flat = self.sums.reshape(len(self.sums), -1)
            for i, limb in enumerate(each.sums, each.low - self.low):
                np.add.at(flat[i], numbers, limb)

    def add_integers(self, values: Array, units: list[int], at: Box) -> None:
        """Add ``values[p] * 2**units[p]`` for every p."""
        place, shift = np.divmod(units, LIMB)
        self.cover(int(place.min()), int(place.max()) + 3)
        by = shift.reshape((-1,) + (1,) * (values.ndim - 1))
        low = (values & MASK).astype(np.uint64) << by.astype(np.uint64)
        high = (values >> LIMB) << by
        limbs = (
            (low & np.uint64(MASK)).astype(np.int64),
            (low >> np.uint64(LIMB)).astype(np.int64) + (high & MASK),
            high >> LIMB,
        )
        for i, limb in enumerate(limbs):
            for p, k in zip(place - self.low + i, limb, strict=True):
                self.sums[(p, *at)] += k

    def cover(self, first: int, stop: int) -> None:
        """Make the window hold the limbs from ``first`` up to ``stop``."""
        if not len(self.sums):
            self.low = first
        below, above = max(0, self.low - first), max(0, stop - self.low - len(self.sums))
        if below or above:
            self.sums = np.pad(self.sums, [(below, above)] + [(0, 0)] * (self.sums.ndim - 1))
            self.low -= below
