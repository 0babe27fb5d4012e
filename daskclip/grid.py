"""Grid arithmetic: boxes of array elements, and grids of boxes of one size.

A box is a slice along each axis. In a grid of boxes of one size, *coords* are the position of a
box: its number along each axis. Boxes at the far edges are smaller if the size does not divide
the shape.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, TypeVar

T = TypeVar("T")
Box = tuple[slice, ...]
"""Slices with a start and a stop, without a step."""


def ceil_div(a: int, b: int) -> int:
    """Smallest integer that is at least ``a / b``."""
    # in integers: a / b would be rounded from 2**53 on
    return -(-a // b)


def grid_shape(shape: Sequence[int], size: Sequence[int]) -> tuple[int, ...]:
    """Number of boxes along each axis of ``shape``."""
    return tuple(-(-n // k) for n, k in zip(shape, size, strict=True))


def all_coords(grid: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Coords of all boxes of a grid of that shape."""
    # an empty grid may be very long along other axes, whose numbers `product` would hold
    return product(*map(range, grid)) if all(grid) else iter(())


def box_at(coords: Sequence[int], size: Sequence[int], shape: Sequence[int]) -> Box:
    """Box at ``coords`` of the grid, cut off at the edges of ``shape``."""
    return tuple(
        slice(i * k, min((i + 1) * k, n)) for i, k, n in zip(coords, size, shape, strict=True)
    )


def box_index(box: Box) -> tuple[Any, ...]:
    """Index of a box; it gives an array, not a scalar, where there are no axes."""
    return (*box, ...)


def without_axes(values: Sequence[T], axes: Sequence[int]) -> tuple[T, ...]:
    """Entries of ``values``, which has one for each axis, of the axes that are not in ``axes``."""
    return tuple(value for a, value in enumerate(values) if a not in axes)


def joined_axes(kept: Sequence[T], others: Sequence[T], axes: Sequence[int]) -> tuple[T, ...]:
    """Entries of ``others`` along ``axes``, and those of ``kept``, in their order, elsewhere."""
    own = iter(kept)
    return tuple(value if a in axes else next(own) for a, value in enumerate(others))


def box_shape(box: Box) -> tuple[int, ...]:
    """Extent of a box along each axis."""
    return tuple(s.stop - s.start for s in box)


def offset_box(inside: Box, outer: Box) -> Box:
    """Box given relative to the start of ``outer``, in the coordinates that ``outer`` has."""
    return tuple(
        slice(o.start + i.start, o.start + i.stop) for i, o in zip(inside, outer, strict=True)
    )


def common_index(other: Box, region: Box) -> tuple[Any, ...]:
    """Index, in the values of ``region``, of what it has in common with another box."""
    pairs = zip(other, region, strict=True)
    inside = (slice(max(a.start - b.start, 0), min(a.stop, b.stop) - b.start) for a, b in pairs)
    return box_index((*inside,))


def tile_shape(shape: Sequence[int], elements: int) -> tuple[int, ...]:
    """Shape of a box of at most ``elements`` elements that lie side by side in C order."""
    size = []
    # the last axis first: it is contiguous
    for n in reversed(shape):
        k = max(1, min(n, elements))
        size.append(k)
        elements //= k
    return tuple(reversed(size))


def boxes(shape: Sequence[int], size: Sequence[int]) -> Iterator[Box]:
    """All boxes of a grid, the last axis fastest.

    Examples
    --------
    >>> list(boxes((3, 4), (2, 4)))
    [(slice(0, 2, None), slice(0, 4, None)), (slice(2, 3, None), slice(0, 4, None))]
    """
    # the chunks of an empty array may have the size 0, which is no step of a range
    if not math.prod(shape):
        return iter(())
    # the product of the slices of each axis: no slice is made twice
    edges = zip(shape, size, strict=True)
    return product(*([slice(i, min(i + k, n)) for i in range(0, n, k)] for n, k in edges))
