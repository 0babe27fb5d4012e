"""A window of blocks as one Dask graph, computed by whatever scheduler is active."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple
from uuid import uuid4

from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph

from daskclip.engine.cluster import (
    ComputeKwargs,
    compute_retrying_cancelled,
    translating_cluster_errors,
)
from daskclip.lazy import LiteralTask
from daskclip.numerics import Scale
from daskclip.plan import sizing
from daskclip.worker import ArrayTask, tasks

SUMS_PER_TASK = 4  # what a task of a tree combines
MAX_BLOCKS_PER_TASK = 16  # blocks, at most, that one task does: all threads have something to do


class BlockId(NamedTuple):
    """A block of one of the arrays of a run."""

    array: int
    slab: int
    block: int


Batch = Sequence[BlockId]
"""Blocks of one task, which syncs them together: several small ones, or one."""
Window = Sequence[Sequence[Batch]]
"""Rows of batches, as many in each; what is combined is combined along a row."""


def compute(
    function: Callable[..., Any],
    arrays: Sequence[ArrayTask],
    window: Window,
    compute_kwargs: ComputeKwargs,
    *,
    scales: Callable[[int, ArrayTask], tuple[str, Scale]] | None = None,
    expected: Callable[[BlockId], int] | None = None,
    combined: bool = False,
) -> list[Any]:
    """Compute ``function`` of every block of a window, row by row, or combined to one of each row.

    ``scales`` gives a name and the scale of a block by its row and array, ``expected`` a digest.
    """
    name = f"{function.__name__}-{uuid4().hex}"
    graph: dict[Any, Any] = {}
    for i, row in enumerate(window):
        for k, batch in enumerate(row):
            given: list[str] = []
            args = []
            for block in batch:
                array = arrays[block.array]
                # a task of its own, so that what blocks share is sent to each worker once
                graph[f"array-{block.array}-{name}"] = (LiteralTask(array),)
                if scales is not None:
                    which, scale = scales(i, array)
                    graph[f"scale-{which}-{name}"] = (LiteralTask(scale),)
                    given.append(f"scale-{which}-{name}")
                digest = () if expected is None else (expected(block),)
                args.append((block.slab, block.block, *digest))
            keys = [f"array-{block.array}-{name}" for block in batch]
            common = function, keys, (LiteralTask(args),)
            graph[(name, i, k)] = (
                (tasks.sum_batch, *common) if combined else (tasks.run_batch, *common, given)
            )
    rows: list[list[Any]] = [
        [(name, i, k) for k in range(len(row))] for i, row in enumerate(window)
    ]
    if combined:
        rows = [_combine(graph, row) for row in rows]

    def block_of(key: object) -> str:
        # of a task that combines, the first block stands for all
        i, k = key[1:3] if isinstance(key, tuple) else (0, 0)
        block = window[i][k][0]
        array = arrays[block.array]
        return f"block {array.source.describe(array.plan.region(block.slab, block.block))}"

    # not a Dask array, which may be an expression; there is nothing to optimize
    layer = HighLevelGraph.from_collections(name, graph, dependencies=())
    results = [Delayed(key, layer, layer=name) for key in chain.from_iterable(rows)]
    with translating_cluster_errors(block_of):
        options = {**compute_kwargs, "optimize_graph": False}
        found = compute_retrying_cancelled(results, options)
    return found if combined else list(chain.from_iterable(found))


def _combine(graph: dict[Any, Any], row: list[Any]) -> list[Any]:
    """Add the tasks of a tree that combines the sums of a row; returns its root."""
    while len(row) > 1:
        some = [row[i : i + SUMS_PER_TASK] for i in range(0, len(row), SUMS_PER_TASK)]
        # named after its first block, one level higher
        level: list[Any] = [(*group[0], "sum") for group in some]
        graph.update((key, (tasks.add_sums, group)) for key, group in zip(level, some, strict=True))
        row = level
    return row


def batch_small_blocks(
    arrays: Sequence[ArrayTask], blocks: Iterable[BlockId]
) -> Iterator[list[BlockId]]:
    """Batch blocks in their order."""
    batch: list[BlockId] = []
    size = 0
    for block in blocks:
        more = arrays[block.array].plan.nbytes_of(block.slab, block.block)
        # the scheduler needs as long for a task of one small block as for one of several
        if batch and (
            size + more > sizing.DEFAULT.task_nbytes or len(batch) == MAX_BLOCKS_PER_TASK
        ):
            yield batch
            batch, size = [], 0
        batch.append(block)
        size += more
    if batch:
        yield batch
