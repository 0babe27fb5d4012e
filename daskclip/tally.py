"""Counts over the slices of blocks, and adding them up."""

from __future__ import annotations

import math
from typing import NamedTuple

from daskclip.factor import Scale


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


NONE = Tally(0, 0, 0, math.inf, -math.inf)


def count(scale: Scale) -> Tally:
    """Tally of the slices of ``scale``."""
    finite = scale.flags == 0
    norm = scale.norm[finite]
    return Tally(
        scale.norm.size,
        int((scale.factor[finite] != 1.0).sum()),
        scale.norm.size - norm.size,
        float(norm.min(initial=math.inf)),
        float(norm.max(initial=-math.inf)),
    )


def add(a: Tally, b: Tally) -> Tally:
    """Tally of disjoint sets of slices."""
    return Tally(
        a.slices + b.slices,
        a.clipped + b.clipped,
        a.nonfinite + b.nonfinite,
        min(a.smallest, b.smallest),
        max(a.largest, b.largest),
    )
