"""A window of blocks as one Dask graph, computed by whatever scheduler is active."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import dask
import dask.array as da

from daskclip.engine.cluster import compute_retrying_cancelled, translating_cluster_errors
from daskclip.lazy import LiteralTask, object_meta, tree_reduce
from daskclip.numerics import Scale
from daskclip.plan import sizing
from daskclip.worker import ArrayTask, tasks

if TYPE_CHECKING:
    from daskclip.numerics import Scale

MAX_BLOCKS_PER_TASK = 16  # blocks, at most, that one task does: all threads have something to do


class BlockId(NamedTuple):
    """A block of one of the arrays of a run."""

    job: int
    slab: int
    block: int


Batch = Sequence[BlockId]


def compute(
    function: Callable[..., Any],
    jobs: Sequence[ArrayTask],
    rows: Sequence[Batch],
    how: dict[str, Any],
    *,
    scales: Callable[[int, ArrayTask], tuple[str, Scale]] | None = None,
    expected: Callable[[BlockId], int] | None = None,
    combined: bool = False,
) -> list[Any]:
    """``function`` of every block; combined to one result a row.

    ``scales`` gives the scale of a block from its row and job, with a name; ``expected`` a digest.
    """
    name = f"{function.__name__}-{uuid4().hex}"
    graph: dict[Any, Any] = {}
    ends = list(accumulate(len(some) for some in batch_small_blocks(jobs, rows[0])))
    spans = list(pairwise((0, *ends)))
    for i, row in enumerate(rows):
        for k, span in enumerate(spans):
            cells, given, args = row[slice(*span)], [], []
            for cell in cells:
                job = jobs[cell.job]
                graph[f"job-{cell.job}-{name}"] = (LiteralTask(job),)
                if scales is not None:
                    which, scale = scales(i, job)
                    graph[f"scale-{which}-{name}"] = (LiteralTask(scale),)
                    given.append(f"scale-{which}-{name}")
                digest = () if expected is None else (expected(cell),)
                args.append((cell.slab, cell.block, *digest))
            keys = [f"job-{cell.job}-{name}" for cell in cells]
            common = (function, keys, (LiteralTask(args),))
            graph[(name, i, k)] = (
                (tasks.sum_batch, *common) if combined else (tasks.run_batch, *common, given)
            )
    chunks = ((1,) * len(rows), (1,) * len(spans))
    results = da.Array(graph, name, chunks, meta=object_meta(2))
    if combined:
        results = tree_reduce(results, (1,), tasks.add_sums)

    def block_of(key: Any) -> str:
        row, place = key[1:] if isinstance(key, tuple) else (0, 0)
        cell = rows[row][spans[place][0]]
        region = jobs[cell.job].plan.region(cell.slab, cell.block)
        return f"block {jobs[cell.job].source.describe(region)}"

    # nothing to fuse; and Dask remembers the names of what it looked at for that
    with translating_cluster_errors(block_of), dask.config.set({"optimization.fuse.active": False}):
        found = compute_retrying_cancelled(results.to_delayed().ravel(), how)
    return found if combined else list(chain.from_iterable(found))


def batch_small_blocks(
    jobs: Sequence[ArrayTask], cells: Iterable[BlockId]
) -> Iterator[list[BlockId]]:
    """Blocks that one task does, and syncs, together: some small ones, or one."""
    some: list[BlockId] = []
    size, most = 0, sizing.DEFAULT.task_nbytes
    for cell in cells:
        more = jobs[cell.job].plan.nbytes_of(cell.slab, cell.block)
        if some and (size + more > most or len(some) == MAX_BLOCKS_PER_TASK):
            yield some
            some, size = [], 0
        some.append(cell)
        size += more
    if some:
        yield some
