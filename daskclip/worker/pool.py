"""Where tasks run: on an executor of this process, or on the workers of a Dask cluster.

Both pools give *futures* for calls. A future may be an argument of a later call, which then gets
its result: on a cluster that stays on the workers.
"""

from __future__ import annotations

import pickle
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol
from uuid import uuid4

from daskclip.worker.context import unpacked

SHORTEST, LONGEST = 0.001, 0.05  # seconds between two looks at the futures of a cluster
COUNT_INTERVAL_S = 1.0  # between two questions for the number of threads
PACKED_NBYTES = 1 << 15  # of a value that is sent with each call
ANSWER_S = 3.0  # within which a worker has to answer that has a result


class Pool(Protocol):
    """Threads that run calls, and the futures of these."""

    is_cluster: bool
    """Whether the threads are those of other machines: calls cost, and workers may be slow."""

    @property
    def threads(self) -> int:
        """Number of threads now, at least 1."""

    def share(self, value: object) -> Any:
        """Argument for many calls that is sent to each process once."""

    def submit(self, function: Callable[..., Any], *args: Any, avoid: Collection[Any] = ()) -> Any:
        """Future of a call; on other workers than the futures of the same call in ``avoid``."""

    def finished(self, pending: Iterable[Any], seconds: float) -> list[Any]:
        """Futures that have ended, waited for so long at most."""

    def results(self, futures: Sequence[Any]) -> dict[Any, Any]:
        """Results of futures that have ended, where they answer; raises what one has raised."""

    def require(self, future: Any) -> None:
        """Raise what a future that has ended has raised; its result stays where it is."""

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
        self, function: Callable[..., Any], *args: Any, avoid: Collection[Any] = ()
    ) -> Future[Any]:
        """Future of a call, whose arguments may be futures that have ended, or lists of them."""
        future = self._executor.submit(function, *map(_resolved, args))
        future.add_done_callback(self._ended.put)
        return future

    def finished(self, pending: Iterable[Any], seconds: float) -> list[Future[Any]]:
        """Futures that have ended since the last call."""
        found = []
        with suppress(Empty):
            found.append(self._ended.get(timeout=seconds))
            while True:
                found.append(self._ended.get_nowait())
        return found

    def results(self, futures: Sequence[Future[Any]]) -> dict[Any, Any]:
        """Results; raises what one of the calls has raised."""
        return {future: future.result() for future in futures}

    def require(self, future: Future[Any]) -> None:
        """Raise what a call has raised."""
        future.result()

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


class ClusterPool:
    """The workers of a Dask cluster, by a distributed Client."""

    is_cluster = True

    def __init__(self, client: Any) -> None:
        self._client = client
        self._name = uuid4().hex
        self._number = 0
        self._threads, self._counted = 1, 0.0

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
        # not always a future: workers would fetch it from the one that has it for each call
        return Packed(data) if len(data) <= PACKED_NBYTES else self.submit(Shared(value))

    def submit(self, function: Callable[..., Any], *args: Any, avoid: Collection[Any] = ()) -> Any:
        """Future of a call; earlier calls come first."""
        self._number += 1
        name = getattr(function, "__name__", "share")
        others = self._others(avoid) if avoid else None
        return self._client.submit(
            function, *args, key=f"{name}-{self._name}-{self._number}", pure=False,
            priority=-self._number, workers=others,
        )  # fmt: skip

    def _others(self, futures: Collection[Any]) -> list[str] | None:
        """Addresses of the workers that do not have one of the futures; None if all do."""
        keys = {future.key for future in futures}
        running: dict[str, Any] = self._client.processing()
        busy = {worker for worker, calls in running.items() if keys & {*calls}}
        return [worker for worker in self._client.nthreads() if worker not in busy] or None

    def finished(self, pending: Iterable[Any], seconds: float) -> list[Any]:
        """Futures that have ended."""
        until, delay = time.monotonic() + seconds, SHORTEST
        while not (found := [f for f in pending if f.status not in ("pending", "lost")]):
            if time.monotonic() >= until:
                break
            time.sleep(delay)
            delay = min(2 * delay, LONGEST)
        return found

    def results(self, futures: Sequence[Any]) -> dict[Any, Any]:
        """Results, fetched together; without those of workers that do not answer."""
        found = self._gathered(futures)
        if found is None:  # one that does not answer holds up all: the others by themselves
            each = ((f, self._gathered([f])) for f in futures) if len(futures) > 1 else ()
            return {f: values[0] for f, values in each if values is not None}
        return dict(zip(futures, found, strict=True))

    def _gathered(self, futures: Sequence[Any]) -> list[Any] | None:
        gather = partial(self._client.gather, list(futures), asynchronous=True)
        try:
            return list(self._client.sync(gather, callback_timeout=ANSWER_S))
        except TimeoutError:
            return None
        except UnboundLocalError as error:
            # the wait is cancelled now and then, though no task was
            if not wait_was_cancelled(error):
                raise
            return None

    def require(self, future: Any) -> None:
        """Raise what a call has raised."""
        if future.status != "finished":
            future.result()

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
