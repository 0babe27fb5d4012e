"""The limit: a loop written by hand over files and codecs, without zarr and without Dask.

It knows what these arrays are (float32, chunks or shards with one codec) and checks nothing. A
thread reuses all its buffers but the one that a codec gives for what it encoded.
"""

import json
import math
import mmap
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd

PAGE = 4096  # what a direct write must be a multiple of
SHUFFLE = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}


def clip(source, target, clip_norm, axes=None, *, threads, direct=False):
    """Clip by the norm of all, or of the rows of chunks that hold them whole.

    Without a target nothing may have to be clipped. ``direct`` writes past the page cache.
    """
    store = Store(source, target, direct)
    if axes is not None:
        run(store, clip_rows, clip_norm, threads)
        return
    total = run(store, sum_squares, None, threads)
    factor = min(1.0, clip_norm / math.sqrt(total)) if total else 1.0
    if factor < 1:
        run(store, multiply, np.float32(factor * (1 - 2**-22)), threads)
    elif target:
        run(store, copy, None, threads)


def run(store, function, argument, threads):
    """``function`` of every file; threads take the next one when they are done with one."""
    keys = iter(store.keys)

    def work(_):
        buffers = Buffers(store)
        return sum(function(store, buffers, key, argument) or 0.0 for key in keys)

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, range(threads)))


def sum_squares(store, buffers, key, _):
    return sum(float(np.vecdot(x, x).sum(dtype=float)) for x in store.read(buffers, key))


def multiply(store, buffers, key, factor):
    parts = []
    for x in store.read(buffers, key):
        np.multiply(x, factor, out=buffers.product)
        parts.append(store.encode(buffers.product))
    store.write(buffers, key, parts)


def copy(store, buffers, key, _):
    n = store.load(buffers, key)
    store.put(buffers.raw, key, n)


def clip_rows(store, buffers, key, clip_norm):
    (x,) = store.read(buffers, key)
    norms = np.sqrt(np.vecdot(x, x))
    if norms.max() <= clip_norm:  # what was read is what is to be written
        store.put(buffers.raw, key, buffers.size)
    else:
        factors = np.minimum(1, clip_norm * (1 - 2**-21) / norms)
        np.multiply(x, factors[:, None], out=buffers.product)
        store.write(buffers, key, [store.encode(buffers.product)])


class Store:
    """Where the files of an array are, and how they are encoded."""

    def __init__(self, source, target, direct):
        document = json.loads(Path(source, "zarr.json").read_text())
        unit = document["chunk_grid"]["configuration"]["chunk_shape"]
        codecs = document["codecs"]
        self.sharded = codecs[0]["name"] == "sharding_indexed"
        self.shape = unit
        if self.sharded:
            self.shape = codecs[0]["configuration"]["chunk_shape"]
            codecs = codecs[0]["configuration"]["codecs"]
        self.pieces = math.prod(unit) // math.prod(self.shape)
        self.nbytes = math.prod(unit) * 4
        self.codec = None
        for codec in codecs:
            settings = codec.get("configuration", {})
            if codec["name"] == "zstd":
                self.codec = Zstd(settings["level"])
            elif codec["name"] == "blosc":
                shuffle = SHUFFLE[settings["shuffle"]]
                self.codec = Blosc(settings["cname"], settings["clevel"], shuffle)
        self.keys = [
            f"c/{row}/{name}" for row in os.listdir(f"{source}/c")
            for name in os.listdir(f"{source}/c/{row}")
        ]  # fmt: skip
        self.source = os.open(source, os.O_RDONLY)
        self.flags = os.O_WRONLY | os.O_CREAT
        self.direct = direct and self.nbytes >= 2**20
        if self.direct:
            self.flags |= os.O_DIRECT
        if target:
            os.mkdir(target)
            shutil.copyfile(f"{source}/zarr.json", f"{target}/zarr.json")
            for row in os.listdir(f"{source}/c"):
                os.makedirs(f"{target}/c/{row}")
            self.target = os.open(target, os.O_RDONLY)

    def load(self, buffers, key):
        """Bring a file into memory; returns its size."""
        file = os.open(key, os.O_RDONLY, dir_fd=self.source)
        buffers.size = os.readv(file, [buffers.raw])
        os.close(file)
        return buffers.size

    def read(self, buffers, key):
        """Values of the chunks of a file, one after the other in the same buffer."""
        n = self.load(buffers, key)
        places = [(0, n)]
        if self.sharded:
            start = n - 16 * self.pieces - 4
            index = bytes(buffers.raw[start : n - 4])
            if google_crc32c.value(index) != int.from_bytes(buffers.raw[n - 4 : n], "little"):
                raise ValueError(f"the index of {key} is damaged")
            places = np.frombuffer(index, "<u8").reshape(-1, 2).tolist()
        if self.codec is None:
            yield buffers.plain
            return
        for at, size in places:
            self.codec.decode(buffers.raw[at : at + size], out=buffers.values)
            yield buffers.values

    def encode(self, x):
        return self.codec.encode(x) if self.codec else x.data.cast("B")

    def write(self, buffers, key, parts):
        """Write encoded chunks as one file."""
        sizes = [len(part) for part in parts]
        if self.sharded:
            ends = np.cumsum(sizes)
            index = np.stack([ends - sizes, sizes], 1).astype("<u8").tobytes()
            parts.append(index + google_crc32c.value(index).to_bytes(4, "little"))
        if not self.direct:
            self.put(b"".join(parts) if len(parts) > 1 else parts[0], key, None)
        elif self.codec is None:
            self.put(buffers.made, key, self.nbytes)  # it lies there already
        else:
            at = 0
            for part in parts:
                buffers.raw[at : at + len(part)] = part
                at += len(part)
            self.put(buffers.raw, key, at)

    def put(self, data, key, size):
        """Write the first ``size`` bytes, None for all."""
        size = len(data) if size is None else size
        file = os.open(key, self.flags, dir_fd=self.target)
        os.write(file, data[: -(-size // PAGE) * PAGE if self.direct else size])
        if self.direct and size % PAGE:
            os.ftruncate(file, size)
        os.close(file)


class Buffers:
    """Memory of one thread, aligned to pages where files are read and written."""

    def __init__(self, store):
        room = store.nbytes + store.nbytes // 8 + 20 * store.pieces + 2 * PAGE
        self.raw = memoryview(mmap.mmap(-1, room))  # a file
        self.made = memoryview(mmap.mmap(-1, room))
        self.plain = np.frombuffer(self.raw, np.float32, store.nbytes // 4)
        n = math.prod(store.shape)
        self.plain = self.plain[:n].reshape(store.shape)
        self.product = np.frombuffer(self.made, np.float32, n).reshape(store.shape)
        self.values = np.empty(store.shape, np.float32)
        self.size = 0
