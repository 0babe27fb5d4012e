"""The Dask tree: partial norms of chunks, combined until every slice has its sum.

Blocks of these arrays are `Partial` and `Scale` tuples, not ndarrays: their dtype is object, and
their shape is that of the norms with reduced axes of size 1.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import dask.array as da
import numpy as np
from dask.core import flatten

from daskclip.arguments import Array
from daskclip.numerics import combine

T = TypeVar("T")


def tree_reduce(
    partials: da.Array, axes: tuple[int, ...], function: Callable[[list[Any]], Any] = combine
) -> da.Array:
    """Combine blocks along ``axes``, Dask's setting ``split_every`` of them in a task.

    Parameters
    ----------
    partials : dask Array
        Of `Partial` blocks, or of what ``function`` combines.
    axes : tuple of int
        Axes to reduce.
    function : callable
        Combines a list of blocks to one.

    Returns
    -------
    dask Array
        One block along each of ``axes``.
    """
    # da.reduction would add two tasks for each block, with nothing to combine, and counts every
    # axis when it shares split_every out among them
    split = tuple(a for a in axes if partials.numblocks[a] > 1)
    if not split:
        return partials
    step = partial(_combine_blocks, function)
    combined: da.Array = da.reduction(
        partials, chunk=_as_is, combine=step, aggregate=step, axis=split, keepdims=True,
        concatenate=False, dtype=object, meta=object_meta(partials.ndim),
    )  # fmt: skip
    return combined


def map_object_blocks(
    function: Callable[..., object], x: da.Array, *args: object, name: str, **kwargs: object
) -> da.Array:
    """`map_blocks` for results that are not ndarrays; ``name`` is the whole layer name."""
    mapped: da.Array = da.map_blocks(
        function, x, *args, name=name, dtype=object, meta=object_meta(x.ndim), **kwargs
    )
    return mapped


def object_meta(ndim: int) -> Array:
    """Meta of an array of ``ndim`` dimensions whose blocks are objects."""
    return np.empty((0,) * ndim, object)


def _as_is(block: T, axis: object, keepdims: object) -> T:
    """The first step of Dask's reduction, which has nothing to do."""
    return block


def _combine_blocks(
    function: Callable[[list[Any]], T], blocks: object, axis: object, keepdims: object
) -> T:
    """Combine blocks, which Dask hands over in lists nested as deep as there are axes."""
    # list alone: a Partial is a tuple, and would be taken apart
    return function(list(flatten([blocks], container=list)))
