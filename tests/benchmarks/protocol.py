"""What safety costs: `python -m tests.benchmarks.protocol [--write]`.

The same run as it is; without fingerprints, digests, journal and record, but with its syncing; and
without syncing too. Every run is a process of its own, takes turns with the others, and ends when
the file system is synced. The time of a run of one chunk is taken off.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import zarr

from daskclip import clip_zarr
from daskclip.storage import Hierarchy, durable
from daskclip.target import directory as publish
from daskclip.target import journal
from daskclip.worker import tasks

from .tables import machine, write

SHAPE, CHUNKS = (512, 2**20), (1, 2**20)  # 2 GiB of float32 in chunks of 4 MiB
REPEAT = 5
CASES = [("two passes", None), ("one pass", 1)]
VARIANTS = ("as it is", "without the protocol", "without syncing too")


def make(folder):
    """Normal values in two arrays: one of the size that is measured, one of a chunk."""
    random = np.random.default_rng(0)
    for name, rows in (("x", SHAPE[0]), ("one", 1)):
        array = zarr.create_array(
            folder / name, shape=(rows, SHAPE[1]), chunks=CHUNKS, dtype="float32"
        )
        for row in range(rows):
            array[row] = random.standard_normal(SHAPE[1], "float32").round(2)


class NoJournal(journal.Journal):
    """Keeps sums in memory and writes nothing."""

    def append(self, entry):
        pass

    def save(self, name, sums):
        self._last = name, sums


def unprotected():
    """Take away what keeps a run safe but the syncing of its blocks."""
    Hierarchy.fingerprint = lambda self, *, changes: {}
    tasks.durable.digest = lambda data, before=0: 0
    publish.Journal = NoJournal

    def rename(work, source, staged, replace):
        os.rename(staged.folder, work.target.path)
        work.clear()

    publish.DirectoryTransaction.publish = rename


def run(variant, source, target, axes):
    """One run in this process; prints its seconds."""
    sync = durable.sync_filesystem
    if variant != VARIANTS[0]:
        unprotected()
    if variant == VARIANTS[2]:
        durable.sync_filesystem = lambda folder: None
    start = time.perf_counter()
    clip_zarr(source, target, 1000.0 if axes else 20000.0, axes)
    sync(Path(target).parent)
    print(time.perf_counter() - start)


def measure(folder):
    """Median seconds by case and variant, start-up taken off."""
    taken = {}
    for _ in range(REPEAT):
        for case, axes in CASES:
            for variant in VARIANTS:
                for source in ("one", "x"):
                    command = ["-m", "tests.benchmarks.protocol", "run", variant]
                    command += [str(folder / source), str(folder / "y"), repr(axes)]
                    os.sync()
                    done = subprocess.run(
                        [sys.executable, *command], capture_output=True, text=True, check=True
                    )
                    taken.setdefault((case, variant, source), []).append(float(done.stdout))
                    shutil.rmtree(folder / "y")
    return {
        (case, variant): statistics.median(taken[case, variant, "x"])
        - statistics.median(taken[case, variant, "one"])
        for case, _ in CASES
        for variant in VARIANTS
    }


def table(seconds):
    """Markdown of the seconds and of what each adds."""
    lines = [f"| | {' | '.join(VARIANTS)} | protocol | syncing |", "|---|---:|---:|---:|---:|---:|"]
    for case, _ in CASES:
        a, b, c = (seconds[case, variant] for variant in VARIANTS)
        costs = f"{100 * (a / b - 1):+.1f} % | {100 * (b / c - 1):+.1f} %"
        lines.append(f"| {case} | {a:.2f} s | {b:.2f} s | {c:.2f} s | {costs} |")
    return "\n".join(lines)


def main(arguments):
    if arguments[:1] == ["run"]:
        variant, source, target, axes = arguments[1:]
        run(variant, source, target, None if axes == "None" else int(axes))
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        text = table(measure(Path(folder)))
    text += (
        f"\n\n2 GiB of float32 in chunks of 4 MiB (zstd), every slice clipped; medians of {REPEAT} "
        "interleaved runs, each a process of its own that ends when the file system is synced; the "
        "time for an array of one chunk is taken off. Without the protocol: no fingerprint, no "
        "digest, journal or record; blocks are synced all the same. Without syncing: only at the "
        f"end.\n\n{machine('numpy', 'zarr', 'dask')}; load average {load:.1f} before the run.\n"
    )
    print(text)
    if "--write" in arguments:
        write("protocol", text)


if __name__ == "__main__":
    main(sys.argv[1:])
