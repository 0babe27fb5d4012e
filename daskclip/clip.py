"""The operation on arrays: NumPy at once, Dask and Zarr lazily."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
from dask import config

from daskclip import lazy, storage
from daskclip.errors import DTypeError, InvalidTypeError
from daskclip.exact import Partial, combine_all, partial_norm
from daskclip.indexed import IndexedSlices, is_indexed
from daskclip.numerics import clip_block, finalize, nan_if_infinite, require_finite, rescale
from daskclip.parameters import (
    NonFinite,
    check_dtype,
    check_nonfinite,
    check_scalar,
    parse_axes,
    parse_clip_norm,
)


def clip_by_norm(
    t: Any,
    clip_norm: Any,
    axes: Any = None,
    name: str | None = None,
    *,
    nonfinite: NonFinite = "propagate",
    return_norm: bool = False,
) -> Any:
    """Clip the L2-norm of every slice of ``t`` over ``axes`` to at most ``clip_norm``.

    A slice whose norm is at most ``clip_norm`` is not modified; a larger one becomes
    ``t * clip_norm / norm``. The norm of every finite slice of the result, in exact arithmetic, is
    at most ``clip_norm``, and the bits of the result depend on neither chunks nor scheduler.

    Parameters
    ----------
    t : array of any shape, or IndexedSlices
        Floating point or complex: NumPy (also lists and scalars), Dask or Zarr.
    clip_norm : float or 0-d array
        The limit, used as exact float64; may be a lazy Dask array. Negative counts as 0, infinity
        leaves ``t`` unchanged, NaN gives NaN.
    axes : None, int or sequence of int
        Axes over which the norm is taken; None takes all, ``[]`` makes every element a slice.
    name : str, optional
        Prefix of the Dask layer.
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
        If ``t`` is not floating point or complex, or an argument is of a wrong type.
    ValueError
        If ``clip_norm`` is not 0-D, or an axis is named twice.
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
    more than 16 chunks need, such as a mean, is made once and held.

    Memory: a chunk and its result per thread, some 10 MB of scratch, and for each slice the
    partial sums (some 20 bytes; at most 80 for float32, 550 for float64) of the chunks that Dask
    combines at a time. NumPy: the result and the scratch.

    References
    ----------
    `tf.clip_by_norm <https://www.tensorflow.org/api_docs/python/tf/clip_by_norm>`_

    Examples
    --------
    >>> clip_by_norm(np.float32([[1, 2, 3, 4, 5]]), 2.0)
    array([[0.26967993, 0.53935987, 0.8090398 , 1.0787197 , 1.3483996 ]],
          dtype=float32)
    """
    _check_name(name)
    check_nonfinite(nonfinite)
    if is_indexed(t):
        result = clip_by_norm(
            t.values, clip_norm, axes, name, nonfinite=nonfinite, return_norm=return_norm
        )
        values, norms = result if return_norm else (result, None)
        slices = IndexedSlices(values, t.indices, t.dense_shape)
        return (slices, norms) if return_norm else slices
    x = _array(t)
    over = parse_axes(axes, x.ndim)
    limit = _limit(clip_norm)
    if isinstance(limit, da.Array) and not isinstance(x, da.Array):
        x = da.from_array(x, chunks=-1)
    if isinstance(x, da.Array):
        clipped, norms = lazy.clip(x, limit, over, name, nonfinite)
    else:
        if nonfinite == "raise" and limit != math.inf:
            require_finite(x, over)
        clipped, scale = clip_block(x, limit, over, omit_nan=nonfinite == "omit")
        norms = scale.norm.squeeze(over)
        if isinstance(t, np.generic):
            clipped = clipped[()]
    return (clipped, norms) if return_norm else clipped


def norm(t: Any, axes: Any = None, *, keepdims: bool = False) -> Any:
    """L2-norm of every slice of ``t`` over ``axes``.

    Parameters
    ----------
    t : array of any shape, or IndexedSlices
        See `clip_by_norm`.
    axes : None, int or sequence of int
        Axes over which the norm is taken; None takes all.
    keepdims : bool
        Keep the reduced axes with size 1.

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
    x = _array(t.values if is_indexed(t) else t)
    over = parse_axes(axes, x.ndim)
    if isinstance(x, da.Array):
        return lazy.norm(x, over, keepdims)
    norms = finalize(partial_norm(x, over), math.inf, x.dtype).norm
    return norms if keepdims else norms.squeeze(over)[()]


def global_norm(t_list: Sequence[Any]) -> Any:
    """L2-norm of all elements of all arrays of a list.

    Parameters
    ----------
    t_list : sequence of arrays of any shape, IndexedSlices or None
        Dtypes may differ; None is passed over.

    Returns
    -------
    array of shape ()
        float64, correctly rounded; a Dask array if any of the list is lazy.

    Raises
    ------
    TypeError
        If ``t_list`` is not a sequence, or one of it is not floating point or complex.

    See Also
    --------
    clip_by_global_norm : Clips by this norm.

    Notes
    -----
    Reads each array once.

    References
    ----------
    `tf.linalg.global_norm <https://www.tensorflow.org/api_docs/python/tf/linalg/global_norm>`_

    Examples
    --------
    >>> global_norm([np.float32([3]), None, np.float64([4])])
    np.float64(5.0)
    """
    arrays, is_lazy = _arrays(t_list)
    if is_lazy:
        return lazy.global_scale(lazy.total(arrays), math.inf, np.dtype(float))[1]
    return finalize(_total(arrays), math.inf, np.dtype(float)).norm[()]


def clip_by_global_norm(
    t_list: Sequence[Any], clip_norm: Any, use_norm: Any = None, name: str | None = None
) -> tuple[list[Any], Any]:
    """Clip all arrays of a list by one factor, that of their global norm.

    Parameters
    ----------
    t_list : sequence of arrays of any shape, IndexedSlices or None
        Dtypes may differ; None stays None.
    clip_norm : float or 0-d array
        See `clip_by_norm`.
    use_norm : float or 0-d array, optional
        The global norm, if it is known; it is believed.
    name : str, optional
        Prefix of the Dask layers.

    Returns
    -------
    clipped : list
        As `t_list`; lazy if any of it is. All NaN if the global norm is infinite or NaN.
    norm : array of shape ()
        The global norm before clipping, float64.

    Raises
    ------
    TypeError, ValueError
        As `clip_by_norm`.

    See Also
    --------
    clip_by_norm : Every array by its own norm.

    Notes
    -----
    Makes every lazy chunk twice, or once with ``use_norm``; holds what `clip_by_norm` holds.

    References
    ----------
    `tf.clip_by_global_norm <https://www.tensorflow.org/api_docs/python/tf/clip_by_global_norm>`_

    Examples
    --------
    >>> clip_by_global_norm([np.float32([3]), None, np.float32([4])], 10.0)
    ([array([3.], dtype=float32), None, array([4.], dtype=float32)], np.float64(5.0))
    """
    _check_name(name)
    limit = _limit(clip_norm)
    used = None if use_norm is None else _limit(use_norm, "use_norm")
    arrays, is_lazy = _arrays(t_list, isinstance(limit, da.Array) or isinstance(used, da.Array))
    if is_lazy:
        clipped, total = lazy.clip_list(arrays, limit, used, name)
    else:
        partial = _total(arrays if used is None else [np.array(used)])
        total = finalize(partial, math.inf, np.dtype(float)).norm[()]
        partial = nan_if_infinite(partial)
        clipped = [x if x is None else rescale(x, finalize(partial, limit, x.dtype)) for x in arrays]
    return [
        IndexedSlices(x, t.indices, t.dense_shape) if is_indexed(t) else x
        for t, x in zip(t_list, clipped, strict=True)
    ], total


def _check_name(name: Any) -> None:
    if name is not None and not isinstance(name, str):
        raise InvalidTypeError(f"name {name!r} is a {type(name).__name__}; give a string or None")


def _array(t: Any) -> Any:
    """``t`` as a NumPy or Dask array of a dtype and of blocks that can be clipped."""
    if storage.is_array(t):
        check_dtype(t.dtype)
        t = storage.as_dask(t)
    if isinstance(t, da.Array):
        if config.get("array.query-planning", None):
            raise InvalidTypeError(
                "dask arrays made under array.query-planning are not supported; "
                "set array.query-planning to False before importing dask.array"
            )
        check_dtype(t.dtype)
        blocks = type(t._meta)
    else:
        if hasattr(t, "__dask_graph__"):
            raise InvalidTypeError(
                f"{type(t).__module__}.{type(t).__name__} is not an array of numpy, dask or zarr; "
                "pass its .data"
            )
        blocks = type(t) if isinstance(t, np.ma.MaskedArray) else np.ndarray
    if not issubclass(blocks, np.ndarray) or issubclass(blocks, np.ma.MaskedArray):
        raise DTypeError(
            f"blocks of type {blocks.__module__}.{blocks.__name__} cannot be clipped; "
            "convert them to numpy.ndarray, masked ones with .filled(numpy.nan)"
        )
    if isinstance(t, da.Array):
        return t
    x = np.asarray(t)
    check_dtype(x.dtype)
    return x


def _limit(clip_norm: Any, what: str = "clip_norm") -> Any:
    if isinstance(clip_norm, da.Array):
        check_scalar(clip_norm.ndim, clip_norm.dtype, clip_norm.shape, what)
        return clip_norm
    return parse_clip_norm(clip_norm, what)


def _arrays(t_list: Any, is_lazy: bool = False) -> tuple[list[Any], bool]:
    if not isinstance(t_list, Sequence) or isinstance(t_list, str | bytes):
        raise InvalidTypeError(f"t_list is a {type(t_list).__name__}; give a list of arrays")
    arrays = [
        None if t is None else _array(t.values if is_indexed(t) else t) for t in t_list
    ]
    is_lazy = is_lazy or any(isinstance(x, da.Array) for x in arrays)
    if is_lazy:
        arrays = [
            da.from_array(x, chunks=-1) if isinstance(x, np.ndarray) else x for x in arrays
        ]
    return arrays, is_lazy


def _total(arrays: list[Any]) -> Partial:
    return combine_all([partial_norm(x, tuple(range(x.ndim))) for x in arrays if x is not None])
