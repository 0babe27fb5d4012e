"""Statistics of the norms of many slices: counts, a histogram, the largest norms.

Bin k is (edge(k - 1), edge(k)], with 256 edges from each power of two to the next: the middle of a
bin is within 1/512 of every norm in it (1/256 below 2**-1022). Counts are integers, so that neither
the blocks nor the order of adding them up change a result. Powers of two and 1, 2, 5, 10 ... 5000
are edges, and the norms above an edge are counted exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from daskclip.grid import ceil_div
from daskclip.numerics.compiled import Array
from daskclip.numerics.partial import NAN, NONFINITE
from daskclip.numerics.scale import ZEROS, Limits, Scale

BINS = 256  # from each power of two to the next; all of float64 has half a million
RELATIVE_ERROR = 1 / (2 * BINS)
"""Largest relative error of a quantile."""
LARGEST = 10  # norms that are listed with their slices
PARTS = 200  # of an axis at most: about the pixels that a picture of it has
TILE = 1 << 16  # norms binned at a time: the sort in np.unique stays in the cache
TOP = np.finfo(np.float64).max  # also stands for norms that exceed float64


class NormHistogram(NamedTuple):
    """Statistics of the norms of some slices, in types that JSON has."""

    zeros: int
    """Finite slices of norm 0."""
    nan: int
    """Slices with NaN that is not omitted."""
    bins: Sequence[int]
    """Numbers of the bins that are not empty, ascending."""
    counts: Sequence[int]
    """Finite slices in each of ``bins``."""
    largest_slices: Sequence[Any]
    """Largest finite norms, each with the index of its slice; ties in the order of indices."""
    clipped: Sequence[Sequence[int]]
    """Clipped slices in each part of each kept axis."""
    largest: Sequence[Sequence[float]]
    """Largest finite norm in each part of each kept axis, 0 if there is none."""

    @classmethod
    def empty(cls, shape: Iterable[int], zeros: int = 0) -> NormHistogram:
        """Histogram of no slice, or of ``zeros`` zero slices, for kept axes of these lengths."""
        parts = [ceil_div(n, part(n)) for n in shape]
        return cls(zeros, 0, [], [], [], [[0] * k for k in parts], [[0.0] * k for k in parts])

    def add(self, other: NormHistogram) -> NormHistogram:
        """Histogram of two disjoint sets of slices."""
        bins, counts = _merge(
            [np.array([h.bins, h.counts], np.int64).reshape(2, -1) for h in (self, other)]
        )
        # by index where norms are equal, so that the order of adding does not matter
        worst = sorted([*self.largest_slices, *other.largest_slices], key=lambda w: (-w[0], w[1]))
        clipped = [np.add(*pair).tolist() for pair in zip(self.clipped, other.clipped, strict=True)]
        pairs = zip(self.largest, other.largest, strict=True)
        largest = [np.maximum(*pair).tolist() for pair in pairs]
        zeros, nan = self.zeros + other.zeros, self.nan + other.nan
        return NormHistogram(zeros, nan, bins, counts, worst[:LARGEST], clipped, largest)

    def quantile(self, percent: Fraction, smallest: float, largest: float) -> float:
        """Norm that ``percent`` of the finite slices do not exceed, to within `RELATIVE_ERROR`.

        Of n norms in ascending order it is the one at the smallest rank that is at least
        ``n * percent / 100``; NaN if n is 0.
        """
        n = self.zeros + sum(self.counts)
        # exact in Fraction, unlike in numpy.percentile(method="inverted_cdf"): 0.07 * 100 > 7
        rank = max(1, math.ceil(n * percent / 100))
        if not n:
            return math.nan
        if rank in (1, n):  # extremes are known exactly
            return smallest if rank == 1 else largest
        if rank <= self.zeros:
            return 0.0
        place = int(np.searchsorted(np.cumsum(self.counts), rank - self.zeros))
        low, high = edges(np.array(self.bins[place]) - [1, 0])
        return float(min(max(low + (high - low) / 2, smallest), largest))

    def above(self, limit: float) -> int:
        """Count the finite slices in the bins above that of ``limit``: exact if it is an edge."""
        counts, bins = np.array(self.counts), np.array(self.bins, np.int64)
        return int(counts[bins > _bins(np.array([limit]))].sum() if limit > 0 else counts.sum())

    def bars(self, most: int = 64) -> list[tuple[float, float, int]]:
        """Lower edges, upper edges and counts of at most so many bars, each of adjacent bins.

        Bars are equally wide on a logarithmic axis, to within a bin.
        """
        if not self.bins:
            return []
        # the edge of bin k lies k // BINS + log2(1 + k % BINS / BINS) octaves along the axis
        octaves, places = np.divmod(np.array([self.bins[0] - 1, self.bins[-1]]), BINS)
        low, high = octaves + np.log2(1 + places / BINS)
        marks = np.linspace(low, high, most + 1)
        octaves = np.floor(marks)
        ends = np.unique(np.rint(BINS * (octaves + np.exp2(marks - octaves) - 1)).astype(np.int64))
        counts = np.zeros(ends.size - 1, np.int64)
        np.add.at(counts, np.searchsorted(ends, self.bins) - 1, self.counts)
        at = edges(ends).tolist()
        return list(zip(at[:-1], at[1:], counts.tolist(), strict=True))

    def figures(self, kept: dict[int, int]) -> dict[str, Any]:
        """Data of the pictures of norms; ``kept`` has the length of each kept axis."""
        names = "axis", "length", "part", "clipped", "largest"
        each = zip(kept, kept.values(), map(part, kept.values()), *self[-2:], strict=True)
        along = [dict(zip(names, axis, strict=True)) for axis in each]
        worst = [{"norm": size, "index": place} for size, place in self.largest_slices]
        return {"zeros": self.zeros, "histogram": self.bars(), "worst": worst, "along": along}


def part(n: int) -> int:
    """Indices in a part of an axis of length ``n``."""
    return max(1, -(-n // PARTS))


def collect(
    norm: Array, flags: Array, clipped: Array, start: Sequence[int], shape: Sequence[int]
) -> NormHistogram:
    """Histogram of the norms of a box of slices.

    Parameters
    ----------
    norm : ndarray of shape box
        Norms, float64; box is the shape in the kept axes.
    flags : ndarray of shape box
        Flags of `Partial`.
    clipped : bool ndarray of shape box
        Where a finite slice is above its limit.
    start : sequence of int
        Index of the first slice of the box.
    shape : sequence of int
        Shape of the array in the kept axes.

    Returns
    -------
    NormHistogram
        Norms that exceed float64 are in the highest bin.

    Notes
    -----
    Holds some 20 bytes a slice, and 4 MB; with more than 2**16 slices, the bins of as many each.

    Examples
    --------
    >>> x = np.array([3.0, 0.0, 5.0])
    >>> found = collect(x, np.zeros(3, np.uint8), x > 4, (0,), (3,))
    >>> found.zeros, found.largest_slices, found.clipped
    (1, [(5.0, [2]), (3.0, [0]), (0.0, [1])], [[0, 0, 1]])
    """
    # below every finite norm, so that comparisons leave out NaN and infinity
    size = np.where(flags & NONFINITE, -1.0, norm)
    flat, found = size.ravel(), [np.zeros((2, 0), np.int64)]
    for i in range(0, flat.size, TILE):
        some = flat[i : i + TILE]
        found.append(np.array(np.unique(_bins(some[some > 0]), return_counts=True)))
    clips, largest = [], []
    for axis, n in enumerate(shape):
        others = tuple(k for k in range(norm.ndim) if k != axis)
        places = (start[axis] + np.arange(norm.shape[axis])) // part(n)
        counts, high = np.zeros((2, ceil_div(n, part(n))))
        np.add.at(counts, places, clipped.sum(axis=others))
        np.maximum.at(high, places, size.max(axis=others, initial=0.0))
        clips.append(counts.astype(np.int64).tolist())
        largest.append(high.tolist())
    top = _largest(flat)
    # unravel_index refuses the shape of an array with one slice, (), without the added axis
    index = np.transpose(np.unravel_index(top, (1, *norm.shape)))[:, 1:] + np.array(start, np.intp)
    worst = list(zip(flat[top].tolist(), index.tolist(), strict=True))
    zeros, nan = int(np.count_nonzero(flat == 0)), int(np.count_nonzero(flags & NAN))
    return NormHistogram(zeros, nan, *_merge(found), worst, clips, largest)


def edges(bins: Array) -> Array:
    """Upper edges of bins."""
    exponent, place = np.divmod(bins, BINS)
    with np.errstate(over="ignore", under="ignore"):
        return np.minimum(np.ldexp(0.5 + place / (2 * BINS), exponent.astype(np.int32)), TOP)


def _merge(found: Sequence[Array]) -> tuple[list[int], list[int]]:
    """Bins, each once and ascending, and their counts, of several arrays of bins and counts."""
    bins, counts = np.concatenate(found, axis=1)
    unique, where = np.unique(bins, return_inverse=True)
    sums = np.zeros(unique.size, np.int64)  # bincount adds weights in float64
    np.add.at(sums, where, counts)
    return unique.tolist(), sums.tolist()


def _bins(norm: Array) -> Array:
    """Bins of norms above 0."""
    # exact, unlike a logarithm: a norm at an edge is in the bin below it
    mantissa, exponent = np.frexp(np.minimum(norm, TOP))
    place = np.ceil((mantissa - 0.5) * (2 * BINS)).astype(np.int64)
    return exponent * np.int64(BINS) + place


def _largest(flat: Array) -> Array:
    """Positions of the largest norms, ties in their order; negative norms are left out."""
    k = min(LARGEST, flat.size)
    least = np.partition(flat, flat.size - k)[flat.size - k] if k else 0.0
    # a partition does not say which of the norms equal to the last one come first
    above = np.flatnonzero(flat > least)
    found: Array = np.append(above, np.flatnonzero(flat == least)[: k - above.size])
    found = found[flat[found] >= 0]
    return found[np.argsort(-flat[found], kind="stable")]


class SliceCounts(NamedTuple):
    """Counts over slices."""

    slices: int
    """Number of slices."""
    clipped: int
    """Finite slices whose norm is above the limit."""
    nonfinite: int
    """Slices with NaN that counts, or infinity."""
    zeros: int
    """Finite slices of norm 0."""
    zeroed: int
    """Slices that become zeros because they are not finite."""
    smallest: float
    """Smallest finite norm."""
    largest: float
    """Largest finite norm."""
    largest_after: float
    """Upper bound of the exact norms after clipping; NaN if a slice stays that is not finite."""
    histogram: NormHistogram | None = None
    """Histogram of the norms; None if it was not collected."""

    @classmethod
    def empty(cls) -> SliceCounts:
        """Counts over no slice."""
        return cls(0, 0, 0, 0, 0, math.inf, -math.inf, 0.0)

    @classmethod
    def from_json(cls, fields: Sequence[Any]) -> SliceCounts:
        """Counts that were stored as JSON, which has no tuples with names."""
        counts = cls(*fields)
        stored = counts.histogram
        return counts if stored is None else counts._replace(histogram=NormHistogram(*stored))

    def add(self, other: SliceCounts) -> SliceCounts:
        """Counts over two disjoint sets of slices."""
        # an empty side has no histogram even if the other one collects it
        if not (self.slices and other.slices):
            return self if self.slices else other
        sums = (a + b for a, b in zip(self[:5], other[:5], strict=True))
        slices, clipped, nonfinite, zeros, zeroed = sums
        smallest, largest = min(self.smallest, other.smallest), max(self.largest, other.largest)
        after = float(np.maximum(self.largest_after, other.largest_after))  # NaN wins
        both = self.histogram and other.histogram and self.histogram.add(other.histogram)
        return SliceCounts(
            slices, clipped, nonfinite, zeros, zeroed, smallest, largest, after, both
        )


def count_slices(scale: Scale, limit: Limits) -> SliceCounts:
    """Count the slices of ``scale``, which was made with ``limit``."""
    finite = scale.flags & NONFINITE == 0
    clipped = int(np.count_nonzero(finite & (scale.factor < 1.0)))
    nonfinite = int(finite.size - np.count_nonzero(finite))
    zeros = int(np.count_nonzero(finite & (scale.norm == 0)))
    zeroed = int(np.count_nonzero(scale.factor == ZEROS))
    smallest = float(scale.norm.min(initial=math.inf, where=finite))
    largest = float(scale.norm.max(initial=-math.inf, where=finite))
    # an infinite limit leaves slices as they are, even if they would become zeros
    after = math.nan if nonfinite > zeroed else largest_after(scale, limit)
    return SliceCounts(finite.size, clipped, nonfinite, zeros, zeroed, smallest, largest, after)


def largest_after(scale: Scale, limit: Limits) -> float:
    """Upper bound of the exact norms of slices after rescaling, at most the largest limit.

    Parameters
    ----------
    scale : Scale
        Of slices that are finite or become zeros.
    limit : float or array that broadcasts against the norms
        The limits that it was made with, 0 or more.

    Returns
    -------
    float
        0 if there is no slice.

    Notes
    -----
    The bound of a slice that is rescaled is its limit. That of another one is its norm, and since
    this was rounded to nearest, the next larger number; or its limit, if the norm is equal to it.

    Examples
    --------
    >>> from daskclip.numerics import finalize, partial_norm
    >>> x = np.float32([[3, 4], [0, 2]])
    >>> scale = finalize(partial_norm(x, (1,)), 4.0, x.dtype)
    >>> largest_after(scale, 4.0)
    4.0
    """
    at_limit = (scale.factor != 1) | (scale.norm >= limit)
    at_limit &= scale.norm != 0  # zeros stay zeros
    limits = np.broadcast_to(limit, at_limit.shape)
    other = scale.norm.max(initial=0.0, where=~at_limit)
    above = math.nextafter(other, math.inf) if other else 0.0
    return float(max(limits.max(initial=0.0, where=at_limit), above))


def count_with_histogram(
    scale: Scale, limit: Limits, axes: Sequence[int], start: Sequence[int], shape: Sequence[int]
) -> SliceCounts:
    """Count the slices over ``axes`` of a box at ``start`` of an array, with their histogram."""
    kept = [a for a in range(len(shape)) if a not in axes]
    norm, flags, factor = (x.squeeze(tuple(axes)) for x in (scale.norm, scale.flags, scale.factor))
    # NaN factors compare as false, but an infinite slice has the factor 0 and is no clipped one
    clipped = (flags & NONFINITE == 0) & (factor < 1.0)
    histogram = collect(norm, flags, clipped, [start[a] for a in kept], [shape[a] for a in kept])
    return count_slices(scale, limit)._replace(histogram=histogram)
