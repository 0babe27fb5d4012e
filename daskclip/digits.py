"""Sums of squares or magnitudes of a matrix as integers, which no order of summation can change.

A float64 with at most 22 significant bits on a known grid is a *digit*: products of two digits add
up in float64 without rounding over 512 terms. Every element is cut into digits on the grid of the
largest one,

    x      = d0 + d1 + ...        d_i a multiple of 2**(top - 22 * (i + 1))
    sum x² = sum of d_i · d_j     by weight i + j, each one an exact integer
    sum x  = sum of d_i           for x that are not negative

A few elements too small for the digits are handed back, to be summed on a grid of their own; for
many of them, all elements get one digit more.
"""

from __future__ import annotations

import math
from itertools import combinations_with_replacement
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from daskclip.blocks import ceil_div

Array = npt.NDArray[Any]

DIGIT = 22
RUN = 512  # terms of one float64 dot product: 2 * DIGIT + log2(RUN) <= 53
PANEL = 1 << 18  # elements of a matrix, at most: 2 * DIGIT + log2(PANEL) < 63, an int64
TILE = 1 << 15  # elements that are cut at a time: their digits stay in the cache
BLAS = 1 << 13  # elements of one call for which BLAS starts no threads of its own
LINES = 64  # of a tile at least, where memory runs across slices
DIGITS = 5  # at most; with 3 the largest element of any dtype fits
FEW = 256  # one element in so many may be handed back
SIGNIFICANT = {2: 11, 4: 24, 8: 53}  # bits of an element, at most, by its size
FAR = 400  # squares of elements beyond 2**±FAR leave float64's range
ONES = np.ones(RUN)


class Magnitudes:
    """Magnitudes of a matrix, as the integers of their bits: those compare fast."""

    def __init__(self, matrix: Array, spare: Array) -> None:
        self.matrix = matrix
        self.dtype = matrix.dtype.newbyteorder("=")
        self.order: Any = "F" if abs(matrix.strides[0]) < abs(matrix.strides[1]) else "C"
        native = np.dtype(f"u{matrix.itemsize}")
        self.bits = spare.view(native)[: matrix.size]
        signed = matrix.view(matrix.dtype.str[0] + native.str[1:])
        np.left_shift(signed, native.type(1), out=self.ordered(self.bits))
        self.top = float((self.bits.max(keepdims=True) >> native.type(1)).view(self.dtype)[0])
        """The largest magnitude; infinity and NaN win."""
        self.bits -= native.type(1)  # now zero is the largest
        self.least = self.bits.min()

    def ordered(self, flat: Array) -> Array:
        """``flat`` in the shape of the matrix and in its order of memory."""
        return flat.reshape(self.matrix.shape, order=self.order)

    def below(self, exponent: int) -> Array | None:
        """Which elements are smaller than ``2**exponent`` and not zero; None if there are none."""
        limit = np.array(math.ldexp(1.0, exponent), self.dtype).view(self.bits.dtype)[()] * 2
        return self.bits < limit - 1 if limit and self.least < limit - 1 else None

    def take(self, small: Array) -> tuple[Array, tuple[Array, ...], Array]:
        """Small elements, where they are, and the matrix without them in the memory of the bits."""
        rest = self.bits.view(self.dtype)
        self.ordered(rest)[...] = self.matrix
        found = np.flatnonzero(small)
        values = rest[found]
        rest[found] = 0
        return values, np.unravel_index(found, self.matrix.shape, self.order), self.ordered(rest)


class Sums(NamedTuple):
    """Sum of every slice, Σ values[p] · 2**units[p], but for ``small`` elements."""

    values: Array
    """int64 of shape (p, slices)."""
    units: list[int]
    """Exponents."""
    small: tuple[Array, Array] | None
    """Elements that are not in the sum, and the numbers of their slices."""


class _Space(NamedTuple):
    """Views of the scratch for tiles of one shape; each row is padded to whole runs."""

    tile: Array
    """The first row, as the tile without padding."""
    rows: list[Array]
    """Each row, flat."""
    split: list[Array]
    """Each row, by slices and runs."""


class Powers:
    """Sums of squares, or of magnitudes, of matrices whose slices are all rows, or all columns.

    Parameters
    ----------
    rows : bool
        Whether slices are rows.
    across : bool
        Whether memory runs across slices, not along them.
    itemsize : int
        Bytes of an element before any conversion to a wider type.
    power : int
        2 for squares, 1 for magnitudes.
    """

    def __init__(self, rows: bool, across: bool, itemsize: int, power: int) -> None:
        self.rows, self.across, self.power = rows, across, power
        self.significant = SIGNIFICANT[itemsize]
        self.spaces: dict[tuple[int, ...], _Space] = {}
        self.scratch = np.empty((DIGITS + 1, TILE + BLAS + RUN))

    def sums(self, magnitudes: Magnitudes) -> Sums:
        """Of a matrix of at most PANEL elements that are finite and not all zero."""
        matrix, small = magnitudes.matrix, None
        e, scaled = math.frexp(magnitudes.top)[1], 0
        for digits in range(ceil_div(self.significant, DIGIT), DIGITS + 1):
            # what is smaller may have bits below the last digit
            below = magnitudes.below(e - DIGIT * digits + self.significant - 1)
            if below is None or FEW * np.count_nonzero(below) <= below.size:
                break
        if below is not None:
            values, places, matrix = magnitudes.take(below)
            small = values, places[0 if self.rows else 1]
        if abs(e) > FAR:
            matrix, scaled, e = np.ldexp(matrix, -e), e, 0
        height, width = matrix.shape
        least = 1 if self.rows and not self.across else LINES
        step = min(width, TILE // min(height, least))
        lines = min(height, TILE // step)
        runs = self.runs(step if self.rows else lines, lines if self.rows else step)
        total = runs * (ceil_div(width, step) if self.rows else ceil_div(height, lines))
        pairs = list(combinations_with_replacement(range(digits), self.power))
        # of every slice the dot products of its runs, for every pair of digits
        dots = np.zeros((len(pairs), *((height, total) if self.rows else (total, width))))
        for i in range(0, height, lines):
            for j in range(0, width, step):
                first, run = (i, j // step) if self.rows else (j, i // lines)
                parts = self.cut_digits(matrix[i : i + lines, j : j + step], e, digits)
                self.multiply(parts, pairs, dots, first, run * runs)
        # of the products of digits i and j; both orders for i < j
        both, n = [pair[0] < pair[-1] for pair in pairs], self.power
        units = [n * e - DIGIT * (sum(p) + n) + twice for p, twice in zip(pairs, both, strict=True)]
        dots *= np.ldexp(1.0, np.subtract(both, units, dtype=np.int32))[:, None, None]
        values = dots.astype(np.int64).sum(axis=2 if self.rows else 1)
        return Sums(values, [u + n * scaled for u in units], small)

    def runs(self, n: int, slices: int) -> int:
        """Dot products of each slice of a tile; columns are summed by one call for a run of all."""
        return ceil_div(n, RUN if self.rows else min(RUN, max(1, BLAS // slices)))

    def space(self, shape: tuple[int, ...]) -> _Space:
        """Scratch for a tile of ``shape``, padded so that its slices are whole runs."""
        if shape not in self.spaces:
            slices, n = shape if self.rows else shape[::-1]
            runs = self.runs(n, slices)
            rows = list(self.scratch[:, : slices * runs * ceil_div(n, runs)])
            padded = rows[0].reshape((slices, -1) if self.rows else (-1, slices))
            split = (slices, runs, -1) if self.rows else (runs, -1, slices)
            self.spaces[shape] = _Space(
                padded[: shape[0], : shape[1]], rows, [row.reshape(split) for row in rows]
            )
        return self.spaces[shape]

    def cut_digits(self, tile: Array, top: int, digits: int) -> list[Array]:
        """The digits of a tile, by slices and runs, and one more row of scratch."""
        space = self.space(tile.shape)
        rest = space.rows[0]
        if rest.size != tile.size:
            rest[:] = 0.0
        space.tile[...] = tile
        if self.power == 1:
            np.abs(rest, out=rest)
        for i in range(1, digits):
            d = space.rows[i]
            # adding 1.5 · 2**(52 + g) rounds to a multiple of 2**g
            magic = math.ldexp(1.5, 52 + top - DIGIT * i)
            np.add(rest, magic, out=d)
            np.subtract(d, magic, out=d)
            np.subtract(rest, d, out=rest)
        return [*space.split[1:digits], space.split[0], space.split[-1]]

    def multiply(
        self, parts: list[Array], pairs: list[tuple[int, ...]], dots: Array, first: int, run: int
    ) -> None:
        """Dot products of the digits of a tile, whose place in ``dots`` is given."""
        for pair, out in zip(pairs, dots, strict=True):
            a, b = parts[pair[0]], parts[pair[-1]]
            if self.rows:
                b = b if self.power == 2 else ONES[: a.shape[2]]
                np.vecdot(a, b, out=out[first : first + len(a), run : run + a.shape[1]])
            else:
                products = np.multiply(a, b, out=parts[-1]) if self.power == 2 else a
                columns = slice(first, first + a.shape[2])
                np.matmul(ONES[: a.shape[1]], products, out=out[run : run + len(a), columns])
