"""Exact arithmetic to check results with.

A float64 is a whole number of units of 2**-1074, so Python's integers hold every value, square and
sum of squares without rounding.
"""

import math

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
UNIT = -1074
DTYPES = [np.dtype(d) for d in ("f2", BFLOAT16, "f4", "f8", "c8", "c16")]
# name of the real part: (significant bits, exponent of the smallest subnormal)
FORMATS = {
    "float16": (11, -24),
    "bfloat16": (8, -133),
    "float32": (24, -149),
    "float64": (53, -1074),
}
# smallest and largest exponent
EXPONENTS = {
    "float16": (-24, 15),
    "bfloat16": (-133, 127),
    "float32": (-149, 127),
    "float64": (-1074, 1023),
}


def native(x):
    """The same values in this machine's byte order, C-contiguous, complex ones as pairs."""
    x = np.asarray(x)
    dtype = x.dtype if x.dtype == BFLOAT16 else x.dtype.newbyteorder("=")
    x = np.array(x, dtype, order="C")
    return x[..., None].view(f"f{x.itemsize // 2}") if x.dtype.kind == "c" else x[..., None]


def bits(x):
    """Dtype, shape and bits: equal for equal arrays only, -0.0 and NaN included."""
    return native(x).dtype.name, np.shape(x), native(x).tobytes()


def same(a, b):
    """Whether two partials, or an array and a scale, have equal fields and bits."""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return bits(a) == bits(b) if a.dtype.kind in "fcV" else np.array_equal(a, b)
    return a == b


def exact_sums(partial):
    """Sums as exact integers in units of 2**-2148; an array of one for each slice."""
    limbs = partial.limbs.astype(object)
    weights = [1 << (32 * (partial.low + i + 68)) for i in range(len(limbs))]
    total = sum((w * limb for w, limb in zip(weights, limbs, strict=True)), 0)
    total = np.broadcast_to(np.asarray(total, object), partial.flags.shape)
    assert not np.any(total & (1 << 28) - 1)
    return np.asarray(total >> 28, object)


def integer(value):
    """A finite float in units of 2**-1074."""
    numerator, denominator = float(value).as_integer_ratio()
    return numerator << (-UNIT + 1 - denominator.bit_length())


def integers(x):
    """Real parts of all elements in units of 2**-1074: objects of shape (*x.shape, 1 or 2)."""
    x = native(x).astype(np.float64)
    return np.array([integer(v) for v in x.ravel().tolist()], object).reshape(x.shape)


def squares(x, axes):
    """Exact sums of squares in units of 2**-2148; reduced axes have size 1."""
    total = (integers(x) ** 2).sum(axis=-1)
    return np.asarray(np.add.reduce(np.asarray(total, object), axis=axes, keepdims=True), object)


def totals(x, axes, ord):
    """Squares of the exact norms of any order, in the units of `squares`."""
    if ord == 2:
        return squares(x, axes)
    magnitudes = np.asarray(abs(integers(x)[..., 0]), object)
    combine = np.add if ord == 1 else np.maximum
    found = combine.reduce(magnitudes, axis=axes, keepdims=True, initial=0)
    return np.asarray(found**2, object)


def tall_squares(x):
    """`squares` of a float16 or float32 array of shape (n, k) over axis 0, n below 2**28."""
    mantissa, exponent = np.frexp(x)
    whole = np.ldexp(mantissa.astype(np.float64), 24).astype(np.int64) ** 2
    result = []
    for m, e in zip(whole.T, exponent.T, strict=True):
        total = 0
        for part, weight in ((m & 0xFFFFFF, 0), (m >> 24, 24)):
            # float64 adds these integers without rounding: each is below 2**25
            sums = np.bincount(e + 149, weights=part)
            unit = weight + 2 * (-149 - 24) - 2 * UNIT
            total += sum(int(s) << (unit + 2 * k) for k, s in enumerate(sums.tolist()))
        result.append(total)
    return np.array(result, object)


def root(total):
    """Square root of an exact sum, correctly rounded to float64."""
    r = math.isqrt(total << 128)
    inexact = r * r != total << 128
    try:
        return (2 * r + inexact) / (1 << (1 + 64 - UNIT))
    except OverflowError:
        return math.inf


def is_rounded(norm, total):
    """Whether ``norm`` is the float64 nearest to the root of an exact sum, ties to even."""
    if norm == math.inf:
        return total >= (integer(np.finfo(float).max) + (1 << (970 - UNIT))) ** 2
    below = integer(norm) + integer(np.nextafter(norm, -math.inf))
    above = 2 * integer(norm) + integer(math.ulp(norm))
    even = math.frexp(norm)[0] * 2**53 % 2 == 0
    low, high = below * abs(below), above**2
    return low <= 4 * total <= high if even else low < 4 * total < high


def is_ideal(y, x, total, clip_norm):
    """Whether ``y`` is the clipped slice ``x``: within 2 ulp of exact (float64: 4), or the same.

    Both finite; ``total`` is the exact sum of squares that the factor is taken from.
    """
    limit = math.inf if clip_norm == math.inf else integer(max(clip_norm, 0.0))
    if limit == math.inf or total <= limit**2:
        return bits(y) == bits(x)
    significant, lowest = FORMATS[native(x).dtype.name]
    ulp = 4 if significant == 53 else 2
    extra = 128
    divisor = math.isqrt(total << (2 * extra))
    for a, b in zip(integers(x).ravel(), integers(y).ravel(), strict=True):
        ideal = (abs(a) * limit << (2 * extra)) // divisor
        error = abs((abs(b) << extra) - ideal)
        step = max(ideal.bit_length() - extra + UNIT - significant, lowest) - UNIT + extra
        # the last term is the error of `ideal` itself
        if error > (ulp << step) + (1 << (step - 60)):
            return False
    return np.array_equal(np.signbit(native(x)), np.signbit(native(y)))


def slices(shape, axes):
    """Indices of all slices over ``axes``: one index of a reduced array, one of the array."""
    for index in np.ndindex(*(1 if k in axes else n for k, n in enumerate(shape))):
        yield index, tuple(slice(None) if k in axes else i for k, i in enumerate(index))


def ordered(x):
    """Numbers of the representable values of a real dtype, counted from zero."""
    x = native(x)
    number = x.view(f"i{x.itemsize}").astype(np.int64)
    magnitude = number & np.iinfo(f"i{x.itemsize}").max
    return np.where(number < 0, -magnitude, magnitude).astype(object)


def steps(a, b):
    """Largest number of representable values between two arrays with NaN in the same places."""
    assert np.array_equal(np.isnan(a), np.isnan(b))
    distance = abs(ordered(a) - ordered(b))
    return max(distance[~np.isnan(native(a))], default=0)
