"""From exact sums to the norm and the factor of every slice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from daskclip.numerics.compiled import Array, Block, DType, format_of
from daskclip.numerics.partial import ORDERS, Partial

Limits = float | npt.NDArray[np.float64]
"""One limit, or an array of limits that broadcasts against the norms."""
ZEROS = -1.0  # of kernel.c


class Scale(NamedTuple):
    """Factors of slices, and their norms; every array has the kept shape."""

    factor: Array
    """float64; 1 leaves the slice as it is, and `ZEROS` makes it +0.0, whatever it holds."""
    shift: Array | None
    """int32, power of two still to be applied to float64 slices, or None where all are 0."""
    toward_zero: Array | None
    """uint8, 1 where subnormal results are rounded toward zero, since rounding them to nearest
    could break the bound, 2 or 3 where all results of float64 are; or None if no slice needs it."""
    norm: Array
    """float64, correctly rounded; NaN and inf where such elements were met, or 0 if these slices
    become zeros."""
    flags: Array
    """uint8, flags of `Partial`: an infinite slice differs from one whose norm exceeds float64, and
    one that becomes zeros from one that was zero."""

    def reshape(self, kept: tuple[int, ...]) -> Scale:
        """Return the same factors for another form of the kept shape."""
        reshaped: Any = (None if a is None else a.reshape(kept) for a in self)
        return Scale(*reshaped)


def finalize(
    partial: Partial,
    clip_norm: Limits,
    dtype: DType,
    *,
    zero: bool = False,
    normalize: Sequence[DType] = (),
) -> Scale:
    """Norms of all slices, and the factors that bring them to at most ``clip_norm``.

    Parameters
    ----------
    partial : Partial
        Exact sums over whole slices.
    clip_norm : float or array that broadcasts against the sums
        Limits; negative ones count as 0, infinity leaves everything as it is, NaN gives NaN.
    dtype : dtype
        Dtype of the array that will be rescaled.
    zero : bool
        Whether slices that hold NaN or infinity become zeros, of norm 0.
    normalize : sequence of dtype
        Dtypes of all arrays that the sums are of, to bring every slice to its limit, from below
        too: `decide.h` explains how close. Empty to leave slices below it as they are.

    Returns
    -------
    Scale
        A pure function of the sums and the other arguments.

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
    kept = partial.flags.shape
    block, scale = prepare_scale(
        kept, clip_norm, dtype, partial.terms, partial.ord, zero=zero, normalize=normalize
    )
    block.point(limbs=np.ascontiguousarray(partial.limbs))
    block.used[:] = partial.low, partial.low + len(partial.limbs)
    block.slices = partial.flags.size
    # the kernel reads the flags of the sums where it would write those of elements
    scale.flags[...] = partial.flags
    block.run("finalize_slices")
    return without_zeros(scale)


def prepare_scale(
    kept: tuple[int, ...],
    clip_norm: Limits,
    dtype: DType,
    terms: int,
    ord: float,
    *,
    zero: bool,
    normalize: Sequence[DType],
) -> tuple[Block, Scale]:
    """Arguments of the kernel that concern the limits, and the arrays that it will fill."""
    limit = np.asarray(clip_norm, np.float64)
    if limit.ndim:
        limit = np.broadcast_to(limit, kept)
    _, digits, lowest, *_ = format_of(dtype)
    factor, norm, flags = np.empty(kept), np.empty(kept), np.zeros(kept, np.uint8)
    shift = np.zeros(kept, np.int32) if digits == 53 else None
    scale = Scale(factor, shift, np.zeros(kept, np.uint8), norm, flags)
    block = Block(dtype, limit=limit, **scale._asdict())
    block.limits = limit.ndim > 0  # a single limit is not repeated for each slice
    block.power, block.zero = ORDERS[ord].power, zero
    # rounding subnormals moves an element by half of 2**lowest at most, and the lowered factor
    # leaves room for 2**-64 of the limit for float64, else for 2**-30
    error = ORDERS[ord].error_gain(terms)
    block.truncate_below = error * math.ldexp(1.0, lowest + (64 if digits == 53 else 30))
    if normalize:
        # one band for all arrays of a slice: else one of them would stay and another one move
        formats = [format_of(one) for one in normalize]
        block.normalize = min(f.digits for f in formats)
        block.error = error * math.ldexp(1.0, max(f.lowest for f in formats) + 64)
        block.ceiling = min(f.largest for f in formats)
    return block, scale


def without_zeros(scale: Scale) -> Scale:
    """Replace optional arrays that are zero everywhere by None."""
    shift, toward_zero = (a if a is not None and a.any() else None for a in scale[1:3])
    return scale._replace(shift=shift, toward_zero=toward_zero)
