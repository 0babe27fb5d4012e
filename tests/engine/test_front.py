"""The rolling front: how many blocks are under way, and runs that other threads resume."""

import asyncio
import time
from functools import wraps
from threading import Event, Lock, Thread
from types import SimpleNamespace

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster, get_worker
from reference import bits
from sizes import resize
from stores import create, least_memory, read, some, stopping_at, stored
from waiting import until

from daskclip import clip_by_norm, clip_zarr, plan_zarr, stats_zarr, verify_zarr
from daskclip.engine import front, stages
from daskclip.engine.front import BlockId, Blocks, Front, Task
from daskclip.target.directory import DirectoryTransaction
from daskclip.target.journal import Journal
from daskclip.worker import LocalPool, pool, tasks

SHAPE, CHUNKS = (32, 48), (2, 8)


@pytest.fixture
def x(tmp_path, monkeypatch):
    resize(
        monkeypatch, block_nbytes=64, process_nbytes=0, thread_nbytes=0, slice_nbytes=0,
        window_blocks=4, sum_nbytes=1,
    )  # fmt: skip
    return create(tmp_path / "x", some(SHAPE, "f4"), CHUNKS)


@pytest.fixture
def under_way(monkeypatch):
    """Blocks under way at each submission, this one included."""
    now, seen, lock, submit = [0], [], Lock(), LocalPool.submit

    def counting(self, function, calls, avoid=()):
        taken = [len(args[2]) if function.__name__.endswith("_batch") else 0 for args in calls]
        with lock:
            now[0] += sum(taken)
            seen.append(now[0])

        def ended(blocks):
            with lock:
                now[0] -= blocks

        futures = submit(self, function, calls, avoid)
        for future, blocks in zip(futures, taken, strict=True):
            future.add_done_callback(lambda _, blocks=blocks: ended(blocks))
        return futures

    monkeypatch.setattr(LocalPool, "submit", counting)
    return seen


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("axes", [None, 0, 1, ()])
def test_no_more_blocks_are_under_way_than_planned(x, tmp_path, under_way, threads, axes):
    with dask.config.set(scheduler="threads", num_workers=threads):
        memory = least_memory(x, axes)
        plan = plan_zarr(x, tmp_path / "y", 1.0, axes, memory=memory)
        report = clip_zarr(x, tmp_path / "y", 1.0, axes, memory=memory)
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(x), 1.0, axes))
    # a task may have several blocks, and one is begun when there is any room
    assert max(under_way) <= 2 * plan.window
    assert report.bytes_read == plan.bytes_read


def test_another_scheduler_of_dask_computes_the_blocks(x, tmp_path):
    calls = []

    def get(graph, keys, **kwargs):
        calls.append(keys)
        return dask.get(graph, keys, **kwargs)

    with dask.config.set(scheduler=get, num_workers=2):
        clip_zarr(x, tmp_path / "y", 1.0, 0, memory=least_memory(x, 0))
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(x), 1.0, 0))
    assert len(calls) > 4


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("axes", [None, 0])
def test_sums_that_are_held_are_no_more_than_planned(x, tmp_path, monkeypatch, threads, axes):
    begun, combined, held = [], [0], []
    monkeypatch.setattr(stages, "SUMS_NBYTES", 0)

    def counting(function):
        @wraps(function)
        def counted(called, tasks, blocks):
            begun.append(len(blocks))
            return function(called, tasks, blocks)

        return counted

    def slow(function):
        @wraps(function)
        def combining(parts, known):
            time.sleep(0.02)  # while other tasks begin, if they may
            held.append(sum(begun) - combined[0])
            sums = function(parts, known)
            combined[0] += len(sums.digests)
            return sums

        return combining

    monkeypatch.setattr(tasks, "sum_batch", counting(tasks.sum_batch))
    monkeypatch.setattr(stages, "add_sums", slow(stages.add_sums))
    with dask.config.set(scheduler="threads", num_workers=threads):
        memory = least_memory(x, axes) + 500
        plan = plan_zarr(x, tmp_path / "y", 1.0, axes, memory=memory)
        clip_zarr(x, tmp_path / "y", 1.0, axes, memory=memory)
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(x), 1.0, axes))
    assert combined[0] == plan.blocks > plan.window
    assert max(held) <= plan.window


def test_a_run_goes_on_with_fewer_threads(x, tmp_path, monkeypatch):
    # the sums that wait are too few to be combined with 16 threads, and too many for one
    resize(monkeypatch, window_blocks=16)
    monkeypatch.setattr(stages, "SUMS_NBYTES", 0)
    take, wait, waits = Blocks.take, Front._wait, []

    def wait_for_all(self):
        begun = len(self._tasks)
        while self._tasks:
            wait(self)
        waits.append(begun)
        return True

    monkeypatch.setattr(Front, "_count_threads", lambda _: 1 if waits else 16)
    monkeypatch.setattr(Blocks, "take", lambda self, arrays, *_: take(self, arrays, 0, 1, 1))
    monkeypatch.setattr(Front, "_wait", wait_for_all)
    with dask.config.set(scheduler="threads", num_workers=16):
        clip_zarr(x, tmp_path / "y", 1.0)
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(x), 1.0))
    assert waits[0] == 32


@pytest.mark.parametrize("seed", range(20))
def test_threads_come_and_go_at_random(x, tmp_path, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    axes = [None, 0, 1][rng.integers(3)]
    resize(monkeypatch, window_blocks=int(rng.integers(1, 33)))
    monkeypatch.setattr(stages, "SUMS_NBYTES", int(rng.choice([0, 1000, 10**6])))
    monkeypatch.setattr(Front, "_count_threads", lambda _: int(2 ** rng.uniform(0, 5)))
    monkeypatch.setattr(LocalPool, "is_cluster", bool(rng.integers(2)))
    with dask.config.set(scheduler="threads", num_workers=int(rng.integers(1, 17))):
        memory = least_memory(x, axes) + int(rng.integers(4000))
        clip_zarr(x, tmp_path / "y", 1.0, axes, memory=memory)
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(x), 1.0, axes))
    verify_zarr(tmp_path / "y", x)


@pytest.mark.parametrize("axes", [None, 0])
@pytest.mark.parametrize("window", [2, 16, 32])
def test_a_task_adds_no_more_sums_than_planned_for_a_thread(x, tmp_path, monkeypatch, axes, window):
    resize(monkeypatch, window_blocks=window)
    monkeypatch.setattr(stages, "SUMS_NBYTES", 0)
    # as where sums are on the workers
    monkeypatch.setattr(LocalPool, "is_cluster", True)
    take, numbers = Blocks.take, []
    monkeypatch.setattr(Blocks, "take", lambda self, arrays, *_: take(self, arrays, 0, 1, 1))

    def counting(function):
        @wraps(function)
        def added(parts, *args):
            numbers.append(len(parts))
            return function(parts, *args)

        return added

    for module, name in [(front, "add_sums"), (stages, "add_sums"), (stages, "add_and_keep")]:
        monkeypatch.setattr(module, name, counting(getattr(module, name)))
    with dask.config.set(scheduler="threads", num_workers=16):
        plan = plan_zarr(x, tmp_path / "y", 1.0, axes)
        stats_zarr(x, axes)
        clip_zarr(x, tmp_path / "y", 1.0, axes)
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(x), 1.0, axes))
    assert plan.passes == 2
    assert 2 <= max(numbers) <= max(2, window // 2)


@pytest.mark.parametrize("most", [8, 16])
def test_small_sums_fit_here_when_more_threads_come(x, tmp_path, monkeypatch, most):
    resize(monkeypatch, window_blocks=8)
    # of one slice; so many fit
    monkeypatch.setattr(stages, "SUMS_NBYTES", most * stages.SUM_NBYTES)
    take, slabs = Blocks.take, []
    monkeypatch.setattr(Blocks, "take", lambda self, arrays, *_: take(self, arrays, 0, 1, 1))

    class Counted(stages.Slab):
        def next_task(self):
            task = super().next_task()
            if self.second is None:
                slabs.append((self.is_small, self._under_way + self._added))
            return task

    monkeypatch.setattr(stages, "Slab", Counted)
    monkeypatch.setattr(Front, "_count_threads", lambda _: 16 if slabs else 1)
    with dask.config.set(scheduler="threads", num_workers=16):
        clip_zarr(x, tmp_path / "y", 1.0)
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(x), 1.0))
    assert all(is_small for is_small, _ in slabs)
    assert most // 2 < max(blocks for _, blocks in slabs) <= 2 * most


@pytest.mark.parametrize("after", [0, 1, 5, 20])
def test_blocks_that_are_left_over_are_no_success(x, tmp_path, monkeypatch, after):
    next_task, calls = stages.Slab.next_task, []

    def none(self):
        calls.append(self)
        return next_task(self) if len(calls) <= after else None

    with monkeypatch.context() as patch:
        patch.setattr(stages.Slab, "next_task", none)
        memory = least_memory(x, 0)
        with pytest.raises(RuntimeError, match="left over"):
            clip_zarr(x, tmp_path / "y", 1.0, 0, memory=memory)
        with pytest.raises(RuntimeError, match="left over"):
            stats_zarr(x, 0, memory=memory)
    assert not (tmp_path / "y").exists()
    clip_zarr(x, tmp_path / "y", 1.0, 0, memory=memory)
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(x), 1.0, 0))


@pytest.mark.parametrize("after", [1, 6])
@pytest.mark.parametrize("axes", [None, 0, 1])
def test_a_run_is_resumed_by_more_threads(x, tmp_path, monkeypatch, axes, after):
    append, lines = Journal.append, []
    with dask.config.set(scheduler="threads", num_workers=4):
        memory = least_memory(x, axes)
    clip_zarr(x, tmp_path / "wanted", 1.0, axes, memory=memory)

    def stopping(self, entry):
        append(self, entry)
        lines.append(entry)
        if len(lines) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, dask.config.set(scheduler="threads", num_workers=1):
        patch.setattr(Journal, "append", stopping)
        with pytest.raises(KeyboardInterrupt):
            clip_zarr(x, tmp_path / "y", 1.0, axes, memory=memory)
    done = {n for line in lines for n in getattr(line, "target", None) or ()}
    with dask.config.set(scheduler="threads", num_workers=4):
        report = clip_zarr(x, tmp_path / "y", 1.0, axes, memory=memory)
    assert stored(tmp_path / "y") == stored(tmp_path / "wanted")
    verify_zarr(tmp_path / "y", x)
    # what was journalled is not written again
    block = read(x).nbytes // report.blocks
    assert report.bytes_written <= read(x).nbytes - len(done) * block


@pytest.mark.parametrize("seed", range(3))
def test_records_in_any_order_are_one_run(x, tmp_path, monkeypatch, seed):
    """Threads end in any order; stopped anywhere, again and again, the run is the same."""
    generator = np.random.default_rng(seed)
    axes = (None, 0, 1)[seed % 3]
    wanted = bits(clip_by_norm(read(x), 1.0, axes))
    with dask.config.set(scheduler="threads", num_workers=4):
        memory = least_memory(x, axes)
    left = stopping_at(monkeypatch)
    for _ in range(50):
        left[0] = int(generator.integers(1, 60))
        with dask.config.set(scheduler="threads", num_workers=int(generator.integers(1, 5))):
            try:
                report = clip_zarr(x, tmp_path / "y", 1.0, axes, memory=memory)
            except KeyboardInterrupt:
                continue
            break
    left[0] = 0
    assert bits(read(tmp_path / "y")) == wanted
    assert report.slices == stats_zarr(x, axes).slices
    assert report.largest_norm == stats_zarr(x, axes).largest_norm
    verify_zarr(tmp_path / "y", x)


# --- more workers --------------------------------------------------------------------------------

WORKERS = 4


@pytest.fixture
def ran(monkeypatch):
    """Addresses of the workers that ran the blocks, in order; each block takes some time."""
    seen = []

    def told(function):
        @wraps(function)
        def run(*args):
            seen.append(get_worker().address)
            time.sleep(0.005)
            return function(*args)

        return run

    for name in ("sum_block", "rescale_block", "clip_slab"):
        monkeypatch.setattr(tasks, name, told(getattr(tasks, name)))
    # a worker that came is counted after some blocks rather than after all
    monkeypatch.setattr(pool, "COUNT_INTERVAL_S", 0.02)
    return seen


@pytest.mark.distributed
@pytest.mark.parametrize("resumed", [True, False], ids=["resumed", "joined"])
@pytest.mark.parametrize("axes", [None, 0, 1])
def test_workers_that_come_all_have_blocks_within_two_windows(
    tmp_path, monkeypatch, ran, axes, resumed
):
    resize(
        monkeypatch, block_nbytes=64, process_nbytes=0, thread_nbytes=0, slice_nbytes=0,
        window_blocks=4, window_sums=4, sum_nbytes=1,
    )  # fmt: skip
    x = create(tmp_path / "x", some((128, 24), "f4"), CHUNKS)
    window, append, come = 4 * WORKERS, Journal.append, []

    def coming(self, entry):
        append(self, entry)
        if not come and len(ran) > 16:
            cluster.scale(WORKERS)
            until(lambda: len(client.nthreads()) == WORKERS)
            come.append(len(ran))
            if resumed:
                raise KeyboardInterrupt

    def clip():
        return clip_zarr(x, tmp_path / "y", 100.0, axes, memory=2000)

    monkeypatch.setattr(Journal, "append", coming)
    # tasks must not move to workers that come while the first one waits here
    stealing = dask.config.set({"distributed.scheduler.work-stealing": False})
    with stealing, LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, protocol="tcp://", host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
    ) as cluster, Client(cluster) as client:  # fmt: skip
        if resumed:
            with pytest.raises(KeyboardInterrupt):
                clip()
            come[0] = len(ran)
        report = clip()
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(x), 100.0, axes))
    assert report.passes == (1 if axes == 1 else 2)
    assert len(set(ran[: come[0]])) == 1
    assert len(ran) > come[0] + 2 * window
    assert len(set(ran[come[0] : come[0] + 2 * window])) == WORKERS


# --- a scheduler that is late --------------------------------------------------------------------


class LateScheduler:
    """A pool in which one call ends at each look; it counts the futures under way."""

    is_cluster = True

    def __init__(self, threads):
        self.threads, self.under_way = threads, []

    def submit(self, function, calls, avoid=()):
        return [object() for _ in calls]

    def ended(self, pending, seconds):
        time.sleep(seconds if self.under_way else 0)
        self.under_way.append(len(pending))
        return {next(iter(pending)): None}

    def cancel(self, futures):
        pass


@pytest.mark.parametrize(("tasks", "most"), [(3, 3), (7, 8), (15, 15)])
def test_late_tasks_are_repeated_on_idle_threads_only(tasks, most):
    pool = LateScheduler(8)
    front = Front(pool, [], blocks=4, task_nbytes=1)
    # after the first one all others are late
    sizes = iter([10**9] + [1] * (tasks - 1))
    calls = (Task(print, (), lambda _: None, nbytes=nbytes) for nbytes in sizes)
    front.run(lambda: next(calls, None))
    assert max(pool.under_way) == most


@pytest.mark.distributed
@pytest.mark.parametrize("axes", [0, 1])
def test_a_repeated_task_has_ended_before_the_target_is_complete(x, tmp_path, monkeypatch, axes):
    write, finish, begun = tasks._write, DirectoryTransaction.finish, []
    repeated, complete, ended = Event(), Event(), Event()

    def late(task, region, *args):
        if region[0].start == 0:
            begun.append(region)
            if len(begun) == 1:
                repeated.wait(60)
                complete.wait(2)  # if nobody waits for this one
                result = write(task, region, *args)
                ended.set()
                return result
            if begun.count(begun[0]) > 1:
                repeated.set()
        return write(task, region, *args)

    def finishing(self, staged):
        complete.set()
        return finish(self, staged)

    monkeypatch.setattr(tasks, "_write", late)
    monkeypatch.setattr(DirectoryTransaction, "finish", finishing)
    with LocalCluster(
        n_workers=3, threads_per_worker=2, processes=False, protocol="tcp://", host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
    ) as cluster, Client(cluster) as client:  # fmt: skip
        client.wait_for_workers(3)
        clip_zarr(x, tmp_path / "y", 1.0, axes, memory=2000)
        assert ended.is_set()
        assert clip_zarr(x, tmp_path / "y", 1.0, axes, memory=2000).status == "up to date"
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(x), 1.0, axes))


class Finished:
    status = "finished"


class StuckClient:
    """A client in which one result cannot be had for some time; it counts what is fetched."""

    def __init__(self, stuck, loop):
        self.stuck, self.fetched, self.is_stuck = stuck, [], True
        self.loop = SimpleNamespace(asyncio_loop=loop)

    async def gather(self, futures, asynchronous):
        self.fetched.append(len(futures))
        while self.is_stuck and self.stuck in futures:
            await asyncio.sleep(0.01)
        return futures


def test_a_result_that_is_stuck_holds_up_no_others(monkeypatch):
    monkeypatch.setattr(pool, "ANSWER_S", 1)
    monkeypatch.setattr(pool, "EACH_S", 0)
    futures = [Finished() for _ in range(64)]
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever)
    thread.start()
    client = StuckClient(futures[5], loop)
    asked, pending = pool.ClusterPool(client), dict.fromkeys(futures, False)
    while len(pending) > 1:
        for future in asked.ended(pending, 0.1):
            del pending[future]
    assert [*pending] == [futures[5]]
    client.is_stuck = False
    assert asked.ended(pending, 10) == {futures[5]: futures[5]}
    assert sorted(client.fetched) == [1] * 8 + [8] * 8 + [64]
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.parametrize(("threads", "blocks"), [(2, 1), (256, 1), (257, 2), (1024, 4), (9999, 8)])
def test_tasks_of_many_threads_have_many_blocks(threads, blocks):
    array = SimpleNamespace(plan=SimpleNamespace(nbytes_of=lambda *_: 1))
    front = Front(LateScheduler(threads), [array], blocks=16, task_nbytes=1)
    left = 10**6
    assert len(front.take(Blocks((BlockId(0, 0, n) for n in range(left)), left))) == blocks
