"""Many arrays in one run: `python -m tests.benchmarks.groups [--write]`.

A group of arrays of 4 KB to 4 MB against one array of the same bytes, clipped by its norm as it is
first met and as it was saved before.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import zarr

from daskclip import clip_zarr, stats_zarr

from .storage import say
from .tables import machine, options, write

ARRAYS, SMALLEST, LARGEST = 1000, 4e3, 4e6  # bytes
CHUNK = 2**20  # elements
RATIO, EACH = 1.3, 0.003  # of one array's time, and seconds more for each of many
CASES = {
    "one array": ("one", {}),
    "one array, its norm saved": ("one", {"norms": "norms"}),
    "a group, each array by its own norm": ("group", {}),
    "a group, by one norm": ("group", {"global_norm": True}),
}


def make(folder):
    """The same bytes as a group of arrays, of sizes with equal logarithms apart, and as one."""
    rng = np.random.default_rng(0)
    sizes = (SMALLEST * (LARGEST / SMALLEST) ** rng.random(ARRAYS)).astype(int) // 4
    data = rng.standard_normal(CHUNK, np.float32)
    group, total = zarr.create_group(folder / "group"), int(sizes.sum())
    one = zarr.create_array(folder / "one", shape=(total,), chunks=(CHUNK,), dtype="float32")
    for i, n in enumerate(sizes):
        array = group.create_array(f"{i:04}", shape=(int(n),), chunks=(int(n),), dtype="float32")
        array[:] = data[:n]
    for start in range(0, total, CHUNK):
        one[start : start + CHUNK] = data[: total - start]
    stats_zarr(folder / "one", save_norms=folder / "norms")
    return 4 * total


def measure(folder, repeat):
    """Seconds of each run, by case; cases take turns."""
    found = {name: [] for name in CASES}
    for repetition in range(-1, repeat):  # the first loads code
        for name, (source, how) in CASES.items():
            how = {k: folder / v if k == "norms" else v for k, v in how.items()}
            # kept until the end: ext4 looks past every inode that was freed in the last minutes, so
            # that what one run makes would take longer after what another made was removed
            target = folder / f"clipped {len(found[name])} {name}"
            os.sync()
            started = time.perf_counter()
            clip_zarr(folder / source, target, 1.0, **how)
            seconds = time.perf_counter() - started
            say(f"{name} {repetition} {seconds:.2f} s")
            found[name].append(seconds)
    return {name: runs[1:] for name, runs in found.items()}


def table(found):
    ones = found["one array"]
    lines = ["| | s | to one array | allowed |", "|---|---:|---:|---:|"]
    for name, runs in found.items():
        ratio = statistics.median(a / b for a, b in zip(runs, ones, strict=True))
        allowed = ""
        if CASES[name][0] == "group":
            allowed = f"{RATIO + EACH * ARRAYS / statistics.median(ones):.2f}"
        lines.append(f"| {name} | {statistics.median(runs):.2f} | {ratio:.2f} | {allowed} |")
    return "\n".join(lines)


def main(arguments):
    chosen = options(__doc__, arguments)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        size = make(Path(folder))
        text = table(measure(Path(folder), chosen.repeat))
    text += (
        f"\n\n`clip_zarr` of {ARRAYS:,} arrays of {SMALLEST / 1e3:g} KB to {LARGEST / 1e6:g} MB of "
        f"float32, a chunk each, {size / 1e6:.0f} MB in all, and of one array of as many bytes in "
        f"chunks of 4 MiB (zstd), all clipped to 1. Medians of {chosen.repeat} interleaved runs in "
        "one process; the ratios are medians of runs next to each other. Allowed are "
        f"{RATIO} times the one array and {EACH * 1e3:g} ms an array.\n\n"
        f"{machine('numpy', 'zarr', 'dask')}; load average {load:.1f} before the run.\n"
    )
    print(text)
    if chosen.write:
        write("groups", text)


if __name__ == "__main__":
    main(sys.argv[1:])
