"""Clusters without workers, calls from inside tasks, probes that fail, and pools of processes."""

import asyncio
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial

import dask
import psutil
import pytest
from distributed import (
    Client,
    LocalCluster,
    Scheduler,
    SpecCluster,
    Worker,
    get_worker,
    worker_client,
)
from reference import bits
from servers import local_cluster
from stores import create, files_of, read, some
from waiting import until

from daskclip import clip_by_norm, clip_zarr, plan_zarr, stats_zarr, verify_zarr
from daskclip.engine import cluster as module
from daskclip.errors import ClusterError, MemoryBudgetError, TemporaryError
from daskclip.target.journal import Journal
from daskclip.worker import tasks

LIMIT, MEMORY = 8.0, 360
AWAITED = "has no worker"


@pytest.fixture
def x(tmp_path):
    return create(tmp_path / "x", some((32, 32), "f4"), (2, 8))


def check(x, report):
    assert (report.status, report.passes) == ("clipped", 2)
    assert bits(read(report.target)) == bits(clip_by_norm(read(x), LIMIT, 0))


def call(x):
    """Clip, verify and look at norms."""
    report = clip_zarr(x, x.parent / "y", LIMIT, 0)
    assert verify_zarr(report.target, x).slices == stats_zarr(x, 0).slices == 32
    return report.clipped


@contextmanager
def cluster_of(workers=0, threads=1):
    """A cluster in this process; its workers are threads."""
    with LocalCluster(
        n_workers=workers, threads_per_worker=threads, processes=False, protocol="tcp://",
        host="127.0.0.1", dashboard_address="127.0.0.1:0",
    ) as cluster:  # fmt: skip
        yield cluster


@pytest.fixture
def awaited(monkeypatch, caplog):
    """Wait until the log says that a worker is awaited, and return how often it did."""
    monkeypatch.setattr(module, "LOG_WAIT_S", 0.05)
    caplog.set_level(logging.INFO, "daskclip")

    def lines():
        return [r.getMessage() for r in caplog.records if AWAITED in r.getMessage()]

    return lines


# --- no workers ----------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_cluster_that_adapts_starts_at_nothing(x, tmp_path, processes):
    with local_cluster(0) if processes else cluster_of() as cluster, Client(cluster) as client:
        cluster.adapt(minimum=0, maximum=2, interval="50ms", wait_count=2)
        check(x, clip_zarr(x, tmp_path / "y", LIMIT, 0, memory=MEMORY))
        until(lambda: not client.nthreads())
        assert stats_zarr(x, 0).slices == 32
        until(lambda: not client.nthreads())
        assert verify_zarr(tmp_path / "y").slices == 32


@pytest.mark.distributed
@pytest.mark.parametrize("function", [plan_zarr, clip_zarr, stats_zarr, verify_zarr])
def test_workers_that_come_late_are_awaited(x, tmp_path, awaited, function):
    target = tmp_path / "y"
    if function is verify_zarr:
        clip_zarr(x, target, LIMIT, 0)
    with cluster_of() as cluster, Client(cluster):

        def come():
            until(lambda: len(awaited()) > 2)
            cluster.scale(1)

        thread = threading.Thread(target=come)
        thread.start()
        with dask.config.set(num_workers=7):  # of threads, which are not used here
            result = {
                plan_zarr: lambda: plan_zarr(x, target, LIMIT, 0).processes,
                clip_zarr: lambda: clip_zarr(x, target, LIMIT, 0).blocks > 0,
                stats_zarr: lambda: stats_zarr(x, 0).slices == 32,
                verify_zarr: lambda: verify_zarr(target).slices == 32,
            }[function]()
        thread.join()
    assert result == 1
    assert cluster.scheduler_address in awaited()[0]


@pytest.mark.distributed
@pytest.mark.usefixtures("small")
def test_workers_that_leave_during_a_run_are_awaited(x, tmp_path, awaited, monkeypatch):
    with cluster_of(1) as cluster, Client(cluster) as client:
        append, done, said = Journal.append, [], []

        def come():
            until(lambda: len(awaited()) > max(2, len(said)))
            cluster.scale(1)

        thread = threading.Thread(target=come)

        def leaving(self, entry):
            append(self, entry)
            done.append(entry)
            if len(done) == 2:
                cluster.scale(0)
                until(lambda: not client.nthreads())
                said.extend(awaited())
                thread.start()

        monkeypatch.setattr(Journal, "append", leaving)
        report = clip_zarr(x, tmp_path / "y", LIMIT, 0, memory=MEMORY)
        thread.join()
    check(x, report)
    assert len(awaited()) > len(said)


@pytest.mark.distributed
def test_all_workers_may_leave_while_they_are_asked(x, tmp_path, monkeypatch):
    with cluster_of(1) as cluster, Client(cluster) as client:
        asked, nthreads = [], client.nthreads

        def leaving():
            # the first one is gone when it is asked, and the next one comes when it is missed
            found = nthreads()
            if threading.current_thread() is threading.main_thread():
                asked.append(found)
                if len(asked) == 2:
                    cluster.scale(0)
                    until(lambda: not nthreads())
                elif not found and asked.count({}) == 1:
                    cluster.scale(1)
            return found

        monkeypatch.setattr(client, "nthreads", leaving)
        assert clip_zarr(x, tmp_path / "y", LIMIT, 0).status == "clipped"
        assert {} in asked


@pytest.mark.distributed
def test_a_cluster_that_ends_before_a_worker_came_is_lost(x, tmp_path, awaited):
    with cluster_of() as cluster, Client(cluster.scheduler_address, timeout=5):

        def end():
            until(awaited)
            cluster.close()

        thread = threading.Thread(target=end)
        thread.start()
        with pytest.raises(TemporaryError, match="the cluster was lost") as caught:
            clip_zarr(x, tmp_path / "y", LIMIT)
        thread.join()
    assert "\n" not in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"x"}


@pytest.mark.distributed
def test_a_cluster_that_lets_tasks_wait_for_a_time_only_is_not_lost(x, tmp_path):
    with (
        dask.config.set({"distributed.scheduler.no-workers-timeout": "1s"}),
        cluster_of() as cluster,
        Client(cluster),
        pytest.raises(TemporaryError, match="no worker came in time") as caught,
    ):
        clip_zarr(x, tmp_path / "y", LIMIT)
    assert "\n" not in str(caught.value)


# --- workers that differ -------------------------------------------------------------------------


def workers_of(*options):
    """A cluster in this process with a worker of each of the options."""
    spec = {i: {"cls": Worker, "options": {"nthreads": 1} | own} for i, own in enumerate(options)}
    scheduler = {
        "cls": Scheduler,
        "options": {"dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"},
    }
    return SpecCluster(scheduler=scheduler, workers=spec)


@pytest.mark.distributed
@pytest.mark.usefixtures("small")
def test_blocks_run_where_the_resources_are_that_they_need(x, tmp_path, monkeypatch):
    ran, read_first = set(), tasks._read_first

    def recording(*args):
        ran.add(get_worker().name)
        return read_first(*args)

    monkeypatch.setattr(tasks, "_read_first", recording)
    with workers_of({}, {"resources": {"GPU": 2}}) as cluster, Client(cluster) as client:
        client.wait_for_workers(2)
        with dask.annotate(resources={"GPU": 1}):
            check(x, clip_zarr(x, tmp_path / "y", LIMIT, 0, memory=MEMORY))
    assert ran == {1}


@pytest.mark.distributed
def test_resources_that_no_worker_has_are_awaited(x, tmp_path, awaited):
    with workers_of({"resources": {"GPU": 1}}) as cluster, Client(cluster) as client:
        client.wait_for_workers(1)

        def come():
            until(awaited)
            cluster.worker_spec["late"] = {
                "cls": Worker, "options": {"nthreads": 1, "resources": {"GPU": 2}}
            }  # fmt: skip
            cluster.sync(cluster._correct_state)

        thread = threading.Thread(target=come)
        thread.start()
        with dask.annotate(resources={"GPU": 2}):
            report = clip_zarr(x, tmp_path / "y", LIMIT)
        thread.join()
    assert report.status == "clipped"
    assert "has no worker with GPU=2; waiting until one comes" in awaited()[0]


@pytest.mark.distributed
def test_the_worker_with_least_memory_counts(tmp_path):
    x = create(tmp_path / "x", some((64, 2**18), "f4"), (2, 2**18))
    large = create(tmp_path / "z", some((2, 2**24), "f4"), (1, 2**24))
    used = psutil.Process().memory_info().rss
    pause = dask.config.get("distributed.worker.memory.pause")
    least = int((used + 200 * 2**20) / pause)
    with workers_of({"memory_limit": 0}, {"memory_limit": 100 * used}) as cluster, Client(cluster):
        wide = plan_zarr(x, tmp_path / "y", LIMIT, 0, memory="1GiB")
    limits = {"memory_limit": 0}, {"memory_limit": least}
    with workers_of(*limits) as cluster, Client(cluster) as client:
        client.wait_for_workers(2)
        narrow = plan_zarr(x, tmp_path / "y", LIMIT, 0, memory="1GiB")
        with pytest.raises(MemoryBudgetError, match=r"MiB' on workers with more than tcp://.* has"):
            plan_zarr(large, tmp_path / "y", LIMIT, memory="4GiB")
    assert wide.memory == 2**30
    assert narrow.memory < 2**29
    assert narrow.projected_memory <= narrow.memory


# --- in a task -----------------------------------------------------------------------------------


def with_client(x):
    with worker_client():
        return call(x)


def on_threads(x):
    with dask.config.set(scheduler="threads"):
        return call(x)


@pytest.mark.distributed
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("task", [call, with_client, on_threads])
@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_task_can_clip(x, tmp_path, workers, task, processes):
    started = local_cluster(workers) if processes else cluster_of(workers)
    with started as cluster, Client(cluster) as client:
        assert client.submit(task, x).result(timeout=120) == 32
        # the thread went back to its pool
        assert client.submit(sum, [1, 2]).result(timeout=60) == 3


async def in_a_coroutine(x):
    return await asyncio.to_thread(call, x)


def in_a_thread(x):
    return asyncio.run(asyncio.to_thread(call, x))


def in_a_thread_of_a_client(x):
    with worker_client():
        return in_a_thread(x)


@pytest.mark.distributed
@pytest.mark.parametrize("task", [in_a_coroutine, in_a_thread, in_a_thread_of_a_client])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_thread_that_a_task_started_can_clip_if_another_is_free(x, task, threads):
    with cluster_of(1, threads) as cluster, Client(cluster) as client:
        future = client.submit(task, x)
        if threads == 2 or task is in_a_thread_of_a_client:
            assert future.result(timeout=60) == 32
        else:
            with pytest.raises(ClusterError, match=r"inside worker_client\(\)"):
                future.result(timeout=30)


@pytest.mark.distributed
def test_as_many_tasks_as_threads_can_clip_at_once(x, tmp_path):
    def clip(target):
        return clip_zarr(x, target, LIMIT, 0).clipped

    with cluster_of(2) as cluster, Client(cluster) as client:
        targets = [tmp_path / f"y{i}" for i in range(4)]
        found = client.map(clip, targets)
        # they take the threads that the others give up
        client.gather(client.map(time.sleep, [3] * 2, pure=False))
        assert client.gather(found) == [32] * 4
    assert all(files_of(t) == files_of(targets[0]) for t in targets)


@pytest.mark.distributed
def test_an_error_in_a_task_gives_the_thread_back(x, tmp_path):
    with cluster_of(1) as cluster, Client(cluster) as client:
        with pytest.raises(FileNotFoundError, match="does not exist"):
            client.submit(clip_zarr, tmp_path / "none", tmp_path / "y", 1.0).result(timeout=60)
        threads = client.submit(lambda: len(get_worker().executors["default"]._threads))
        assert threads.result(timeout=60) == 1


# --- in a loop -----------------------------------------------------------------------------------


CALLS = {
    "clip": lambda x: clip_zarr(x, x.parent / "y", LIMIT, 0),
    "plan": lambda x: plan_zarr(x, x.parent / "y", LIMIT, 0),
    "stats": lambda x: stats_zarr(x, 0),
    "verify": lambda x: verify_zarr(x),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", CALLS)
def test_an_asynchronous_client_in_its_own_loop_is_refused(x, name):
    async def run():
        async with Client(cluster.scheduler_address, asynchronous=True):
            CALLS[name](x)

    with (
        cluster_of(1) as cluster,
        pytest.raises(ClusterError, match=r"synchronous Client.*asyncio\.to_thread") as caught,
    ):
        asyncio.run(run())
    assert "\n" not in str(caught.value)
    assert {p.name for p in x.parent.iterdir()} == {"x"}


@pytest.mark.distributed
def test_an_asynchronous_client_serves_another_thread(x):
    async def run():
        async with Client(cluster.scheduler_address, asynchronous=True):
            return await asyncio.to_thread(call, x)

    with cluster_of(1) as cluster:
        assert asyncio.run(run()) == 32


@pytest.mark.distributed
def test_the_loop_of_a_worker_is_refused(x):
    async def task():
        clip_zarr(x, x.parent / "y", LIMIT)

    with local_cluster(1) as cluster, Client(cluster) as client:
        for run in (lambda: client.submit(task).result(timeout=60), lambda: client.run(task)):
            with pytest.raises(ClusterError, match="synchronous Client"):
                run()


# --- probes --------------------------------------------------------------------------------------


@contextmanager
def worker_of(cluster, folder, site):
    """A worker process that runs some code first."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(site)
    path = os.pathsep.join(filter(None, (str(folder / "site"), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "distributed.cli.dask_worker", cluster.scheduler_address]
    process = subprocess.Popen(
        [*command, "--no-nanny", "--nthreads", "1", "--host", "127.0.0.1", "--no-dashboard"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": path},
    )
    try:
        with Client(cluster, set_as_default=False) as client:
            client.wait_for_workers(1 + len(cluster.workers), timeout=120)
        yield process
    finally:
        process.kill()
        process.wait(60)


FAILING = {
    # a package without metadata, as from a folder of sources on the path
    "no metadata": (
        "from importlib import metadata\n"
        "def version(name, original=metadata.version):\n"
        "    if name == 'zarr':\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return original(name)\n"
        "metadata.version = version\n",
        "PackageNotFoundError: No package metadata was found for zarr",
    ),
    "another Python": (
        "import platform\nplatform.python_version_tuple = lambda: ('3', '9', '1')\n",
        "has Python 3.9.1 and not 3.",
    ),
    "unpicklable": (
        "import cloudpickle.cloudpickle as c\n"
        "def refuse(*_): raise TypeError('code() argument 13\\nmust be str')\n"
        "c._make_function = refuse\n",
        "TypeError: code",
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize("kind", FAILING)
def test_a_worker_that_cannot_say_its_versions_says_why(x, tmp_path, kind):
    site, text = FAILING[kind]
    with (
        cluster_of() as cluster,
        worker_of(cluster, tmp_path, site),
        Client(cluster),
        pytest.raises(ClusterError) as caught,
    ):
        clip_zarr(x, tmp_path / "y", 1.0)
    assert text in str(caught.value)
    assert "worker tcp://127.0.0.1:" in str(caught.value)
    assert "busy" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "y").exists()


@pytest.mark.distributed
def test_a_worker_that_does_not_answer_is_told_from_one_that_works(x, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PROBE_S", 1)
    go = tmp_path / "go"

    def work():
        until(go.exists)

    with (
        cluster_of() as cluster,
        worker_of(cluster, tmp_path, "") as process,
        Client(cluster) as client,
    ):
        future = client.submit(work)
        until(lambda: any(client.processing().values()))
        errors = []
        for _ in range(2):  # the first question is not among the tasks of the second one
            with pytest.raises(TemporaryError) as caught:
                clip_zarr(x, tmp_path / "y", 1.0)
            assert "no answer in 1 s, and 1 other task there" in str(caught.value)
            errors.append(caught)
        go.touch()
        future.result()
        # the questions that were not answered in time may still come
        until(lambda: not any(client.processing().values()))
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(TemporaryError, match="no answer in 1 s, and 0 other tasks there"):
            clip_zarr(x, tmp_path / "y", 1.0)
    assert not (tmp_path / "y").exists()


@pytest.mark.distributed
def test_a_worker_that_dies_while_it_is_asked_is_not_missed(x, tmp_path):
    # the probe looks at paths, where this one dies
    site = "import os\nos.path.exists = lambda path, exists=os.path.exists: "
    site += f"os._exit(1) if path == {str(x / 'zarr.json')!r} else exists(path)\n"
    with cluster_of(1) as cluster, worker_of(cluster, tmp_path, site) as process, Client(cluster):
        assert clip_zarr(x, tmp_path / "y", LIMIT, 0).status == "clipped"
        assert process.wait(60) == 1


# --- pools of processes --------------------------------------------------------------------------


def pids(folder):
    """Processes that wrote their number into a folder."""
    return {p.name for p in folder.iterdir()}


def note(folder):
    """Write the number of this process into a folder, as an initializer of processes."""
    open(os.path.join(folder, str(os.getpid())), "w").close()


@pytest.mark.usefixtures("small")
def test_a_run_on_processes_makes_one_pool(x, tmp_path):
    made = tmp_path / "pids"
    made.mkdir()
    settings = {"multiprocessing.initializer": partial(note, str(made)), "num_workers": 2}
    with dask.config.set(settings, scheduler="processes"):
        plan = plan_zarr(x, tmp_path / "y", LIMIT, 0, memory=MEMORY)
        assert plan.blocks > 2 * plan.window
        report = clip_zarr(x, tmp_path / "y", LIMIT, 0, memory=MEMORY)
    check(x, report)
    assert 1 <= len(pids(made)) <= 2
    for pid in pids(made):
        assert not os.path.exists(f"/proc/{pid}")


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["executor", "pool"])
def test_a_pool_of_processes_of_ones_own_is_used(x, tmp_path, kind):
    context = multiprocessing.get_context("spawn")
    made = ProcessPoolExecutor(2, context) if kind == "executor" else context.Pool(2)
    with made as pool, dask.config.set(scheduler="processes", pool=pool, num_workers=5):
        plan = plan_zarr(x, tmp_path / "y", LIMIT, 0, memory=MEMORY)
        assert (plan.processes, plan.threads) == (2, 1)
        check(x, clip_zarr(x, tmp_path / "y", LIMIT, 0, memory=MEMORY))
        # it is not closed
        assert (pool.submit(int).result() if kind == "executor" else pool.apply(int)) == 0


def end_process(task, *_):
    os._exit(1)


def test_a_process_that_dies_is_told_on_one_line(x, tmp_path, monkeypatch):
    settings = {"multiprocessing.context": "fork", "num_workers": 1}
    monkeypatch.setattr(tasks, "clip_slab", end_process)
    with (
        dask.config.set(settings, scheduler="processes"),
        pytest.raises(TemporaryError, match="run the same command again") as caught,
    ):
        clip_zarr(x, tmp_path / "y", LIMIT, 1)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert clip_zarr(x, tmp_path / "y", LIMIT, 1).status == "clipped"
