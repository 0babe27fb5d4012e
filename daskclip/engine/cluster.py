"""The processes that run blocks: their number, threads, versions and memory."""

from __future__ import annotations

import logging
import os
import platform
import time
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing.pool import Pool as BasePool
from threading import Event, Thread
from typing import Any, TypeVar

import dask
from dask import config
from dask.base import get_scheduler
from dask.local import MultiprocessingPoolExecutor, SynchronousExecutor
from dask.system import CPU_COUNT

from daskclip.arguments import check_configuration
from daskclip.errors import (
    ClusterError,
    DaskClipError,
    InvalidValueError,
    StorageError,
    TemporaryError,
    error_text,
    short_repr,
)
from daskclip.storage import Hierarchy, is_private
from daskclip.worker import (
    ClusterPool,
    LocalPool,
    Memory,
    Pool,
    SchedulerExecutor,
    drain,
    own_memory,
    wait_was_cancelled,
)

WRITING = ("daskclip", "zarr", "numcodecs")  # what the bytes that are stored depend on
PACKAGES = (*WRITING, "numpy", "dask", "distributed")
LOG_WAIT_S = 60.0  # between two lines of the log while no worker is there
PROBE_S = 60.0  # that a worker has to say what it has
LOOK_S = 0.2  # that workers have before it is asked which ones are silent
SILENT_S = 3.0  # after the last sign of life of another worker
R = TypeVar("R")
log = logging.getLogger("daskclip")


def _scheduler() -> Any:
    """Function that Dask computes with; None if nothing is set."""
    try:
        return get_scheduler()
    except RuntimeError as error:
        raise ClusterError(
            f"Dask has no scheduler for this call ({error_text(error)}); use a synchronous Client, "
            "or another thread: await asyncio.to_thread(clip_zarr, ...)"
        ) from error
    except Exception as error:  # also of distributed, which is imported for it
        named = short_repr(config.get("scheduler", None))
        raise InvalidValueError(
            f"dask's setting scheduler is {named}, which cannot be used ({error_text(error)}); "
            "give another, or none"
        ) from error


def _client() -> Any:
    """The active distributed Client, or None."""
    owner = getattr(_scheduler(), "__self__", None)
    return owner if hasattr(owner, "nthreads") else None


@contextmanager
def leaving_worker_pool() -> Iterator[None]:
    """Give up the thread of a worker whose task this is, since blocks and probes need it."""
    with ExitStack() as stack:
        if _client() is not None:
            from distributed import get_worker, worker_client
            from distributed.worker import thread_state

            with suppress(ValueError):  # this is no task
                worker = get_worker()
                stack.enter_context(worker_client())
                # a coroutine gives up nothing, nor does a task that waits for this thread
                if not hasattr(thread_state, "start_time"):
                    _require_thread(worker.state)
        yield


def _require_thread(state: Any) -> None:
    """Refuse a worker, whose state is given, that has no thread for another task."""
    until = time.monotonic() + 1  # a thread that is given up is not counted at once
    while state.executing_count >= state.nthreads:
        if time.monotonic() > until:
            raise ClusterError(
                "all threads of the worker are taken, one by the task of this call; call it inside "
                "worker_client(), in a task that is no coroutine"
            )
        time.sleep(0.01)


def workers() -> tuple[int, int, int]:
    """Number of processes that run blocks, threads of the largest one, and the fewest to use."""
    check_configuration()
    client = _client()
    if client is not None:
        with translating_cluster_errors(str):
            threads = _awaited_threads(client).values()
        return len(threads), max(threads), max(threads)
    get = _scheduler()
    if get is dask.get:
        return 1, 1, 1
    pool, number = config.get("pool", None), config.get("num_workers", None) or CPU_COUNT
    # of an executor, or of a pool of the standard library
    number = getattr(pool, "_max_workers", getattr(pool, "_processes", number))
    if get is not None and get is not dask.threaded.get:
        return number, 1, 1
    return 1, number, 1 if pool is None else number


def _awaited_threads(client: Any) -> dict[str, int]:
    """Threads of every worker; waits for the first one as long as the cluster lives."""
    threads: dict[str, int] = client.nthreads()
    while not threads:
        with _logging_absence(client):
            # clusters that adapt start workers for tasks only
            client.submit(abs, 0, pure=False).result()
        threads = client.nthreads()
    return threads


@contextmanager
def _logging_absence(client: Any) -> Iterator[None]:
    """Log each minute that there is no worker that can run tasks, as long as there is none."""
    ended, resources = Event(), dask.get_annotations().get("resources", {})

    def watch() -> None:
        while not ended.wait(LOG_WAIT_S):
            # a cluster that is lost is reported by who waits for it
            with suppress(Exception, CancelledError):
                workers = client.scheduler_info()["workers"].values()
                if not any(_has(about["resources"], resources) for about in workers):
                    what = "".join(f" with {k}={n:g}" for k, n in resources.items())
                    where = client.scheduler.address
                    log.warning(
                        "the cluster at %s has no worker%s; waiting until one comes", where, what
                    )

    Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _has(resources: dict[str, float], wanted: dict[str, float]) -> bool:
    """Whether a worker of these resources has those that tasks want."""
    return all(resources.get(name, 0) >= number for name, number in wanted.items())


def memory_of_workers() -> tuple[str, int] | None:
    """The worker that has least memory before Dask pauses it, and its bytes; None if unlimited."""
    client, pause = _client(), config.get("distributed.worker.memory.pause", False)
    if client is None or not pause:
        return None
    with translating_cluster_errors(str):
        workers = client.scheduler_info()["workers"]
    left = {
        address: int(about["memory_limit"] * pause - about["metrics"]["memory"])
        for address, about in workers.items()
        if about["memory_limit"]
    }
    return min(left.items(), key=lambda item: item[1], default=None)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that read, clip and write."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def require_shared(read: Sequence[Hierarchy]) -> None:
    """Refuse what only this process sees, if blocks run in other ones."""
    if _scheduler() in (None, dask.threaded.get, dask.get):
        return
    for where in read:
        if is_private(where.store):
            raise ClusterError(
                f"{where} is in a store that other processes do not see; run on threads of this "
                "one, or use another store"
            )


def require_alike(paths: Sequence[str]) -> None:
    """Refuse a cluster with a worker of other versions, or one that does not see some files."""
    client = _client()
    if client is None:
        return
    names = WRITING

    # pickled by value: on a worker there may be another daskclip, or none
    def look() -> dict[str, str]:
        import os
        from importlib import metadata, util

        found = {name: metadata.version(name) if util.find_spec(name) else "none" for name in names}
        return found | {path: "" if os.path.exists(path) else "no" for path in paths}

    # first, since another Python may crash when it loads a function by value
    python = platform.python_version_tuple()
    for worker, theirs in _ask_all(client, platform.python_version_tuple).items():
        if theirs[:2] != python[:2]:
            raise ClusterError(
                f"worker {worker} has Python {'.'.join(theirs)} and not {'.'.join(python)}; "
                "install there what is here"
            )
    here = look()
    for worker, there in _ask_all(client, look).items():
        for name in (n for n in here if there[n] != here[n]):
            if name in paths:
                raise ClusterError(
                    f"worker {worker} does not see {name}; give it the same file system, or use "
                    "an object store"
                )
            raise ClusterError(
                f"worker {worker} has {name} {there[name]} and not {here[name]}; install there "
                "what is here"
            )


def _ask_all(client: Any, question: Callable[[], R]) -> dict[str, R]:
    """Answer of every worker, of which there is one at least; refuse those that give none."""
    answers: dict[str, R] = {}
    failed: dict[str, BaseException] = {}
    with translating_cluster_errors(str):
        # all that were asked may have left
        while not answers and not failed:
            _awaited_threads(client)
            answers = _everywhere(question, PROBE_S, failed)
    for worker, error in failed.items():
        passing = isinstance(error, TimeoutError | CancelledError)
        remedy = "give it the Python and the packages of this process"
        if passing:
            remedy = "run again, in a task inside worker_client()"
        raise (TemporaryError if passing else ClusterError)(
            f"worker {worker} did not say which versions it has ({type(error).__name__}: "
            f"{error_text(error)}); {remedy}, or look at its log"
        ) from error
    return answers


@contextmanager
def running(threads: int, attempt_id: str) -> Iterator[Pool]:
    """Yield the pool that runs the blocks of an attempt; none is running afterwards.

    A pool of threads that is made here has ``threads``.
    """
    client = _client()
    try:
        if client is not None:
            with _logging_absence(client):
                yield ClusterPool(client)
        else:
            with _executor(threads) as executor:
                yield LocalPool(executor, getattr(executor, "_max_workers", threads))
    finally:
        # when one block fails, others may be running; and an error here must not hide the one that
        # ended the run
        with suppress(Exception):
            _everywhere(partial(drain, attempt_id), PROBE_S)


@contextmanager
def _executor(threads: int) -> Iterator[Executor]:
    """Executor that Dask's configuration asks for: it is made here, unless it is a given one."""
    given, get = config.get("pool", None), _scheduler()
    if get is dask.get:
        yield SynchronousExecutor()
    elif given is not None:
        yield MultiprocessingPoolExecutor(given) if isinstance(given, BasePool) else given
    else:
        made: Executor = ThreadPoolExecutor(threads)
        if get is dask.multiprocessing.get:
            setup = config.get("multiprocessing.initializer", None)
            start = partial(dask.multiprocessing.initialize_worker_process, setup)
            context = dask.multiprocessing.get_context()
            made = ProcessPoolExecutor(workers()[0], context, start)
        elif get not in (None, dask.threaded.get):
            made = SchedulerExecutor(get, workers()[0])
        with made:
            try:
                yield made
            finally:
                made.shutdown(cancel_futures=True)


@contextmanager
def translating_cluster_errors(block_of: Callable[[object], str]) -> Iterator[None]:
    """Report the loss of workers or of the cluster on one line; ``block_of`` names a task."""
    try:
        yield
    except DaskClipError:
        raise
    except (Exception, CancelledError) as error:
        kind = type(error)
        if kind.__name__ == "KilledWorker":
            # Dask blames all tasks that a worker had, not only the one that it was running
            raise StorageError(
                f"workers repeatedly died while {block_of(getattr(error, 'task', None))} or one "
                "that they had too was running; look into their logs and run the same command "
                "again to resume"
            ) from error
        lost = isinstance(error, OSError | CancelledError | TimeoutError | BrokenExecutor)
        if lost or wait_was_cancelled(error) or kind.__module__.startswith("distributed"):
            # by distributed.scheduler.no-workers-timeout, which is infinite by default
            late = kind.__name__ in ("NoWorkerError", "NoValidWorkerError")
            what = "no worker came in time" if late else "the cluster was lost"
            raise TemporaryError(
                f"{what} ({kind.__name__}: {error_text(error)}); run the same command again to "
                "resume"
            ) from error
        raise


def memory_used(*, reset: bool = False) -> dict[str, Memory]:
    """Memory of every process that runs blocks; with ``reset``, the highest is counted from now."""
    with translating_cluster_errors(str):
        return _everywhere(partial(own_memory, reset), 10)


@dataclass(frozen=True)
class _Calling:
    """A function that is called where this is loaded from its pickle, and gives its result."""

    function: Callable[[], object]

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return self.function, ()


def _everywhere(
    function: Callable[[], R], seconds: float, failed: dict[str, BaseException] | None = None
) -> dict[str, R]:
    """Result of ``function`` from this process, or from every worker that answers in time.

    ``failed`` gets the errors of those that have not answered and not left; without it, workers of
    which the scheduler does not hear any more are not waited for.
    """
    client = _client()
    if client is None:
        return {str(os.getpid()): function()}
    from distributed.protocol import pickle

    until, look = time.monotonic() + seconds, time.monotonic() + LOOK_S
    # the priority puts it before the tasks that workers have
    options = {"pure": False, "priority": 1000}
    # loaded inside a task, since a worker that cannot load a task closes and does not say why
    load = pickle.loads, pickle.dumps(_Calling(function))
    with dask.annotate(resources={}):  # those that blocks need are none of its business
        calls = {w: client.submit(*load, workers=[w], **options) for w in client.nthreads()}
    results = {}
    for worker, call in calls.items():
        try:
            # a worker that is gone never answers
            while not call.done() and worker in client.nthreads():
                if time.monotonic() > until:
                    others = len({*client.processing([worker])[worker]} - {call.key})
                    tasks = "1 other task" if others == 1 else f"{others} other tasks"
                    raise TimeoutError(f"no answer in {seconds:g} s, and {tasks} there")
                if failed is None and time.monotonic() > look:
                    look += 1
                    if _is_silent(client, worker):
                        break
                time.sleep(0.01)
            results[worker] = call.result(timeout=10 if call.done() else 0.01)
        except (Exception, CancelledError) as error:
            if failed is not None and worker in client.nthreads():
                failed[worker] = error
        finally:
            call.release()  # not only when the error, which refers to this frame, is freed
    return results


def _is_silent(client: Any, worker: str) -> bool:
    """Whether the scheduler has not heard of a worker for long, as if it were frozen."""
    workers = client.scheduler_info()["workers"]
    seen = {address: about["last_seen"] for address, about in workers.items()}
    # the more workers there are, the less often each sends a sign of life
    longest = SILENT_S + len(seen) / 50
    return worker in seen and max(seen.values()) - seen[worker] > longest
