"""From flat files to Zarr: `python -m tests.benchmarks.flat [--write]`.

A `.npy` file of float16 whose rows are clipped, and a `.safetensors` file whose tensors are,
against loops written by hand that read with `numpy.memmap` and write the same Zarr: the same chunks
and the same codec, by as many threads. One writes with zarr, the other encodes and writes files.
"""

import json
import math
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import zarr
from numcodecs.zstd import Zstd

from daskclip import clip_zarr, open_flat

from .storage import say
from .tables import machine, options, write

ROWS, COLUMNS = 2_796_202, 384  # 2 GiB of float16
TENSORS, SHAPE = 40, (3277, 1024)  # 0.5 GiB of float32
MEMORY, THREADS, ALLOWED = "128MiB", os.cpu_count() or 1, 1.15
CASES = {"rows of a .npy file": "x.npy", "tensors of a .safetensors file": "x.safetensors"}


def make(folder):
    """Normal values, most slices of which are clipped."""
    rng = np.random.default_rng(0)
    part = rng.standard_normal((1 << 14, COLUMNS), np.float32) / 16
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float16, (ROWS, COLUMNS))
    for start in range(0, ROWS, len(part)):
        x[start : start + len(part)] = part[: ROWS - start] * (0.5 + rng.random())
    size = 4 * math.prod(SHAPE)
    header = {
        f"layer.{i}": {"dtype": "F32", "shape": SHAPE, "data_offsets": [i * size, (i + 1) * size]}
        for i in range(TENSORS)
    }
    text = json.dumps(header).encode()
    with open(folder / "x.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in header:
            file.write(rng.standard_normal(SHAPE, np.float32).tobytes())


def maps(path):
    """Arrays of a file by name, mapped into memory."""
    if path.suffix == ".npy":
        return {"": np.load(path, mmap_mode="r")}
    with open(path, "rb") as file:
        width = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(width))
    return {
        name: np.memmap(path, np.float32, "r", 8 + width + about["data_offsets"][0], SHAPE)
        for name, about in header.items()
    }


def by_zarr(path, target):
    """The loop, which writes with zarr."""
    by_hand(
        path, target, lambda y, start, part: y.__setitem__(slice(start, start + len(part)), part)
    )


def by_files(path, target):
    """The loop, which encodes chunks and writes their files."""
    codec = Zstd(0)

    def put(y, start, part):
        folder = f"{target}/{y.path}/c/{start // y.chunks[0]}"
        os.makedirs(folder)
        whole = part
        if len(part) < y.chunks[0]:
            whole = np.zeros(y.chunks, y.dtype)
            whole[: len(part)] = part
        Path(folder, "0").write_bytes(codec.encode(whole))

    by_hand(path, target, put)


def by_hand(path, target, put):
    """Norms in float32, and none of what daskclip guarantees."""
    source, made = open_flat(path), zarr.open_group(target, mode="w")
    with ThreadPoolExecutor(THREADS) as pool:
        for name, x in maps(path).items():
            chunks = (source[name] if name else source).chunks
            y = made.create_array(
                name or "x", shape=x.shape, chunks=chunks, dtype=x.dtype,
                compressors=zarr.codecs.ZstdCodec(level=0),
            )  # fmt: skip
            starts, scale = range(0, len(x), chunks[0]), None
            if name:
                norm = math.sqrt(sum(pool.map(partial(squares, x, chunks[0]), starts)))
                scale = np.float32(min(1.0, 1 / norm))
            [*pool.map(partial(clip, x, y, scale, put), starts)]


def squares(x, rows, start):
    part = x[start : start + rows]
    return float(np.vdot(part, part))


def clip(x, y, scale, put, start):
    part = x[start : start + y.chunks[0]].astype(np.float32)
    if scale is None:
        norms = np.sqrt(np.vecdot(part, part))
        scale = np.minimum(1, 1 / norms, dtype=np.float32)[:, None]
    part *= scale
    put(y, start, part.astype(x.dtype, copy=False))


def by_daskclip(path, target):
    clip_zarr(path, target, 1.0, 1 if path.suffix == ".npy" else None, memory=MEMORY)


WAYS = (by_zarr, by_files, by_daskclip)


def measure(folder, repeat):
    """Seconds of each run, until the file system is synced; they take turns."""
    found = {(case, how): [] for case in CASES for how in WAYS}
    for repetition in range(-1, repeat):  # the first loads code and files
        for case, how in found:
            os.sync()
            with tempfile.TemporaryDirectory(dir=folder) as target:
                started = time.perf_counter()
                how(folder / CASES[case], Path(target) / "y")
                os.sync()
                found[case, how].append(time.perf_counter() - started)
            say(f"{case} {how.__name__} {repetition} {found[case, how][-1]:.2f} s")
    return {key: runs[1:] for key, runs in found.items()}


def table(found):
    lines = [
        "| | loop with zarr, s | loop over files, s | daskclip, s | to the faster loop | allowed |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for case in CASES:
        runs = [found[case, how] for how in WAYS]
        best = min(runs[:2], key=statistics.median)
        ratio = statistics.median(a / b for a, b in zip(runs[2], best, strict=True))
        times = " | ".join(f"{statistics.median(seconds):.2f}" for seconds in runs)
        lines.append(f"| {case} | {times} | {ratio:.2f} | {ALLOWED} |")
    return "\n".join(lines)


def main(arguments):
    chosen = options(__doc__, arguments)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        make(Path(folder))
        text = table(measure(Path(folder), chosen.repeat))
    text += (
        f"\n\n`clip_zarr` with memory={MEMORY!r} of {ROWS:,} rows of {COLUMNS} float16 (2 GiB) to "
        f"norm 1, and of {TENSORS} tensors of {SHAPE[0]} x {SHAPE[1]} float32 (0.5 GiB), each to "
        "norm 1; and loops over the same chunks of 4 MiB that read with `numpy.memmap`, compute "
        f"in float32 and write the same Zarr (zstd, level 0), by {THREADS} threads too. Medians of "
        f"{chosen.repeat} interleaved runs in one process, each until the file system is synced; "
        "the ratios are medians of runs next to each other.\n\n"
        f"{machine('numpy', 'zarr', 'dask')}; load average {load:.1f} before the run.\n"
    )
    print(text)
    if chosen.write:
        write("flat", text)


if __name__ == "__main__":
    main(sys.argv[1:])
