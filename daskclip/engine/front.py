"""The front of a run: the tasks that are under way, as many as keep all threads busy.

A *task* is a call that does some blocks, or combines their sums. Whenever one ends, others begin,
so that no thread waits for the slowest of a group. On a cluster a task does as many blocks as take
about a second, since each costs the scheduler some tenths of a millisecond, and fewer towards the
end of a pass. A task that takes far longer than others is given to another worker too; the first
result counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from daskclip.engine.cluster import translating_cluster_errors
from daskclip.grid import ceil_div
from daskclip.worker import ArrayTask, Pool

TASKS = 2  # tasks under way for each thread: the next one is there when one ends
MAX_BLOCKS_PER_TASK = 16  # small blocks that one task does although none has been timed yet
TASK_S = 1.0  # seconds that a task on a cluster should take
SCHEDULER_S = 0.0015  # seconds that the scheduler and the client have for each task
LATE, VERY_LATE = 2, 10  # times the usual seconds: where threads are idle, and where none is
LATE_S = 0.5  # and so many seconds more
COPIES = 3  # workers that a late task is given to, at most


class BlockId(NamedTuple):
    """A block of one of the arrays of a run."""

    array: int
    slab: int
    block: int


@dataclass(slots=True)
class Blocks:
    """Blocks that a pass has left, in their order."""

    blocks: Iterator[BlockId]
    left: int
    """Number of them."""

    def take(self, arrays: Sequence[ArrayTask], nbytes: float, most: int) -> list[BlockId]:
        """Some blocks for a task: one, or as many as have so many bytes together."""
        found: list[BlockId] = []
        size = 0.0
        for block in islice(self.blocks, most):
            found.append(block)
            size += arrays[block.array].plan.nbytes_of(block.slab, block.block)
            if size >= nbytes:
                break
        self.left -= len(found)
        return found


@dataclass(eq=False, slots=True)
class Task:
    """A call, and what follows from its result."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    then: Callable[[Any], None]
    """Called with the result, or with the future if the result is kept on the workers."""
    blocks: Sequence[BlockId] = ()
    nbytes: int = 0
    """Bytes of the blocks."""
    keeps: bool = False
    futures: list[Any] = field(default_factory=list)
    """Of the call, and of its repetitions on other workers."""
    began: float = 0.0


class Front:
    """The tasks that are under way in a pool."""

    def __init__(
        self, pool: Pool, arrays: Sequence[ArrayTask], window: int, task_nbytes: int
    ) -> None:
        self.pool = pool
        self._arrays = arrays
        self.window = window
        """Blocks under way, at most."""
        self._task_nbytes = task_nbytes
        self._tasks: dict[Any, Task] = {}
        self._blocks = 0
        self._is_idle = False
        self._done_nbytes = 0
        self._began = self._ended = time.monotonic()

    def run(self, next_task: Callable[[], Task | None]) -> None:
        """Run tasks until there are none: neither given by ``next_task`` nor under way."""
        while True:
            self._is_idle = False
            while self._has_room():
                task = next_task()
                if task is None:
                    self._is_idle = True
                    break
                self.submit(task)
            if not self._tasks:
                return
            self._wait()

    def take(self, blocks: Blocks) -> list[BlockId]:
        """Blocks for one task."""
        tasks = TASKS * self._threads
        # fewer and fewer towards the end, so that all threads end together
        most = min(ceil_div(blocks.left, tasks), self.window // tasks)
        nbytes = float(self._task_nbytes)
        if not self.pool.is_cluster:
            most = min(most, MAX_BLOCKS_PER_TASK)
        elif self._done_nbytes:
            seconds = max(TASK_S, self._threads * SCHEDULER_S)
            nbytes = max(nbytes, seconds / self._seconds(1))
        return blocks.take(self._arrays, nbytes, max(1, most))

    def submit(self, task: Task) -> None:
        """Begin a task, or repeat it on other workers."""
        task.began = time.monotonic()
        if not task.futures:
            self._blocks += len(task.blocks)
        with translating_cluster_errors(self._block_of):
            future = self.pool.submit(task.function, *task.args, avoid=task.futures)
        task.futures.append(future)
        self._tasks[future] = task

    def cancel(self) -> None:
        """Let go of all tasks."""
        self.pool.cancel(self._tasks)
        self._tasks.clear()

    @property
    def _threads(self) -> int:
        with translating_cluster_errors(self._block_of):
            return self.pool.threads

    def _has_room(self) -> bool:
        """Whether another task keeps within the limits."""
        tasks, most = len(self._tasks), TASKS * self._threads
        return not tasks or (self._blocks < self.window and tasks < most)

    def _seconds(self, nbytes: float) -> float:
        """Seconds that a thread has needed for so many bytes."""
        # up to the last task that ended: what waits for the next one is no work
        taken = (self._ended - self._began) * self._threads
        return nbytes * taken / max(1, self._done_nbytes)

    def _wait(self) -> None:
        """Wait until tasks end, and go on from their results."""
        with translating_cluster_errors(self._block_of):
            ended = self.pool.finished(self._tasks, LATE_S)
            # of a repeated task, one future is enough
            first = {self._tasks[future]: future for future in reversed(ended)}
            for task, future in first.items():
                if task.keeps:
                    self.pool.require(future)
            values = self.pool.results([f for task, f in first.items() if not task.keeps])
        for task, future in reversed(first.items()):
            if task.keeps or future in values:
                self._forget(task, future)
                task.then(values.get(future, future))
            else:  # its worker does not answer
                del self._tasks[future]
                self.submit(task)
        if self.pool.is_cluster and (self._is_idle or not ended):
            self._repeat_late()

    def _block_of(self, key: object) -> str:
        """Name of the first block of a task, given the key of its future."""
        for future, task in self._tasks.items():
            if task.blocks and getattr(future, "key", None) == key:
                array, *at = task.blocks[0]
                one = self._arrays[array]
                return f"block {one.source.describe(one.plan.region(*at))}"
        return "a task"

    def _forget(self, task: Task, ended: Any) -> None:
        self._blocks -= len(task.blocks)
        self._done_nbytes += task.nbytes
        self._ended = time.monotonic()
        for future in task.futures:
            self._tasks.pop(future, None)
        self.pool.cancel(f for f in task.futures if f is not ended)

    def _repeat_late(self) -> None:
        """Give tasks that take far longer than others to other workers too."""
        times = LATE if self._is_idle else VERY_LATE
        for task in list(dict.fromkeys(self._tasks.values())):
            limit = LATE_S + times * TASKS * self._seconds(task.nbytes)
            if time.monotonic() - task.began > limit and len(task.futures) < COPIES:
                self.submit(task)
