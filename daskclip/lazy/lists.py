"""The operation on lists of arrays that have norms in common: NumPy at once, Dask lazily."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import dask.array as da
import numpy as np

from daskclip.arguments import Array, Axes, check_flag
from daskclip.lazy import inputs, list_graph
from daskclip.lazy.clip import ClipNorm, Operand
from daskclip.lazy.indexed_slices import with_values
from daskclip.lazy.list_graph import Reduced
from daskclip.numerics import (
    Partial,
    combine,
    finalize,
    kept_shape,
    nan_if_infinite,
    no_sums,
    partial_norm,
    rescale,
    without_axes,
)


def global_norm(t_list: Sequence[Operand | None], *, axes: Axes = None) -> Any:
    """L2-norm of all elements of all arrays of a list, or of each slice over all arrays.

    Parameters
    ----------
    t_list : sequence of arrays of any shape, IndexedSlices or None
        Dtypes may differ; None is ignored.
    axes : None, int, sequence of int or slice
        See `clip_by_global_norm`.

    Returns
    -------
    array of shape (), or of the shape of each array without axes
        float64, correctly rounded; a Dask array if any array of the list is lazy.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `clip_by_global_norm`.

    See Also
    --------
    clip_by_global_norm : Clips by this norm.

    Notes
    -----
    Computes each chunk once. Holds the partial sums that `clip_by_norm` holds.

    References
    ----------
    `tf.linalg.global_norm <https://www.tensorflow.org/api_docs/python/tf/linalg/global_norm>`_

    Examples
    --------
    >>> global_norm([np.float32([3]), None, np.float64([4])])
    np.float64(5.0)
    """
    arrays = inputs.as_arrays(t_list)
    reduced = inputs.reduced_axes(t_list, arrays, axes)
    # one lazy array makes the norm lazy: computing it here could take hours without a warning
    if inputs.is_lazy(arrays):
        return list_graph.global_norm([da.asarray(x, chunks=-1) for x in arrays], reduced)
    return _norm_of(_total(arrays, reduced))


def clip_by_global_norm(
    t_list: Sequence[Operand | None],
    clip_norm: ClipNorm,
    use_norm: ClipNorm | None = None,
    name: str | None = None,
    *,
    axes: Axes = None,
    normalize: bool = False,
) -> tuple[list[Any], Any]:
    """Clip all arrays of a list by one factor, that of their global norm.

    With ``axes``, the arrays share the axes that are kept, and each kept position has a norm and a
    factor over all arrays: ``axes=slice(1, None)`` clips each example by its gradients in all
    layers.

    Parameters
    ----------
    t_list : sequence of arrays of any shape, IndexedSlices or None
        Dtypes may differ; None stays None.
    clip_norm : float or 0-d array
        See `clip_by_norm`.
    use_norm : float or array of the shape of the norms, optional
        Precomputed global norm; not verified.
    name : str, optional
        Prefix of the Dask layers.
    axes : None, int, sequence of int or slice
        Axes of each array over which the norms are taken; None takes all. The others have the same
        lengths, in the same order, in all arrays. A slice may take no axis of an array.
    normalize : bool
        Bring the global norm to the limit, from below too; of the dtypes of the list, the one with
        the fewest bits decides how close `clip_by_norm` says that it comes.

    Returns
    -------
    clipped : list
        As ``t_list``; lazy if any argument is. All NaN where the global norm is infinite or NaN.
    norm : array of shape (), or of the shape of each array without axes
        The global norm before clipping, float64.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `clip_by_norm`. With ``axes``, IndexedSlices are refused, whose rows are not those of
        other arrays, and arrays that keep different shapes.

    See Also
    --------
    clip_by_norm : Every array by its own norm.

    Notes
    -----
    Computes every chunk twice, or once with ``use_norm``. Holds what `clip_by_norm` holds, but no
    chunks between the passes, however small.

    References
    ----------
    `tf.clip_by_global_norm <https://www.tensorflow.org/api_docs/python/tf/clip_by_global_norm>`_

    Examples
    --------
    >>> clip_by_global_norm([np.float32([3]), None, np.float32([4])], 10.0)
    ([array([3.], dtype=float32), None, array([4.], dtype=float32)], np.float64(5.0))
    >>> layers = [np.float32([[3, 0], [6, 0]]), np.float32([4, 8])]
    >>> clip_by_global_norm(layers, 10.0, axes=slice(1, None))[1]
    array([ 5., 10.])
    """
    inputs.check_name(name)
    check_flag(normalize, "normalize")
    # a limit may depend on the data, as use_norm may: both stay lazy where they are
    limit = inputs.normalize_clip_norm(clip_norm)
    arrays = inputs.as_arrays(t_list)
    reduced = inputs.reduced_axes(t_list, arrays, axes)
    kept = next((without_axes(x.shape, own) for x, own in zip(arrays, reduced, strict=True)), ())
    known = None if use_norm is None else inputs.normalize_use_norm(use_norm, kept)
    clipped: Any
    total: Any
    if inputs.is_lazy(arrays) or isinstance(limit, da.Array) or isinstance(known, da.Array):
        lazy = [da.asarray(x, chunks=-1) for x in arrays]
        clipped, total = list_graph.clip_list(
            lazy, reduced, limit, known, name, normalize=normalize
        )
    else:
        clipped, total = _clip_list(arrays, reduced, limit, known, normalize=normalize)
    # None, a variable without a gradient, stays in its place and has no clipped array
    values = iter(clipped)
    return [None if t is None else with_values(t, next(values)) for t in t_list], total


def _clip_list(
    arrays: list[Array],
    axes: Reduced,
    limit: float,
    use_norm: inputs.Limit | None,
    *,
    normalize: bool,
) -> tuple[list[Array], Array]:
    """Arrays clipped by one factor for each kept position and the norms, in memory."""
    total = _total(arrays, axes)
    if use_norm is not None:
        # the norm of an array that holds one number is that number
        total = _total([np.broadcast_to(use_norm, total.flags.shape)], [()])
    # an infinite norm makes a list NaN, an array alone not
    sums = nan_if_infinite(total)
    scale = partial(finalize, sums, limit, normalize=[x.dtype for x in arrays] * normalize)
    clipped = [
        rescale(x, scale(x.dtype).reshape(kept_shape(x.shape, own)))
        for x, own in zip(arrays, axes, strict=True)
    ]
    return clipped, _norm_of(total)


def _total(arrays: Sequence[Array], axes: Reduced) -> Partial:
    """Exact sums over all arrays, of the kept shape."""
    # one sum of exact sums, not of norms: their rounding would make the bits depend on the list
    parts = [
        partial_norm(x, own).reshape(without_axes(x.shape, own))
        for x, own in zip(arrays, axes, strict=True)
    ]
    return combine(parts or [no_sums(())])


def _norm_of(total: Partial) -> Array:
    # float64 whatever the arrays are, since the norm of a list has no other dtype to follow
    norms: Array = finalize(total, math.inf, np.dtype(float)).norm[()]
    return norms
