"""The norms that there are, by the order that says which."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class Order(NamedTuple):
    """How the norm of a slice is made of the magnitudes of its elements."""

    power: int
    """The norm to this power is a sum, or the largest, of magnitudes to this power."""
    largest: bool
    """Whether the largest one is taken, and not the sum."""
    room: Callable[[int], float]
    """How far an error of 1 in each of so many elements can move the norm."""


ORDERS = {
    1.0: Order(1, False, float),
    2.0: Order(2, False, math.sqrt),
    math.inf: Order(1, True, lambda terms: 1.0),
}
