"""Pools that run tasks: an executor of this process, or the workers of a Dask cluster.

Both pools give *futures* for calls. A future may be an argument of a later call, which then gets
its result: on a cluster that stays on the workers.
"""

from __future__ import annotations

import asyncio
import pickle
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol
from uuid import uuid4

from daskclip.grid import ceil_div
from daskclip.worker.context import unpacked

SHORTEST, LONGEST = 0.001, 0.05  # seconds between two looks at the futures of a cluster
TOGETHER = 8  # parts of the calls under way whose results are fetched together
FETCH_INTERVAL_S = 0.2  # after which fewer are fetched too
COUNT_INTERVAL_S = 1.0  # between two questions for the number of threads
PACKED_NBYTES = 1 << 15  # of a value that is sent with each call
ANSWER_S, EACH_S = 1.0, 0.02  # and for each result, after which a fetch is split
SPLIT = 8  # into so many parts
Function = Callable[..., Any]
Calls = Sequence[tuple[Any, ...]]
"""Arguments of calls."""


class Pool(Protocol):
    """Threads that run calls, and the futures of these."""

    is_cluster: bool
    """Whether the threads are those of other machines: calls cost, and workers may be slow."""

    @property
    def threads(self) -> int:
        """Number of threads now, at least 1."""

    def share(self, value: object) -> Any:
        """Argument for many calls that is sent to each process once."""

    def submit(self, function: Function, calls: Calls, avoid: Collection[Any] = ()) -> list[Any]:
        """Futures of calls of a function, given the arguments of each.

        They run on workers that have none of the futures in ``avoid``, if there are any.
        """

    def ended(self, pending: Mapping[Any, bool], seconds: float) -> dict[Any, Any]:
        """Results of futures that have ended, waited for so long at most.

        Of futures with True, the result stays where it is, and the future stands for it. Raises
        what a call has raised.
        """

    def cancel(self, futures: Iterable[Any]) -> None:
        """Let go of futures; calls that have not begun need not run."""


class LocalPool:
    """An executor: threads or processes of this machine, or one that runs calls at once."""

    is_cluster = False

    def __init__(self, executor: Executor, threads: int) -> None:
        self.threads = threads
        self._executor = executor
        self._ended: SimpleQueue[Future[Any]] = SimpleQueue()

    def share(self, value: object) -> Any:
        """Return the value: threads share it."""
        return value

    def submit(
        self, function: Function, calls: Calls, avoid: Collection[Any] = ()
    ) -> list[Future[Any]]:
        """Futures of calls, whose arguments may be futures that have ended, or lists of them."""
        futures = [self._executor.submit(function, *map(_resolved, args)) for args in calls]
        for future in futures:
            future.add_done_callback(self._ended.put)
        return futures

    def ended(self, pending: Mapping[Future[Any], bool], seconds: float) -> dict[Future[Any], Any]:
        """Results of futures that have ended since the last call."""
        found = []
        with suppress(Empty):
            found.append(self._ended.get(timeout=seconds))
            while True:
                found.append(self._ended.get_nowait())
        # all are looked at: one may have raised
        results = {future: future.result() for future in found}
        return {future: future if pending[future] else value for future, value in results.items()}

    def cancel(self, futures: Iterable[Future[Any]]) -> None:
        """Cancel calls that have not begun."""
        for future in futures:
            future.cancel()


class SchedulerExecutor(ThreadPoolExecutor):
    """Calls that another scheduler of Dask computes, some at a time."""

    def __init__(self, get: Callable[..., Any], threads: int) -> None:
        super().__init__(threads)
        self._get = get

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Future of a call, which is a graph of one task."""
        return super().submit(self._get, {"call": (partial(fn, *args, **kwargs),)}, "call")


@dataclass(slots=True)
class Fetch:
    """Results that are on their way to this process."""

    futures: list[Any]
    results: Future[list[Any]]
    until: float = field(init=False)
    """When it is split."""

    def __post_init__(self) -> None:
        self.until = time.monotonic() + ANSWER_S + EACH_S * len(self.futures)


class ClusterPool:
    """The workers of a Dask cluster, by a distributed Client."""

    is_cluster = True

    def __init__(self, client: Any) -> None:
        self._client = client
        self._name = uuid4().hex
        self._number = 0
        self._threads, self._counted = 1, 0.0
        self._fetches: list[Fetch] = []
        self._fetched = 0.0

    @property
    def threads(self) -> int:
        """Number of threads of all workers now; 1 while there is none."""
        if time.monotonic() - self._counted >= COUNT_INTERVAL_S:
            self._threads = max(1, sum(self._client.nthreads().values()))
            self._counted = time.monotonic()
        return self._threads

    def share(self, value: object) -> Any:
        """Argument that has the value on a worker: its pickle, or a future if that is large."""
        data = pickle.dumps(value)
        if len(data) <= PACKED_NBYTES:
            # not a future: workers would fetch it from the one that has it for each call
            return Packed(data)
        return self._client.submit(Shared(value), key=self._key("share"), pure=False)

    def submit(self, function: Function, calls: Calls, avoid: Collection[Any] = ()) -> list[Any]:
        """Futures of calls; those submitted before come first."""
        keys = [self._key(function.__name__) for _ in calls]
        # one message, since each costs as much as several calls
        futures: list[Any] = self._client.map(
            function, *zip(*calls, strict=True), key=keys, pure=False, priority=-self._number,
            workers=self._others(avoid) if avoid else None,
        )  # fmt: skip
        return futures

    def _key(self, name: str) -> str:
        self._number += 1
        return f"{name}-{self._name}-{self._number}"

    def _others(self, futures: Collection[Any]) -> list[str] | None:
        """Addresses of the workers that do not have one of the futures; None if all do."""
        keys = {future.key for future in futures}
        running: dict[str, Any] = self._client.processing()
        busy = {worker for worker, calls in running.items() if keys & {*calls}}
        return [worker for worker in self._client.nthreads() if worker not in busy] or None

    def ended(self, pending: Mapping[Any, bool], seconds: float) -> dict[Any, Any]:
        """Results that have arrived; what has ended is fetched."""
        # each look takes longer with more futures
        longest = min(LONGEST, SHORTEST * len(pending))
        until, delay, fetched = time.monotonic() + seconds, SHORTEST, self._fetched
        while not (found := self._arrived(pending)) and time.monotonic() < until:
            # results are there soon after they are asked for
            if fetched != self._fetched:
                delay, fetched = SHORTEST, self._fetched
            time.sleep(delay)
            delay = min(2 * delay, longest)
        return found

    def _arrived(self, pending: Mapping[Any, bool]) -> dict[Any, Any]:
        asked = {future for fetch in self._fetches for future in fetch.futures}
        ready = [f for f in pending if f.status not in ("pending", "lost") and f not in asked]
        for future in ready:
            if future.status != "finished":
                future.result()
        wanted = [future for future in ready if not pending[future]]
        # some at a time where many are under way: each time costs as much as a task
        waited = time.monotonic() - self._fetched > FETCH_INTERVAL_S
        if wanted and (waited or len(wanted) > len(pending) // TOGETHER):
            self._fetch(wanted)
        found = {future: future for future in ready if pending[future]}
        fetches, self._fetches = self._fetches, []
        for fetch in fetches:
            found |= self._result(fetch, pending)
        return found

    def _fetch(self, futures: list[Any]) -> None:
        """Begin to fetch results together; the loop of the client goes on with it."""
        results = asyncio.run_coroutine_threadsafe(
            self._client.gather(futures, asynchronous=True), self._client.loop.asyncio_loop
        )
        self._fetches.append(Fetch(futures, results))
        self._fetched = time.monotonic()

    def _result(self, fetch: Fetch, pending: Mapping[Any, bool]) -> dict[Any, Any]:
        """Results of a fetch that has ended; else it goes on, with what is still wanted."""
        wanted = [future for future in fetch.futures if future in pending]
        if fetch.results.done():
            # the wait is cancelled now and then, though no task was
            lost = fetch.results.cancelled()
            error = None if lost else fetch.results.exception()
            if error is None and not lost:
                values = dict(zip(fetch.futures, fetch.results.result(), strict=True))
                return {future: values[future] for future in wanted}
            # where a future was let go of, that is the error
            if error and len(wanted) == len(fetch.futures) and not wait_was_cancelled(error):
                raise error
        elif wanted and (len(wanted) == 1 or time.monotonic() < fetch.until):
            self._fetches.append(fetch)
            return {}
        # a worker that does not answer holds up the results of others
        fetch.results.cancel()
        size = ceil_div(len(wanted), SPLIT) or 1
        for start in range(0, len(wanted), size):
            self._fetch(wanted[start : start + size])
        return {}

    def cancel(self, futures: Iterable[Any]) -> None:
        """Let go of futures: a call whose future nobody holds is forgotten by the scheduler."""
        for future in futures:
            future.release()


class Packed:
    """A value as its pickle, which becomes the value where it is sent to."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return unpacked, (self.data,)


class Shared:
    """A call without arguments that gives a value, in which Dask does not look for tasks."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __call__(self) -> Any:
        return self.value


def _resolved(argument: Any) -> Any:
    """Result of a future, and of the futures of a list."""
    if isinstance(argument, Future):
        return argument.result()
    return [*map(_resolved, argument)] if isinstance(argument, list) else argument


def wait_was_cancelled(error: BaseException) -> bool:
    """Whether distributed cancelled its wait for results, which it reports as a bug of its own."""
    if not isinstance(error, UnboundLocalError):
        return False
    # dask/distributed#8514; a task may raise the same, but elsewhere
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    return bool(last.f_globals["__name__"] == "distributed.utils")
