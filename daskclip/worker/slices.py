"""The slices that a block meets: their limits and counts."""

import math
from functools import partial
from itertools import product

import numpy as np

from daskclip.grid import Box, box_at, box_index, box_shape, common_index, without_axes
from daskclip.numerics import (
    Array,
    Scale,
    SliceCounts,
    count_slices,
    count_with_histogram,
    require_limits,
)
from daskclip.storage import retrying_block
from daskclip.worker.context import ArrayTask, Limits


def slices_of(task: ArrayTask, region: Box) -> Box:
    """Region of the slices of a block: without the reduced axes if other arrays share them."""
    return without_axes(region, task.plan.axes) if task.shared else region


def block_limit(task: ArrayTask, region: Box) -> float | Array:
    """Limit of the slices that meet a region, or one for each; infinity if they are measured."""
    if task.limits is not None:
        return read_limits(task.limits, slices_of(task, region), task.missing)
    return math.inf if task.clip_norm is None else task.clip_norm


def read_limits(limits: Limits, region: Box, missing: str) -> Array:
    """Limits of the slices that meet a region; stored ones are read one unit at a time.

    Those given as a NumPy array were checked before the run.
    """
    # limits broadcast: their axes are the last ones, and one limit holds for all of an axis
    trailing = zip(limits.shape, region[len(region) - limits.ndim :], strict=True)
    own = tuple(slice(0, 1) if n == 1 else s for n, s in trailing)
    if isinstance(limits, np.ndarray):
        held: Array = limits[box_index(own)]
        return held
    values, unit = np.empty(box_shape(own)), limits.unit
    steps = (range(s.start // u, -(-s.stop // u)) for s, u in zip(own, unit, strict=True))
    read = partial(limits.read, missing=missing)
    # whole units, of which a block may need a part: a unit cannot be decoded in part
    for coords in product(*steps):
        whole = box_at(coords, unit, limits.shape)
        found = retrying_block("reading", limits, whole, read)
        values[common_index(whole, own)] = found[common_index(own, whole)]
    require_limits(values, f"limits {limits.location}", [s.start for s in own])
    return values


def count_region(task: ArrayTask, scale: Scale, limit: float | Array, region: Box) -> SliceCounts:
    """Counts over the slices that meet a region, by their scale and the limit it was made with."""
    if not task.collect:
        return count_slices(scale, limit)
    axes, start, shape = task.plan.axes, tuple(s.start for s in region), task.plan.shape
    if task.shared:
        kept = without_axes(start, axes), without_axes(shape, axes)
        return count_with_histogram(scale, limit, (), *kept)
    found = count_with_histogram(scale, limit, axes, start, shape)
    if not task.name or found.histogram is None:
        return found
    # of a group: slices are named with their array, and axes of different arrays not counted
    largest = [(norm, [task.name, *place]) for norm, place in found.histogram.largest_slices]
    histogram = found.histogram._replace(largest_slices=largest, clipped=[], largest=[])
    return found._replace(histogram=histogram)
