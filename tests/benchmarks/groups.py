"""Many arrays in one run: `python -m tests.benchmarks.groups [--write]`.

A group of arrays of 4 KB to 4 MB against one array of the same bytes, clipped by its norm as it is
first met and as it was saved before; and the gradients of a network for each example, an array for
each layer, clipped by one norm for each example, against one array of the same rows.
"""

import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import zarr
from scipy.special import softmax
from sklearn.datasets import load_digits

from daskclip import clip_zarr, stats_zarr

from .storage import say
from .tables import machine, options, write

ARRAYS, SMALLEST, LARGEST = 1000, 4e3, 4e6  # bytes
CHUNK = 2**20  # elements
RATIO, EACH = 1.3, 0.003  # of one array's time, and seconds more for each of many
LAYERS, WIDTH, EXAMPLES = 30, 74, 150  # of the network, and examples of a chunk
MEMORY = "512MiB"
CASES = {
    "one array": ("one", {}),
    "one array, its norm saved": ("one", {"norms": "norms"}),
    "a group, each array by its own norm": ("group", {}),
    "a group, by one norm": ("group", {"global_norm": True}),
    "gradients, one array": ("rows", {"axes": 1}),
    "gradients by layer": ("layers", {"axes": slice(1, None), "global_norm": True}),
}
TO = {name: "gradients, one array" if "gradients" in name else "one array" for name in CASES}


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


def gradients(x, labels, weights, biases):
    """Gradients of the cross-entropy of a network for each example, by layer."""
    inputs = [x]
    for w, b in zip(weights, biases, strict=True):
        inputs.append(np.maximum(inputs[-1] @ w + b, 0))
    error = softmax(inputs.pop(), axis=1) - np.eye(weights[-1].shape[1], dtype=x.dtype)[labels]
    found = []
    for w, given in zip(reversed(weights), reversed(inputs), strict=True):
        found += [error, given[:, :, None] * error[:, None]]
        error = error @ w.T * (given > 0)
    return found[::-1]


def make_layers(folder):
    """Gradients of a network of digits as a group of an array for each parameter, and as rows."""
    digits, rng = load_digits(), np.random.default_rng(0)
    x, labels = np.float32(digits.data / 16), digits.target
    widths = [64, *[WIDTH] * (LAYERS - 1), 10]
    sizes = [*pairwise(widths)]
    weights = [np.float32(rng.normal(0, (2 / n) ** 0.5, (n, m))) for n, m in sizes]
    biases = [np.zeros(m, np.float32) for _, m in sizes]
    shapes = [shape for w, b in zip(weights, biases, strict=True) for shape in (w.shape, b.shape)]
    group, total = zarr.create_group(folder / "layers"), sum(map(np.prod, shapes))
    layers = [
        group.create_array(
            f"{i // 2:02}/{'bias' if i % 2 else 'kernel'}", shape=(len(x), *shape),
            chunks=(EXAMPLES, *shape), dtype="float32",
        )
        for i, shape in enumerate(shapes)
    ]  # fmt: skip
    rows = zarr.create_array(
        folder / "rows", shape=(len(x), total), chunks=(EXAMPLES, WIDTH**2), dtype="float32"
    )
    for start in range(0, len(x), EXAMPLES):
        some = slice(start, start + EXAMPLES)
        found = gradients(x[some], labels[some], weights, biases)
        for layer, values in zip(layers, found, strict=True):
            layer[some] = values
        rows[some] = np.concatenate([v.reshape(len(v), -1) for v in found], axis=1)
    return rows.nbytes


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
            report = clip_zarr(folder / source, target, 1.0, **how, memory=MEMORY)
            seconds = time.perf_counter() - started
            assert report.peak_memory is None or report.peak_memory <= report.projected_memory
            say(f"{name} {repetition} {seconds:.2f} s")
            found[name].append(seconds)
    return {name: runs[1:] for name, runs in found.items()}


def table(found):
    lines = ["| | s | to one array | allowed |", "|---|---:|---:|---:|"]
    for name, runs in found.items():
        ones = found[TO[name]]
        ratio = statistics.median(a / b for a, b in zip(runs, ones, strict=True))
        arrays = {"group": ARRAYS, "layers": 0}.get(CASES[name][0])
        allowed = "" if arrays is None else f"{RATIO + EACH * arrays / statistics.median(ones):.2f}"
        lines.append(f"| {name} | {statistics.median(runs):.2f} | {ratio:.2f} | {allowed} |")
    return "\n".join(lines)


def main(arguments):
    chosen = options(__doc__, arguments)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        size, layers = make(Path(folder)), make_layers(Path(folder))
        text = table(measure(Path(folder), chosen.repeat))
    text += (
        f"\n\n`clip_zarr` of {ARRAYS:,} arrays of {SMALLEST / 1e3:g} KB to {LARGEST / 1e6:g} MB of "
        f"float32, a chunk each, {size / 1e6:.0f} MB in all, and of one array of as many bytes in "
        f"chunks of 4 MiB (zstd), all clipped to 1. Medians of {chosen.repeat} interleaved runs in "
        "one process; the ratios are medians of runs next to each other. Allowed are "
        f"{RATIO} times the one array and {EACH * 1e3:g} ms an array. Gradients: those of "
        f"{2 * LAYERS} parameters for each of scikit-learn's 1,797 digits, {layers / 1e6:,.0f} MB, "
        f"by one norm for each example, with memory={MEMORY}; allowed are {RATIO} times.\n\n"
        f"{machine('numpy', 'zarr', 'dask')}; load average {load:.1f} before the run.\n"
    )
    print(text)
    if chosen.write:
        write("groups", text)


if __name__ == "__main__":
    main(sys.argv[1:])
