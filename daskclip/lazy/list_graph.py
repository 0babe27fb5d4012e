"""Lists of arrays that have norms in common, as a Dask graph.

Chunks of the arrays may differ along the axes that are kept. The sums of all arrays are added for
each *cell*: a part of the kept positions that lies in one chunk of each array. A scale of cells
becomes one of chunks again::

    chunk ── partial-norm ──┐                 ┌── scale of a chunk ── clipped chunk
    chunk ── partial-norm ──┼── sum of a cell ┤
    chunk ── partial-norm ──┘                 └── norms
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise, product
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from daskclip.lazy.graph import Number, norms_of, partials, rescaled
from daskclip.lazy.inputs import Limit, Operation
from daskclip.lazy.tree import map_object_blocks, object_meta
from daskclip.numerics import (
    Array,
    Partial,
    Scale,
    box_index,
    box_shape,
    combine,
    finalize,
    joined_axes,
    nan_if_infinite,
    no_sums,
    without_axes,
)

Reduced = Sequence[tuple[int, ...]]
"""Axes of each array over which norms are taken."""
Coords = tuple[int, ...]
Box = tuple[slice, ...]
Chunks = tuple[tuple[int, ...], ...]
Tasks = dict[Any, Any]


def clip_list(
    arrays: Sequence[da.Array],
    axes: Reduced,
    limit: Number,
    use_norm: Limit | None,
    name: str | None,
    *,
    normalize: bool,
) -> tuple[list[da.Array], da.Array]:
    """Return arrays clipped by one factor for each kept position, and the norms."""
    total = _total(arrays, axes)
    if use_norm is not None:
        # the norm of an array that holds one number is that number
        known = da.broadcast_to(da.asarray(use_norm).astype(float), total.shape)
        total = _total([known.rechunk(total.chunks)], [()])
    # an infinite norm makes a list NaN, an array alone not
    sums = map_object_blocks(nan_if_infinite, total, name=f"nan-if-infinite-{total.name}")
    dtypes = tuple(x.dtype for x in arrays) * normalize
    clipped = []
    for x, own in zip(arrays, axes, strict=True):
        token = tokenize(x, x.chunks, own, total.name, limit, dtypes, ensure_deterministic=True)
        scale = partial(finalize, dtype=x.dtype, normalize=dtypes)
        scales = map_object_blocks(scale, sums, limit, name=f"cell-scale-{token}")
        scales = _of_chunks(scales, x, own, f"list-scale-{token}")
        # not kept: each array may be small, and a list has any number of them
        clipped.append(rescaled(x, scales, f"{name or 'clip-by-global-norm'}-{token}", keep=False))
    return clipped, _norm(total)


def global_norm(arrays: Sequence[da.Array], axes: Reduced) -> da.Array:
    """Return the norms over all arrays, of the kept shape."""
    return _norm(_total(arrays, axes))


def _norm(total: da.Array) -> da.Array:
    scale = partial(finalize, clip_norm=math.inf, dtype=np.dtype(float))
    scales = map_object_blocks(scale, total, name=f"global-scale-{total.name}")
    return norms_of(scales, (), f"global-norm-{total.name}")


def _total(arrays: Sequence[da.Array], axes: Reduced) -> da.Array:
    """`Partial` blocks of the sums over all arrays, one for each cell."""
    kept = [without_axes(x.chunks, own) for x, own in zip(arrays, axes, strict=True)]
    cells = tuple(map(_common, zip(*kept, strict=True)))
    parts = []
    for x, own in zip(arrays, axes, strict=True):
        token = tokenize(x, x.chunks, own, ensure_deterministic=True)
        parts.append(partials(x, Operation(own), f"global-{token}"))
    name = f"list-sum-{tokenize([part.name for part in parts], cells, ensure_deterministic=True)}"
    tasks: Tasks = {}
    for coords, box in _boxes(cells):
        keys, inside = [], []
        for own, part, chunks in zip(axes, parts, kept, strict=True):
            ((at, some, _),) = _overlaps(chunks, box)
            keys.append((part.name, *joined_axes(at, [0] * part.ndim, own)))
            inside.append((own, some))
        tasks[(name, *coords)] = (partial(_sum_cell, inside=inside, kept=box_shape(box)), keys)
    return _object_array(name, tasks, parts, cells)


def _of_chunks(scales: da.Array, x: da.Array, axes: tuple[int, ...], name: str) -> da.Array:
    """`Scale` blocks of the chunks of an array, from those of cells."""
    chunks = tuple((1,) if a in axes else c for a, c in enumerate(x.chunks))
    tasks: Tasks = {}
    for coords, box in _boxes(without_axes(chunks, axes)):
        found = [*_overlaps(scales.chunks, box)]
        size = box_shape(box)
        places = [(there, here) for _, there, here in found]
        join = partial(
            _join_cells, places=places, kept=size, shape=joined_axes(size, [1] * x.ndim, axes)
        )
        keys = [(scales.name, *at) for at, *_ in found]
        tasks[(name, *joined_axes(coords, [0] * x.ndim, axes))] = (join, keys)
    return _object_array(name, tasks, [scales], chunks)


def _object_array(name: str, tasks: Tasks, needs: list[Any], chunks: Chunks) -> da.Array:
    graph = HighLevelGraph.from_collections(name, tasks, dependencies=needs)
    return da.Array(graph, name, chunks, meta=object_meta(len(chunks)))


# ---- chunks


def _common(chunks: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Chunks along an axis that lie in one of each of several chunkings of it."""
    ends = {0}.union(*map(accumulate, chunks))
    # an axis of length 0 has a chunk of that length
    return tuple(b - a for a, b in pairwise(sorted(ends))) or (0,)


def _boxes(chunks: Chunks) -> Iterator[tuple[Coords, Box]]:
    """Coordinates and box of each chunk."""
    edges = [[*pairwise(accumulate(sizes, initial=0))] for sizes in chunks]
    for coords in np.ndindex(*map(len, edges)):
        yield coords, tuple(slice(*edges[a][i]) for a, i in enumerate(coords))


def _overlaps(chunks: Chunks, box: Box) -> Iterator[tuple[Coords, Box, Box]]:
    """Yield chunks that a box meets: coordinates, and the common part as both have it."""
    each = (_overlaps_along(sizes, side) for sizes, side in zip(chunks, box, strict=True))
    for found in product(*each):
        yield tuple(i for i, *_ in found), tuple(f[1] for f in found), tuple(f[2] for f in found)


def _overlaps_along(sizes: tuple[int, ...], side: slice) -> Iterator[tuple[int, slice, slice]]:
    """Chunks along an axis that a slice meets, of an empty slice one."""
    ends = [*accumulate(sizes)]
    first = min(bisect_right(ends, side.start), len(ends) - 1)
    for i in range(first, len(ends)):
        begin = ends[i] - sizes[i]
        start, stop = max(begin, side.start), min(ends[i], side.stop)
        yield i, slice(start - begin, stop - begin), slice(start - side.start, stop - side.start)
        if ends[i] >= side.stop:
            return


# ---- tasks


def _sum_cell(
    parts: list[Partial], inside: list[tuple[tuple[int, ...], Box]], kept: tuple[int, ...]
) -> Partial:
    """Add the sums of all arrays in a cell; ``inside`` has the axes and the place of each."""
    sums = [
        part.reshape(without_axes(part.flags.shape, axes)).part(box)
        for part, (axes, box) in zip(parts, inside, strict=True)
    ]
    # the sum of no arrays is 0, and `combine` needs a part
    return combine([no_sums(kept), *sums])


def _join_cells(
    scales: list[Scale], places: list[tuple[Box, Box]], kept: tuple[int, ...], shape: Coords
) -> Scale:
    """Scale of a chunk from those of the cells that it meets."""

    def join(parts: tuple[Array | None, ...]) -> Array | None:
        some = [
            (part[box_index(there)], here)
            for part, (there, here) in zip(parts, places, strict=True)
            if part is not None
        ]
        if not some:
            return None
        joined = np.zeros(kept, some[0][0].dtype)
        for values, here in some:
            joined[box_index(here)] = values
        return joined.reshape(shape)

    return Scale(*map(join, zip(*scales, strict=True)))  # type: ignore[arg-type]
