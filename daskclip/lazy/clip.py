"""The operation on an array: NumPy at once, Dask and Zarr lazily."""

from __future__ import annotations

import math
from typing import Any

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.system import CPU_COUNT

from daskclip.arguments import (
    Array,
    Axes,
    NonFinite,
    check_flag,
    check_nonfinite,
    parse_axes,
    parse_ord,
)
from daskclip.lazy import graph, inputs
from daskclip.lazy.indexed_slices import IndexedSlices, values_of, with_values
from daskclip.numerics import (
    clip_array,
    finalize,
    partial_norm,
    require_finite,
)

Operand = npt.ArrayLike | da.Array | IndexedSlices
"""Array to clip; a Zarr array too, since it follows NumPy's array protocol."""
ClipNorm = npt.ArrayLike | da.Array
"""A real number, or an array of shape () that holds one."""


def clip_by_norm(
    t: Operand,
    clip_norm: ClipNorm | None = None,
    axes: Axes = None,
    name: str | None = None,
    *,
    ord: float = 2,
    limits: npt.ArrayLike | da.Array | None = None,
    nonfinite: NonFinite = "propagate",
    normalize: bool = False,
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
    axes : None, int, sequence of int or slice
        Axes over which the norm is taken; None takes all, ``[]`` makes every element a slice, and
        ``slice(1, None)`` takes all but the first.
    name : str, optional
        Prefix of the Dask layer.
    ord : {1, 2, inf}
        Order of the norm: 1 is the sum of the magnitudes, 2 the square root of the sum of their
        squares, inf the largest magnitude. Complex arrays support 2 only.
    limits : array of a shape that broadcasts against the norms with reduced axes of size 1
        A limit for each slice, with the meaning of ``clip_norm``: NumPy, Dask or Zarr.
    nonfinite : {'propagate', 'omit', 'raise', 'zero'}
        ``'propagate'``: a NaN makes its slice NaN; an infinity makes the finite elements of its
        slice 0 and the infinite ones NaN. ``'omit'``: NaN elements do not count and stay NaN.
        ``'raise'``: an error when the result is computed. ``'zero'``: a slice that holds NaN or
        infinity becomes zeros, and its norm counts as 0.
    normalize : bool
        Bring every slice to its limit, from below too, except zeros.
    return_norm : bool
        Return the norms as well.

    Returns
    -------
    clipped : array of the shape of t
        Of the dtype and byte order of ``t``; NumPy for NumPy, Dask for Dask and Zarr,
        IndexedSlices for IndexedSlices. With a lazy limit, always Dask.
    norm : array of the shape of t without axes
        float64, correctly rounded; only with ``return_norm``.

    Raises
    ------
    TypeError
        If ``t`` is neither floating point nor complex, if it is complex and ``ord`` is not 2, if a
        limit carries a unit, or if an argument has a wrong type. When computing, if a block of a
        Dask array has another type or dtype than the array says.
    ValueError
        If ``clip_norm`` is not 0-D, an axis is repeated, ``ord`` is not supported, or ``limits``
        do not broadcast or are given together with ``clip_norm``.
    numpy.exceptions.AxisError
        If an axis is out of bounds.
    FloatingPointError
        When computing, if ``nonfinite='raise'`` and NaN or infinity is met.
    OSError
        When computing, if a chunk of a Zarr array in a local folder cannot be read.

    See Also
    --------
    clip_by_global_norm : One norm for a list of arrays.
    clip_zarr : From storage to storage with bounded memory.

    Notes
    -----
    **Reads.** A Dask array is computed once if no axis in ``axes`` is split into chunks. Otherwise
    every chunk is computed twice, first for the norms and then for the result, so that no chunk
    is held in between. Upstream work runs twice too: persist or store what is expensive. A source
    that returns other values the second time breaks the bound.

    The following are computed once and held until they have been used:

    - chunks that share their slices, if together they have at most 16 MiB;
    - upstream results that several chunks need, if their array has at most 1/16 of the size of
      ``t``: a mean, for example;
    - upstream chunks that more than 64 chunks of ``t`` need;
    - chunks whose layers are annotated with different workers or resources: no worker may be able
      to run them all in one task.

    Arrays in memory and persisted chunks are used as they are.

    **Zarr.** The chunks of a Dask array made of a Zarr array are its shards, else its chunks. From
    a local folder, each thread decodes them by itself, without zarr's codec pipeline; other stores
    and codecs that may not be lossless are left to zarr.

    **Memory.** Dask holds a chunk, its result and 2 MB of scratch for each thread, and a chunk of a
    Zarr array as it is stored. For each slice it holds the partial sums of the chunks that it
    combines at a time (about 20 bytes each; at most 80 for float32 and 550 for float64) and, with
    ``limits``, 8 bytes. NumPy holds the result and the scratch.

    **Threads.** A NumPy array of 8 MiB or more is clipped by as many threads as Dask's setting
    ``num_workers``, or by one for each CPU.

    **Normalizing.** The exact norm of a slice that was finite and above 0 is at most the limit c
    and at least (1 - 1.875·eps)·c - e. eps is that of ``t``'s dtype, as `numpy.finfo` has it, and e
    the norm of as many of its smallest subnormals as a slice has elements: so much rounding takes
    where results are subnormal. It is at most eps·c / 8, and the norm within 2·eps·c of c, for c =
    1 and 4 million elements of float16 or fewer. A slice that is as close stays as it is, so that
    doing it again changes no bit. A limit above the largest number of the dtype, which one element
    alone could not reach, is that number for slices below it; those between the two stay.

    **Comparison.** ``clip_norm`` is compared with the exact norm. A limit that is a norm rounded
    to float64 may be just below the exact one; then that slice is clipped.

    References
    ----------
    `tf.clip_by_norm <https://www.tensorflow.org/api_docs/python/tf/clip_by_norm>`_

    Examples
    --------
    >>> clip_by_norm(np.float32([[1, 2, 3, 4, 5]]), 2.0)
    array([[0.26967993, 0.53935987, 0.80903983, 1.0787197 , 1.3483996 ]],
          dtype=float32)
    """
    inputs.check_name(name)
    check_nonfinite(nonfinite)
    check_flag(normalize, "normalize")
    x = inputs.as_array(values_of(t))
    # all arguments are checked now, for a lazy result too: a late error has no useful traceback
    operation = inputs.Operation(
        parse_axes(axes, x.ndim), parse_ord(ord, x.dtype), nonfinite, normalize
    )
    limit = inputs.normalize_limit(clip_norm, limits, x, operation.axes)
    clipped: Any
    norms: Any
    # a limit that is not known yet makes the result lazy, whatever the array is
    if isinstance(x, da.Array) or isinstance(limit, da.Array):
        clipped, norms = graph.clip(da.asarray(x, chunks=-1), limit, operation, name)
    else:
        clipped, norms = _clip(x, limit, operation)
        # as in NumPy: a scalar for a scalar, an array for an array of shape ()
        if x.ndim == 0 and not isinstance(t, np.ndarray):
            clipped = clipped[()]
    clipped = with_values(t, clipped)
    return (clipped, norms) if return_norm else clipped


def norm(t: Operand, axes: Axes = None, *, keepdims: bool = False, ord: float = 2) -> Any:
    """Norm of every slice of ``t`` over ``axes``.

    Parameters
    ----------
    t : array of any shape, or IndexedSlices
        See `clip_by_norm`.
    axes : None, int, sequence of int or slice
        Axes over which the norm is taken; None takes all.
    keepdims : bool
        Keep the reduced axes with size 1.
    ord : {1, 2, inf}
        See `clip_by_norm`.

    Returns
    -------
    array of the shape of t without axes
        float64, correctly rounded; lazy if ``t`` is.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `clip_by_norm`.

    See Also
    --------
    global_norm : One norm for a list of arrays.

    Notes
    -----
    Computes each chunk once. Holds the partial sums that `clip_by_norm` holds.

    References
    ----------
    `tf.norm <https://www.tensorflow.org/api_docs/python/tf/norm>`_

    Examples
    --------
    >>> norm(np.float32([[3, 4], [6, 8]]), axes=1)
    array([ 5., 10.])
    """
    x = inputs.as_array(values_of(t))
    operation = inputs.Operation(parse_axes(axes, x.ndim), parse_ord(ord, x.dtype))
    if isinstance(x, da.Array):
        return graph.norm(x, operation, keepdims)
    total = partial_norm(x, operation.axes, ord=operation.ord)
    # no limit is needed for a norm, and an infinite one clips nothing
    norms = finalize(total, math.inf, x.dtype).norm
    # [()] gives a scalar for an array of shape (), as the reductions of NumPy do
    return norms if keepdims else norms.squeeze(operation.axes)[()]


def _clip(
    x: Array, limit: float | npt.NDArray[np.float64], operation: inputs.Operation
) -> tuple[Array, Array]:
    """Clipped array and norms, in memory."""
    if operation.nonfinite == "raise":
        # a pass of its own: clipping does not tell where the first NaN or infinity is
        require_finite(x, operation.axes, limit)
    # as many as Dask's threaded scheduler takes: its CPU count respects the affinity of the process
    # and the limits of the container
    threads = int(dask.config.get("num_workers", None) or CPU_COUNT)
    clipped, norms = clip_array(
        x, limit, operation.axes, threads=threads, ord=operation.ord, omit_nan=operation.omit_nan,
        zero=operation.zero, normalize=operation.normalize,
    )  # fmt: skip
    return clipped, norms.squeeze(operation.axes)[()]
