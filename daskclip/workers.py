"""The processes that run blocks: how many, with how many threads, how large."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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


def workers() -> tuple[int, int]:
    """Processes that will run blocks, and the threads of the largest of them."""
    client = _client()
    if client is not None:
        threads = list(client.nthreads().values())
        return max(1, len(threads)), max(threads, default=1)
    get = get_scheduler()
    if get is dask.get:
        return 1, 1
    number = config.get("num_workers", None) or CPU_COUNT
    if get is not None and get is not dask.threaded.get:
        return number, 1
    pool = config.get("pool", None)
    return 1, getattr(pool, "_max_workers", None) or number


@contextmanager
def running() -> Iterator[None]:
    """Threads that have ended their blocks when the context ends, however it does.

    Dask's own pool goes on with blocks that it began before another one failed; they would write
    after the clean-up.
    """
    get = get_scheduler()
    if get not in (None, dask.threaded.get) or config.get("pool", None):
        yield
        return
    with ThreadPoolExecutor(workers()[1]) as pool, config.set(pool=pool):
        yield


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
