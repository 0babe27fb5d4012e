"""The processes that run blocks: their number, threads, versions and memory."""

from __future__ import annotations

import os
import platform
import time
import traceback
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

import dask
from dask import config
from dask.base import get_scheduler
from dask.system import CPU_COUNT

from daskclip.errors import ClusterError, DaskClipError, StorageError, TemporaryError, error_text
from daskclip.worker import drain

WRITING = ("daskclip", "zarr", "numcodecs")  # what the bytes that are stored depend on
PACKAGES = (*WRITING, "numpy", "dask", "distributed")
ComputeKwargs = dict[str, ThreadPoolExecutor]
"""Keyword arguments of ``dask.compute``."""
R = TypeVar("R")


def _client() -> Any:
    """The active distributed Client, or None."""
    get = get_scheduler()
    owner = getattr(get, "__self__", None)
    return owner if hasattr(owner, "nthreads") else None


def workers() -> tuple[int, int, int]:
    """Number of processes that run blocks, threads of the largest one, and the fewest to use."""
    client = _client()
    if client is not None:
        with translating_cluster_errors(str):
            if not client.nthreads():
                client.wait_for_workers(1, timeout=60)
            threads = list(client.nthreads().values())
        most = max(threads, default=1)
        return max(1, len(threads)), most, most
    get = get_scheduler()
    if get is dask.get:
        return 1, 1, 1
    number = config.get("num_workers", None) or CPU_COUNT
    if get is not None and get is not dask.threaded.get:
        return number, 1, 1
    if _own_pool():
        return 1, number, 1
    number = getattr(config.get("pool"), "_max_workers", number)
    return 1, number, number


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that read, clip and write."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


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

    with translating_cluster_errors(str):
        before = client.nthreads().keys()
        seen = _everywhere(look, 60)
        # workers that have left need not answer, and those that have joined were not asked
        silent = (before & client.nthreads().keys()) - seen.keys()
    if silent:
        raise TemporaryError(
            f"worker {min(silent)} did not say in 60 s which versions it has; it may be busy: run "
            "again, or look at its log"
        )
    here = look()
    for worker, there in seen.items():
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


def _own_pool() -> bool:
    """Whether blocks run on threads that are made for the run."""
    return get_scheduler() in (None, dask.threaded.get) and config.get("pool", None) is None


@contextmanager
def running(threads: int, attempt_id: str) -> Iterator[ComputeKwargs]:
    """Yield arguments for computing the blocks of an attempt; none is running afterwards.

    A pool that is made here has ``threads``.
    """
    try:
        if _own_pool():
            with ThreadPoolExecutor(threads) as pool:
                try:
                    yield {"pool": pool}
                finally:
                    pool.shutdown(cancel_futures=True)
        else:
            yield {}
    finally:
        # when one block fails, Dask goes on with those that it began before; and an error here
        # must not hide the one that ended the run
        with suppress(Exception):
            _everywhere(partial(drain, attempt_id), 60)


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
                "of its window was running; look into their logs and run the same command again "
                "to resume"
            ) from error
        lost = isinstance(error, OSError | CancelledError | TimeoutError)
        if lost or _wait_was_cancelled(error) or kind.__module__.startswith("distributed"):
            raise TemporaryError(
                f"the cluster was lost ({kind.__name__}: {error_text(error)}); "
                "run the same command again to resume"
            ) from error
        raise


def compute_retrying_cancelled(tasks: Sequence[Any], compute_kwargs: ComputeKwargs) -> list[Any]:
    """Compute tasks; again if distributed has cancelled its own wait for their results."""
    try:
        return list(dask.compute(*tasks, **compute_kwargs))
    except UnboundLocalError as error:
        # the wait is cancelled now and then, though no task was
        if not _wait_was_cancelled(error):
            raise
    return list(dask.compute(*tasks, **compute_kwargs))


def _wait_was_cancelled(error: BaseException) -> bool:
    """Whether distributed cancelled its wait for results, which it reports as a bug of its own."""
    if not isinstance(error, UnboundLocalError):
        return False
    # dask/distributed#8514; a task may raise the same, but elsewhere
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    return bool(last.f_globals["__name__"] == "distributed.utils")


def memory_used() -> dict[str, tuple[int, int]]:
    """Resident bytes of every process that runs blocks, now and at the highest."""
    with translating_cluster_errors(str):
        return _everywhere(_own_memory, 10)


def _everywhere(function: Callable[[], R], seconds: float) -> dict[str, R]:
    """Result of ``function`` from this process, or from every worker that answers in time."""
    client = _client()
    if client is None:
        return {str(os.getpid()): function()}
    until = time.monotonic() + seconds
    # the priority puts it before the tasks that workers have
    options = {"pure": False, "priority": 1000}
    calls = {w: client.submit(function, workers=[w], **options) for w in client.nthreads()}
    results = {}
    for worker, call in calls.items():
        with suppress(Exception, CancelledError):
            # a worker that is gone never answers
            while not call.done() and time.monotonic() < until and worker in client.nthreads():
                time.sleep(0.01)
            results[worker] = call.result(timeout=10 if call.done() else 0.01)
    return results


def _own_memory() -> tuple[int, int]:
    """Resident bytes of this process, now and at its highest; 0 where /proc does not say."""
    try:
        with open("/proc/self/status") as status:
            fields = dict(line.split(":", 1) for line in status)
        return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return 0, 0
