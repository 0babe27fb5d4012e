"""Rate of the exact sum of squares: `python -m tests.benchmarks.exact_sum [--write]`.

One core, arrays in memory. Every repetition runs all cases, one after the other, so that a slow
spell of the machine hits them alike. `--write` replaces the table in README.md beside this.
"""

import os
import statistics
import sys
import time

import ml_dtypes
import numpy as np

from daskclip.numerics import finalize, partial_norm

from .tables import machine, write

NBYTES = 2**26
REPEAT = 7
# name, dtype and spread of the values; log-normal ones span 40 powers of two, softmax 200
DATA = [
    *((name, name, "normal") for name in ("float32", "float64", "float16", "bfloat16")),
    *(
        (f"{name}, {kind}", name, kind)
        for name in ("float32", "float64")
        for kind in ("log-normal", "softmax")
    ),
]
# name, shape of the array from its number of elements, axes
CASES = [
    ("whole array", lambda n: (n,), (0,)),
    *((f"rows of {k}", lambda n, k=k: (n // k, k), (1,)) for k in (64, 512, 4096)),
    *((f"{k} columns", lambda n, k=k: (n // k, k), (0,)) for k in (2, 64, 1024)),
]


def exact(x, axes, out):
    return finalize(partial_norm(x, axes), 1.0, x.dtype)


def plain(x, axes, out):
    return np.sqrt(np.square(x, dtype=np.float64).sum(axis=axes, keepdims=True))


def copy(x, axes, out):
    np.copyto(out, x)


FUNCTIONS = (exact, plain, copy)


def values(dtype, kind, n):
    """Normal values, or what is made of them."""
    x = np.random.default_rng(0).standard_normal(n)
    if kind == "log-normal":
        x = np.exp(4 * x)
    if kind == "softmax":
        x = np.exp(20 * x.reshape(-1, 1024))
        x = (x / x.sum(axis=1, keepdims=True)).ravel()
    return x.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))


def measure(nbytes=NBYTES, repeat=REPEAT):
    """Seconds of every repetition, by (data, case, function)."""
    arrays = {}
    for label, dtype, kind in DATA:
        x = values(dtype, kind, nbytes // np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize)
        arrays[label] = x, np.empty_like(x)
    seconds = {}
    for _ in range(repeat):
        for label, (flat, spare) in arrays.items():
            for name, shape, axes in CASES:
                x, out = (a.reshape(shape(a.size)) for a in (flat, spare))
                for function in FUNCTIONS:
                    start = time.perf_counter()
                    function(x, axes, out)
                    taken = time.perf_counter() - start
                    seconds.setdefault((label, name, function), []).append(taken)
    return seconds


def table(seconds, nbytes):
    """Markdown of the rates; best of the repetitions, then their median."""
    lines = [
        "| values | slices | exact | NumPy float64 | copy | exact / NumPy |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for label, *_ in DATA:
        for name, _, _ in CASES:
            taken = [seconds[label, name, f] for f in FUNCTIONS]
            rates = [rate(min(t), statistics.median(t), nbytes) for t in taken]
            ratio = statistics.median(b / a for a, b in zip(taken[0], taken[1], strict=True))
            lines.append(f"| {label} | {name} | {' | '.join(rates)} | {ratio:.2f} |")
    return "\n".join(lines)


def rate(best, median, nbytes):
    return f"{nbytes / best / 1e9:.2f} ({nbytes / median / 1e9:.2f})"


def context(nbytes, repeat, load):
    return (
        f"GB/s of input on one core, best of {repeat} interleaved repetitions (median in "
        "brackets); standard normal values where nothing else is said, "
        f"{nbytes / 2**20:.0f} MiB in memory. Exact is "
        "`partial_norm` and `finalize`; NumPy is `sqrt(square(x, dtype=float64).sum(axes))`, "
        "neither exact nor safe from overflow; copy is `copyto`. The machine is shared and noisy: "
        "ratios count. The last column is the median ratio of runs next to each other.\n\n"
        f"{machine('numpy')}; load average {load:.1f} before the run."
    )


def main(arguments):
    if os.environ.get("OMP_NUM_THREADS") != "1":  # must be there before NumPy starts
        one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.benchmarks.exact_sum", *arguments]
        os.execve(sys.executable, command, {**os.environ, **one})
    load = os.getloadavg()[0]
    text = f"{table(measure(), NBYTES)}\n\n{context(NBYTES, REPEAT, load)}\n"
    print(text)
    if "--write" in arguments:
        write("exact_sum", text)


if __name__ == "__main__":
    main(sys.argv[1:])
