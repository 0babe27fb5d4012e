"""Grid arithmetic: cutting a box of integers into smaller boxes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

Box = tuple[slice, ...]


def ceil_div(a: int, b: int) -> int:
    """Smallest integer that is at least ``a / b``."""
    return -(-a // b)


def grid(shape: Sequence[int], step: Sequence[int]) -> tuple[int, ...]:
    """Number of boxes of size ``step`` along each axis of ``shape``."""
    return tuple(ceil_div(n, k) for n, k in zip(shape, step, strict=True))


def box(cell: Sequence[int], step: Sequence[int], shape: Sequence[int]) -> Box:
    """Region of grid cell ``cell``, cut off at the edge of ``shape``."""
    return tuple(
        slice(i * k, min((i + 1) * k, n)) for i, k, n in zip(cell, step, shape, strict=True)
    )


def index(region: Box) -> Any:
    """Index for a region, which gives an array and not a scalar where there are no axes."""
    return (*region, ...)


def box_shape(region: Box) -> tuple[int, ...]:
    """Extent of a region along each axis."""
    return tuple(s.stop - s.start for s in region)


def shift(inside: Box, region: Box) -> Box:
    """A box given relative to ``region``, in the coordinates of ``region``."""
    return tuple(
        slice(r.start + i.start, r.start + i.stop) for i, r in zip(inside, region, strict=True)
    )


def tile_shape(shape: Sequence[int], size: int) -> tuple[int, ...]:
    """Box of at most ``size`` elements that grows from the last axis on, the contiguous one."""
    step = []
    for n in reversed(shape):
        k = max(1, min(n, size))
        step.append(k)
        size //= k
    return tuple(reversed(step))


def boxes(shape: Sequence[int], step: Sequence[int]) -> Iterator[Box]:
    """All boxes of size ``step`` that cover ``shape``, the last axis fastest.

    Examples
    --------
    >>> list(boxes((3, 4), (2, 4)))
    [(slice(0, 2, None), slice(0, 4, None)), (slice(2, 3, None), slice(0, 4, None))]
    """
    if math.prod(shape):
        for cell in product(*map(range, grid(shape, step))):
            yield box(cell, step, shape)


def tiles(shape: Sequence[int], size: int) -> Iterator[Box]:
    """Boxes of at most ``size`` elements that cover ``shape``."""
    return boxes(shape, tile_shape(shape, size))


@dataclass(frozen=True, slots=True)
class Spans:
    """``range(n)`` in ranges of ``step``, made as they are iterated over: there may be 10**9."""

    n: int
    step: int

    def __len__(self) -> int:
        return ceil_div(self.n, self.step)

    def __iter__(self) -> Iterator[range]:
        return map(self._range, range(0, self.n, self.step))

    def __reversed__(self) -> Iterator[range]:
        return map(self._range, reversed(range(0, self.n, self.step)))

    def _range(self, start: int) -> range:
        return range(start, min(start + self.step, self.n))
