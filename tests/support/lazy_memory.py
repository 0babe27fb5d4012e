"""One measurement in a fresh process: MB held above the start, as JSON, one number per process.

python lazy_memory.py STORE TARGET KIND {threads,distributed}
"""

import json
import sys
from importlib import import_module
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import zarr
from distributed import Client, LocalCluster

import daskclip


def array(store):
    return da.from_zarr(store)


def halves(store):
    x = array(store)
    return da.concatenate([x[:8192], x[8192:]])


def everything(store):
    """Array sliced, concatenated and rechunked across chunk borders."""
    x = array(store)
    return da.concatenate([x[3:5000], x[5000:, ::-1]])[:, 1024:].rechunk((1024, 1024))


def chain(store):
    """Array of many steps for each chunk, before a step that mixes chunks."""
    x = array(store)
    for _ in range(20):
        x = x + 1
    return x.rechunk((512, 2048))


SOURCES = {
    "zarr": array,
    "stored": zarr.open_array,
    "rechunked": lambda store: array(store).rechunk((512, 2048)),
    "split": lambda store: array(store).rechunk((1024, 60)),
    "sliced": lambda store: array(store)[::-1, 1024:],
    "concatenated": halves,
    "everything": everything,
    "chain": chain,
    "centred": lambda store: array(store) - array(store).mean(axis=0),
}


def clipped(store, kind):
    if kind == "plain":
        x = array(store)
        return x * da.minimum(1, 1000.0 / da.linalg.norm(x.reshape(-1)))
    source, _, axes = kind.partition(" over ")
    return daskclip.clip_by_norm(SOURCES[source](store), 1000.0, int(axes) if axes else None)


def status(field):
    """Memory of this process, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    raise KeyError(field)


def main(store, target, kind, scheduler):
    if scheduler == "threads":
        start = loaded()
        write(store, target, kind)
        return [status("VmHWM") - start]
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(2)
        start = client.run(loaded)
        write(store, target, kind)
        peak = client.run(status, "VmHWM")
        return [peak[worker] - start[worker] for worker in start]


def loaded():
    """Memory of a process that has imported what it needs."""
    numerics = import_module("daskclip.numerics")
    for axes in ((1,), (0, 1)):
        numerics.clip_block(np.ones((2, 1 << 18), np.float32), 1.0, axes)
    return status("VmRSS")


def write(store, target, kind):
    # a path, not an array: for an array, to_zarr first rechunks to larger chunks
    with dask.config.set(num_workers=2):
        clipped(store, kind).to_zarr(target, compressors=None)


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
