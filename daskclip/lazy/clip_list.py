"""The operation on lists of arrays: one norm for all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np

from daskclip.lazy import graph as lazy
from daskclip.lazy.indexed_slices import IndexedSlices, is_indexed
from daskclip.lazy.inputs import as_arrays, check_name, normalize_clip_norm
from daskclip.numerics import Partial, combine_all, finalize, nan_if_infinite, partial_norm, rescale


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
    arrays, is_lazy = as_arrays(t_list)
    if is_lazy:
        return lazy.global_norm(lazy.total(arrays))
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
    check_name(name)
    limit = normalize_clip_norm(clip_norm)
    used = None if use_norm is None else normalize_clip_norm(use_norm, "use_norm")
    arrays, is_lazy = as_arrays(t_list, isinstance(limit, da.Array) or isinstance(used, da.Array))
    clipped: list[Any]
    total: Any
    if is_lazy:
        clipped, total = lazy.clip_list(arrays, limit, used, name)
    else:
        partial = _total(arrays if used is None else [np.array(used)])
        total = finalize(partial, math.inf, np.dtype(float)).norm[()]
        partial = nan_if_infinite(partial)
        clipped = [
            x if x is None else rescale(x, finalize(partial, limit, x.dtype)) for x in arrays
        ]
    return [
        IndexedSlices(x, t.indices, t.dense_shape) if is_indexed(t) else x
        for t, x in zip(t_list, clipped, strict=True)
    ], total


def _total(arrays: list[Any]) -> Partial:
    return combine_all([partial_norm(x, tuple(range(x.ndim))) for x in arrays if x is not None])
