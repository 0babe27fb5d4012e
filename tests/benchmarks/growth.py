"""Does it grow with the array: `python -m tests.benchmarks.growth [--write] [--sizes 1 4 16]`.

The engine on arrays of growing size within the same budget: seconds for each GB, and peak memory.
"""

import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import zarr

from .contenders import THREADS
from .storage import CHUNK, Case, Runs, make, remove, say
from .tables import machine, options, write

CASE = Case("growth", codec="Blosc-lz4")
PASSES = (("two passes", CASE), ("one pass", replace(CASE, axes=1)))
FILLED = 1 / 4  # of the columns of a chunk; the others are zero and take no disk
DIFFERENT = 64  # chunks that differ; the others are copies of their files


def grow(case, path, gigabytes):
    """An array one chunk wide, of so many times 256 chunks."""
    shape = (round(gigabytes * 256) * CHUNK[0], CHUNK[1])
    few = path.with_name("few")
    make(case, few, (DIFFERENT * CHUNK[0], CHUNK[1]), filled=FILLED)
    zarr.create_array(
        path,
        shape=shape,
        chunks=CHUNK,
        dtype="float32",
        compressors=zarr.open_array(few).compressors,
    )
    for row in range(shape[0] // CHUNK[0]):
        (path / f"c/{row}").mkdir(parents=True)
        shutil.copyfile(few / f"c/{row % DIFFERENT}/0", path / f"c/{row}/0")
    remove(few)
    return shape


def measure(runs, sizes):
    """What each run took, by passes and size; sizes take turns, an array at a time on disk."""
    found = {}
    for repetition in range(runs.repeat):
        for gigabytes in sizes:
            source = runs.folder / "x"
            shape = grow(CASE, source, gigabytes)
            for name, case in PASSES:
                first = runs.start("engine", case)
                os.sync()
                result, target = runs.once("engine", source, case.clip_norm(shape), case)
                remove(target)
                result["seconds"] -= first
                found.setdefault((name, gigabytes), []).append(result)
                say(f"{name} {gigabytes} GB {repetition} {result['seconds']:.2f} s")
            remove(source)
    return found


def table(found, sizes):
    lines = [
        "| | GB | s | s / GB | to the smallest | MB | to the smallest |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, _ in PASSES:
        each = {}
        for gigabytes in sizes:
            runs = found[name, gigabytes]
            each[gigabytes] = [r["seconds"] / gigabytes for r in runs], [r["memory"] for r in runs]
            pairs = zip(each[gigabytes], each[sizes[0]], strict=True)
            ratios = [
                statistics.median(a / b for a, b in zip(*pair, strict=True)) for pair in pairs
            ]
            seconds, memory = map(statistics.median, each[gigabytes])
            lines.append(
                f"| {name} | {gigabytes:g} | {seconds * gigabytes:.2f} | {seconds:.3f} | "
                f"{ratios[0]:.2f} | {memory / 1e6:.0f} | {ratios[1]:.2f} |"
            )
    return "\n".join(lines)


def main(arguments):
    chosen = options(__doc__, arguments, sizes=[1.0, 4.0, 16.0], memory="256MiB")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        runs = Runs(Path(folder), chosen.python, chosen.repeat, chosen.memory)
        make(Case("one", (128, 128)), runs.folder / "one", (128, 128))
        text = table(measure(runs, chosen.sizes), chosen.sizes)
    text += (
        f"\n\nThe engine with memory={chosen.memory} and {THREADS} threads, every slice clipped; a "
        f"GB is 2^30 bytes of float32 in chunks of 4 MiB (Blosc-lz4); {DIFFERENT} chunks of normal "
        f"values of two digits in {FILLED:.0%} of their columns, else zero, and copies of "
        "their files, so that the largest array takes less disk. Two passes: the norm of all; one "
        f"pass: of rows inside a chunk. Medians of {chosen.repeat} interleaved runs, each a "
        "process of its own that ends "
        "when the file system is synced; the time for an array of one chunk is taken off. The "
        f"ratios are medians of runs next to each other.\n\n{machine('numpy', 'zarr', 'dask')}; "
        f"load average {load:.1f} before the run.\n"
    )
    print(text)
    if chosen.write:
        write("growth", text)


if __name__ == "__main__":
    main(sys.argv[1:])
