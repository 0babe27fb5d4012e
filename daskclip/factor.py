"""From an exact sum to the norm and the factor of every slice.

The bound holds exactly because every rounding is on the safe side. float16, bfloat16 and float32:
a factor of 29 bits, rounded down, makes each product exact in float64, and the product is rounded
toward zero. float64: a factor lowered by a little more than the half unit that rounding the product
to nearest can add. Below the normal range, where that half unit is no longer relative, see `Scale`.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from daskclip.blocks import index, tiles
from daskclip.exact import partial_norm
from daskclip.loops import two_product
from daskclip.orders import ORDERS
from daskclip.partials import INF, LIMB, NAN, SLICES, Partial

Array = npt.NDArray[Any]

# dtype name of one real part: (significant bits, exponent of the smallest subnormal)
PRECISION = {
    "float16": (11, -24),
    "bfloat16": (8, -133),
    "float32": (24, -149),
    "float64": (53, -1074),
}
FACTOR_BITS = 29
SHIFT = -900  # exponents of float64 factors below this are kept apart


class Scale(NamedTuple):
    """What a slice is multiplied by, and its norm; every array of shape kept."""

    factor: Array
    """float64; 1 leaves the slice as it is."""
    shift: Array | None
    """int32, power of two still to be applied to float64 slices, or None where all are 0."""
    toward_zero: Array | bool
    """Whether subnormal results are rounded toward zero: rounding them to nearest could break the
    bound."""
    norm: Array
    """float64, correctly rounded; NaN and inf where such elements were met."""
    flags: Array
    """uint8, of `Partial`: tells an infinite slice from one whose norm exceeds float64."""


def real_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Dtype of the real part."""
    return np.dtype(f"f{dtype.itemsize // 2}") if dtype.kind == "c" else dtype


def limit_at(limit: Any, shape: tuple[int, ...], at: Any) -> Any:
    """Limits of a region of slices; one for all stays one."""
    return limit if np.ndim(limit) == 0 else np.broadcast_to(limit, shape)[index(at)]


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
    Holds the result and 2 MB of scratch. A slice whose norm lies so near the middle between two
    float64 that 100 bits do not decide is finished in integers, by itself.

    Examples
    --------
    >>> x = np.float32([[3, 4], [0.3, 0.4]])
    >>> scale = finalize(partial_norm(x, (1,)), 1.0, x.dtype)
    >>> scale.norm.ravel().round(3), scale.factor.ravel().round(3)
    (array([5. , 0.5]), array([0.2, 1. ]))
    """
    limit = np.maximum(np.asarray(clip_norm, np.float64), 0.0)
    bits, lowest = PRECISION[real_dtype(dtype).name]
    shape = partial.flags.shape
    factor, norm, shift = np.empty(shape), np.empty(shape), None
    with np.errstate(all="ignore"):
        for t in tiles(shape, SLICES):
            limbs, flags = partial.limbs[(slice(None), *t)], partial.flags[index(t)]
            part = partial._replace(limbs=limbs, flags=flags)
            norm[t], factor[t], extra = _norm_and_factor(part, limit_at(limit, shape, t), bits)
            if extra is not None:
                shift = np.zeros(shape, np.int32) if shift is None else shift
                shift[t] = extra
    # room that the lowered factor leaves, against what rounding subnormals can add
    room = 64 if bits == 53 else FACTOR_BITS + 1
    error = ORDERS[partial.ord].room(partial.terms)
    toward_zero = np.less(limit, error * math.ldexp(1.0, lowest + room))
    return Scale(factor, shift, toward_zero, norm, partial.flags)


def _norm_and_factor(partial: Partial, limit: Any, bits: int) -> tuple[Array, Array, Array | None]:
    nan, infinite = partial.flags & NAN != 0, partial.flags & INF != 0
    lead = _leading(partial)
    root, low_part, half = _root(lead, ORDERS[partial.ord].power)
    norm = _rounded(partial, root, low_part, half)
    norm = np.where(nan, np.nan, np.where(infinite, np.inf, norm))
    unlimited = limit == math.inf
    if unlimited.all():
        return norm, np.ones_like(norm), None
    finite = np.where(np.isfinite(limit), limit, 1.0)
    mantissa, exponent = _factor(finite, root, low_part, half, bits)
    fraction, power = np.frexp(finite)  # apart: limits far from each other would take many limbs
    limits = _leading(partial_norm(np.asarray(fraction), (), ord=partial.ord))
    limits = limits._replace(exponent=limits.exponent + ORDERS[partial.ord].power * power)
    clipped = _greater(lead, limits) & ~unlimited
    shift = None
    if bits == 53 and (clipped & (exponent < SHIFT)).any():
        shift = np.where(clipped, np.minimum(exponent - SHIFT, 0), 0)
        exponent = np.maximum(exponent, SHIFT)
    factor = np.where(clipped, np.ldexp(mantissa, exponent), 1.0)
    factor = np.where(nan | np.isnan(limit), np.nan, np.where(infinite, 0.0, factor))
    return norm, np.where(unlimited, 1.0, factor), shift


def nan_if_infinite(partial: Partial) -> Partial:
    """Infinite slices count as NaN, as they do for a global norm."""
    return partial._replace(flags=np.where(partial.flags != 0, np.uint8(NAN), partial.flags))


class _Leading(NamedTuple):
    """A sum by its highest 128 bits: (high · 2**64 + low + more) · 2**exponent, high >= 2**63."""

    high: Array
    low: Array
    more: Array
    exponent: Array


def _leading(partial: Partial) -> _Leading:
    limbs = partial.limbs
    kept = limbs.shape[1:]
    if not len(limbs):
        zero = np.zeros(kept, np.uint64)
        return _Leading(zero, zero, zero != 0, np.full(kept, -(1 << 20)))
    full = limbs != 0
    top = len(limbs) - 1 - full[::-1].argmax(axis=0)
    more = full.argmax(axis=0) < top - 4
    padded = np.concatenate([np.zeros((4, *kept), np.uint32), limbs])
    place = (top + 4) * top.size + np.arange(top.size).reshape(kept)
    t = [padded.take(place - i * top.size).astype(np.uint64) for i in range(5)]
    left = (LIMB - np.frexp(t[0].astype(np.float64))[1]).astype(np.uint64)
    right = LIMB - left
    half = np.uint64(LIMB)
    high = (((t[0] << half) | t[1]) << left) | (t[2] >> right)
    low = (((t[2] << half) | t[3]) << left) | (t[4] >> right)
    more |= (t[4] << left) & np.uint64(2**LIMB - 1) != 0
    more &= t[0] != 0
    exponent = LIMB * (partial.low + top - 3) - left.astype(np.int64)
    return _Leading(high, low, more, np.where(t[0] == 0, -(1 << 20), exponent))


def _greater(a: _Leading, b: _Leading) -> Array:
    """Whether a > b, where b has no more than 128 bits."""
    low = (a.low > b.low) | ((a.low == b.low) & a.more)
    high = (a.high > b.high) | ((a.high == b.high) & low)
    greater: Array = (a.exponent > b.exponent) | ((a.exponent == b.exponent) & high)
    return greater


def _root(lead: _Leading, power: int) -> tuple[Array, Array, Array]:
    """Root of a sum to some 100 bits: (root + low_part) · 2**half, root in [2**26, 2**27]."""
    a = (lead.high >> np.uint64(11)).astype(np.float64)
    rest = ((lead.high & np.uint64(2047)) << np.uint64(42)) | (lead.low >> np.uint64(22))
    b = np.ldexp(rest.astype(np.float64), -53)
    exponent = lead.exponent + 75
    if power == 1:
        root = a + b
        low_part = (a - root) + b
        return root * 2.0**-26, low_part * 2.0**-26, (exponent + 26).astype(np.int32)
    odd = (exponent & 1) * 1.0 + 1.0
    a, b = a * odd, b * odd
    first = np.sqrt(a)
    square, error = two_product(first, first)
    delta = np.where(a == 0, 0.0, (((a - square) - error) + b) / (2.0 * first))
    root = first + delta
    return root, (first - root) + delta, ((exponent - (exponent & 1)) // 2).astype(np.int32)


def _rounded(partial: Partial, root: Array, low_part: Array, half: Array) -> Array:
    """Correctly rounded norm; what 100 bits do not decide is decided by all of them."""
    eps = 2.0**-40
    undecided = root + low_part * (1 + eps) != root + low_part * (1 - eps)
    # `root` is the sum rounded to nearest; near a tie a smaller low part could round elsewhere
    half_gap = np.abs(np.spacing(root)) / 2
    undecided |= np.abs(np.abs(low_part) - half_gap) <= half_gap * eps
    undecided |= np.abs(np.abs(low_part) - half_gap / 2) <= half_gap * eps  # below a power of two
    undecided |= half < -1040
    norm = np.where(root == 0, 0.0, np.ldexp(root, half))
    for place in map(tuple, np.argwhere(undecided & (root > 0))):
        norm[place] = _exact_norm(partial, place)
    return norm


def _exact_norm(partial: Partial, index: tuple[Any, ...]) -> float:
    limbs = partial.limbs[(slice(None), *index)]
    total = int.from_bytes(np.ascontiguousarray(limbs, "<u4").tobytes(), "little")
    extra = max(0, 140 - total.bit_length())
    exponent = LIMB * partial.low - extra
    extra += exponent & 1
    exponent -= exponent & 1
    root = math.isqrt(total << extra)
    sticky = root * root != total << extra
    norm = Fraction(2 * root + sticky) * Fraction(2) ** (exponent // 2 - 1)
    if ORDERS[partial.ord].power == 1:
        norm = Fraction(total) * Fraction(2) ** (LIMB * partial.low)
    try:
        return float(norm)
    except OverflowError:
        return math.inf


def _factor(
    clip_norm: Any, root: Array, low_part: Array, half: Array, bits: int
) -> tuple[Array, Array]:
    """Factor clip_norm / norm, lowered as the module says: mantissa · 2**exponent."""
    c, c_exponent = np.frexp(clip_norm)
    q = c / root
    product, error = two_product(q, root)
    correction = (((c - product) - error) - q * low_part) / root
    # float64: half a unit for the product, half for this sum, and some for subnormal results
    slack = 2.0625 * 2.0**-53 if bits == 53 else 2.0**-FACTOR_BITS
    mantissa = q + (correction - q * slack)
    if bits != 53:
        mantissa = (mantissa.view(np.int64) & -(1 << (53 - FACTOR_BITS))).view(np.float64)
    return mantissa, (c_exponent - half).astype(np.int32)
