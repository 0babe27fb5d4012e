"""The ways to clip an array: `python -m tests.benchmarks.contenders NAME '{"source": ...}'`.

Each is run in a process of its own, which imports only what that one needs and prints a line of
JSON: seconds until the file system is synced, CPU seconds, and memory in bytes above the imports.
"""

import importlib
import json
import os
import shutil
import sys
import time
from functools import partial
from importlib.metadata import version
from math import sqrt
from pathlib import Path

import numpy as np

from . import limit as loop

THREADS = os.cpu_count()
GULP = 16 * 2**20  # bytes that the batches of the zarrs pipeline hold


def by_hand():
    return partial(loop.clip, threads=THREADS)


def direct():
    return partial(loop.clip, threads=THREADS, direct=True)


def zarrs():
    """Batches of many chunks, one after the other; the codecs have threads of their own."""
    import zarr
    import zarrs  # noqa: F401 (registers itself)

    def clip(source, target, clip_norm, axes):
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
        x, y = zarr.open_array(source, mode="r"), made(zarr, source, target)
        unit = x.shards or x.chunks
        wide = max(unit[1], min(x.shape[1], GULP // 4 // unit[0] // unit[1] * unit[1]))
        tall = max(unit[0], GULP // 4 // wide // unit[0] * unit[0])
        parts = [
            (slice(i, i + tall), slice(j, j + wide))
            for i in range(0, x.shape[0], tall)
            for j in range(0, x.shape[1], wide)
        ]
        total = sum(squares(x[part]) for part in parts)
        factor = np.float32(min(1, clip_norm / sqrt(total)) * (1 - 2**-22))
        for part in parts:
            block = x[part]
            np.multiply(block, factor, out=block)
            y[part] = block

    return clip


def two_steps():
    """Dask: the norm is a number before the second graph begins."""
    da, zarr = dask_and_zarr()

    def clip(source, target, clip_norm, axes):
        array, x = opened(da, zarr, source)
        factor = min(1.0, clip_norm / sqrt(total(x).compute())) * (1 - 2**-22)
        store(x.map_blocks(scaled, factor, dtype=x.dtype), array, target)

    return clip


def cloned():
    """Dask: one graph that reads the source twice."""
    da, zarr = dask_and_zarr()
    from dask.graph_manipulation import clone

    def clip(source, target, clip_norm, axes):
        array, x = opened(da, zarr, source)
        factor = da.minimum(1, clip_norm / da.sqrt(total(clone(x, seed=0)))) * (1 - 2**-22)
        store(x.map_blocks(scaled, factor, dtype=x.dtype), array, target)

    return clip


def product():
    """Dask: what one writes first; it holds the whole array."""
    da, zarr = dask_and_zarr()

    def clip(source, target, clip_norm, axes):
        array, x = opened(da, zarr, source)
        factor = da.minimum(1, clip_norm / da.sqrt(total(x))) * (1 - 2**-22)
        store(x * factor.astype("float32"), array, target)

    return clip


def usual():
    """Dask: the expression as people write it, in the dtype of the array."""
    da, zarr = dask_and_zarr()

    def clip(source, target, clip_norm, axes, threads=THREADS):
        array, x = opened(da, zarr, source, threads)
        norm = da.linalg.norm(x, axis=axes, keepdims=True)
        store(x * da.minimum(1, clip_norm / norm), array, target)

    return clip


def cubed():
    import cubed
    import cubed.array_api as xp
    import zarr
    from cubed.runtime.executors.local import ThreadsExecutor

    def clip(source, target, clip_norm, axes):
        executor = ThreadsExecutor(max_workers=THREADS)
        spec = cubed.Spec(Path(target).with_name("cubed"), allowed_mem="1GB", executor=executor)
        x = cubed.from_zarr(source, spec=spec)
        sums = cubed.map_blocks(block_squares, x, dtype=float, chunks=ones(x))
        factor = xp.minimum(xp.asarray(1.0, spec=spec), clip_norm / xp.sqrt(xp.sum(sums)))
        y = x * xp.astype(factor * (1 - 2**-22), xp.float32)
        cubed.store(y, made(zarr, source, target))

    return clip


def lazy():
    da, zarr = dask_and_zarr()
    daskclip = importlib.import_module("daskclip")

    def clip(source, target, clip_norm, axes):
        array, x = opened(da, zarr, source)
        store(daskclip.clip_by_norm(x, clip_norm), array, target)

    return clip


def engine():
    daskclip = importlib.import_module("daskclip")

    def clip(source, target, clip_norm, axes, memory="512MiB", threads=THREADS):
        use_threads(threads)
        in_place = target is None
        daskclip.clip_zarr(source, target, clip_norm, axes, memory=memory, in_place=in_place)

    return clip


LABELS = {
    by_hand: "loop over files and codecs",
    direct: "the same, direct writes",
    zarrs: "batches, `zarrs` codecs",
    two_steps: "Dask, two steps",
    cloned: "Dask, cloned",
    product: "Dask, `x * f(norm(x))`",
    usual: "Dask, `x * minimum(1, c / norm(x))`",
    cubed: "cubed, threads",
    lazy: "daskclip, lazy",
    engine: "daskclip, engine",
}
LABELS = {function.__name__: label for function, label in LABELS.items()}


def squares(x):
    return float(np.vecdot(x, x).sum(dtype=float))


def block_squares(x):
    return np.full((1,) * x.ndim, squares(x))


def ones(x):
    """Chunks of an array with an element for each chunk of ``x``."""
    return tuple((1,) * n for n in x.numblocks)


def scaled(x, factor):
    return x * x.dtype.type(factor)


def total(x):
    """Sum of squares of a Dask array, chunk by chunk."""
    return x.map_blocks(block_squares, dtype=float, chunks=ones(x)).sum()


def dask_and_zarr():
    import dask.array as da
    import zarr

    return da, zarr


def use_threads(threads=THREADS):
    import dask

    dask.config.set(scheduler="threads", num_workers=threads)


def opened(da, zarr, source, threads=THREADS):
    """A Zarr array, and as Dask array with a chunk for each stored object."""
    use_threads(threads)
    array = zarr.open_array(source, mode="r")
    return array, da.from_zarr(array, chunks=array.shards or array.chunks)


def store(x, array, target):
    """Write a Dask array like ``array``; for one that is there to_zarr would rechunk."""
    x.to_zarr(target, chunks=array.chunks, shards=array.shards, compressors=array.compressors)


def made(zarr, source, target):
    """An empty array with the metadata of the source."""
    os.mkdir(target)
    shutil.copyfile(f"{source}/zarr.json", f"{target}/zarr.json")
    return zarr.open_array(target, mode="r+")


def status(name):
    """Bytes of this process by their name in /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measured(function, *args, **kwargs):
    """Seconds until all is on disk, CPU seconds, and memory above what there was; when it began."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = status("VmRSS")
    cpu, start = time.process_time(), time.perf_counter()
    function(*args, **kwargs)
    os.sync()
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "memory": status("VmHWM") - before,
        "began": start,
        "before": before,
    }


def main(arguments):
    name, settings = arguments
    function = globals()[name]()
    result = measured(function, **json.loads(settings))
    packages = {"cubed", "zarrs"} & {name} | {"numpy", "numcodecs"}
    print(json.dumps(result | {"versions": {p: version(p) for p in sorted(packages)}}))


if __name__ == "__main__":
    main(sys.argv[1:])
