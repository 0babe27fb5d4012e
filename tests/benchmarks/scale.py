"""How far clusters scale: `python -m tests.benchmarks.scale [--write] [--only "no-op"]`.

A real scheduler, workers and a client, each a process, run blocks that do nothing or sleep, over an
empty array; the operating system says what CPU each process takes. Then many workers in few
processes, which only answer, and a run of a million blocks on threads.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Timer

import dask
import psutil
import zarr
from dask.distributed import Client

from daskclip import clip_zarr
from daskclip.engine import front
from daskclip.plan.sizing import DEFAULT
from daskclip.worker import ClusterPool

from . import scale_blocks
from .contenders import THREADS, measured
from .storage import say
from .tables import machine, options, write

CHUNK = 2**22  # elements of a block of one chunk: 16 MiB
FROZEN_S = 45
MEMORY = "4GiB"
PER_PROCESS = 500  # workers that one process simulates


@dataclass(frozen=True)
class Case:
    """Workers and blocks of a run."""

    workers: int
    threads: int
    blocks: int
    seconds: float = 0
    """Of a block."""
    slow: int = 1
    """How many times slower the last worker is."""
    freezes: bool = False
    """Whether the last worker is stopped in mid run."""
    simulated: bool = False
    """Whether many workers share a process."""

    @property
    def ideal(self):
        """Seconds of both passes if all threads always had a block."""
        threads = self.threads * (self.workers - 1 + 1 / self.slow)
        return 2 * self.blocks * self.seconds / threads


BUSY, PARTS = "80 ms", ("scheduler", "client")
CASES = {
    "no-op": Case(2, 16, 6400),
    BUSY: Case(2, 16, 3200, 0.08),
    "one worker 5 times slower": Case(4, 4, 1536, 0.08, slow=5),
    "none slower": Case(4, 4, 1536, 0.08),
    "one worker frozen for 45 s": Case(4, 4, 1536, 0.08, freezes=True),
    "1 x 2 threads": Case(1, 2, 2000),
    "10 workers": Case(10, 2, 5000, 0.08, simulated=True),
    "100 workers": Case(100, 2, 40_000, 0.08, simulated=True),
    "1,000 workers": Case(1000, 2, 80_000, 0.08, simulated=True),
    "1,000 workers, blocks of 1 s": Case(1000, 2, 60_000, 1, simulated=True),
}


@contextmanager
def started(*command, **environment):
    """Run a module of Python in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, command)], env=os.environ | environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def cluster(case, folder):
    """Address of a scheduler, its process, and those of its workers."""
    file = f"{folder}/scheduler.json"
    with ExitStack() as stack:
        scheduler = stack.enter_context(
            started("distributed.cli.dask_scheduler", "--port", 0, "--no-dashboard",
                    "--scheduler-file", file)
        )  # fmt: skip
        while not os.path.exists(file):
            time.sleep(0.05)
        address = json.loads(Path(file).read_text())["address"]
        workers = []
        if case.simulated:
            left = case.workers
            while left > 0:
                number = min(left, PER_PROCESS)
                command = "tests.benchmarks.answering_workers", address, number, case.threads
                workers.append(
                    stack.enter_context(started(*command, ANSWER_SECONDS=str(case.seconds)))
                )
                left -= number
        else:
            for number in range(case.workers):
                slow = case.slow if number == case.workers - 1 else 1
                command = (
                    "distributed.cli.dask_worker", address, "--nthreads", case.threads,
                    "--no-nanny", "--no-dashboard", "--memory-limit", 0,
                    "--preload", "tests.benchmarks.scale_blocks",
                )  # fmt: skip
                seconds = str(case.seconds * slow)
                workers.append(stack.enter_context(started(*command, BLOCK_SECONDS=seconds)))
        yield address, scheduler, workers


def cpu(process):
    """CPU seconds of a process so far."""
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system


def empty(path, blocks):
    zarr.create_array(path, shape=(blocks, CHUNK), chunks=(1, CHUNK), dtype="float32", fill_value=1)
    return path


def run_client(address, blocks):
    """Clip in this process; prints a line before, and one with the figures after."""
    submit, tasks, copies = ClusterPool.submit, [], []

    def counting(self, function, calls, avoid=()):
        (copies if avoid else tasks).extend(calls)
        return submit(self, function, calls, avoid)

    ClusterPool.submit = counting
    with tempfile.TemporaryDirectory() as folder, Client(address) as client:
        # the scheduler imports the package when it has the first task
        clip_zarr(empty(f"{folder}/one", 1), f"{folder}/made", 1.0, memory=MEMORY)
        client.run(scale_blocks.forget_times)
        source = empty(f"{folder}/x", blocks)
        print("ready", flush=True)
        tasks.clear()
        copies.clear()
        before, began = time.process_time(), time.perf_counter()
        clip_zarr(source, f"{folder}/y", 1.0, memory=MEMORY)
        took, used = time.perf_counter() - began, time.process_time() - before
        figures = {"seconds": took, "client": used, "tasks": len(tasks), "copies": len(copies)}
        print(json.dumps(figures), flush=True)
        sys.stdin.readline()
        # of workers that answer
        found = client.run(scale_blocks.times, on_error="ignore").values()
        ends = [pair for pair in found if isinstance(pair, list | tuple)]
        print(json.dumps(max(last for _, last in ends) - min(first for first, _ in ends)))


def run(case):
    """Figures of one run of a case."""
    with tempfile.TemporaryDirectory() as folder, cluster(case, folder) as (address, *processes):
        scheduler, workers = processes
        with Client(address) as client:
            client.wait_for_workers(case.workers, timeout=300)
        command = [
            sys.executable,
            *(
                ["/tmp/w/simclient.py"]
                if os.environ.get("SIMC")
                else ["-m", "tests.benchmarks.scale", "client"]
            ),
            address,
        ]
        with subprocess.Popen(
            [*command, str(case.blocks)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child:
            child.stdout.readline()
            before = cpu(scheduler)
            if case.freezes:
                stop = Timer(case.ideal / 2, os.kill, (workers[-1].pid, signal.SIGSTOP))
                wake = Timer(case.ideal / 2 + FROZEN_S, os.kill, (workers[-1].pid, signal.SIGCONT))
                stop.start()
                wake.start()
            figures = json.loads(child.stdout.readline())
            figures["scheduler"] = cpu(scheduler) - before
            figures["memory"] = psutil.Process(scheduler.pid).memory_info().rss
            if case.freezes:
                stop.join()
                wake.join()
            child.stdin.write("\n")
            child.stdin.flush()
            figures["span"] = json.loads(child.stdout.readline())
            child.kill()
    return figures


def run_threads(blocks):
    """Clip on threads of this process, with blocks that do nothing; prints what it took."""
    scale_blocks.do_nothing()
    with tempfile.TemporaryDirectory() as folder:
        clip = partial(clip_zarr, empty(f"{folder}/x", blocks), f"{folder}/y", 1.0)
        with dask.config.set(scheduler="threads", num_workers=THREADS):
            print(json.dumps(measured(clip)))


def on_threads(blocks):
    """Figures of a run on threads of a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.scale", "threads", str(blocks)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def middle(results, key):
    return statistics.median(result[key] for result in results)


def cluster_rows(found):
    """Rows of the table of clusters, and the scheduler's milliseconds by case."""
    yield (
        "| | threads | blocks | tasks | s | work / time | scheduler, ms | client, ms | MB |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    for name, results in found.items():
        case, each = CASES[name], 2 * CASES[name].blocks / 1e3
        seconds = middle(results, "seconds" if case.freezes else "span")
        work = f"{case.ideal / seconds:.2f}" if case.seconds and not case.freezes else ""
        yield (
            f"| {name} | {case.workers * case.threads:,} | {case.blocks:,} "
            f"| {middle(results, 'tasks'):,.0f} | {seconds:.1f} | {work} "
            f"| {middle(results, 'scheduler') / each:.3f} | {middle(results, 'client') / each:.3f} "
            f"| {middle(results, 'memory') / 1e6:.0f} |"
        )


def ends(found):
    """Where the scheduler and the client end, computed from what a task takes of their time."""
    case, results = CASES[BUSY], found[BUSY]
    longest = DEFAULT.window_blocks // front.TASKS
    each = {part: middle(results, part) / middle(results, "tasks") for part in PARTS}
    # so many tasks a second end on a thread, and as many begin
    workers = {part: longest * case.seconds / seconds / 2 for part, seconds in each.items()}
    return (
        f"Extrapolated from {BUSY}: a task takes {1e3 * each['scheduler']:.2f} ms of the scheduler "
        f"and {1e3 * each['client']:.2f} ms of the client. On many workers a task has up to "
        f"{longest} blocks. With blocks of 80 ms the scheduler then has no time left at "
        f"{workers['scheduler']:,.0f} workers of two threads, and the client at "
        f"{workers['client']:,.0f}; with blocks that take twice as long, at twice as many."
    )


def on_threads_text(rows):
    return (
        "| blocks on threads | s | ms a block and pass | MB |\n|---:|---:|---:|---:|\n"
        f"{rows}\n\nOne run each on {THREADS} threads; memory is the peak above the imports.\n\n"
    )


def main(arguments):
    if arguments[:1] == ["client"]:
        run_client(arguments[1], int(arguments[2]))
        return
    if arguments[:1] == ["threads"]:
        run_threads(int(arguments[1]))
        return
    chosen = options(__doc__, arguments, blocks=[1e5, 1e6])
    load = os.getloadavg()[0]
    names = [n for n in CASES if not chosen.only or any(part in n for part in chosen.only)]
    found = {name: [] for name in names}
    for repetition in range(chosen.repeat):
        for name in names:
            # many workers of one process take long to start
            if repetition < (1 if CASES[name].simulated else chosen.repeat):
                found[name].append(run(CASES[name]))
                say(f"{repetition} {name} {found[name][-1]}")
    threads = {int(n): on_threads(int(n)) for n in ([] if chosen.only else chosen.blocks)}
    rows = "\n".join(
        f"| {n:,} | {r['seconds']:.1f} | {500 * r['seconds'] / n:.3f} | {r['memory'] / 1e6:.0f} |"
        for n, r in threads.items()
    )
    text = (
        "\n".join(cluster_rows(found)) + "\n\nTwo passes over blocks of 16 MiB that do nothing, or "
        "sleep for 80 ms, of an empty array; scheduler, workers and client are a process each, on "
        f"one machine. Medians of {chosen.repeat} interleaved runs, from the first block to the "
        "last; milliseconds are of CPU, for each block and pass, and MB those of the scheduler. "
        f"The frozen worker is stopped for {FROZEN_S} s in mid run. Where there are 10 workers or "
        f"more, they are simulated, {PER_PROCESS} at most in a process, and run once: they speak "
        "the protocol of workers, on the cores that scheduler and client need too.\n\n"
        + (f"{ends(found)}\n\n" if BUSY in found else "")
        + (on_threads_text(rows) if rows else "")
        + f"{machine('numpy', 'zarr', 'dask')}; load average {load:.1f} before the run.\n"
    )
    print(text)
    if chosen.write:
        write("scale", text)


if __name__ == "__main__":
    main(sys.argv[1:])
