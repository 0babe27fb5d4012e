"""From exact sums to the norm and the factor of every slice."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from daskclip.grid import box_index
from daskclip.numerics.compiled import FORMATS, Array, Block, real_dtype
from daskclip.numerics.partial import ORDERS, Partial


class Scale(NamedTuple):
    """What slices are multiplied by, and their norms; every array of shape kept."""

    factor: Array
    """float64; 1 leaves the slice as it is."""
    shift: Array | None
    """int32, power of two still to be applied to float64 slices, or None where all are 0."""
    toward_zero: Array | None
    """uint8, whether subnormal results are rounded toward zero, since rounding them to nearest
    could break the bound; or None if no slice needs it."""
    norm: Array
    """float64, correctly rounded; NaN and inf where such elements were met."""
    flags: Array
    """uint8, of `Partial`: tells an infinite slice from one whose norm exceeds float64."""


def limit_at(limit: Any, shape: tuple[int, ...], at: Any) -> Any:
    """Limits of a region of slices; one for all stays one."""
    return limit if np.ndim(limit) == 0 else np.broadcast_to(limit, shape)[box_index(at)]


def finalize(partial: Partial, clip_norm: Any, dtype: np.dtype[Any]) -> Scale:
    """Norms of all slices, and the factors that bring them to at most ``clip_norm``.

    Parameters
    ----------
    partial : Partial
        Exact sums over whole slices.
    clip_norm : float or array that broadcasts against the sums
        The limits; negative counts as 0, infinity leaves everything as it is, NaN gives NaN.
    dtype : dtype
        Of the array that will be rescaled.

    Returns
    -------
    Scale
        A pure function of the sums, ``clip_norm`` and ``dtype``.

    Notes
    -----
    Holds the result, 22 bytes a slice, and 1 MB of scratch.

    Examples
    --------
    >>> from daskclip.numerics import partial_norm
    >>> x = np.float32([[3, 4], [0.3, 0.4]])
    >>> scale = finalize(partial_norm(x, (1,)), 1.0, x.dtype)
    >>> scale.norm.ravel().round(3), scale.factor.ravel().round(3)
    (array([5. , 0.5]), array([0.2, 1. ]))
    """
    block, scale = scaling(partial.flags.shape, clip_norm, dtype, partial.terms, partial.ord)
    block.point("limbs", np.ascontiguousarray(partial.limbs))
    block.used[:] = partial.low, partial.low + len(partial.limbs)
    scale.flags[...] = partial.flags
    block.slices = scale.flags.size
    block.run("finalize_slices")
    return trimmed(scale)


def scaling(
    kept: tuple[int, ...], clip_norm: Any, dtype: np.dtype[Any], terms: int, ord: float
) -> tuple[Block, Scale]:
    """What the kernel is to be told of the limits, and the arrays it will fill."""
    limit = np.asarray(clip_norm, np.float64)
    if limit.ndim:
        limit = np.ascontiguousarray(np.broadcast_to(limit, kept))
    _, bits, lowest, *_ = FORMATS[real_dtype(dtype).name]
    factor, norm, flags = np.empty(kept), np.empty(kept), np.zeros(kept, np.uint8)
    shift = np.zeros(kept, np.int32) if bits == 53 else None
    scale = Scale(factor, shift, np.zeros(kept, np.uint8), norm, flags)
    block = Block(dtype, limit=limit, **scale._asdict())
    block.limits = limit.ndim > 0
    block.power = ORDERS[ord].power
    # what rounding subnormals can add, against the room that the lowered factor leaves: 2**-64 of
    # the limit for float64, else 2**-30
    error = ORDERS[ord].error_gain(terms)
    block.tiny = error * math.ldexp(1.0, lowest + (64 if bits == 53 else 30))
    return block, scale


def trimmed(scale: Scale) -> Scale:
    """The same without arrays that are zero everywhere."""
    shift, toward_zero = (a if a is not None and a.any() else None for a in scale[1:3])
    return scale._replace(shift=shift, toward_zero=toward_zero)
