"""Limits of the slices of a region, one for each slice."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import numpy as np

from daskclip.grid import Box, box_at, box_index, box_shape, ceil_div
from daskclip.storage import array as storage
from daskclip.storage import regions, retrying_block


def read_limits(limits: Any, region: Box, missing: str) -> Any:
    """Limits of the slices of a region, read one chunk or shard at a time."""
    behind = zip(limits.shape, region[len(region) - limits.ndim :], strict=True)
    own = tuple(slice(0, 1) if n == 1 else s for n, s in behind)
    if isinstance(limits, np.ndarray):
        return limits[box_index(own)]
    values = np.empty(box_shape(own))
    unit = storage.write_unit(limits)
    steps = (range(s.start // u, ceil_div(s.stop, u)) for s, u in zip(own, unit, strict=True))
    for cell in product(*steps):
        whole = box_at(cell, unit, limits.shape)
        read = partial(regions.read, limits, missing=missing)
        with retrying_block("reading", limits, whole, read) as reading:
            found = reading(whole)
        values[_shared(whole, own)] = found[_shared(own, whole)]
    return values


def _shared(other: Box, region: Box) -> Any:
    """Index in a region of what another one has of it too."""
    pairs = zip(other, region, strict=True)
    return box_index(
        tuple(slice(max(a.start - b.start, 0), min(a.stop, b.stop) - b.start) for a, b in pairs)
    )
