"""Rescaling of NumPy blocks, and clipping of blocks that hold their slices whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt

from daskclip.errors import InvalidValueError, NonFiniteError
from daskclip.grid import Box, ceil_div
from daskclip.numerics.compiled import Array, Block
from daskclip.numerics.partial import combine, kept_shape, partial_norm, sum_slices, term_count
from daskclip.numerics.scale import Limits, Scale, finalize, prepare_scale, without_zeros

LARGE = 1 << 23  # bytes from which several threads pay
PARTS = 4  # parts of an array for each thread, which may take unequal times


def rescale(x: Array, scale: Scale, out: Array | None = None) -> Array:
    """Multiply every slice of ``x`` by its factor, rounding so that the bound holds.

    Parameters
    ----------
    x : ndarray
        A whole array or any part of it.
    scale : Scale
        Factors of the slices of ``x``; broadcast against it.
    out : ndarray of the shape and dtype of ``x``, optional
        Where to write; may be ``x`` itself.

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
        kept = scale.factor.shape  # () for a global norm
        block.describe(x, (1,) * (x.ndim - len(kept)) + kept, out)
        block.run("rescale_slices")
    return out


def clip_block(
    x: Array,
    clip_norm: Limits,
    axes: tuple[int, ...],
    *,
    omit_nan: bool = False,
    zero: bool = False,
    normalize: bool = False,
    ord: float = 2,
    out: Array | None = None,
) -> tuple[Array, Scale]:
    """Clip the slices of a block that holds them whole.

    Parameters
    ----------
    x : ndarray
        Floating point or complex elements.
    clip_norm : float or array that broadcasts against the norms with reduced axes of size 1
        See `finalize`.
    axes : tuple of int
        Axes to reduce, not negative, without repetition.
    omit_nan : bool
        Leave NaN elements out of the norms.
    zero, normalize : bool
        See `finalize`.
    ord : float
        See `partial_norm`.
    out : ndarray of the shape and dtype of ``x``, optional
        Where to write; may be ``x`` itself.

    Returns
    -------
    clipped : ndarray
        ``out``, of the shape and dtype of ``x``.
    scale : Scale
        Norms and factors.

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
    if not x.size:
        return out, finalize(partial_norm(x, axes, omit_nan=omit_nan, ord=ord), clip_norm, x.dtype)
    kept, terms = kept_shape(x.shape, axes), term_count(x.shape, axes, x.dtype)
    dtypes = (x.dtype,) * normalize
    block, scale = prepare_scale(kept, clip_norm, x.dtype, terms, ord, zero=zero, normalize=dtypes)
    block.describe(x, kept, out)
    sum_slices(block, x.dtype, ord, omit_nan)
    return out, without_zeros(scale)


def clip_array(
    x: Array,
    clip_norm: Limits,
    axes: tuple[int, ...],
    *,
    threads: int,
    ord: float,
    omit_nan: bool,
    zero: bool = False,
    normalize: bool = False,
) -> tuple[Array, Array]:
    """Clip an array like `clip_block`; a large one in parts, by several threads.

    Returns the clipped array and the norms, with reduced axes of size 1.
    """
    clip = partial(
        clip_block, axes=axes, omit_nan=omit_nan, zero=zero, normalize=normalize, ord=ord
    )
    if x.nbytes < LARGE or threads < 2:
        out, scale = clip(x, clip_norm)
        return out, scale.norm
    out = np.empty_like(x, subok=False)
    norm = np.empty(kept_shape(x.shape, axes))
    # parts along the axis of the longest stride are the most contiguous
    axis = max(range(x.ndim), key=lambda k: (x.shape[k] > 1, abs(x.strides[k])))
    step = ceil_div(x.shape[axis], PARTS * threads)
    parts = [(slice(None),) * axis + (slice(i, i + step),) for i in range(0, x.shape[axis], step)]

    def clip_part(part: Box) -> None:
        # a single limit stays one, and takes no memory for each slice
        limit = np.broadcast_to(clip_norm, norm.shape)[part] if np.ndim(clip_norm) else clip_norm
        norm[part] = clip(x[part], limit, out=out[part])[1].norm

    with ThreadPoolExecutor(threads) as pool:
        if axis not in axes:
            list(pool.map(clip_part, parts))  # a list raises what a part has raised
            return out, norm
        # every slice lies in all parts: their sums come first
        sum_part = partial(partial_norm, axes=axes, omit_nan=omit_nan, ord=ord)
        sums = combine([*pool.map(sum_part, (x[part] for part in parts))])
        scale = finalize(sums, clip_norm, x.dtype, zero=zero, normalize=(x.dtype,) * normalize)
        list(pool.map(lambda part: rescale(x[part], scale, out[part]), parts))
    return out, scale.norm


def require_limits(limits: Limits, what: str, start: Sequence[int] | None = None) -> None:
    """Raise for the first of some limits that is below 0 or NaN.

    ``start`` is the position of the limits in an array of them.
    """
    # NaN compares as false
    found = np.argwhere(~np.greater_equal(limits, 0))
    if len(found):
        place = [int(i) + (start[k] if start else 0) for k, i in enumerate(found[0])]
        value = np.asarray(limits)[tuple(found[0])]
        raise InvalidValueError(
            f"{what}{place or ''} is {value}, and slices would be destroyed by it; give 0 or more, "
            "or inf for no limit"
        )


def require_finite(
    x: Array,
    axes: tuple[int, ...],
    limit: Limits,
    start: Sequence[int] | None = None,
    chunk_of: Callable[[list[int]], Sequence[int]] | None = None,
) -> None:
    """Raise for the first slice of a block that holds NaN or infinity and has a finite limit.

    ``start`` is the position of the block in its array; ``chunk_of`` maps the position of an
    element to that of its chunk.
    """
    # ml_dtypes warns of a signaling NaN
    with np.errstate(invalid="ignore"):
        bad: npt.NDArray[np.bool_] = ~np.isfinite(x)
    bad &= np.not_equal(limit, math.inf)  # infinity clips nothing, so it refuses nothing
    found = np.argwhere(bad.any(axis=axes, keepdims=True))
    if not len(found):
        return
    inside = tuple(slice(None) if k in axes else slice(i, i + 1) for k, i in enumerate(found[0]))
    element = np.argwhere(bad[inside])[0] + [s.start or 0 for s in inside]
    position = [int(i) + (start[k] if start else 0) for k, i in enumerate(element)]
    # Dask gives the start of chunks of unknown size as nan
    shown = [":" if k in axes else "?" if math.isnan(i) else str(i) for k, i in enumerate(position)]
    where = f" (chunk {tuple(chunk_of(position))})" if chunk_of else ""
    raise NonFiniteError(
        f"slice [{', '.join(shown)}] holds nan or infinity{where}; "
        "use nonfinite='propagate', 'omit' or 'zero'"
    )
