"""The operation as Dask graphs."""

from __future__ import annotations

import math
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.delayed import Delayed, delayed
from dask.highlevelgraph import HighLevelGraph

from daskclip.lazy.recipes import Recipe, recipes
from daskclip.lazy.tree import map_object_blocks, tree_reduce
from daskclip.numerics import (
    Array,
    Partial,
    Scale,
    clip_block,
    combine_all,
    finalize,
    nan_if_infinite,
    partial_norm,
    require_finite,
    rescale,
)

HOLD = 16 * 2**20  # bytes of the chunks that share their slices, up to which they are held
NORM = attrgetter("norm")


def clip(
    x: da.Array, limit: Any, over: tuple[int, ...], name: str | None, nonfinite: str, ord: float
) -> tuple[da.Array, da.Array]:
    """Clipped array and norms: one map where chunks hold their slices whole, else two passes."""
    if np.ndim(limit):
        chunks = tuple((1,) if n == 1 else c for n, c in zip(limit.shape, x.chunks, strict=True))
        limit = da.asarray(limit).rechunk(chunks)
    limit_name = limit.name if isinstance(limit, da.Array) else limit
    token = tokenize(x.name, x.chunks, limit_name, over, nonfinite, ord, ensure_deterministic=True)
    full = f"{name or 'clip-by-norm'}-{token}"
    omit = nonfinite == "omit"
    checked = x
    if nonfinite == "raise":
        checked = da.map_blocks(
            _require_finite, x, limit, over=over,
            name=f"require-finite-{token}", dtype=x.dtype, meta=x._meta,
        )  # fmt: skip
    if all(x.numblocks[a] == 1 for a in over):
        pairs = map_object_blocks(
            _clip_chunk, checked, limit, over=over, omit=omit, ord=ord, name=f"clip-chunk-{token}"
        )
        clipped = da.map_blocks(itemgetter(0), pairs, name=full, dtype=x.dtype, meta=x._meta)
        return clipped, _norms(itemgetter(1), pairs, over, f"norm-{token}")
    scale = _scales(checked, limit, over, omit, ord, token)
    return rescaled(x, scale, over, full), _norms(NORM, scale, over, f"norm-{token}")


def norm(x: da.Array, over: tuple[int, ...], keepdims: bool, ord: float) -> da.Array:
    """Norms of the slices of ``x``."""
    token = tokenize(x.name, x.chunks, over, ord, ensure_deterministic=True)
    scale = _scales(x, math.inf, over, False, ord, f"only-{token}")
    return _norms(NORM, scale, () if keepdims else over, f"norm-only-{keepdims}-{token}")


def clip_list(
    arrays: list[Any], limit: Any, used: Any, name: str | None
) -> tuple[list[Any], da.Array]:
    """Arrays clipped by one factor, and the norm it is taken from."""
    summed = total(arrays if used is None else [da.asarray(used).astype(float)])
    if isinstance(limit, da.Array):
        limit = limit.to_delayed()[()]
    clipped = []
    for x in arrays:
        if x is not None:
            scale = delayed(_global_scale, pure=True)(summed, limit, x.dtype)
            token = tokenize(x.name, x.chunks, scale.key, ensure_deterministic=True)
            x = rescaled(x, scale, (), f"{name or 'clip-by-global-norm'}-{token}")
        clipped.append(x)
    return clipped, global_norm(summed)


def total(arrays: list[Any]) -> Delayed:
    """Partial over all elements of all arrays."""
    parts = []
    for x in arrays:
        if x is not None:
            over = tuple(range(x.ndim))
            token = tokenize(x.name, x.chunks, over, ensure_deterministic=True)
            parts += _partials(x, over, False, 2, f"global-{token}").to_delayed().ravel().tolist()
    summed: Delayed = delayed(combine_all, pure=True)(parts)
    return summed


def global_norm(summed: Delayed) -> da.Array:
    """Norm of what `total` gives, as an array of shape ()."""
    value = delayed(_global_norm, pure=True)(summed)
    name = f"global-norm-{tokenize(value.key)}"
    result: da.Array = da.from_delayed(value, (), float, name=name)
    return result


def rescaled(x: da.Array, scale: Any, over: tuple[int, ...], name: str) -> da.Array:
    """Second pass: every chunk is made again from its recipe once its scale is known."""
    group = math.prod(
        sum(x.chunks[a]) if a in over else max(x.chunks[a], default=0) for a in range(x.ndim)
    )
    hold = isinstance(scale, da.Array) and group * x.dtype.itemsize <= HOLD
    made, layers = recipes(x, hold)
    tasks: dict[Any, Any] = {}
    for index in np.ndindex(*x.numblocks):
        recipe = made[(x.name, *index)]
        if isinstance(scale, da.Array):
            at = (scale.name, *(0 if a in over else i for a, i in enumerate(index)))
        else:
            at = scale.key
        tasks[(name, *index)] = (_rescale_made, recipe, list(recipe.inputs), at)
    graph = HighLevelGraph(
        {**x.dask.layers, **scale.dask.layers, name: tasks},
        {
            **x.dask.dependencies,
            **scale.dask.dependencies,
            name: {*layers, *scale.__dask_layers__()},
        },
    )
    return da.Array(graph, name, x.chunks, meta=x._meta)


def _partials(x: da.Array, over: tuple[int, ...], omit: bool, ord: float, token: str) -> da.Array:
    kept = tuple((1,) * len(c) if a in over else c for a, c in enumerate(x.chunks))
    parts = map_object_blocks(
        partial_norm, x, axes=over, omit_nan=omit, ord=ord,
        name=f"partial-norm-{token}", chunks=kept,
    )  # fmt: skip
    return tree_reduce(parts, over)


def _scales(
    x: da.Array, limit: Any, over: tuple[int, ...], omit: bool, ord: float, token: str
) -> da.Array:
    parts = _partials(x, over, omit, ord, token)
    return map_object_blocks(partial(finalize, dtype=x.dtype), parts, limit, name=f"scale-{token}")


def _norms(pick: Any, blocks: da.Array, over: tuple[int, ...], name: str) -> da.Array:
    chunks = tuple((1,) if a in over else c for a, c in enumerate(blocks.chunks))
    result: da.Array = da.map_blocks(
        pick, blocks, name=name, chunks=chunks, dtype=float, meta=np.empty((0,) * blocks.ndim)
    )
    return result.squeeze(axis=over) if over else result


# ---- tasks


def _clip_chunk(
    x: Array, limit: Any, over: tuple[int, ...], omit: bool, ord: float
) -> tuple[Array, Array]:
    clipped, scale = clip_block(x, limit, over, omit_nan=omit, ord=ord)
    return clipped, scale.norm


def _require_finite(x: Array, limit: Any, over: tuple[int, ...], block_info: Any = None) -> Array:
    where = block_info[0]
    start = [first for first, _ in where["array-location"]]
    require_finite(x, over, limit, start, lambda _: where["chunk-location"])
    return x


def _rescale_made(recipe: Recipe, inputs: list[Any], scale: Scale) -> Array:
    return rescale(recipe.make(inputs), scale)


def _global_scale(summed: Partial, limit: Any, dtype: Any) -> Scale:
    return finalize(nan_if_infinite(summed), limit, dtype)


def _global_norm(summed: Partial) -> Any:
    return finalize(summed, math.inf, np.dtype(float)).norm
