"""The operation as a Dask graph.

Where every chunk holds its slices whole, one task clips a chunk and returns its norms too::

    chunk ── clip-chunk ──┬── clipped chunk
                          └── norms

Otherwise there are two passes, and no chunk is held between them::

    chunk ── partial-norm ──┐
    chunk ── partial-norm ──┼── combine ── scale ──┬── norms
    chunk ── partial-norm ──┘                      │
    chunk made again ──────────────────────────────┴── clipped chunk

The second pass makes each chunk again, in one of two ways:

- Where every layer of the source is Blockwise and needs one chunk of others for each of its own,
  all of them are one layer with the second pass (see `fusion`): stored arrays, and what is computed
  from them or from data in memory by elementwise functions, transpositions and `map_blocks`.
- Otherwise each chunk has a recipe (see `recipes`): arrays that are sliced, rechunked, concatenated
  or random, and those of which many chunks need the same one, as all do that subtract a mean.
"""

import math
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

from daskclip.errors import InvalidValueError, SourceChangedError
from daskclip.lazy.fusion import fuse_source
from daskclip.lazy.inputs import Limit, Operation, check_block
from daskclip.lazy.recipes import Recipe, chunk_recipes
from daskclip.lazy.tree import map_object_blocks, tree_reduce
from daskclip.numerics import (
    Array,
    Partial,
    Scale,
    clip_block,
    combine,
    finalize,
    partial_norm,
    require_finite,
    rescale,
)

# chunks that share their slices are held up to this size: reading them again would cost more
HELD_NBYTES = 16 * 2**20
Number = float | da.Array
"""A number, or a Dask array that will give it."""


class ClippedChunk(NamedTuple):
    """A chunk clipped in one pass; the rest of its scale is not kept."""

    clipped: Array
    norm: Array


def clip(
    x: da.Array, limit: Limit, operation: Operation, name: str | None
) -> tuple[da.Array, da.Array]:
    """Return the clipped array and its norms, in one pass or two."""
    axes = operation.axes
    limit = _chunked_like(x, limit)
    # the chunks too: compute_chunk_sizes() replaces them and keeps the name
    token = tokenize(x, x.chunks, limit, operation, ensure_deterministic=True)
    layer = f"{name or 'clip-by-norm'}-{token}"
    checked = x
    if operation.nonfinite == "raise":
        check = partial(_require_finite, axes=axes, meta=x._meta)
        checked = _map_blocks(check, x, limit, name=f"require-finite-{token}", like=x)
    if all(x.numblocks[a] == 1 for a in axes):
        clip_chunk = partial(_clip_chunk, operation=operation, meta=x._meta)
        blocks = map_object_blocks(clip_chunk, checked, limit, name=f"clip-chunk-{token}")
        clipped = _map_blocks(attrgetter("clipped"), blocks, name=layer, like=x)
    else:
        blocks = _scales(checked, limit, operation, token)
        # from x, not checked again: what is rescaled has passed the check
        clipped = rescaled(x, blocks, layer, keep=_slab_nbytes(x, axes) <= HELD_NBYTES)
    return clipped, norms_of(blocks, axes, f"norm-{token}")


def norm(x: da.Array, operation: Operation, keepdims: bool) -> da.Array:
    """Return the norms of the slices of ``x``."""
    token = tokenize(x, x.chunks, operation, ensure_deterministic=True)
    scales = _scales(x, math.inf, operation, f"only-{token}")
    return norms_of(scales, () if keepdims else operation.axes, f"norm-only-{keepdims}-{token}")


# ---- layers


def _chunked_like(x: da.Array, limit: Limit) -> Number:
    """Limits in the chunks of the array whose slices they are for; one limit as it is."""
    if isinstance(limit, float):
        return limit
    limits: da.Array = da.asarray(limit)
    if limits.ndim:
        chunks = zip(limits.shape, x.chunks, strict=True)
        limits = limits.rechunk(tuple((1,) if n == 1 else c for n, c in chunks))
    return limits


def _map_blocks(
    function: Callable[..., Array], *args: Limit, name: str, like: da.Array
) -> da.Array:
    """`map_blocks` for a result of the dtype and type of ``like``; ``name`` is the layer name."""
    mapped: da.Array = da.map_blocks(function, *args, name=name, dtype=like.dtype, meta=like._meta)
    return mapped


def partials(x: da.Array, operation: Operation, token: str) -> da.Array:
    """`Partial` blocks, one along each reduced axis."""
    axes = operation.axes
    kept = tuple((1,) * len(c) if a in axes else c for a, c in enumerate(x.chunks))
    sum_chunk = partial(_sum_chunk, operation=operation, meta=x._meta)
    parts = map_object_blocks(sum_chunk, x, name=f"partial-norm-{token}", chunks=kept)
    return tree_reduce(parts, axes, _combine_alike)


def _scales(x: da.Array, limit: Number, operation: Operation, token: str) -> da.Array:
    """`Scale` blocks, one along each reduced axis."""
    parts, name = partials(x, operation, token), f"scale-{token}"
    dtypes = (x.dtype,) * operation.normalize
    scale = partial(finalize, dtype=x.dtype, zero=operation.zero, normalize=dtypes)
    scales = map_object_blocks(scale, parts, limit, name=name)
    # unlike the second pass: Dask would fuse the two, and make a scale once for each chunk
    scales.dask.layers[name].concatenate = False
    return scales


def norms_of(blocks: da.Array, axes: tuple[int, ...], name: str) -> da.Array:
    """Norms of `ClippedChunk` or `Scale` blocks, without ``axes``."""
    chunks = tuple((1,) if a in axes else c for a, c in enumerate(blocks.chunks))
    norms: da.Array = da.map_blocks(
        attrgetter("norm"), blocks,
        name=name, chunks=chunks, dtype=float, meta=np.empty((0,) * blocks.ndim),
    )  # fmt: skip
    return norms.squeeze(axis=axes) if axes else norms


def _slab_nbytes(x: da.Array, axes: tuple[int, ...]) -> float:
    """Bytes of the largest group of chunks that share their slices; NaN if Dask cannot tell."""
    sizes = (sum(c) if a in axes else max(c, default=0) for a, c in enumerate(x.chunks))
    return float(math.prod(sizes) * x.dtype.itemsize)


def rescaled(x: da.Array, scales: da.Array, name: str, *, keep: bool) -> da.Array:
    """Second pass: each chunk is made again once its scale is known, or is held with ``keep``."""
    rescale_chunk = partial(_rescale_chunk, meta=x._meta)
    second_pass = _map_blocks(rescale_chunk, x, scales, name=name, like=x)
    if keep:
        return second_pass
    second = fuse_source(x, name, second_pass.dask.layers[name]) or _made(x, scales, name)
    graph = HighLevelGraph(
        {**scales.dask.layers, **second.layers},
        {**scales.dask.dependencies, **second.dependencies},
    )
    return da.Array(graph, name, x.chunks, meta=x._meta)


def _made(x: da.Array, scales: da.Array, name: str) -> HighLevelGraph:
    """Layer that makes each chunk from its recipe, and the layers that it needs of ``x``."""
    recipes, held = chunk_recipes(x)
    rescale_made = partial(_rescale_made, meta=x._meta)
    tasks: dict[Any, Any] = {}
    annotations: dict[str, dict[Any, Any]] = {}
    for coords in np.ndindex(*x.numblocks):
        recipe = recipes[(x.name, *coords)]
        # chunks along a reduced axis share one scale
        own = (0 if n == 1 else i for i, n in zip(coords, scales.numblocks, strict=True))
        scale_key = (scales.name, *own)
        tasks[(name, *coords)] = (rescale_made, recipe, recipe.references, scale_key)
        for kind, value in recipe.annotations.items():
            annotations.setdefault(kind, {})[(name, *coords)] = value
    layer = MaterializedLayer(tasks, {k: _by_key(v, len(tasks)) for k, v in annotations.items()})
    return HighLevelGraph(
        {**x.dask.layers, name: layer}, {**x.dask.dependencies, name: {*held, scales.name}}
    )


def _by_key(values: dict[Any, Any], tasks: int) -> Any:
    """Annotation of a layer of as many tasks: one value for all of them, or a function of keys."""
    first = next(iter(values.values()))
    is_common = len(values) == tasks and all(value == first for value in values.values())
    return first if is_common else values.get


# ---- tasks


def _clip_chunk(x: object, limit: float | Array, operation: Operation, meta: Array) -> ClippedChunk:
    """Clip a chunk that holds its slices whole."""
    clipped, scale = clip_block(
        check_block(x, meta), limit, operation.axes, omit_nan=operation.omit_nan,
        zero=operation.zero, normalize=operation.normalize, ord=operation.ord,
    )  # fmt: skip
    return ClippedChunk(clipped, scale.norm)


def _sum_chunk(x: object, operation: Operation, meta: Array) -> Partial:
    """Sum a chunk that may hold parts of slices."""
    omit_nan, ord = operation.omit_nan, operation.ord
    return partial_norm(check_block(x, meta), operation.axes, omit_nan=omit_nan, ord=ord)


def _combine_alike(parts: list[Partial]) -> Partial:
    """Combine sums of chunks of the same slices."""
    shapes = {p.flags.shape for p in parts}
    if len(shapes) > 1:
        found = " and ".join(map(str, sorted(shapes)))
        remedy = "give the array the shapes of its blocks"
        raise InvalidValueError(f"blocks side by side have norms of shapes {found}; {remedy}")
    return combine(parts)


def _require_finite(
    x: object, limit: float | Array, axes: tuple[int, ...], meta: Array, block_info: Any = None
) -> Array:
    """Return a chunk; raise with its place if NaN or infinity has a limit."""
    # Dask fills in block_info; 0 is the first argument
    info = block_info[0]
    start = [first for first, _ in info["array-location"]]
    chunk = check_block(x, meta)
    require_finite(chunk, axes, limit, start, lambda _: info["chunk-location"])
    return chunk


def _rescale_chunk(x: object, scale: Scale, meta: Array) -> Array:
    """Rescale a chunk."""
    chunk = check_block(x, meta)
    # the kernel would read factors beyond the last one
    if any(n not in (1, m) for n, m in zip(scale.factor.shape, chunk.shape, strict=False)):
        raise SourceChangedError(
            f"a chunk of shape {chunk.shape} had norms of shape {scale.factor.shape} before: its "
            "source does not give the same twice; persist it or store it"
        )
    return rescale(chunk, scale)


def _rescale_made(recipe: Recipe, inputs: list[Any], scale: Scale, meta: Array) -> Array:
    """Make a chunk again and rescale it, in one task so that it is held by no other."""
    return _rescale_chunk(recipe.make(inputs), scale, meta)
