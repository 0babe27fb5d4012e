"""Kills while many tasks are under way: no wrong byte, and the work that is repeated is bounded."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from threading import Timer

import pytest
from clusters import cluster_in
from distributed import Client
from reference import bits
from sizes import SMALL
from stores import create, read, some, stored

from daskclip import clip_by_norm, clip_zarr
from daskclip.engine import front, stages
from daskclip.target.journal import Journal

pytestmark = pytest.mark.distributed

SHAPE, CHUNKS = (128, 32), (2, 8)
SIZES = SMALL | {"block_nbytes": 64, "window_blocks": 8, "window_sums": 8}
LIMIT = 100.0
THREAD_WINDOW = 8
WORKERS = 3
# blocks under way, and the results of as many: of half a window in either pass, and of some tasks
REPEATED = 2 * (WORKERS + 1) * THREAD_WINDOW
LONGEST_STOP_S = 5  # of a worker, whose results all may wait for
# passes: axes, memory, blocks
RUNS = {1: ((), 4096, 256), 2: (0, 1400, 256)}
# writes a letter for each block that runs
COUNTING = """
import os, time
from functools import wraps
from daskclip.worker import tasks
log = os.open({!r}, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
def counting(letter, function):
    @wraps(function)
    def counted(*args):
        os.write(log, letter)
        time.sleep(float(os.environ.get("BLOCK_S", "0")))
        return function(*args)
    return counted
def dask_setup(worker):
    for letter, name in (b"1", "sum_block"), (b"2", "rescale_block"), (b"2", "clip_slab"):
        setattr(tasks, name, counting(letter, getattr(tasks, name)))
"""
# a client, which writes a letter for each block that it gives to another worker too
CLIENT = """
import os, sys
from distributed import Client
from sizes import use
from daskclip import clip_zarr
from daskclip.engine import stages
from daskclip.engine.front import Front
from daskclip.errors import DaskClipError
use(**{sizes})
stages.SUMS_NBYTES = {sums}
log = os.open({log!r}, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
def begin(self, tasks, original=Front._begin):
    os.write(log, b"x" * sum(len(task.blocks) for task in tasks if task.futures))
    return original(self, tasks)
def made_again(parts):
    calls = [part[1] for part in parts if isinstance(part, list)]
    # of blocks, or of sums that were added
    return sum(len(args[2]) if len(args) == 3 else made_again(args[0]) for args in calls)
def renewed(self, args, original=Front._renewed):
    made = original(self, args)
    os.write(log, b"x" * (made_again(made[0]) if isinstance(made[0], list) else 0))
    return made
Front._begin, Front._renewed = begin, renewed
with Client({address!r}, timeout=5):
    try:
        clip_zarr({source!r}, {target!r}, {limit}, {axes}, memory={memory})
    except DaskClipError as error:
        print("daskclip:", error, file=sys.stderr)
        os._exit(error.exit_code)
"""


class Work:
    """A cluster whose workers write down which blocks they run."""

    def __init__(self, cluster, folder):
        self.cluster, self.log = cluster, folder / "log"
        self.preload = folder / "counting.py"
        self.preload.write_text(COUNTING.format(str(self.log)))

    def start_workers(self, number, seconds=0.01):
        """Start workers of which a block takes so long; they are not waited for."""
        self.cluster.environment["BLOCK_S"] = str(seconds)
        for _ in range(number):
            self.cluster.workers.append(
                self.cluster.start(
                    "distributed.cli.dask_worker", self.cluster.address, "--nthreads", "1",
                    "--no-nanny", "--preload", self.preload,
                )
            )  # fmt: skip

    def wait_for_workers(self, number):
        with Client(self.cluster.address, set_as_default=False) as client:
            client.wait_for_workers(number, timeout=120)

    def counts(self):
        """Blocks of the first pass, of the last one, and of tasks given to other workers too."""
        found = Counter(self.log.read_bytes()) if self.log.exists() else Counter()
        return [found[ord(letter)] for letter in "12x"]


@pytest.fixture
def work(tmp_path):
    with cluster_in(tmp_path / "cluster") as cluster:
        work = Work(cluster, tmp_path)
        try:
            yield work
        finally:
            # a stopped process does not end when it is asked to
            for worker in cluster.workers:
                worker.kill()


@pytest.fixture
def x(tmp_path):
    (tmp_path / "data").mkdir()
    return create(tmp_path / "data" / "x", some(SHAPE, "f4"), CHUNKS)


@pytest.fixture
def large_sums(monkeypatch):
    """Sums that stay on the workers."""
    monkeypatch.setattr(stages, "SUMS_NBYTES", 0)


# --- all workers at once -------------------------------------------------------------------------


@pytest.mark.usefixtures("small", "large_sums")
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_sums_of_workers_that_are_lost_are_not_made_again(x, work, monkeypatch, share):
    """Dask would make a lost result again, from the blocks on: those that were saved are loaded."""
    axes, memory, blocks = RUNS[2]
    monkeypatch.setattr(front, "COPIES", 1)  # no task runs twice only because it is late
    values, target = read(x)[:, :8], x.parent / "y"
    source = create(x.parent / "one", values, CHUNKS)
    blocks //= 4
    work.start_workers(2)
    work.wait_for_workers(2)
    append, summed, lost = Journal.append, set(), []

    def killing(self, entry):
        append(self, entry)
        summed.update(getattr(entry, "source", None) or ())
        if len(summed) >= share * blocks and not lost:
            lost.append(work.counts())
            for worker in work.cluster.workers:
                worker.kill()
            work.start_workers(2)

    monkeypatch.setattr(Journal, "append", killing)
    with Client(work.cluster.address):
        report = clip_zarr(source, target, LIMIT, axes, memory=memory)
    assert (report.passes, report.blocks) == (2, blocks)
    assert lost
    assert bits(read(target)) == bits(clip_by_norm(values, LIMIT, axes))
    first, second, _ = work.counts()
    # nothing is under way when the last sums are saved
    allowed = 0 if share == 1 else 2 * THREAD_WINDOW + THREAD_WINDOW // 2
    assert first + second <= 2 * blocks + allowed


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("small", "large_sums")
@pytest.mark.parametrize("line", [1, 4])
def test_a_frozen_worker_that_has_sums_holds_nobody_up(x, work, monkeypatch, line):
    """Sums that it has kept are made again from their blocks on other workers."""
    axes, memory, blocks = RUNS[2]
    work.start_workers(WORKERS)
    work.wait_for_workers(WORKERS)
    frozen, append, lines, target = work.cluster.workers[0], Journal.append, [], x.parent / "y"
    # without this the scheduler would give it up after 5 minutes
    wake = Timer(200, os.kill, (frozen.pid, signal.SIGCONT))

    def freezing(self, entry):
        append(self, entry)
        lines.append(entry)
        if len(lines) == line:
            os.kill(frozen.pid, signal.SIGSTOP)
            wake.start()

    monkeypatch.setattr(Journal, "append", freezing)
    try:
        with Client(work.cluster.address):
            report = clip_zarr(x, target, LIMIT, axes, memory=memory)
        assert wake.is_alive()
    finally:
        wake.cancel()
    assert (report.passes, report.blocks) == (2, blocks)
    assert bits(read(target)) == bits(clip_by_norm(read(x), LIMIT, axes))


# --- anything, at any time -----------------------------------------------------------------------


class Disturbed:
    """A run whose processes are killed, stopped and restarted at random, until it is done."""

    def __init__(self, work, source, passes, sums, generator):
        self.work, self.generator = work, generator
        self.axes, memory, self.blocks = RUNS[passes]
        self.target = source.parent / "y"
        self.code = CLIENT.format(
            sizes=SIZES, sums=sums, log=str(work.log), address=work.cluster.address,
            source=str(source), target=str(self.target), limit=LIMIT, axes=self.axes,
            memory=memory,
        )  # fmt: skip
        self.kills = 0
        self.stopped = None

    def start(self):
        return subprocess.Popen(
            [sys.executable, "-c", self.code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def run(self, disturbances):
        """Start the client until it succeeds; after so many disturbances it is left alone."""
        code = None
        while code != 0:
            with self.start() as client:
                while disturbances and client.poll() is None:
                    disturbances -= 1
                    self.wait_for_blocks(client, self.generator.randrange(2, self.blocks // 3))
                    self.disturb(client)
                self.wake()
                _, err = client.communicate(timeout=120)
                code = client.returncode
            # the library leaves it to the caller what distributed logs
            assert code in (0, 75, -signal.SIGKILL), err

    def wait_for_blocks(self, client, number):
        """Wait until so many more blocks have begun, or the run has ended, but not for long."""
        wanted, end = sum(self.work.counts()) + number, time.monotonic() + LONGEST_STOP_S
        while sum(self.work.counts()) < wanted and client.poll() is None:
            if self.stopped is not None and time.monotonic() > end:
                return
            time.sleep(0.002)

    def disturb(self, client):
        kind = self.generator.choices(
            [self.kill_worker, self.stop_worker, self.kill_client, self.kill_scheduler],
            [4, 3, 2, 1],
        )[0]
        kind(client)

    def kill_worker(self, _):
        self.wake()
        self.kills += 1
        self.work.cluster.kill_worker()
        self.work.start_workers(1, self.generator.choice([0.01, 0.02, 0.1]))

    def stop_worker(self, _):
        self.wake()
        self.stopped = self.generator.choice(self.work.cluster.workers)
        os.kill(self.stopped.pid, signal.SIGSTOP)

    def wake(self):
        if self.stopped is not None:
            os.kill(self.stopped.pid, signal.SIGCONT)
            self.stopped = None

    def kill_client(self, client):
        self.kills += client.poll() is None
        client.kill()

    def kill_scheduler(self, _):
        self.wake()
        self.kills += 1
        cluster = self.work.cluster
        cluster.kill_scheduler()
        while cluster.workers:
            cluster.kill_worker()
        cluster.start_scheduler()
        self.work.start_workers(WORKERS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_work_is_right_and_bounded_whatever_is_killed(x, work, seed):
    generator = random.Random(seed)
    work.start_workers(WORKERS - 1, 0.01)
    work.start_workers(1, 0.1)
    work.wait_for_workers(WORKERS)
    before = stored(x)
    # one pass, two, and two where the sums stay on the workers
    passes, sums = [(1, 0), (2, 1 << 25), (2, 0), (2, 0)][seed % 4]
    run = Disturbed(work, x, passes, sums, generator)
    run.run(generator.randrange(4, 9))
    assert bits(read(run.target)) == bits(clip_by_norm(read(x), LIMIT, run.axes))
    assert stored(x) == before
    assert {p.name for p in x.parent.iterdir()} == {"x", "y"}
    first, second, copies = work.counts()
    repeated = first + second - passes * run.blocks - copies
    print("passes", passes, "kills", run.kills, "repeated", repeated, "copies", copies)
    assert repeated <= run.kills * REPEATED
