"""What the blocks of an array have in common in a run, and which of them are under way here."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition, get_ident
from typing import Any

import numpy as np

from daskclip.errors import StorageError
from daskclip.plan import ClipPlan
from daskclip.storage import durable


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArrayTask:
    """What all blocks of an array have in common in a run."""

    run: str
    """Name of this attempt at the run."""
    number: int
    """Of the array among all of a run."""
    name: str
    """Its path in its group; '' for one that is no part of a group."""
    plan: ClipPlan
    """Where the blocks are."""
    source: Any
    """Zarr array to read."""
    target: Any
    """Zarr array to write, of what is clipped or of norms, or to compare with; or None."""
    staged: str | None
    """Folder of all that is written, for a run that writes to files."""
    shared: bool
    """Whether its only slice goes on in other arrays."""
    in_place: bool
    """Whether blocks that stay as they are need not be written at once."""
    clip_norm: float | None
    """The limit; None with limits."""
    ord: float
    """Which norm."""
    nonfinite: str
    """Policy for NaN and infinity."""
    missing: str
    """Policy for chunks that are not stored."""
    limits: Any
    """NumPy or Zarr array of a limit for each slice, or None."""
    collect: bool = False
    """Whether the norms are counted by their size too, and the largest kept."""


_rooms: dict[str, dict[int, Any]] = {}
_blocks: Counter[str] = Counter()
_ended: deque[str] = deque(maxlen=1000)  # a worker may live for months, and run many
_changed = Condition()


@contextmanager
def running_block(run: str) -> Iterator[None]:
    """Count something that is under way for ``run``; refused after the end of it."""
    with _changed:
        if run in _ended:
            raise StorageError("the run was stopped")
        _blocks[run] += 1
    try:
        yield
    finally:
        with _changed:
            _blocks[run] -= 1
            _changed.notify_all()


def drain(run: str) -> None:
    """Let no block of ``run`` begin in this process, and return once none is under way."""
    with _changed:
        _ended.append(run)
        _changed.wait_for(lambda: not _blocks[run])
        del _blocks[run]
    _rooms.pop(run, None)


def block_buffer(run: str, size: int) -> tuple[Any, bool]:
    """Memory of this thread for a block, and for those that follow; and whether it is new."""
    rooms, me = _rooms.setdefault(run, {}), get_ident()
    new = len(rooms.get(me, b"")) < size
    if new:
        rooms.pop(me, None)
        rooms[me] = np.frombuffer(durable.aligned_buffer(size), np.uint8)
    return rooms[me][:size], new
