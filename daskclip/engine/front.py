"""The front of a run: the tasks that are under way, as many as keep all threads busy.

A *task* is a call that does some blocks, or combines their sums. Whenever one ends, others begin,
so that no thread waits for the slowest of a group. On a cluster a task does as many blocks as take
about a second, since each task costs the scheduler about a millisecond; more where there are many
threads, and fewer towards the end of a pass. A task that takes far longer than others is given to
another worker too; the first result counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby, islice
from operator import attrgetter
from typing import Any, NamedTuple, Self
from weakref import WeakKeyDictionary

from daskclip.engine.cluster import translating_cluster_errors
from daskclip.grid import ceil_div
from daskclip.worker import ArrayTask, Pool, add_sums

TASKS = 2  # tasks under way for each thread: the next one is there when one ends
MAX_BLOCKS_PER_TASK = 16  # small blocks that one task does although none has been timed yet
SCHEDULER_S = 0.0015  # seconds that the scheduler and the client have for each task
SHARE = 0.04  # of their time that tasks should take
TASK_S = 1.2  # seconds that a task takes at most to keep to that share
MOST_SHARE = 0.3  # of their time that tasks may take, however long a task is then
THREADS_PER_BLOCK = 256  # for each of which a task has a block, whatever blocks seem to take
LATE, VERY_LATE = 1.25, 10  # times the usual seconds: where threads are idle, and where none is
LATE_S = 0.25  # and so many seconds more
COPIES = 3  # workers that a late task is given to, at most
SILENT_PART = 8  # threads for each that may be taken for frozen while no task ends


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

    @classmethod
    def chained(cls, queues: Sequence[Blocks]) -> Self:
        """Blocks of several queues, one after the other."""
        return cls(chain.from_iterable(q.blocks for q in queues), sum(q.left for q in queues))

    def take(
        self, arrays: Sequence[ArrayTask], nbytes: float, least: int, most: int
    ) -> list[BlockId]:
        """Take the blocks of a task: as many as have so many bytes together."""
        found: list[BlockId] = []
        size = 0.0
        for block in islice(self.blocks, most):
            found.append(block)
            size += arrays[block.array].plan.nbytes_of(block.slab, block.block)
            if size >= nbytes and len(found) >= least:
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
    can_repeat: bool = False
    """Whether a late task makes the result anew that it uses: who has it may not answer."""
    futures: list[Any] = field(default_factory=list)
    """Futures of the call, and of its repetitions on other workers."""
    began: float = 0.0


class Front:
    """The tasks that are under way in a pool."""

    def __init__(
        self, pool: Pool, arrays: Sequence[ArrayTask], blocks: int, task_nbytes: int
    ) -> None:
        self.pool = pool
        self._arrays = arrays
        self.thread_blocks = blocks
        """Blocks under way for each thread, at most."""
        self._task_nbytes = task_nbytes
        self._new: list[Task] = []
        self._tasks: dict[Any, Task] = {}
        # tasks by their results that stay on the workers, as long as these are used
        self._kept: WeakKeyDictionary[Any, Task] = WeakKeyDictionary()
        self._blocks = 0
        self._done_nbytes = 0
        self._began = self._ended = time.monotonic()
        self._threads = self._count_threads()

    @property
    def window(self) -> int:
        """Blocks under way, at most: for each thread that there is now, as many as planned."""
        return self.thread_blocks * self._threads

    def run(self, next_task: Callable[[], Task | None]) -> None:
        """Run tasks until there are none: neither given by ``next_task`` nor under way."""
        while True:
            # once, so that all that is decided until tasks have ended agrees
            self._threads = self._count_threads()
            is_idle = not self._fill(next_task)
            new, self._new = self._new, []
            self._begin(new)
            if not self._tasks:
                return
            ended = self._wait()
            # until some have ended nobody knows what is late
            if self.pool.is_cluster and self._done_nbytes and (is_idle or not ended):
                self._repeat_late(LATE if is_idle else VERY_LATE, is_silent=not ended)

    def _fill(self, next_task: Callable[[], Task | None]) -> bool:
        """Take tasks until no more may be under way; False if there are not as many."""
        while self._has_room():
            task = next_task()
            if task is None:
                return False
            self.submit(task)
        return True

    def take(self, blocks: Blocks, room: int = sys.maxsize) -> list[BlockId]:
        """Blocks for one task, and no more than there is room for."""
        threads = self._threads
        # fewer and fewer towards the end, so that all threads end together
        most = min(ceil_div(blocks.left, threads), self.thread_blocks // TASKS, room)
        nbytes, least = float(self._task_nbytes), 1
        if not self.pool.is_cluster:
            most = min(most, MAX_BLOCKS_PER_TASK)
        else:
            # blocks seem to take the longer, the later the scheduler is
            least = ceil_div(threads, THREADS_PER_BLOCK)
            if self._done_nbytes:
                # longer where there are many threads, so that the scheduler keeps up with them
                every = threads * SCHEDULER_S
                seconds = max(min(TASK_S, every / SHARE), every / MOST_SHARE)
                nbytes = max(nbytes, seconds / self._seconds(1))
        return blocks.take(self._arrays, nbytes, least, max(1, most))

    def submit(self, task: Task) -> None:
        """Let a task begin."""
        self._new.append(task)
        self._blocks += len(task.blocks)

    def _begin(self, tasks: Sequence[Task]) -> None:
        """Begin tasks, or repeat them on other workers than those that have one of them."""
        for function, group in groupby(tasks, key=attrgetter("function")):
            some = [*group]
            avoid = [future for task in some for future in task.futures]
            with translating_cluster_errors(self._block_of):
                calls = [self._renewed(task.args) if avoid else task.args for task in some]
                futures = self.pool.submit(function, calls, avoid)
            for task, future in zip(some, futures, strict=True):
                task.began = time.monotonic()
                task.futures.append(future)
                self._tasks[future] = task

    def _renewed(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments of a late call: who has the results in them may not answer."""

        def renewed(argument: Any) -> Any:
            if isinstance(argument, list):
                return [*map(renewed, argument)]
            if argument not in self._kept:
                return argument
            task = self._kept[argument]
            return [task.function, [*map(renewed, task.args)]]

        return tuple(map(renewed, args))

    def cancel(self) -> None:
        """Let go of all tasks."""
        self.pool.cancel(self._tasks)
        self._tasks.clear()

    def _count_threads(self) -> int:
        """Threads that there are now."""
        with translating_cluster_errors(self._block_of):
            return self.pool.threads

    def _has_room(self) -> bool:
        """Whether another task keeps within the limits."""
        tasks, most = len(self._tasks) + len(self._new), TASKS * self._threads
        return not tasks or (self._blocks < self.window and tasks < most)

    def _seconds(self, nbytes: float) -> float:
        """Seconds that a thread has needed for so many bytes."""
        # up to the last task that ended: what waits for the next one is no work
        taken = (self._ended - self._began) * self._threads
        return nbytes * taken / max(1, self._done_nbytes)

    def _wait(self) -> bool:
        """Wait until tasks end, and go on from their results; False if none has ended in time."""
        with translating_cluster_errors(self._block_of):
            pending = {future: task.keeps for future, task in self._tasks.items()}
            ended = self.pool.ended(pending, LATE_S)
        for future, value in ended.items():
            # of a repeated task, one result is enough
            if (task := self._tasks.get(future)) is not None:
                self._forget(task, future)
                task.then(value)
        return bool(ended)

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
        task.futures = []  # else a result that is kept would be held by its own task
        if task.can_repeat:
            self._kept[ended] = task

    def _repeat_late(self, times: float, *, is_silent: bool) -> None:
        """Give tasks that take so many times as long as others to other workers too."""
        under_way = list(dict.fromkeys(self._tasks.values()))
        # what a thread has, on average, may come before a task
        before = sum(task.nbytes for task in under_way) / self._threads
        now = time.monotonic()
        late = [
            task for task in under_way
            if now - task.began > LATE_S + times * self._seconds(before + task.nbytes)
            and len(task.futures) < COPIES
        ]  # fmt: skip
        # for threads without a task, since all tasks are late if the scheduler is; and for some
        # others if no task ends, since these threads may be frozen
        frozen = ceil_div(self._threads, SILENT_PART) if is_silent else 0
        idle = max(self._threads - len(self._tasks), frozen)
        self._begin(sorted(late, key=attrgetter("began"))[:idle])


def reduce_sums(
    front: Front, parts: Sequence[Any], known: int, then: Callable[[Sequence[Any], int], None]
) -> None:
    """Add sums on the workers until they are few enough for one task, which has to hold them all.

    The digests of the first ``known`` sums are known. Calls ``then`` with the sums that are left,
    and the number of those among them.
    """
    most = max(2, front.thread_blocks // 2)
    if len(parts) <= most:
        then(parts, known)
        return
    each = ceil_div(len(parts), ceil_div(len(parts), most))
    groups = [parts[start : start + each] for start in range(0, len(parts), each)]
    found: dict[int, Any] = {}

    def added(group: int, sums: Any) -> None:
        found[group] = sums
        if len(found) == len(groups):
            # taken out, so that no task that has ended holds them
            reduce_sums(front, [found.pop(i) for i in range(len(groups))], 0, then)

    for i, group in enumerate(groups):
        args = group, 0 if i else known
        front.submit(Task(add_sums, args, partial(added, i), keeps=True, can_repeat=True))
