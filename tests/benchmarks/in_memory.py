"""Arrays in memory: `python -m tests.benchmarks.in_memory [--write] [--repeat N]`.

The same clipping by NumPy, TensorFlow, PyTorch and daskclip.
Every repetition starts a process for each contender, which makes the array, clips it once to warm
up and then measures. What cannot be imported is left out and named under the table.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import packages_distributions

import numpy as np

from .tables import machine, options, write

SHAPE = (2**17, 2**10)  # 0.5 GiB of float32
# name, axes, limit: about half of the rows and columns, and the whole array, are above it
CASES = (("all", None, 1000.0), ("rows", 1, 32.0), ("columns", 0, 362.0))
OURS = "daskclip"


def numpy(x):
    def clip(axes, limit):
        norm = np.sqrt(np.square(x).sum(axis=axes, keepdims=True))
        return x * np.minimum(limit / norm, 1)

    return clip


def tensorflow(x):
    import tensorflow

    t = tensorflow.constant(x)
    return lambda axes, limit: tensorflow.clip_by_norm(t, limit, axes).numpy()


def torch(x):
    import torch

    t = torch.from_numpy(x)

    def clip(axes, limit):
        if axes is None:
            return t.reshape(1, -1).renorm(2, 0, limit).numpy()
        return t.renorm(2, 1 - axes, limit).numpy()

    return clip


def daskclip(x):
    from daskclip import clip_by_norm

    return lambda axes, limit: clip_by_norm(x, limit, axes)


CONTENDERS = {
    "NumPy": (numpy, "numpy"),
    "TensorFlow": (tensorflow, "tensorflow"),
    "PyTorch": (torch, "torch"),
    OURS: (daskclip, "dask"),
}


def child(name):
    """Seconds of each case, as JSON."""
    clip = CONTENDERS[name][0](np.random.default_rng(0).standard_normal(SHAPE, np.float32))
    seconds = {}
    for case, axes, limit in CASES:
        clip(axes, limit)
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            clip(axes, limit)
            taken.append(time.perf_counter() - start)
        seconds[case] = statistics.median(taken)
    print(json.dumps(seconds))


def measure(names, repeat):
    """Seconds of every repetition, by (contender, case)."""
    seconds = {}
    for _ in range(repeat):
        for name in names:
            command = [sys.executable, "-m", "tests.benchmarks.in_memory", "--child", name]
            quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
            out = subprocess.run(command, check=True, capture_output=True, text=True, env=quiet)
            for case, taken in json.loads(out.stdout.splitlines()[-1]).items():
                seconds.setdefault((name, case), []).append(taken)
    return seconds


def table(seconds, names):
    nbytes = 4 * SHAPE[0] * SHAPE[1]
    lines = [f"| | {' | '.join(case for case, *_ in CASES)} |", "|---|" + "---:|" * len(CASES)]
    for name in names:
        rates = (f"{nbytes / statistics.median(seconds[name, c]) / 1e9:.1f}" for c, *_ in CASES)
        lines.append(f"| {name} | {' | '.join(rates)} |")
    for peer in names:
        if peer != OURS:
            ratios = (
                statistics.median(
                    a / b for a, b in zip(seconds[peer, c], seconds[OURS, c], strict=True)
                )
                for c, *_ in CASES
            )
            lines.append(f"| {OURS} / {peer} | {' | '.join(f'{r:.1f}' for r in ratios)} |")
    return "\n".join(lines)


def main(arguments):
    if arguments[:1] == ["--child"]:
        child(arguments[1])
        return
    chosen = options(__doc__, arguments)
    load = os.getloadavg()[0]
    found = {name: importlib.util.find_spec(module) for name, (_, module) in CONTENDERS.items()}
    names = [name for name in CONTENDERS if found[name]]
    missing = [name for name in CONTENDERS if not found[name]]
    seconds = measure(names, chosen.repeat)
    owners = packages_distributions()  # the package of TensorFlow has several names
    packages = [owners[CONTENDERS[name][1]][0] for name in names]
    left_out = f" Not installed here: {', '.join(missing)}." if missing else ""
    text = (
        f"{table(seconds, names)}\n\n"
        f"GB/s of input, float32 of shape {SHAPE} in memory, a new array as result; medians of "
        f"{chosen.repeat} interleaved processes; ratios are those of neighbours. NumPy is "
        "`x * minimum(c / sqrt(square(x).sum(axes)), 1)`, TensorFlow `clip_by_norm`, PyTorch "
        f"`renorm`; only daskclip is exact.{left_out}\n\n"
        f"{machine(*packages)}; load average {load:.1f} before "
        "the run.\n"
    )
    print(text)
    if chosen.write:
        write("in_memory", text)


if __name__ == "__main__":
    main(sys.argv[1:])
