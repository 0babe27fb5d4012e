"""What is kept of the norms of many slices: counts, a histogram, the largest ones.

Bins are (edge(k - 1), edge(k)], with 256 edges from each power of two to the next, so that a norm
is told by the middle of its bin to within a part in 512 (below 2**-1022, in 256). The counts are of
integers: they are the same in whatever order, and from whatever blocks, they are added up. Powers
of two and 1, 2, 5, 10 ... 5000 are edges: what lies above one of them is counted exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from daskclip.numerics.partial import NAN

if TYPE_CHECKING:
    from daskclip.numerics.scale import Scale

Array = npt.NDArray[Any]

BINS = 256
"""Bins from each power of two to the next; all of float64 has half a million."""
RELATIVE_ERROR = 1 / (2 * BINS)
"""Largest relative error of a quantile."""
LARGEST = 10
PARTS = 200
"""Parts of an axis that are told apart, at most."""
TILE = 1 << 16  # norms that are worked on at a time


class NormHistogram(NamedTuple):
    """What is kept of the norms of some slices, as JSON takes it."""

    zeros: int
    """Finite slices of norm 0."""
    nan: int
    """Slices with NaN that counts."""
    bins: Sequence[int]
    """Bins with a norm in them, ascending."""
    counts: Sequence[int]
    """Number of finite slices in each."""
    largest_slices: Sequence[Any]
    """Largest finite norms, each with the index of its slice; the first of equal ones first."""
    clipped: Sequence[Sequence[int]]
    """Clipped slices in each part of each kept axis."""
    largest: Sequence[Sequence[float]]
    """Largest finite norm in each part of each kept axis, 0 if there is none."""

    @classmethod
    def empty(cls, shape: Iterable[int], zeros: int = 0) -> NormHistogram:
        """Norms of no slice, or of slices without elements, of an array with these kept axes."""
        parts = [-(-n // part(n)) for n in shape]
        return cls(zeros, 0, [], [], [], [[0] * k for k in parts], [[0.0] * k for k in parts])

    def add(self, other: NormHistogram) -> NormHistogram:
        """Norms of disjoint sets of slices."""
        bins, counts = _merged(
            *np.array([[*self.bins, *other.bins], [*self.counts, *other.counts]], np.int64)
        )
        worst = sorted([*self.largest_slices, *other.largest_slices], key=lambda w: (-w[0], w[1]))[
            :LARGEST
        ]
        clipped = [np.add(c, d).tolist() for c, d in zip(self.clipped, other.clipped, strict=True)]
        largest = [
            np.maximum(c, d).tolist() for c, d in zip(self.largest, other.largest, strict=True)
        ]
        return NormHistogram(
            self.zeros + other.zeros, self.nan + other.nan, bins, counts, worst, clipped, largest
        )

    def quantile(self, percent: Fraction, smallest: float, largest: float) -> float:
        """Norm that ``percent`` of the finite slices do not exceed, to within `RELATIVE_ERROR`.

        Of n norms in ascending order it is the one at the smallest rank that is at least
        ``n * percent / 100``, as ``numpy.percentile(method="inverted_cdf")`` gives it except for
        the rounding of its rank. NaN if there is none.
        """
        n = self.zeros + sum(self.counts)
        rank = max(1, math.ceil(n * percent / 100))
        if not n:
            return math.nan
        if rank in (1, n):
            return smallest if rank == 1 else largest
        if rank <= self.zeros:
            return 0.0
        place = int(np.searchsorted(np.cumsum(self.counts), rank - self.zeros))
        low, high = edges(np.array(self.bins[place]) - [1, 0])
        return float(min(max(low + (high - low) / 2, smallest), largest))

    def above(self, limit: float) -> int:
        """Finite slices above ``limit`` and its bin: all that are above it, if it is an edge."""
        counts, bins = np.array(self.counts), np.array(self.bins, np.int64)
        return int(counts[bins > _bins(np.array([limit]))].sum() if limit > 0 else counts.sum())

    def bars(self, most: int = 64) -> list[tuple[float, float, int]]:
        """Edges and counts of neighbouring bins, put together to at most so many bars.

        They are as wide as each other on a logarithmic axis, as far as bins allow.
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
        """What pictures of norms show; ``kept`` has the length of each kept axis."""
        names = "axis", "length", "part", "clipped", "largest"
        each = zip(kept, kept.values(), map(part, kept.values()), *self[-2:], strict=True)
        along = [dict(zip(names, axis, strict=True)) for axis in each]
        worst = [{"norm": size, "index": place} for size, place in self.largest_slices]
        return {"zeros": self.zeros, "histogram": self.bars(), "worst": worst, "along": along}


def part(n: int) -> int:
    """Indices in a part of an axis of length ``n``."""
    return max(1, -(-n // PARTS))


def collect(
    norm: Array, nonfinite: tuple[Array, Array], clipped: Array, start: Sequence[int], shape: Any
) -> NormHistogram:
    """What is kept of the norms of a box of slices.

    Parameters
    ----------
    norm : ndarray
        Of dtype float64 and of the shape of the box in the kept axes.
    nonfinite : tuple of two bool ndarrays
        Where there are NaN, and where NaN or infinity.
    clipped : bool ndarray
        Where a finite slice is above the limit.
    start : sequence of int
        Where the box begins.
    shape : sequence of int
        Of the array in the kept axes.

    Returns
    -------
    Norms
        A norm that exceeds float64 is in the highest bin.

    Notes
    -----
    Holds some 20 bytes a slice, and 4 MB; with more than 2**16 slices, the bins of as many each.

    Examples
    --------
    >>> x = np.array([3.0, 0.0, 5.0])
    >>> found = collect(x, (x < 0, x < 0), x > 4, (0,), (3,))
    >>> found.zeros, found.largest_slices, found.clipped
    (1, [(5.0, [2]), (3.0, [0]), (0.0, [1])], [[0, 0, 1]])
    """
    nan, odd = nonfinite
    size = np.where(odd, -1.0, norm)
    flat, found = size.ravel(), [np.zeros((2, 0), np.int64)]
    for i in range(0, flat.size, TILE):
        some = flat[i : i + TILE]
        found.append(np.array(np.unique(_bins(some[some > 0]), return_counts=True)))
    bins, counts = _merged(*np.concatenate(found, axis=1))
    clips: list[Any] = []
    largest: list[Any] = []
    for a, n in enumerate(shape):
        others = tuple(k for k in range(norm.ndim) if k != a)
        places = (start[a] + np.arange(norm.shape[a])) // part(n)
        here, high = np.zeros(-(-n // part(n)), np.int64), np.zeros(-(-n // part(n)))
        np.add.at(here, places, clipped.sum(axis=others))
        np.maximum.at(high, places, size.max(axis=others, initial=0.0))
        clips.append(here.tolist())
        largest.append(high.tolist())
    top = _top(flat)
    places = np.transpose(np.unravel_index(top, (1, *norm.shape)))[:, 1:] + np.array(start, np.intp)
    worst = list(zip(flat[top].tolist(), places.tolist(), strict=True))
    zeros = int((flat == 0).sum())
    return NormHistogram(zeros, int(nan.sum()), bins, counts, worst, clips, largest)


def edges(bins: Array) -> Array:
    """Upper edges of bins."""
    exponent, place = np.divmod(bins, BINS)
    with np.errstate(over="ignore", under="ignore"):
        high = np.ldexp(0.5 + place / (2 * BINS), exponent.astype(np.int32))
    return np.minimum(high, np.finfo(np.float64).max)


def _merged(bins: Array, counts: Array) -> tuple[list[int], list[int]]:
    """Each bin once, ascending."""
    unique, where = np.unique(bins, return_inverse=True)
    sums = np.zeros(unique.size, np.int64)
    np.add.at(sums, where, counts)
    return unique.tolist(), sums.tolist()


def _bins(norm: Array) -> Array:
    """Bins of norms above 0."""
    mantissa, exponent = np.frexp(np.minimum(norm, np.finfo(np.float64).max))
    place = np.ceil((mantissa - 0.5) * (2 * BINS)).astype(np.int64)
    return exponent * np.int64(BINS) + place


def _top(flat: Array) -> Array:
    """Places of the largest that are not negative, the first of equal ones first."""
    k = min(LARGEST, flat.size)
    least = np.partition(flat, flat.size - k)[flat.size - k] if k else 0.0
    over = np.flatnonzero(flat > least)
    even = np.flatnonzero(flat == least)[: k - over.size]
    found: Array = np.concatenate([over, even])
    found = found[flat[found] >= 0]
    order = np.lexsort([found, -flat[found]])
    return np.asarray(found[order])


class SliceCounts(NamedTuple):
    """Counts over slices."""

    slices: int
    """Number of slices."""
    clipped: int
    """Finite slices whose norm is above the limit."""
    nonfinite: int
    """Slices with NaN that counts, or infinity."""
    smallest: float
    """Smallest finite norm."""
    largest: float
    """Largest finite norm."""
    histogram: NormHistogram | None = None
    """Histogram of the norms; None if it was not collected."""

    @classmethod
    def empty(cls) -> SliceCounts:
        """Counts over no slice."""
        return cls(0, 0, 0, math.inf, -math.inf)

    @classmethod
    def from_json(cls, fields: Sequence[Any]) -> SliceCounts:
        """Counts that were stored as JSON, in which tuples are lists."""
        slices, clipped, nonfinite, smallest, largest, histogram = fields
        found = None if histogram is None else NormHistogram(*histogram)
        return cls(slices, clipped, nonfinite, smallest, largest, found)

    def add(self, other: SliceCounts) -> SliceCounts:
        """Counts over two disjoint sets of slices."""
        if not (self.slices and other.slices):
            return self if self.slices else other
        histogram = None
        if self.histogram is not None and other.histogram is not None:
            histogram = self.histogram.add(other.histogram)
        return SliceCounts(
            self.slices + other.slices,
            self.clipped + other.clipped,
            self.nonfinite + other.nonfinite,
            min(self.smallest, other.smallest),
            max(self.largest, other.largest),
            histogram,
        )


def count_slices(scale: Scale) -> SliceCounts:
    """Count the slices of ``scale``."""
    finite = scale.flags == 0
    return SliceCounts(
        scale.norm.size,
        int(np.count_nonzero((scale.factor < 1.0) & finite)),
        int(finite.size - np.count_nonzero(finite)),
        float(scale.norm.min(initial=math.inf, where=finite)),
        float(scale.norm.max(initial=-math.inf, where=finite)),
    )


def count_with_histogram(
    scale: Scale, axes: Sequence[int], start: Sequence[int], shape: Sequence[int]
) -> SliceCounts:
    """Count the slices over ``axes`` of a box at ``start`` of an array, with their histogram."""
    counts, kept = count_slices(scale), [a for a in range(len(shape)) if a not in axes]
    norm, flags, factor = (x.squeeze(tuple(axes)) for x in (scale.norm, scale.flags, scale.factor))
    histogram = collect(
        norm,
        (flags & NAN != 0, flags != 0),
        (flags == 0) & (factor < 1.0),
        [start[a] for a in kept],
        [shape[a] for a in kept],
    )
    return counts._replace(histogram=histogram)
