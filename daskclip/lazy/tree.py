"""The Dask tree: partial norms of chunks, combined until every slice has its sum.

Blocks of these arrays are `Partial` and `Scale` tuples, not ndarrays: their dtype is object and
their shape is that of the kept grid, with size 1 along the reduced axes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
from dask.core import flatten

from daskclip.numerics import combine


def tree_reduce(
    partials: da.Array,
    axes: tuple[int, ...],
    function: Callable[[list[Any]], Any] = combine,
) -> da.Array:
    """Combine the partials along ``axes``, ``split_every`` of them at a time.

    Parameters
    ----------
    partials : dask Array
        Of `Partial` blocks.
    axes : tuple of int
        Axes to reduce.
    function : callable
        What combines a list of blocks, for those that are more than partials.

    Returns
    -------
    dask Array
        Of `Partial` blocks, one along each of ``axes``. The number of inputs of a task is Dask's
        ``split_every`` setting.
    """
    if all(partials.numblocks[a] == 1 for a in axes):
        return partials
    step = partial(_combine_blocks, function)
    combined: da.Array = da.reduction(
        partials,
        chunk=_as_is,
        combine=step,
        aggregate=step,
        axis=axes,
        keepdims=True,
        concatenate=False,
        dtype=object,
        meta=object_meta(partials.ndim),
    )
    return combined


def map_object_blocks(
    function: Callable[..., Any], x: da.Array, *args: Any, name: str, **kwargs: Any
) -> da.Array:
    """`map_blocks` for blocks that are not ndarrays; ``name`` is the whole layer name."""
    mapped: da.Array = da.map_blocks(
        function, x, *args, name=name, dtype=object, meta=object_meta(x.ndim), **kwargs
    )
    return mapped


def object_meta(ndim: int) -> Any:
    """Meta of an array of ``ndim`` dimensions whose blocks are objects."""
    return np.empty((0,) * ndim, object)


def _as_is(block: Any, axis: Any = None, keepdims: Any = None) -> Any:
    return block


def _combine_blocks(function: Any, blocks: Any, axis: Any = None, keepdims: Any = None) -> Any:
    return function(list(flatten([blocks], container=list)))
