"""Rescaling NumPy blocks, and the whole operation on a block that holds its slices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from daskclip.errors import NonFiniteError
from daskclip.grid import ceil_div
from daskclip.numerics.compiled import Array, Block
from daskclip.numerics.partial import combine, partial_norm, sum_slices
from daskclip.numerics.scale import Scale, finalize, limit_at, scaling, trimmed

LARGE = 1 << 23  # bytes from which several threads pay
PARTS = 4  # a thread


def rescale(x: Array, scale: Scale, out: Array | None = None) -> Array:
    """Multiply every slice of ``x`` by its factor, rounding so that the bound holds.

    Parameters
    ----------
    x : ndarray
        A whole array or any part of it.
    scale : Scale
        Of the slices of ``x``; broadcasts against it.
    out : ndarray, optional
        Of the shape and dtype of ``x``; may be ``x`` itself.

    Returns
    -------
    ndarray
        ``out``, of the dtype of ``x``.

    Notes
    -----
    Holds 1 MB of scratch beside the result.

    Examples
    --------
    >>> from daskclip.numerics import finalize, partial_norm
    >>> x = np.float32([[3, 4]])
    >>> rescale(x, finalize(partial_norm(x, (1,)), 1.0, x.dtype))
    array([[0.59999996, 0.79999995]], dtype=float32)
    """
    if out is None:
        out = np.empty_like(x, subok=False)
    if x.size:
        block = Block(x.dtype, **scale._asdict())
        kept = scale.factor.shape
        block.describe(x, (1,) * (x.ndim - len(kept)) + kept, out)
        block.run("rescale_slices")
    return out


def clip_block(
    x: Array,
    clip_norm: Any,
    axes: tuple[int, ...],
    *,
    omit_nan: bool = False,
    ord: float = 2,
    out: Array | None = None,
) -> tuple[Array, Scale]:
    """Clip the slices of a block that holds them whole.

    Parameters
    ----------
    x : ndarray
        Floating point or complex.
    clip_norm : float or array that broadcasts against the norms with reduced axes of size 1
        See `finalize`.
    axes : tuple of int
        Axes to reduce, not negative, without repetition.
    omit_nan : bool
        NaN elements do not count.
    ord : float
        See `partial_norm`.
    out : ndarray, optional
        Of the shape and dtype of ``x``; may be ``x`` itself.

    Returns
    -------
    clipped : ndarray
        ``out``, of the shape and dtype of ``x``.
    scale : Scale
        What was done.

    Notes
    -----
    Holds 2 MB of scratch beside the results.

    Examples
    --------
    >>> clip_block(np.float32([[3, 4]]), 2.5, (1,))[1].norm
    array([[5.]])
    """
    if out is None:
        out = np.empty_like(x, subok=False)
    kept = tuple(1 if k in axes else n for k, n in enumerate(x.shape))
    terms = math.prod(x.shape[k] for k in axes) * (2 if x.dtype.kind == "c" else 1)
    if not x.size:
        return out, finalize(partial_norm(x, axes, omit_nan=omit_nan, ord=ord), clip_norm, x.dtype)
    block, scale = scaling(kept, clip_norm, x.dtype, terms, ord)
    block.describe(x, kept, out)
    sum_slices(block, x.dtype, ord, omit_nan)
    return out, trimmed(scale)


def clip_array(
    x: Array, clip_norm: Any, axes: tuple[int, ...], *, threads: int, ord: float = 2, omit_nan: bool
) -> tuple[Array, Array]:
    """`clip_block`, a large one in parts along the axis that memory runs along slowest.

    Returns the clipped array and the norms, with reduced axes of size 1.
    """
    how: Any = {"omit_nan": omit_nan, "ord": ord}
    if x.nbytes < LARGE or threads < 2:
        out, scale = clip_block(x, clip_norm, axes, **how)
        return out, scale.norm
    out = np.empty_like(x, subok=False)
    norm = np.empty(tuple(1 if k in axes else n for k, n in enumerate(x.shape)))
    axis = max(range(x.ndim), key=lambda k: (x.shape[k] > 1, abs(x.strides[k])))
    step = ceil_div(x.shape[axis], PARTS * threads)
    parts = [(slice(None),) * axis + (slice(i, i + step),) for i in range(0, x.shape[axis], step)]

    def clip(part: Any) -> None:
        limit = limit_at(clip_norm, norm.shape, part)
        norm[part] = clip_block(x[part], limit, axes, out=out[part], **how)[1].norm

    with ThreadPoolExecutor(threads) as pool:
        if axis not in axes:
            list(pool.map(clip, parts))
            return out, norm
        partials = pool.map(lambda part: partial_norm(x[part], axes, **how), parts)
        scale = finalize(combine(list(partials)), clip_norm, x.dtype)
        list(pool.map(lambda part: rescale(x[part], scale, out[part]), parts))
    return out, scale.norm


def require_finite(
    x: Array,
    axes: tuple[int, ...],
    limit: Any,
    start: Sequence[int] | None = None,
    chunk_of: Callable[[list[int]], Sequence[int]] | None = None,
) -> None:
    """Raise for the first slice of a block that holds NaN or infinity and has a limit.

    ``start`` is the place of the block in its array; ``chunk_of`` tells the chunk of an element.
    """
    bad = ~np.isfinite(x)
    bad &= np.not_equal(limit, math.inf)
    found = np.argwhere(bad.any(axis=axes, keepdims=True))
    if not len(found):
        return
    inside = tuple(slice(None) if k in axes else slice(i, i + 1) for k, i in enumerate(found[0]))
    element = np.argwhere(bad[inside])[0] + [s.start or 0 for s in inside]
    place = [int(i) + (start[k] if start else 0) for k, i in enumerate(element)]
    # Dask does not know the place of chunks of unknown size: nan
    shown = [":" if k in axes else str(i) if i == i else "?" for k, i in enumerate(place)]
    where = f" (chunk {tuple(chunk_of(place))})" if chunk_of else ""
    raise NonFiniteError(
        f"slice [{', '.join(shown)}] holds nan or infinity{where}; "
        "use nonfinite='propagate' or 'omit'"
    )
