"""State that the tasks of an array share, and that of a process that runs blocks."""

import pickle
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from threading import Condition, get_ident
from typing import Any

import numpy as np
import numpy.typing as npt

from daskclip.errors import StorageError
from daskclip.plan import ClipPlan
from daskclip.storage import StoredArray, durable

Limits = npt.NDArray[Any] | StoredArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArrayTask:
    """Array of a run, as the tasks of all its blocks share it."""

    attempt_id: str
    """Name of this attempt at the run."""
    number: int
    """Number of the array among all of the run."""
    name: str
    """Path of the array in its group; '' if it is not in a group."""
    plan: ClipPlan
    """Plan of its blocks."""
    source: StoredArray
    """Array to read."""
    target: StoredArray | None
    """Array to write the clipped values or the norms to, or to compare with."""
    staged: str | None
    """Folder that a run writes its files to; None if it writes objects."""
    shared: bool
    """Whether the slices continue in other arrays."""
    in_place: bool
    """Whether unchanged blocks need not be written at once."""
    clip_norm: float | None
    """The limit of all slices. Tasks without it and without ``limits`` only measure."""
    ord: float
    """Order of the norm."""
    nonfinite: str
    """Policy for NaN and infinity."""
    normalize: tuple[np.dtype[Any], ...]
    """Dtypes of all arrays that a slice lies in, if it is brought to its limit from below too."""
    missing: str
    """Policy for chunks that are not stored."""
    limits: Limits | None
    """A limit for each slice."""
    collect: bool = False
    """Whether norms are also counted in a histogram, and the largest ones kept."""

    @property
    def only_measures(self) -> bool:
        """Whether nothing is clipped: the target, if there is one, is for norms."""
        return self.clip_norm is None and self.limits is None

    @property
    def written(self) -> StoredArray:
        """The target of tasks that have one."""
        # a task of a function that writes is made with a target
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
        self._running: defaultdict[str, set[int]] = defaultdict(set)
        self._buffers: dict[str, dict[int, npt.NDArray[np.uint8]]] = {}
        self._drained: deque[str] = deque(maxlen=1000)

    @contextmanager
    def running_block(self, attempt_id: str) -> Iterator[None]:
        """Count a block as running; refused once the attempt has been drained."""
        with self._changed:
            # a task of a stopped run may still be in the queue of the scheduler
            if attempt_id in self._drained:
                raise StorageError("the run was stopped")
            self._running[attempt_id].add(get_ident())
        try:
            yield
        finally:
            with self._changed:
                self._running[attempt_id].discard(get_ident())
                self._changed.notify_all()

    def drain(self, attempt_id: str) -> None:
        """Refuse further blocks of an attempt, wait for running ones, and free its buffers."""
        with self._changed:
            # first: a block that arrives while others are waited for is refused
            self._drained.append(attempt_id)
            # this thread runs none, unless an interrupt came before it could say so
            self._changed.wait_for(lambda: self._running[attempt_id] <= {get_ident()})
            del self._running[attempt_id]
        self._buffers.pop(attempt_id, None)

    def buffer(self, attempt_id: str, size: int) -> tuple[npt.NDArray[np.uint8], bool]:
        """Buffer of this thread, which its next block reuses; and whether it is new."""
        # without the lock: each thread changes its own entry only
        buffers, me = self._buffers.setdefault(attempt_id, {}), get_ident()
        new = me not in buffers or len(buffers[me]) < size
        if new:
            buffers.pop(me, None)  # free it first: there is no memory for both
            buffers[me] = np.frombuffer(durable.aligned_buffer(size), np.uint8)
        return buffers[me][:size], new


PROCESS = ProcessState()


# a method of `PROCESS` would be pickled with its instance, and drain a copy of it
def drain(attempt_id: str) -> None:
    """Drain an attempt in this process; see `ProcessState.drain`."""
    PROCESS.drain(attempt_id)
    unpacked.cache_clear()


@lru_cache(maxsize=64)
def unpacked(data: bytes) -> Any:
    """Value of a pickle, which the tasks of an attempt have in common."""
    return pickle.loads(data)
