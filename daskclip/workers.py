"""The processes that run blocks: how many, with how many threads, how large."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import dask
from dask import config
from dask.base import get_scheduler
from dask.system import CPU_COUNT


def _client() -> Any:
    """The active distributed Client, or None."""
    get = get_scheduler()
    owner = getattr(get, "__self__", None)
    return owner if hasattr(owner, "nthreads") else None


def workers() -> tuple[int, int, int]:
    """Processes that will run blocks, threads of the largest of them, and the fewest it may use."""
    client = _client()
    if client is not None:
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


def _own_pool() -> bool:
    """Whether blocks run on threads that are made for the run."""
    return get_scheduler() in (None, dask.threaded.get) and config.get("pool", None) is None


@contextmanager
def running(threads: int, wait: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """Arguments of ``dask.compute``; no block is under way any more when the context ends.

    When one block fails, Dask goes on with those that it began before; they would write after the
    clean-up. ``wait`` returns once its process has ended them. A pool of our own has ``threads``.
    """
    client = _client()
    if client is not None:
        try:
            yield {}
        except BaseException:
            ends = [client.submit(wait, workers=[w], pure=False) for w in client.nthreads()]
            for end in ends:
                with suppress(Exception):  # the first error is the one to tell
                    end.result(timeout=60)
            raise
    elif _own_pool():
        with ThreadPoolExecutor(threads) as pool:
            yield {"pool": pool}
    else:
        yield {}


def memory_used() -> dict[Any, tuple[int, int]]:
    """Bytes of every process that runs blocks, now and at the highest."""
    client = _client()
    if client is not None:
        return dict(client.run(_own_memory))
    return {os.getpid(): _own_memory()}


def _own_memory() -> tuple[int, int]:
    """Resident bytes of this process, now and at its highest; 0 where /proc does not say."""
    try:
        with open("/proc/self/status") as status:
            fields = dict(line.split(":", 1) for line in status)
        return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return 0, 0
