"""The first screen of README: `python -m tests.benchmarks.first_screen [--write] [--size 2GiB]`.

daskclip against the expression that is usually written in Dask, from Zarr to Zarr. They take turns,
each in a process of its own, whose memory is read every 50 ms. With `--write` the table of README
and both of its pictures are replaced.
"""

import json
import math
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import zarr

from daskclip import stats_zarr

from . import pictures
from .storage import EVERY, Case, check, make, remove, say
from .tables import ROOT, machine, options, write

USUAL, OURS = "usual", "engine"
LABELS = {USUAL: "x * minimum(1, c / norm(x)) in Dask", OURS: "daskclip"}
WHOLE = Case("whole", codec="Blosc-lz4")
ROWS = replace(WHOLE, name="rows", part=1 / 8)
OTHER_CHUNKS, OTHER_THREADS = (512, 1536), 1
TICK = 0.05  # seconds from one look at a process to the next


def begin(name, source, target, clip_norm, axes, **more):
    """A process in which a contender clips."""
    settings = {"source": str(source), "target": str(target), "clip_norm": clip_norm, "axes": axes}
    one = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.contenders", name, json.dumps(settings | more)],
        cwd=ROOT, env={**os.environ, **one, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def once(name, *args, **more):
    """What a contender took; its trace has seconds and bytes above the imports."""
    spawned, trace = time.perf_counter(), []
    process = begin(name, *args, **more)
    while process.poll() is None:
        trace.append((time.perf_counter(), resident(process.pid)))
        time.sleep(TICK)
    output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{name} failed:\n{errors}")
    result = json.loads(output.splitlines()[-1])
    began, before = result["began"], result["before"]
    span = 0, result["seconds"]
    shown = [(t - began, max(0, rss - before)) for t, rss in trace]
    say(f"{name} {result['seconds']:.2f} s, {result['memory'] / 1e6:.0f} MB")
    return result | {
        "start": began - spawned,
        "trace": [(0.0, 0), *(p for p in shown if span[0] < p[0] <= span[1])],
    }


def resident(pid):
    """Resident bytes of a process, 0 at its end."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(s.split()[1]) * 1024 for s in lines if s.startswith("VmRSS")), 0)


def middle(results, key):
    return statistics.median(r[key] for r in results)


@dataclass
class Contest:
    """Both contenders on the same arrays, below a folder."""

    folder: Path
    size: int
    repeat: int

    def whole(self):
        """Results of both, by name: the norm of all of an array of ``size``."""
        source, target = self.folder / "whole", self.folder / "y"
        shape = WHOLE.shape(self.size)
        make(WHOLE, source, shape)
        found = {USUAL: [], OURS: []}
        for repetition in range(self.repeat):
            for name, results in found.items():
                os.sync()
                results.append(once(name, source, target, WHOLE.clip_norm(shape), None))
                if not repetition:
                    check(source, target, WHOLE.clip_norm(shape), None)
                remove(target)
        return found

    def killed(self, found):
        """Part of the chunks missing after a kill half-way, and seconds of our second call."""
        source, shape = self.folder / "whole", WHOLE.shape(self.size)
        limit = WHOLE.clip_norm(shape)
        for name, results in found.items():
            target = self.folder / f"killed {name}"
            process = begin(name, source, target, limit, None)
            time.sleep(middle(results, "start") + middle(results, "seconds") / 2)
            process.kill()
            process.communicate()
        usual, ours = (self.folder / f"killed {name}" for name in (USUAL, OURS))
        chunks = len(list(source.glob("c/*/*")))
        missing = None
        if (usual / "zarr.json").exists():
            missing = 1 - len(list(usual.glob("c/*/*"))) / chunks
        if ours.exists():
            raise SystemExit("a run that was killed half-way has left a target; use a larger size")
        again = once(OURS, source, ours, limit, None)
        check(source, ours, limit, None)
        return missing, again["seconds"]

    def rows(self):
        """Part of the clipped rows above the limit, and of those that other chunks change."""
        source, other = self.folder / "rows", self.folder / "other"
        shape = replace(ROWS, axes=None).shape(self.size)
        limit = EVERY * math.sqrt(shape[1])
        make(ROWS, source, shape)
        x = zarr.open_array(source)
        zarr.create_array(other, data=x[:], chunks=OTHER_CHUNKS, compressors=x.compressors)
        above, changed = {}, {}
        for name in (USUAL, OURS):
            results = []
            for path, threads in ((source, None), (other, OTHER_THREADS)):
                target = self.folder / "y"
                more = {} if threads is None else {"threads": threads}
                once(name, path, target, limit, 1, **more)
                results.append(zarr.open_array(target)[:])
                remove(target)
            norms = np.concatenate([np.linalg.norm(r.astype(float), axis=1) for r in results])
            above[name] = (norms > limit).mean()
            first, second = (r.view("u4") for r in results)
            changed[name] = (first != second).any(axis=1).mean()
        if above[OURS] or changed[OURS]:
            raise SystemExit(f"above the limit {above}, changed by other chunks {changed}")
        return above[USUAL], changed[USUAL]


def table(nbytes, memory, seconds, above, changed, missing, resumed):
    """Markdown; ``memory`` and ``seconds`` are by contender, the rest are parts and seconds."""
    left = "" if missing is None else f"; what is there opens, with {missing:.0%} of it missing"
    head = "| | `x * minimum(1, c / norm(x))` in Dask | daskclip |\n|---|---|---|"
    rows = {
        f"memory for {nbytes / 1e9:.1f} GB": (
            f"{memory[USUAL] / 1e6:,.0f} MB: every chunk is held",
            f"{memory[OURS] / 1e6:,.0f} MB, whatever the size",
        ),
        "time": (f"{seconds[USUAL]:.1f} s", f"{seconds[OURS]:.1f} s"),
        "norm of the result": (
            f"above `c` in {above:.0%} of the clipped rows, by rounding",
            "never above `c`",
        ),
        "same bits for any chunks and workers": (
            f"no: other chunks change {changed:.1%} of the rows" if changed else "yes, those tried",
            "yes",
        ),
        "killed half-way": (
            f"start again{left}",
            f"the same command resumes: {resumed:.1f} s more",
        ),
    }
    return "\n".join([head, *(f"| {name} | {a} | {b} |" for name, (a, b) in rows.items())])


def context(shape, repeat, load):
    return (
        f"From Zarr to Zarr, float32 of shape {shape[0]} x {shape[1]} in chunks of 4 MiB "
        "(Blosc-lz4), by the norm of all; rows: of an eighth of it, also in chunks of "
        f"{OTHER_CHUNKS[0]} x {OTHER_CHUNKS[1]} on {OTHER_THREADS} thread. Medians of {repeat} "
        "interleaved runs, each a process of its own; memory is above the imports. "
        f"{machine('numpy', 'zarr', 'dask')}; load average {load:.1f}."
    )


def draw(found, nbytes):
    """Memory over time of the median run of each, and norms of the gradients of an example."""
    series = {}
    for name, results in found.items():
        result = sorted(results, key=lambda r: r["seconds"])[len(results) // 2]
        series[LABELS[name]] = [(t, rss / 1e6) for t, rss in result["trace"]]
    across = f"seconds, for {nbytes / 1e9:.1f} GB"
    pictures.curves("memory", across, "MB above the imports", series)
    with tempfile.TemporaryDirectory() as folder:
        runpy.run_path(str(ROOT / "examples" / "03_gradients.py"))["main"](folder)
        stats = stats_zarr(f"{folder}/gradients.zarr", axes=1)
    pictures.histogram(stats, stats.quantiles["p99"])


def main(arguments):
    chosen = options(__doc__, arguments, size="2GiB")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        contest = Contest(Path(folder), chosen.size, chosen.repeat)
        found = contest.whole()
        missing, resumed = contest.killed(found)
        above, changed = contest.rows()
    shape = WHOLE.shape(chosen.size)
    memory, seconds = (
        {name: middle(results, key) for name, results in found.items()}
        for key in ("memory", "seconds")
    )
    nbytes = 4 * math.prod(shape)
    made = table(nbytes, memory, seconds, above, changed, missing, resumed)
    text = f"{made}\n\n{context(shape, chosen.repeat, load)}\n"
    print(text)
    if chosen.write:
        write("first_screen", text)
        draw(found, nbytes)


if __name__ == "__main__":
    main(sys.argv[1:])
