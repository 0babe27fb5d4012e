"""Limits of the slices of a region, one for each slice."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from daskclip.grid import Box, box_at, box_index, box_shape, ceil_div
from daskclip.storage import retrying_block

if TYPE_CHECKING:
    from daskclip.worker.context import Limits


def read_limits(limits: Limits, region: Box, missing: str) -> npt.NDArray[Any]:
    """Limits of the slices that meet a region; stored ones are read one unit at a time."""
    trailing = zip(limits.shape, region[len(region) - limits.ndim :], strict=True)
    own = tuple(slice(0, 1) if n == 1 else s for n, s in trailing)
    if isinstance(limits, np.ndarray):
        held: npt.NDArray[Any] = limits[box_index(own)]
        return held
    values, unit = np.empty(box_shape(own)), limits.unit
    steps = (range(s.start // u, ceil_div(s.stop, u)) for s, u in zip(own, unit, strict=True))
    read = partial(limits.read, missing=missing)
    for coords in product(*steps):
        whole = box_at(coords, unit, limits.shape)
        found = retrying_block("reading", limits, whole, read)
        values[_shared(whole, own)] = found[_shared(own, whole)]
    return values


def _shared(other: Box, region: Box) -> Any:
    """Index, in a region, of what it has in common with another one."""
    pairs = zip(other, region, strict=True)
    return box_index(
        tuple(slice(max(a.start - b.start, 0), min(a.stop, b.stop) - b.start) for a, b in pairs)
    )
