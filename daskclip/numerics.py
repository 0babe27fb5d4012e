"""Rescaling NumPy blocks, and the whole operation on a block that holds its slices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from daskclip import kernels
from daskclip.blocks import boxes, ceil_div, index, tile_shape, tiles
from daskclip.errors import NonFiniteError
from daskclip.exact import partial_norm
from daskclip.factor import PRECISION, Scale, finalize, limit_at
from daskclip.partials import SLICES, combine

Array = npt.NDArray[Any]
LARGE = 1 << 23  # bytes from which several threads pay
PARTS = 4  # a thread
TILE = 1 << 14  # elements that are rescaled at a time: they stay in the cache


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
    Holds 128 KiB of scratch beside the result.

    Examples
    --------
    >>> x = np.float32([[3, 4]])
    >>> rescale(x, finalize(partial_norm(x, (1,)), 1.0, x.dtype))
    array([[0.59999996, 0.79999995]], dtype=float32)
    """
    if out is None:
        out = np.empty_like(x, subok=False)
    if x.dtype.kind == "c":
        rescale(x.real, scale, out.real)
        rescale(x.imag, scale, out.imag)
        return out
    with np.errstate(all="ignore"):
        if (scale.factor == 1.0).all():
            if out is not x:
                out[...] = x
        elif x.dtype.itemsize == 8:
            _rescale_double(x, scale, out)
        elif np.any(scale.toward_zero) or not kernels.rescale(x, scale.factor, out):
            _rescale_tiles(x, scale, out)
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
        What was done, for the record; its shifts are left out.

    Notes
    -----
    Works on 2**13 slices at a time, so that what it holds per slice stays at some 4 MB.

    Examples
    --------
    >>> clip_block(np.float32([[3, 4]]), 2.5, (1,))[1].norm
    array([[5.]])
    """
    if out is None:
        out = np.empty_like(x, subok=False)
    shape = tuple(1 if k in axes else n for k, n in enumerate(x.shape))
    done = Scale(np.empty(shape), None, False, np.empty(shape), np.zeros(shape, np.uint8))
    limit = np.asarray(clip_norm, np.float64)
    rows = kernels.clip_rows(x, float(limit), axes, out) if ord == 2 and not limit.ndim else None
    if rows is not None:
        done.factor.reshape(-1)[:], done.norm.reshape(-1)[:], left = rows
        source, target = x.reshape(len(left), -1), out.reshape(len(left), -1)
        found = np.flatnonzero(left)
        step = ceil_div(kernels.LONGEST, source.shape[1])
        for at in (found[i : i + step] for i in range(0, len(found), step)):
            some = source[at]
            scale = finalize(partial_norm(some, (1,), omit_nan=omit_nan), limit, x.dtype)
            target[at] = rescale(some, scale, some)
            for field in ("factor", "norm", "flags"):
                getattr(done, field).reshape(-1)[at] = getattr(scale, field)[:, 0]
        return out, done
    for kept in boxes(shape, tile_shape(shape, SLICES)):
        region = index(tuple(slice(None) if k in axes else s for k, s in enumerate(kept)))
        part = x[region]
        summed = partial_norm(part, axes, omit_nan=omit_nan, ord=ord)
        scale = finalize(summed, limit_at(limit, shape, kept), x.dtype)
        rescale(part, scale, out[region])
        done.factor[kept], done.norm[kept], done.flags[kept] = scale.factor, scale.norm, scale.flags
    return out, done


def clip_array(
    x: Array, clip_norm: Any, axes: tuple[int, ...], *, threads: int, ord: float = 2, omit_nan: bool
) -> tuple[Array, Scale]:
    """`clip_block`, a large one in parts along the axis that memory runs along slowest."""
    how: Any = {"omit_nan": omit_nan, "ord": ord}
    if x.nbytes < LARGE or threads < 2:
        return clip_block(x, clip_norm, axes, **how)
    out = np.empty_like(x, subok=False)
    kept = tuple(1 if k in axes else n for k, n in enumerate(x.shape))
    axis = max(range(x.ndim), key=lambda k: (x.shape[k] > 1, abs(x.strides[k])))
    step = ceil_div(x.shape[axis], PARTS * threads)
    parts = [(slice(None),) * axis + (slice(i, i + step),) for i in range(0, x.shape[axis], step)]

    def clip(part: Any) -> Scale:
        return clip_block(x[part], limit_at(clip_norm, kept, part), axes, out=out[part], **how)[1]

    with ThreadPoolExecutor(threads) as pool:
        if axis not in axes:
            found = ((s.factor, s.norm, s.flags) for s in pool.map(clip, parts))
            factor, norm, flags = (np.concatenate(a, axis) for a in zip(*found, strict=True))
            return out, Scale(factor, None, False, norm, flags)
        partials = pool.map(lambda part: partial_norm(x[part], axes, **how), parts)
        scale = finalize(combine(list(partials)), clip_norm, x.dtype)
        list(pool.map(lambda part: rescale(x[part], scale, out[part]), parts))
    return out, scale


def warm_up(dtype: np.dtype[Any], size: int) -> None:
    """Load what blocks of ``size`` bytes need of compiled loops: it stays, and is no block's."""
    if size > kernels.LEAST:
        x = np.ones((2, kernels.LEAST // dtype.itemsize), dtype)
        clip_block(x, 1.0, (1,), out=x)
        rescale(x, finalize(partial_norm(x, (0, 1)), 1.0, dtype), x)


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


def _rescale_tiles(x: Array, scale: Scale, out: Array) -> None:
    bits, lowest = PRECISION[x.dtype.name]
    keep = -(1 << (53 - bits))
    order = sorted(range(x.ndim), key=lambda k: -abs(x.strides[k]))
    source, target = x.transpose(order), out.transpose(order)
    factor = np.broadcast_to(scale.factor, x.shape).transpose(order)
    cut = np.any(scale.toward_zero)
    toward_zero = np.broadcast_to(scale.toward_zero, x.shape).transpose(order)
    scratch = np.empty(min(TILE, x.size))
    for t in tiles(source.shape, TILE):
        tile = source[index(t)]
        z = scratch[: tile.size].reshape(tile.shape)
        np.multiply(tile, factor[t], out=z)
        z.view(np.int64)[...] &= keep
        if cut:
            z *= math.ldexp(1.0, -lowest)
            np.trunc(z, out=z, where=toward_zero[t])
            z *= math.ldexp(1.0, lowest)
        target[t] = z


def _rescale_double(x: Array, scale: Scale, out: Array) -> None:
    shift = 0 if scale.shift is None else scale.shift
    cut = np.any(scale.toward_zero)
    if cut:  # products with room for all bits; first, since `out` may be `x`
        mantissa, exponent = np.frexp(scale.factor)
        up = np.where(np.abs(x) < 1.0, 100, 0)
        y, down = np.abs(np.ldexp(x, up) * mantissa), exponent + shift - up
    np.multiply(x, scale.factor, out=out)
    if scale.shift is not None:
        np.ldexp(out, shift, out=out)
    if cut:
        raised = (np.abs(np.ldexp(out, -down)) > y) & scale.toward_zero
        np.copyto(out, np.nextafter(out, 0.0), where=raised)
