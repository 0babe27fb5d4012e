"""Counts over the slices of blocks, and adding them up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from daskclip.numerics import histogram as sketch
from daskclip.numerics.partial import NAN
from daskclip.numerics.scale import Scale


class Tally(NamedTuple):
    """Counts over slices."""

    slices: int
    """Slices seen."""
    clipped: int
    """Finite ones that were above the limit."""
    nonfinite: int
    """Those with NaN that counts, or infinity."""
    smallest: float
    """Smallest finite norm."""
    largest: float
    """Largest finite norm."""
    norms: Any = None
    """`sketch.Norms` of them, or their fields from JSON; None if they were not collected."""


NONE = Tally(0, 0, 0, math.inf, -math.inf)


def count(scale: Scale) -> Tally:
    """Tally of the slices of ``scale``."""
    finite = scale.flags == 0
    return Tally(
        scale.norm.size,
        int(np.count_nonzero((scale.factor < 1.0) & finite)),
        int(finite.size - np.count_nonzero(finite)),
        float(scale.norm.min(initial=math.inf, where=finite)),
        float(scale.norm.max(initial=-math.inf, where=finite)),
    )


def collect(scale: Scale, axes: Sequence[int], start: Sequence[int], shape: Any) -> Tally:
    """Tally with the norms of the slices over ``axes`` of a box, of an array of some shape."""
    counted, kept = count(scale), [a for a in range(len(shape)) if a not in axes]
    norm, flags, factor = (x.squeeze(tuple(axes)) for x in (scale.norm, scale.flags, scale.factor))
    norms = sketch.collect(
        norm,
        (flags & NAN != 0, flags != 0),
        (flags == 0) & (factor < 1.0),
        [start[a] for a in kept],
        [shape[a] for a in kept],
    )
    return counted._replace(norms=norms)


def add(a: Tally, b: Tally) -> Tally:
    """Tally of disjoint sets of slices."""
    if not (a.slices and b.slices):
        return a if a.slices else b
    collected = a.norms is not None and b.norms is not None
    return Tally(
        a.slices + b.slices,
        a.clipped + b.clipped,
        a.nonfinite + b.nonfinite,
        min(a.smallest, b.smallest),
        max(a.largest, b.largest),
        sketch.add(sketch.Norms(*a.norms), sketch.Norms(*b.norms)) if collected else None,
    )
