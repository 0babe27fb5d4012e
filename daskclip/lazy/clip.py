"""The operation on one array: NumPy at once, Dask and Zarr lazily."""

from __future__ import annotations

import math
from typing import Any

import dask
import dask.array as da
import numpy as np
from dask.system import CPU_COUNT

from daskclip.arguments import NonFinite, check_nonfinite, parse_axes, parse_ord
from daskclip.lazy import graph as lazy
from daskclip.lazy.indexed_slices import IndexedSlices, is_indexed
from daskclip.lazy.inputs import as_array, check_name, normalize_clip_norm, normalize_limits
from daskclip.numerics import clip_array, finalize, partial_norm, require_finite


def clip_by_norm(
    t: Any,
    clip_norm: Any = None,
    axes: Any = None,
    name: str | None = None,
    *,
    ord: float = 2,
    limits: Any = None,
    nonfinite: NonFinite = "propagate",
    return_norm: bool = False,
) -> Any:
    """Clip the norm of every slice of ``t`` over ``axes`` to at most ``clip_norm``.

    A slice whose norm is at most ``clip_norm`` is not modified; a larger one becomes
    ``t * clip_norm / norm``. The norm of every finite slice of the result, in exact arithmetic, is
    at most ``clip_norm``, and the bits of the result depend on neither chunks nor scheduler.

    Parameters
    ----------
    t : array of any shape, or IndexedSlices
        Floating point or complex: NumPy (also lists and scalars), Dask or Zarr.
    clip_norm : float or 0-d array
        The limit, used as exact float64; may be a lazy Dask array. Negative counts as 0, infinity
        leaves ``t`` unchanged, NaN gives NaN. None with ``limits``.
    axes : None, int or sequence of int
        Axes over which the norm is taken; None takes all, ``[]`` makes every element a slice.
    name : str, optional
        Prefix of the Dask layer.
    ord : {1, 2, inf}
        Which norm: the sum of magnitudes, the root of the sum of their squares, or the largest
        magnitude; complex arrays have 2 only.
    limits : array of a shape that broadcasts against the norms with reduced axes of size 1
        A limit for each slice, each one as ``clip_norm``: NumPy, Dask or Zarr.
    nonfinite : {'propagate', 'omit', 'raise'}
        ``'propagate'``: a NaN makes its slice NaN; an infinity makes the finite elements of its
        slice 0 and the infinite ones NaN. ``'omit'``: NaN elements do not count and stay NaN.
        ``'raise'``: an error when the result is computed.
    return_norm : bool
        Return the norms as well.

    Returns
    -------
    clipped : array of the shape of t
        Of the dtype and byte order of ``t``; NumPy for NumPy, Dask for Dask and Zarr,
        IndexedSlices for IndexedSlices.
    norm : array of the shape of t without axes
        float64, correctly rounded; only with ``return_norm``.

    Raises
    ------
    TypeError
        If ``t`` is not floating point or complex, or complex for another ``ord`` than 2, or an
        argument is of a wrong type.
    ValueError
        If ``clip_norm`` is not 0-D, an axis is named twice, there is no such ``ord``, or
        ``limits`` do not broadcast or are given beside ``clip_norm``.
    numpy.exceptions.AxisError
        If an axis is out of bounds.
    FloatingPointError
        When computing, if ``nonfinite='raise'`` and NaN or infinity is met.

    See Also
    --------
    clip_by_global_norm : One norm for a list of arrays.
    clip_zarr : From storage to storage with bounded memory.

    Notes
    -----
    Reads: a Dask array whose reduced axes lie within one chunk is read once. Otherwise each chunk
    is made twice, for the norms and for the result, so that no chunk waits in memory: work
    upstream is done twice (persist or store what is expensive), and a source that gives other
    values the second time breaks the bound. Chunks in memory or persisted are used as they are,
    and chunks that share their slices are held instead if all of them have less than 16 MiB. What
    several chunks need of an array 16 times smaller, such as a mean, is made once and held, and so
    is a chunk upstream that more than 64 chunks need.

    Memory: a chunk and its result per thread, some 2 MB of scratch, and for each slice the
    partial sums (some 20 bytes; at most 80 for float32, 550 for float64) of the chunks that Dask
    combines at a time, and 8 bytes for ``limits``. NumPy: the result and the scratch.

    The exact norm is compared, so a limit that is its rounding to float64 may be just below it.

    References
    ----------
    `tf.clip_by_norm <https://www.tensorflow.org/api_docs/python/tf/clip_by_norm>`_

    Examples
    --------
    >>> clip_by_norm(np.float32([[1, 2, 3, 4, 5]]), 2.0)
    array([[0.26967993, 0.53935987, 0.80903983, 1.0787197 , 1.3483996 ]],
          dtype=float32)
    """
    check_name(name)
    check_nonfinite(nonfinite)
    x = as_array(t.values if is_indexed(t) else t)
    over = parse_axes(axes, x.ndim)
    ord = parse_ord(ord, x.dtype)
    limit = (
        normalize_clip_norm(clip_norm)
        if limits is None
        else normalize_limits(limits, clip_norm, x, over)
    )
    if isinstance(limit, da.Array) and not isinstance(x, da.Array):
        x = da.from_array(x, chunks=-1)
    clipped: Any
    norms: Any
    if isinstance(x, da.Array):
        clipped, norms = lazy.clip(x, limit, over, name, nonfinite, ord)
    else:
        if nonfinite == "raise":
            require_finite(x, over, limit)
        threads = int(dask.config.get("num_workers", None) or CPU_COUNT)
        omit = nonfinite == "omit"
        clipped, norms = clip_array(x, limit, over, omit_nan=omit, ord=ord, threads=threads)
        norms = norms.squeeze(over)[()]
        if x.ndim == 0 and not isinstance(t, np.ndarray):
            clipped = clipped[()]
    if is_indexed(t):
        clipped = IndexedSlices(clipped, t.indices, t.dense_shape)
    return (clipped, norms) if return_norm else clipped


def norm(t: Any, axes: Any = None, *, keepdims: bool = False, ord: float = 2) -> Any:
    """Norm of every slice of ``t`` over ``axes``.

    Parameters
    ----------
    t : array of any shape, or IndexedSlices
        See `clip_by_norm`.
    axes : None, int or sequence of int
        Axes over which the norm is taken; None takes all.
    keepdims : bool
        Keep the reduced axes with size 1.
    ord : {1, 2, inf}
        See `clip_by_norm`.

    Returns
    -------
    array of the shape of t without axes
        float64, correctly rounded; lazy where ``t`` is.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `clip_by_norm`.

    See Also
    --------
    global_norm : One norm for a list of arrays.

    Notes
    -----
    Reads each chunk once; holds what `clip_by_norm` holds for the partial sums.

    References
    ----------
    `tf.norm <https://www.tensorflow.org/api_docs/python/tf/norm>`_

    Examples
    --------
    >>> norm(np.float32([[3, 4], [6, 8]]), axes=1)
    array([ 5., 10.])
    """
    x = as_array(t.values if is_indexed(t) else t)
    over = parse_axes(axes, x.ndim)
    ord = parse_ord(ord, x.dtype)
    if isinstance(x, da.Array):
        return lazy.norm(x, over, keepdims, ord)
    norms = finalize(partial_norm(x, over, ord=ord), math.inf, x.dtype).norm
    return norms if keepdims else norms.squeeze(over)[()]
