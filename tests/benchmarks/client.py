"""What the client costs: `python -m tests.benchmarks.client [--write] [--blocks 1e4 1e5 1e6]`.

Runs of blocks that do nothing, over an empty array; the planning of a petabyte; and how far that
and the seconds for each byte reach.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import dask
import numpy as np
import zarr
from dask.distributed import Client

from daskclip import clip_zarr, plan_zarr
from daskclip.numerics import SliceCounts, partial_norm
from daskclip.worker import tasks

from .contenders import THREADS, measured
from .storage import SMALL, Case, Runs, make, remove, say
from .tables import machine, options, write

CHUNK = 2**22  # elements of a block of one chunk: 16 MiB
SUMS = partial_norm(np.ones((1, 1), "float32"), (0, 1))
SCHEDULERS = ("threads", "distributed")
PASSES = {1: (1,), 2: None}  # axes
FEWER = 30  # times fewer blocks on distributed, which takes milliseconds for each
TERABYTES, WORKERS = (1, 100, 1000), (1, 10, 100)


def sum_nothing(task, slab, block):
    return tasks.Sums(SUMS, {(task.number, slab, block): 0}, 0)


def write_nothing(task, slab, block, scale, expected):
    return tasks.BlockResult(0)


def clip_nothing(task, slab, block):
    return tasks.BlockResult(0, SliceCounts.empty())


def empty(path, chunks):
    zarr.create_array(path, shape=(chunks, CHUNK), chunks=(1, CHUNK), dtype="float32", fill_value=1)
    return path


def run(scheduler, blocks, passes):
    """Clip in this process with blocks that do nothing; prints what it took."""
    tasks.sum_block, tasks.rescale_block = sum_nothing, write_nothing
    tasks.clip_slab = clip_nothing
    with tempfile.TemporaryDirectory() as folder:
        source = empty(f"{folder}/x", blocks)
        clip = partial(clip_zarr, source, f"{folder}/y", 1.0, PASSES[passes])
        plan = plan_zarr(source, f"{folder}/y", 1.0, PASSES[passes])
        if (plan.blocks, plan.passes) != (blocks, passes):
            raise SystemExit(f"{plan} is not a plan of {blocks} blocks in {passes} passes")
        if scheduler == "threads":
            dask.config.set(scheduler="threads", num_workers=THREADS)
            result = measured(clip)
        else:  # in one process, so that nothing has to be patched elsewhere
            with Client(processes=False, n_workers=1, threads_per_worker=THREADS,
                        dashboard_address=None):  # fmt: skip
                result = measured(clip)
    print(json.dumps(result))


def measure(blocks, repeat):
    """Seconds and memory by scheduler, passes and number of blocks."""
    found = {}
    for repetition in range(repeat):
        for scheduler in SCHEDULERS:
            for passes in PASSES:
                for n in blocks:
                    if scheduler == "distributed":
                        n /= FEWER
                    command = ["run", scheduler, str(round(n)), str(passes)]
                    done = subprocess.run(
                        [sys.executable, "-m", "tests.benchmarks.client", *command],
                        capture_output=True, text=True, check=True,
                    )  # fmt: skip
                    result = json.loads(done.stdout.splitlines()[-1])
                    found.setdefault((scheduler, passes, round(n)), []).append(result)
                    say(f"{repetition} {' '.join(command)} {result['seconds']:.2f} s")
    return found


def middle(results, key):
    return statistics.median(r[key] for r in results)


def costs(found):
    """Milliseconds of a block and a pass, from the fewest to the most blocks."""
    result = {}
    for scheduler in SCHEDULERS:
        for passes in PASSES:
            counts = sorted(n for s, p, n in found if (s, p) == (scheduler, passes))
            low, high = (
                middle(found[scheduler, passes, n], "seconds") for n in counts[:: len(counts) - 1]
            )
            result[scheduler, passes] = 1e3 * (high - low) / (counts[-1] - counts[0]) / passes
    return result


def table(found, each):
    lines = [
        "| scheduler | passes | blocks | s | MB | ms a block and pass |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for (scheduler, passes, n), results in sorted(found.items(), reverse=True):
        seconds, memory = middle(results, "seconds"), middle(results, "memory")
        lines.append(
            f"| {scheduler} | {passes} | {n:,} | {seconds:.2f} | {memory / 1e6:.0f} | "
            f"{each[scheduler, passes]:.2f} |"
        )
    return "\n".join(lines)


def planning(folder, repeat):
    """Seconds of the plan of a gigabyte and of a billion chunks."""
    taken = {}
    for chunks in (64, 10**9):
        empty(folder / str(chunks), chunks)
    for _ in range(10 * repeat):
        for chunks in (64, 10**9):
            start = time.perf_counter()
            plan_zarr(folder / str(chunks), folder / "y", 1.0)
            taken.setdefault(chunks, []).append(time.perf_counter() - start)
    few, many = (statistics.median(t) for t in taken.values())
    return f"Planning 64 chunks takes {1e3 * few:.1f} ms, 10^9 chunks {1e3 * many:.1f} ms."


def rate(folder, chosen):
    """Seconds for each GB of the engine on this machine, by passes."""
    runs = Runs(folder, {}, chosen.repeat, "512MiB")
    make(Case("one", SMALL), folder / "one", SMALL)
    taken = {}
    for passes, case in {1: Case("rate", axes=1), 2: Case("rate")}.items():
        shape = case.shape(chosen.size)
        found = runs.case(case, chosen.size, ["engine"])["engine"]
        taken[passes] = middle(found, "seconds") / (np.prod(shape) * 4 / 1e9)
    remove(folder / "one")
    return taken


def capacity(seconds, each):
    """How long arrays take on some workers, and what that time is spent on."""
    lines = [
        "| | TB | blocks | "
        + " | ".join(f"{w} worker{'s' * (w > 1)}" for w in WORKERS)
        + " | client's record |",
        "|---|---:|---:|" + "---:|" * (len(WORKERS) + 1),
    ]
    for passes in PASSES:
        for size in TERABYTES:
            blocks = size * 1e12 / (4 * CHUNK)
            client = blocks * passes * each["distributed", passes] / 1e3
            cells = []
            for workers in WORKERS:
                data = size * 1e3 * seconds[passes] / workers
                bound = "bytes" if data > client else "client"
                cells.append(f"{spoken(max(data, client))}, {bound}")
            lines.append(
                f"| {passes} {'pass' if passes == 1 else 'passes'} | {size:,} | {blocks:,.0f} | "
                f"{' | '.join(cells)} | {5 * blocks / 1e6:,.1f} MB |"
            )
    return "\n".join(lines)


def spoken(seconds):
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s"


def main(arguments):
    if arguments[:1] == ["run"]:
        run(arguments[1], int(arguments[2]), int(arguments[3]))
        return
    chosen = options(__doc__, arguments, blocks=[1e4, 1e5], size="1GiB")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        found = measure(chosen.blocks, chosen.repeat)
        plans = planning(folder, chosen.repeat)
        seconds = rate(folder, chosen)
    each = costs(found)
    # a worker adds speed until the client has no more blocks for it
    full = min(seconds[p] * 4 * CHUNK / 1e9 / p / (each["distributed", p] / 1e3) for p in PASSES)
    text = (
        f"{table(found, each)}\n\nBlocks of 16 MiB that do nothing, of an empty array; the journal "
        f"is real. Medians of {chosen.repeat} interleaved runs, each a process of its own; memory "
        "is the peak above the imports; the last column is the slope between the fewest and the "
        "most blocks. Distributed: scheduler, worker and client share one process "
        f"here, and so its lock.\n\n{plans}\n\n{capacity(seconds, each)}\n\n"
        f"Computed from what was measured: {seconds[1]:.2f} s for each GB in one pass and "
        f"{seconds[2]:.2f} in two (float32, chunks of 4 MiB, zstd, every slice clipped, "
        f"{THREADS} cores), and the client's milliseconds on distributed. It takes each worker for "
        "such a machine, storage for one that gives each of them what the disk here gives, and "
        "blocks for 16 MiB. Bytes or client says which of the two takes that time; with more than "
        f"{full:,.0f} workers it is the client. Its record takes 5 bytes a block.\n\n"
        f"{machine('numpy', 'zarr', 'dask')}; load average {load:.1f} before the run.\n"
    )
    print(text)
    if chosen.write:
        write("client", text)


if __name__ == "__main__":
    main(sys.argv[1:])
