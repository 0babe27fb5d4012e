"""A window of blocks as one Dask graph, computed by whatever scheduler is active."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple
from uuid import uuid4

import dask
import dask.array as da

from daskclip.engine.cluster import gathered, surviving
from daskclip.lazy import Constant, no_block, tree
from daskclip.numerics import Scale
from daskclip.plan import array as plan
from daskclip.storage import array as storage
from daskclip.storage import shown_region
from daskclip.worker import Job, tasks

TOGETHER = 16  # blocks, at most, that one task does: all threads have something to do


class Cell(NamedTuple):
    """A block of one of the arrays of a run."""

    job: int
    slab: int
    block: int


Row = Sequence[Cell]


def compute(
    function: Callable[..., Any],
    jobs: Sequence[Job],
    rows: Sequence[Row],
    how: dict[str, Any],
    *,
    scales: Callable[[int, Job], tuple[str, Scale]] | None = None,
    expected: Callable[[Cell], int] | None = None,
    combined: bool = False,
) -> list[Any]:
    """``function`` of every block; combined to one result a row.

    ``scales`` gives the scale of a block from its row and job, with a name; ``expected`` a digest.
    """
    name = f"{function.__name__}-{uuid4().hex}"
    graph: dict[Any, Any] = {}
    ends = list(accumulate(len(some) for some in together(jobs, rows[0])))
    spans = list(pairwise((0, *ends)))
    for i, row in enumerate(rows):
        for k, span in enumerate(spans):
            cells, given, args = row[slice(*span)], [], []
            for cell in cells:
                job = jobs[cell.job]
                graph[f"job-{cell.job}-{name}"] = (Constant(job),)
                if scales is not None:
                    which, scale = scales(i, job)
                    graph[f"scale-{which}-{name}"] = (Constant(scale),)
                    given.append(f"scale-{which}-{name}")
                digest = () if expected is None else (expected(cell),)
                args.append((cell.slab, cell.block, *digest))
            keys = [f"job-{cell.job}-{name}" for cell in cells]
            graph[(name, i, k)] = (tasks.each, function, keys, (Constant(args),), given)
    chunks = ((1,) * len(rows), (1,) * len(spans))
    results = da.Array(graph, name, chunks, meta=no_block(2))
    if combined:
        results = tree(results, (1,), _added)

    def block_of(key: Any) -> str:
        row, place = key[1:] if isinstance(key, tuple) else (0, 0)
        cell = rows[row][spans[place][0]]
        region = jobs[cell.job].plan.region(cell.slab, cell.block)
        return f"block {shown_region(region)} of {storage.location(jobs[cell.job].source)}"

    # nothing to fuse; and Dask remembers the names of what it looked at for that
    with surviving(block_of), dask.config.set({"optimization.fuse.active": False}):
        found = gathered(results.to_delayed().ravel(), how)
    return [_added([one]) for one in found] if combined else list(chain.from_iterable(found))


def _added(parts: list[Any]) -> Any:
    """Sums of all blocks: those of a task are a list."""
    return tasks.add_sums([s for part in parts for s in (part if type(part) is list else [part])])


def together(jobs: Sequence[Job], cells: Iterable[Cell]) -> Iterator[list[Cell]]:
    """Blocks that one task does, and syncs, together: some small ones, or one."""
    some: list[Cell] = []
    size = 0
    for cell in cells:
        more = jobs[cell.job].plan.nbytes_of(cell.slab, cell.block)
        if some and (size + more > plan.BLOCK // 4 or len(some) == TOGETHER):
            yield some
            some, size = [], 0
        some.append(cell)
        size += more
    if some:
        yield some
