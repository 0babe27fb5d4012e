"""From storage to storage: `python -m tests.benchmarks.storage [--write] [--size 2GiB] ...`.

Every way to clip an array against a loop written by hand. A case makes its array, lets the
contenders take turns, each in a process of its own, and removes it again.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import BloscCodec

from .contenders import LABELS, THREADS
from .tables import machine, options, write

HAND = ("by_hand", "direct", "zarrs")
PEERS = ("two_steps", "cloned", "product", "cubed", "lazy")
ONE = ("by_hand", "engine")
BATCHES = ("by_hand", "zarrs", "engine")
ALL = (*HAND, "engine", *PEERS)
CODECS = {"none": None, "Blosc-lz4": BloscCodec(cname="lz4"), "zstd": "auto"}
CHUNK, SMALL, SHARD = (1024, 1024), (128, 128), (2048, 2048)  # 4 MiB, 64 KiB, 16 MiB
EVERY, NOTHING = 0.3, 1e9  # limits, as a part of the norm


@dataclass(frozen=True)
class Case:
    """An array, and how it is to be clipped."""

    name: str
    chunks: tuple[int, int] = CHUNK
    shards: tuple[int, int] | None = None
    codec: str = "zstd"
    part: float = 1  # of the size asked for
    axes: int | None = None
    above: float = EVERY
    large: float = 1  # part of the rows that are a thousand times as large
    stored: float = 1  # part of the chunks
    in_place: bool = False
    contenders: tuple[str, ...] = ("by_hand", "direct", "engine")

    def shape(self, size):
        """A square, or one chunk wide where rows are clipped; more where little is stored."""
        unit = self.shards or self.chunks
        units = max(1, round(size * self.part / 4 / math.prod(unit)))
        if self.stored < 1:
            return units * unit[0], round(1 / self.stored) * unit[1]
        wide = 1 if self.axes else max(1, math.isqrt(units))
        return units // wide * unit[0], wide * unit[1]

    def clip_norm(self, shape):
        n = shape[1] if self.axes else math.prod(shape)
        return self.above * math.sqrt(n * (self.stored if n > self.stored else 1))


CASES = [
    Case("4 MiB chunks", codec="none", contenders=("by_hand", "direct", "engine", "two_steps")),
    Case("4 MiB chunks", codec="Blosc-lz4", contenders=ALL),
    Case("4 MiB chunks", contenders=("by_hand", "direct", "engine", "two_steps", "cubed", "lazy")),
    Case("64 KiB chunks", SMALL, codec="Blosc-lz4", part=1 / 8, contenders=(*BATCHES, "two_steps")),
    Case("64 KiB chunks", SMALL, part=1 / 8, contenders=(*BATCHES, "two_steps")),
    Case("16 MiB shards of 64 KiB", SMALL, SHARD, part=1 / 2, contenders=BATCHES),
    Case("one pass", axes=1, part=1 / 2),
    Case("nothing to clip", above=NOTHING, part=1 / 2),
    Case("nothing to clip, in place", above=NOTHING, in_place=True, contenders=ONE),
    Case("rows, nothing to clip", axes=1, above=NOTHING, part=1 / 2, contenders=ONE),
    Case("rows, 10 % of the blocks clipped", axes=1, above=10, large=0.1, part=1 / 2,
         contenders=ONE),
    Case("1 % of the chunks present", part=1 / 4, stored=0.01, contenders=ONE),
]  # fmt: skip


def make(case, path, shape, filled=1):
    """Normal values of two digits in part of the columns of the chunks that are to be there."""
    array = zarr.create_array(
        path, shape=shape, chunks=case.chunks, shards=case.shards, dtype="float32",
        compressors=CODECS[case.codec],
    )  # fmt: skip
    random = np.random.default_rng(0)
    tall, wide = case.shards or case.chunks
    for row in range(0, shape[0], tall):
        columns = range(0, shape[1], wide)
        if case.stored < 1:
            columns = [columns[row // tall * 37 % len(columns)]]
        for column in columns:
            values = random.standard_normal((tall, wide), "float32").round(2)
            values[:, int(filled * wide) :] = 0
            if case.large < 1 and row < case.large * shape[0]:
                values *= 1000
            array[row : row + tall, column : column + wide] = values


def check(source, target, clip_norm, axes):
    """Refuse what is not the clipped array; looks at what is stored."""
    array = zarr.open_array(target, mode="r")
    unit = array.shards or array.chunks
    keys, there = ({p.relative_to(f) for p in f.glob("c/*/*")} for f in (source, target))
    squares = 0.0
    for key in there:
        at = (int(i) * u for i, u in zip(key.parts[1:], unit, strict=True))
        x = array[tuple(slice(i, i + u) for i, u in zip(at, unit, strict=True))]
        rows = np.vecdot(x, x, dtype=float)
        squares = max(squares, rows.max()) if axes else squares + rows.sum()
    if keys != there or not 0 < math.sqrt(squares) <= clip_norm * (1 + 1e-5):
        raise SystemExit(f"{target} has norm {math.sqrt(squares)}, and {len(there)} chunks")


@dataclass
class Runs:
    """Starts the contenders and remembers what they took."""

    folder: Path
    pythons: dict
    repeat: int
    memory: str
    versions: dict = field(default_factory=dict)
    startup: dict = field(default_factory=dict)
    absent: set = field(default_factory=set)

    def once(self, name, source, clip_norm, case):
        target = None if case.in_place else self.folder / "y"
        settings = {"source": str(source), "clip_norm": clip_norm, "axes": case.axes}
        settings["target"] = str(target) if target else None
        if name == "engine":
            settings["memory"] = self.memory
        root = str(Path(__file__).parents[2])
        one = {f"{lib}_NUM_THREADS": "1" for lib in ("OMP", "OPENBLAS", "MKL")}
        done = subprocess.run(
            [self.pythons.get(name, sys.executable), "-m", "tests.benchmarks.contenders", name,
             json.dumps(settings)],
            cwd=root, env={**os.environ, **one, "PYTHONPATH": root}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr}")
        result = json.loads(done.stdout.splitlines()[-1])
        self.versions |= result.pop("versions")
        return result, target

    def installed(self, name):
        """Whether what a contender needs is there."""
        if name not in ("zarrs", "cubed"):
            return True
        command = [self.pythons.get(name, sys.executable), "-c", f"import {name}"]
        there = subprocess.run(command, capture_output=True).returncode == 0
        if not there:
            self.absent.add(name)
        return there

    def start(self, name, case):
        """Seconds of an array of one chunk, clipped in the same way."""
        key = name, case.axes, case.above, case.in_place
        if len(self.startup.setdefault(key, [])) < self.repeat:
            source = self.folder / "one"
            result, target = self.once(name, source, case.above, case)
            self.startup[key].append(result["seconds"])
            remove(target)
        return statistics.median(self.startup[key])

    def case(self, case, size, contenders):
        """Seconds, CPU seconds and memory by contender, a list each."""
        shape = case.shape(size)
        clip_norm = case.clip_norm(shape)
        source = self.folder / "x"
        make(case, source, shape)
        contenders = [name for name in contenders if self.installed(name)]
        found = {name: [] for name in contenders}
        for repetition in range(self.repeat):
            for name in contenders:
                self.start(name, case)
                os.sync()
                result, target = self.once(name, source, clip_norm, case)
                if target and not repetition:
                    check(source, target, clip_norm, case.axes)
                remove(target)
                found[name].append(result)
                say(f"{case.name} {case.codec} {repetition} {name} {result['seconds']:.2f} s")
        remove(source)
        for name, results in found.items():
            first = self.start(name, case)
            for result in results:
                result["seconds"] -= first
        return found


def say(text):
    print(text, file=sys.stderr, flush=True)


def remove(path):
    if path:
        for left in path.parent.glob(f"{path.name}*"):
            shutil.rmtree(left)
    if path and (cubed := path.with_name("cubed")).exists():
        shutil.rmtree(cubed)


def ratio(found, name, other):
    """Median of runs next to each other, as text."""
    if other not in found or name == other:
        return ""
    pairs = zip(found[name], found[other], strict=True)
    return f"{statistics.median(a['seconds'] / b['seconds'] for a, b in pairs):.2f}"


def rows(case, found):
    """Lines of the table; the best of what is written by hand is what the rest is divided by."""
    middle = {
        name: {key: statistics.median(r[key] for r in results) for key in results[0]}
        for name, results in found.items()
    }
    hand = [name for name in HAND if name in found]
    best = min(hand, key=lambda name: middle[name]["seconds"]) if hand else None
    for name, m in middle.items():
        ratios = " | ".join(ratio(found, name, other) for other in (best, "engine", "two_steps"))
        what = f"{case.name}, {case.codec}" if case.codec != "none" else case.name
        numbers = f"{m['seconds']:.2f} | {m['cpu']:.2f} | {m['memory'] / 1e6:.0f}"
        yield f"| {what} | {LABELS[name]} | {numbers} | {ratios} |"


HEAD = """\
| array | clipped by | s | CPU s | MB | / best by hand | / engine | / Dask, two steps |
|---|---|---:|---:|---:|---:|---:|---:|"""


def context(chosen, runs, load):
    sizes = "; ".join(
        f"{c.name}: {' x '.join(map(str, c.shape(chosen.size)))}"
        for c in {c.name: c for c in chosen.cases}.values()
    )
    versions = ", ".join(f"{name} {v}" for name, v in sorted(runs.versions.items()))
    left = f" Not installed and left out: {', '.join(sorted(runs.absent))}." if runs.absent else ""
    return (
        f"Medians of {chosen.repeat} interleaved runs of float32, normal values of two digits, by "
        "the norm of all or, where rows are clipped, of rows of 1024 that lie inside a chunk. "
        f"Shapes: {sizes}. Each run is a process with {THREADS} threads that ends when the file "
        "system is synced; the time for an array of one chunk is taken off; memory is the peak "
        "above the imports. The ratios are medians of runs next to each other. The loop by hand "
        "is without zarr, without checks and not safe; it stands for one reading pass and a copy "
        f"where nothing is clipped. The engine has memory={chosen.memory}.{left}\n\n"
        f"{machine('zarr', 'dask')}; {versions}; load average {load:.1f} before the run."
    )


def main(arguments):
    chosen = options(__doc__, arguments, size="2GiB", memory="512MiB")
    names = [n for n in chosen.only if n in LABELS] or ALL
    texts = [n for n in chosen.only if n not in LABELS] or [""]
    chosen.cases = [c for c in CASES if any(t in f"{c.name}, {c.codec}" for t in texts)]
    load = os.getloadavg()[0]
    lines = [HEAD]
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        runs = Runs(Path(folder), chosen.python, chosen.repeat, chosen.memory)
        make(Case("one", CHUNK), runs.folder / "one", CHUNK)
        for case in chosen.cases:
            found = runs.case(case, chosen.size, [n for n in case.contenders if n in names])
            made = list(rows(case, found))
            say("\n".join(made))
            lines += made
    text = "\n".join(lines) + f"\n\n{context(chosen, runs, load)}\n"
    print(text)
    if chosen.write:
        write("storage", text)


if __name__ == "__main__":
    main(sys.argv[1:])
