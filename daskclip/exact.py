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
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from daskclip.blocks import Box, box_shape, boxes, ceil_div, index, tile_shape, tiles
from daskclip.partials import INF, LIMB, MASK, NAN, Partial, canonical, combine

Array = npt.NDArray[Any]

DIGIT = 22
RUN = 512  # terms of one float64 dot product: 2 * DIGIT + log2(RUN) <= 53
TILE = 1 << 14  # elements; what is worked on at a time stays in the second-level cache
SHORT = 16  # elements of a slice below which many slices go side by side
COLUMNS = 64  # columns of a tile at least: whole cache lines of its rows
PANEL = 1 << 18  # elements that share one grid: 2 * DIGIT + log2(PANEL) < 63, an int64
FAR = 400  # squares of elements beyond 2**±FAR leave float64's range


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
        limbs, low = canonical(total.sums, total.low)
    kept = tuple(1 if k in axes else n for k, n in enumerate(x.shape))
    terms = math.prod(x.shape[k] for k in axes)
    return Partial(limbs.reshape(len(limbs), *kept), low, total.flags.reshape(kept), terms)


def _magnitude(x: Array) -> float:
    """Largest magnitude; infinity and NaN win. By bits, since float16 compares slowly."""
    native = np.dtype(f"u{x.dtype.itemsize}")
    bits = x.view(x.dtype.str[0] + native.str[1:])
    top = (bits & native.type(np.iinfo(native).max // 2)).max()
    return float(np.array(top, native).view(x.dtype.newbyteorder("="))[()])


class _Space(NamedTuple):
    """Views of the scratch for tiles of one shape."""

    flat: Array
    """What is still to be cut into digits, with padding."""
    z: Array
    """The part of it that is the tile."""
    digits: list[Array]
    """The digits, with padding."""
    split: list[Array]
    """The digits by slices and runs."""


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
        self.across = fastest in kept  # memory runs across slices, not along them
        self.rows = slices < SHORT or x.size >= SHORT * slices  # else slices are columns of a tile
        self.order = [*kept, *sorted(axes)]
        self.cut = len(kept)
        digits = 4 if x.dtype.itemsize == 8 else 2
        self.pairs = [(i, j) for i in range(digits) for j in range(i, digits)]
        self.spaces: dict[tuple[int, ...], _Space] = {}
        self.scratch = np.empty((digits + 1, TILE + 2 * TILE // RUN + RUN))

    def add_block(self, x: Array, omit_nan: bool = False) -> None:
        view = x.transpose(self.order)
        for where in self.panels(view.shape):
            at = where[: self.cut]
            matrix = self.matrix(view[index(where)])
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
        """Boxes of at most PANEL elements, whole cache lines of memory wide."""
        if not self.across:
            return tiles(shape, PANEL)
        wide = max(COLUMNS, PANEL // math.prod(shape[self.cut :]))
        kept = tile_shape(shape[: self.cut], min(PANEL, wide))
        reduced = tile_shape(shape[self.cut :], PANEL // math.prod(kept))
        return boxes(shape, (*kept, *reduced))

    def matrix(self, panel: Array) -> Array:
        """A panel as (slices, n) for rows, (n, slices) for columns, in the order of memory."""
        slices, n = math.prod(panel.shape[: self.cut]), math.prod(panel.shape[self.cut :])
        if self.across:
            axes = [*range(self.cut, panel.ndim), *range(self.cut)]
            matrix = np.ascontiguousarray(panel.transpose(axes)).reshape(n, slices)
        else:
            matrix = panel.reshape(slices, n)
        return matrix.T if self.across == self.rows else matrix

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
        height, width = matrix.shape
        least = COLUMNS if self.across == self.rows else 1
        step = min(width, TILE // min(height, least))
        lines = min(height, TILE // step)
        runs = ceil_div(step if self.rows else lines, RUN)
        total = runs * (ceil_div(width, step) if self.rows else ceil_div(height, lines))
        # of every slice the dot products of its runs, for every pair of digits
        dots = np.zeros((len(self.pairs), *((height, total) if self.rows else (total, width))))
        for i in range(0, height, lines):
            for j in range(0, width, step):
                tile = matrix[i : i + lines, j : j + step]
                first, run = (i, j // step) if self.rows else (j, i // lines)
                small = self.cut_digits(tile, e)
                if small is not None:
                    self.set_aside(np.ldexp(tile[small], scaled), small, first, at)
                self.multiply(tile.shape, dots, first, run * runs)
        # of the products of digits i and j; both orders for i < j
        units = [2 * e - DIGIT * (i + j + 2) + (i < j) for i, j in self.pairs]
        both = [i < j for i, j in self.pairs]
        dots *= np.ldexp(1.0, np.subtract(both, units, dtype=np.int32))[:, None, None]
        sums = dots.astype(np.int64).sum(axis=2 if self.rows else 1)
        sums = sums.reshape(len(units), *box_shape(at))
        self.add_integers(sums, [u + 2 * scaled for u in units], at)

    def space(self, shape: tuple[int, ...]) -> _Space:
        """Scratch for a tile of ``shape``, padded so that its slices are whole runs."""
        if shape not in self.spaces:
            slices, n = shape if self.rows else shape[::-1]
            runs = ceil_div(n, RUN)
            flat, *digits = self.scratch[:, : slices * runs * ceil_div(n, runs)]
            z = flat.reshape((slices, -1) if self.rows else (-1, slices))
            split = (slices, runs, -1) if self.rows else (runs, -1, slices)
            self.spaces[shape] = _Space(
                flat, z[: shape[0], : shape[1]], digits, [d.reshape(split) for d in digits]
            )
        return self.spaces[shape]

    def cut_digits(self, tile: Array, top: int) -> tuple[Array, ...] | None:
        """Fill the digits of the scratch; the result tells which elements have too many bits."""
        space = self.space(tile.shape)
        flat = space.flat
        if flat.size != tile.size:
            flat[:] = 0.0
        space.z[...] = tile
        for i, d in enumerate(space.digits):
            if i:
                np.subtract(flat, space.digits[i - 1], out=flat)
            # adding 1.5 · 2**(52 + g) rounds to a multiple of 2**g
            magic = math.ldexp(1.5, 52 + top - DIGIT * (i + 1))
            np.add(flat, magic, out=d)
            np.subtract(d, magic, out=d)
        whole = flat == d
        if whole.all():
            return None
        for d in space.digits:
            d[~whole] = 0.0
        np.copyto(flat, whole)
        return np.nonzero(space.z == 0.0)

    def multiply(self, shape: tuple[int, ...], dots: Array, first: int, run: int) -> None:
        """Dot products of the digits of a tile, whose place in ``dots`` is given."""
        split = self.space(shape).split
        for (i, j), out in zip(self.pairs, dots, strict=True):
            a, b = split[i], split[j]
            if self.rows:
                np.vecdot(a, b, out=out[first : first + len(a), run : run + a.shape[1]])
            else:
                columns = slice(first, first + a.shape[2])
                np.einsum("rns,rns->rs", a, b, out=out[run : run + len(a), columns])

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
