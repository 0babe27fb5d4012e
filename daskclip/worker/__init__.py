"""One block in, one block out: what a process does that runs blocks, and the pools that call it.

    tasks ──> sums               pool ──> context          memory
        └─> slices ──> context

Every function of `tasks` can run twice and does the same again. Nothing here knows which block
comes next.
"""

from daskclip.worker import tasks
from daskclip.worker.context import ArrayTask, drain
from daskclip.worker.memory import Memory, memory_growth, own_memory
from daskclip.worker.pool import (
    ClusterPool,
    LocalPool,
    Pool,
    SchedulerExecutor,
    wait_was_cancelled,
)
from daskclip.worker.sums import (
    SavedSums,
    Sums,
    add_and_keep,
    add_sums,
    keep_sums,
    kept_sums,
)

__all__ = [
    "ArrayTask", "ClusterPool", "LocalPool", "Memory", "Pool", "SavedSums", "SchedulerExecutor",
    "Sums", "add_and_keep", "add_sums", "drain", "keep_sums", "kept_sums", "memory_growth",
    "own_memory", "tasks", "wait_was_cancelled",
]  # fmt: skip
