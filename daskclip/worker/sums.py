"""Exact sums of the blocks of a slab: combined, saved and loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from daskclip.numerics import Array, Partial, combine


class ArrayFiles(Protocol):
    """Files of arrays by name, for every process."""

    def save(self, name: str, arrays: dict[str, Array]) -> None:
        """Keep arrays."""

    def load(self, name: str) -> dict[str, Array]:
        """Arrays that were kept."""


class Sums(NamedTuple):
    """Result of the first pass for some blocks of a slab."""

    partial: Partial
    """Their exact sums."""
    digests: dict[tuple[int, int, int], int]
    """Digests of the values read, by number of the array, slab, and block in the slab."""
    state: int
    """Planned bytes of the sum of a slice; 0 for any number."""


@dataclass(frozen=True, slots=True)
class SavedSums:
    """Sums that `keep_sums` has saved, as an argument of calls, which load them."""

    arrays: ArrayFiles
    name: str
    state: int


def loaded(sums: Sums | SavedSums | list[Any]) -> Sums:
    """Sums, from where they are saved if they are; or from a function and its arguments."""
    if isinstance(sums, list):
        function, args = sums
        made: Sums = function(*args)
        return made
    return kept_sums(sums.arrays, sums.name, sums.state) if isinstance(sums, SavedSums) else sums


def add_sums(parts: Sequence[Sums | SavedSums | list[Any]], known: int = 0) -> Sums:
    """Combine sums of different blocks of a slab; digests of the first ``known`` are left out."""
    sums = [*map(loaded, parts)]
    digests = {block: d for p in sums[known:] for block, d in p.digests.items()}
    state = sums[0].state
    return Sums(combine([p.partial for p in sums], max_nbytes=state), digests, state)


def keep_sums(sums: Sums, arrays: ArrayFiles | None, name: str) -> dict[tuple[int, int, int], int]:
    """Save sums, if there is a place for them, and return the digests of their blocks."""
    if arrays is not None:
        p = sums.partial
        rest = np.array([p.low, p.terms])
        arrays.save(
            name, {"limbs": p.limbs, "flags": p.flags, "rest": rest, "ord": np.array(p.ord)}
        )
    return sums.digests


def add_and_keep(
    parts: Sequence[Sums | SavedSums | list[Any]], known: int, arrays: ArrayFiles, name: str
) -> dict[tuple[int, int, int], int]:
    """Combine sums and save them: no process has to have them from then on."""
    return keep_sums(add_sums(parts, known), arrays, name)


def kept_sums(arrays: ArrayFiles, name: str, state: int) -> Sums:
    """Sums that `keep_sums` has saved, without digests."""
    kept = arrays.load(name)
    (low, terms), ord = kept["rest"].tolist(), kept["ord"].item()
    return Sums(Partial(kept["limbs"], low, kept["flags"], terms, ord), {}, state)
