"""What the tasks of an array share, and the state of a process that runs blocks."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition, get_ident
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from daskclip.errors import StorageError
from daskclip.storage import StoredArray, durable

if TYPE_CHECKING:
    from daskclip.plan import ClipPlan

Limits = npt.NDArray[Any] | StoredArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArrayTask:
    """What the tasks of all blocks of an array have in common in a run."""

    attempt_id: str
    """Name of this attempt at the run."""
    number: int
    """Number of the array among all of the run."""
    name: str
    """Path of the array in its group; '' if it is not in a group."""
    plan: ClipPlan
    """Where the blocks are."""
    source: StoredArray
    """Array to read."""
    target: StoredArray | None
    """Array to write the clipped values or the norms to, or to compare with."""
    staged: str | None
    """Folder of everything that is written, for a run that writes to files."""
    shared: bool
    """Whether the array is a part of one slice that continues in other arrays."""
    in_place: bool
    """Whether unchanged blocks need not be written at once."""
    clip_norm: float | None
    """The limit of all slices. Tasks without it and without ``limits`` only measure."""
    ord: float
    """Order of the norm."""
    nonfinite: str
    """Policy for NaN and infinity."""
    missing: str
    """Policy for chunks that are not stored."""
    limits: Limits | None
    """A limit for each slice."""
    collect: bool = False
    """Whether norms are also counted in a histogram, and the largest ones kept."""

    @property
    def only_measures(self) -> bool:
        """Whether there is no limit to clip to."""
        return self.clip_norm is None and self.limits is None

    @property
    def written(self) -> StoredArray:
        """The target of tasks that have one."""
        assert self.target is not None
        return self.target


class ProcessState:
    """The blocks that run in this process, and the buffers of its threads, by attempt.

    There is one instance, `PROCESS`, which lives as long as the process: a Dask worker may run
    blocks of many attempts, one after the other or at once. It holds a buffer for each thread from
    the first block of an attempt until `drain`, and after that the names of the last attempts,
    since a block may arrive late.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._running: Counter[str] = Counter()
        self._buffers: dict[str, dict[int, npt.NDArray[np.uint8]]] = {}
        self._drained: deque[str] = deque(maxlen=1000)

    @contextmanager
    def running_block(self, attempt_id: str) -> Iterator[None]:
        """Count a block as running; refused once the attempt has been drained."""
        with self._changed:
            # a task of a run that was stopped may still be in the queue of the scheduler
            if attempt_id in self._drained:
                raise StorageError("the run was stopped")
            self._running[attempt_id] += 1
        try:
            yield
        finally:
            with self._changed:
                self._running[attempt_id] -= 1
                self._changed.notify_all()

    def drain(self, attempt_id: str) -> None:
        """Refuse further blocks of an attempt, wait for running ones, and free its buffers."""
        with self._changed:
            self._drained.append(attempt_id)
            self._changed.wait_for(lambda: not self._running[attempt_id])
            del self._running[attempt_id]
        self._buffers.pop(attempt_id, None)

    def buffer(self, attempt_id: str, size: int) -> tuple[npt.NDArray[np.uint8], bool]:
        """Buffer of this thread, which its next block reuses; and whether it is new."""
        buffers, me = self._buffers.setdefault(attempt_id, {}), get_ident()
        new = me not in buffers or len(buffers[me]) < size
        if new:
            buffers.pop(me, None)  # free it first: there is no memory for both
            buffers[me] = np.frombuffer(durable.aligned_buffer(size), np.uint8)
        return buffers[me][:size], new


PROCESS = ProcessState()


def drain(attempt_id: str) -> None:
    """Drain an attempt in this process; see `ProcessState.drain`."""
    PROCESS.drain(attempt_id)
