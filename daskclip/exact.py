"""Exact sums of squares or magnitudes per slice, so that no order of summation can change a bit.

A block is summed panel by panel: integers of `digits` go into limbs of 32 bits, one number per
slice. Elements too small for the grid of their panel are set aside, and summed later on one of
their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from daskclip import kernels
from daskclip.blocks import Box, box_shape, boxes, index, tile_shape, tiles
from daskclip.digits import PANEL, Magnitudes, Powers
from daskclip.orders import ORDERS
from daskclip.partials import INF, LIMB, MASK, NAN, Partial, canonical, combine

Array = npt.NDArray[Any]

SHORT = 16  # elements of a slice below which many slices go side by side
COLUMNS = 256  # slices of a panel at least, where memory runs across them


def partial_norm(
    x: Array, axes: tuple[int, ...], *, omit_nan: bool = False, ord: float = 2
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

    Returns
    -------
    Partial
        Reduced axes have size 1.

    Notes
    -----
    Holds some 6 MB of scratch and, per slice, 8 bytes for each limb in use: 4 to 6 limbs for
    data of ordinary spread, at most 20 for float32 and 136 for float64.

    Examples
    --------
    >>> partial_norm(np.float32([[3, 4]]), (1,)).limbs.tolist()
    [[[25]]]
    """
    if ORDERS[ord].largest:
        return _largest(x, axes, omit_nan)
    compiled = kernels.partial_norm(x, axes, omit_nan) if ord == 2 else None
    if compiled is not None:
        return compiled
    if x.dtype.kind == "c":
        if omit_nan and np.isnan(x).any():
            x = np.where(np.isnan(x), 0, x)
        return combine([partial_norm(x.real, axes), partial_norm(x.imag, axes)])
    total = _Accumulator(x, axes, ORDERS[ord].power)
    with np.errstate(all="ignore"):
        if x.size:
            total.add_block(x, omit_nan)
        limbs, low = canonical(total.sums, total.low)
    kept = tuple(1 if k in axes else n for k, n in enumerate(x.shape))
    terms = math.prod(x.shape[k] for k in axes)
    return Partial(limbs.reshape(len(limbs), *kept), low, total.flags.reshape(kept), terms, ord)


def _largest(x: Array, axes: tuple[int, ...], omit_nan: bool) -> Partial:
    """`partial_norm` of the order inf."""
    how: Any = {"axis": axes, "keepdims": True, "initial": x.dtype.type(0)}
    with np.errstate(all="ignore"):
        top = np.array(np.maximum(np.fmax.reduce(x, **how), -np.fmin.reduce(x, **how)))
        infinite = np.isinf(top)
        flags = infinite * np.uint8(INF)
        if not omit_nan:
            flags |= np.isnan(np.maximum.reduce(x, **how)) * np.uint8(NAN)
    top[infinite] = 0
    terms = math.prod(x.shape[k] for k in axes)
    return partial_norm(top, (), ord=1)._replace(flags=np.asarray(flags), terms=terms, ord=math.inf)


class _Accumulator:
    """Running sums of one block: int64 limbs with room for carries, in a window that grows."""

    def __init__(self, x: Array, axes: tuple[int, ...], power: int) -> None:
        kept = [k for k in range(x.ndim) if k not in axes]
        self.shape = tuple(x.shape[k] for k in kept)
        self.sums: Array = np.zeros((0, *self.shape), np.int64)
        self.low = 0
        self.flags: Array = np.zeros(self.shape, np.uint8)
        self.aside: list[tuple[Array, Array]] = []
        slices = math.prod(self.shape)
        fastest = min(range(x.ndim), key=lambda k: (x.shape[k] == 1, abs(x.strides[k])), default=0)
        self.across = fastest in kept  # memory runs across slices, not along them
        # else slices are columns of a tile
        self.rows = slices < SHORT or (not self.across and x.size >= SHORT * slices)
        self.order = [*kept, *sorted(axes)]
        self.cut = len(kept)
        self.powers = Powers(self.rows, self.across, x.itemsize, power)
        self.spare = np.empty(min(x.size, PANEL))

    def add_block(self, x: Array, omit_nan: bool) -> None:
        view = x.transpose(self.order)
        for where in self.panels(view.shape):
            at = where[: self.cut]
            matrix = self.matrix(view[index(where)])
            magnitudes = Magnitudes(matrix, self.spare)
            if not math.isfinite(magnitudes.top):
                matrix = matrix.astype(np.float64)
                over = 1 if self.rows else 0
                found = np.isinf(matrix).any(axis=over) * np.uint8(INF)
                if not omit_nan:
                    found |= np.isnan(matrix).any(axis=over) * np.uint8(NAN)
                self.flags[at] |= found.reshape(box_shape(at))
                np.nan_to_num(matrix, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
                magnitudes = Magnitudes(matrix, self.spare)
            if magnitudes.top:
                self.add_panel(magnitudes, at)
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
            matrix = panel.transpose(axes).reshape(n, slices)
        else:
            matrix = panel.reshape(slices, n)
        return matrix.T if self.across == self.rows else matrix

    def add_panel(self, magnitudes: Magnitudes, at: Box) -> None:
        sums = self.powers.sums(magnitudes)
        if sums.small is not None:
            values, slices = sums.small
            self.aside.append((values, self.numbers(at)[slices]))
        self.add_integers(sums.values.reshape(-1, *box_shape(at)), sums.units, at)

    def numbers(self, at: Box) -> Array:
        """Numbers of the slices of a box among all."""
        numbers: Array = np.zeros((), np.int64)
        for s, n in zip(at, self.shape, strict=True):
            numbers = numbers[..., None] * n + np.arange(s.start, s.stop)
        return numbers.reshape(-1)

    def add_aside(self) -> None:
        while self.aside:
            values, numbers = map(np.concatenate, zip(*self.aside, strict=True))
            self.aside.clear()
            each = _Accumulator(values, (), self.powers.power)
            each.add_block(values, False)
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
