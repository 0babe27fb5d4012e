"""A small run in a forked process, killed or failing at any file operation, and what it leaves.

The model of a power loss: everything written to a file since its last sync is lost.
"""

import atexit
import builtins
import errno
import io
import json
import os
import shutil
import signal
import tempfile
import threading
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import cycle
from pathlib import Path

import dask
import zarr
from sizes import SMALL, use
from stores import create, some, stored

from daskclip import clip_zarr
from daskclip.errors import DaskClipError
from daskclip.storage import durable

OPERATIONS = ("fsync", "replace", "rename", "remove", "unlink", "rmdir", "mkdir", "truncate")
REMOVING = ("remove", "unlink", "rmdir")
SIZES = SMALL | {"block_nbytes": 128}


@contextmanager
def room():
    """A temporary folder, in memory if possible: only the model of a power loss loses data."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as folder:
        yield Path(folder)


@dataclass
class Hooks:
    """Counts file operations; kills the process or fails at one of them."""

    kill: int | None = None
    """Number of the operation to be killed at."""
    after: bool = False
    """Whether the operation is done first."""
    fail: int | None = None
    """Number of the operation from which on all fail that make or change something."""
    number: int = 0
    """errno of these failures."""
    log: Path | None = None
    """File for the synced length of every written file."""
    count: int = 0
    lengths: dict = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def install(self):
        for name in OPERATIONS:
            setattr(os, name, self.wrapped(getattr(os, name), name))
        durable._call = self.wrapped(durable._call, "call")
        if self.log:
            self.log = self.log.open("w")
        writes = lambda path, mode="r", *a, **k: not {*mode}.isdisjoint("wax+")  # noqa: E731
        io.open = builtins.open = self.wrapped(io.open, "open", writes)
        creates = lambda path, flags, *a, **k: flags & (os.O_WRONLY | os.O_RDWR)  # noqa: E731
        os.open = self.wrapped(os.open, "create", creates)

    def wrapped(self, function, name, counts=lambda *a, **k: True):
        def operation(*args, **kwargs):
            if not counts(*args, **kwargs):
                return function(*args, **kwargs)
            with self.lock:
                self.count += 1
                if self.count == self.kill and not self.after:
                    os.kill(os.getpid(), signal.SIGKILL)
                if self.fail and self.count >= self.fail and name not in REMOVING:
                    raise OSError(self.number, os.strerror(self.number))
                number = self.count
                try:
                    result = function(*args, **kwargs)
                    if self.log:
                        self.lose(name, args, kwargs)
                    return result
                finally:
                    if number == self.kill:
                        os.kill(os.getpid(), signal.SIGKILL)

        return operation

    def lose(self, name, args, kwargs):
        """Track how much of every written file is on disk."""

        def place(path):
            if isinstance(path, int):
                return os.readlink(f"/proc/self/fd/{path}")
            path = os.fsdecode(path)
            if kwargs.get("dir_fd") is not None:
                path = os.path.join(os.readlink(f"/proc/self/fd/{kwargs['dir_fd']}"), path)
            return os.path.abspath(path)

        def moved(path, a, b):
            return b + path[len(a) :] if path == a or path.startswith(f"{a}/") else path

        lengths = self.lengths
        if name in ("open", "create"):
            path, mode = place(args[0]), [*args, kwargs.get("mode")][1]
            adding = name == "open" and "a" in mode
            lengths[path] = lengths.get(path, os.path.getsize(path)) if adding else 0
        elif name == "fsync":
            lengths[place(args[0])] = os.path.getsize(place(args[0]))
        elif name in ("replace", "rename"):
            a, b = map(place, args)
            self.lengths = {moved(p, a, b): n for p, n in lengths.items() if moved(p, b, a) == p}
        elif name == "call" and args[0] == "syncfs":
            self.lengths = {p: os.path.getsize(p) for p in lengths if os.path.exists(p)}
        elif name == "call":
            a, b = map(os.fsdecode, (args[2], args[4]))
            self.lengths = {
                moved(p, a, b) if moved(p, a, b) != p else moved(p, b, a): n
                for p, n in lengths.items()
            }
        self.log.seek(0)
        self.log.truncate()
        json.dump(self.lengths, self.log)
        self.log.flush()


def lose_power(log):
    """Truncate every file to its synced length; returns the number of files."""
    lost = 0
    for path, length in json.loads(log.read_text() or "{}").items():
        if os.path.isfile(path) and os.path.getsize(path) > length:
            os.truncate(path, length)
            lost += 1
    return lost


def in_child(function, hooks=None, defect=None):
    """Result or error of ``function`` in a forked process, and its number of operations."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        child = os.fork()
    if not child:
        os.close(reading)
        try:
            hooks = hooks or Hooks()
            use(**SIZES)
            if defect:
                defect()
            hooks.install()
            try:
                outcome = {"value": function()}
            except DaskClipError as error:
                outcome = {
                    "error": str(error),
                    "code": error.exit_code,
                    "kind": type(error).__name__,
                }
            except BaseException:
                outcome = {"bug": traceback.format_exc()}
            outcome["operations"] = hooks.count
            os.write(writing, json.dumps(outcome).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(answer) if answer else {"killed": os.WIFSIGNALED(status)}


@dataclass(frozen=True)
class Case:
    """A run over a folder."""

    name: str
    axes: object
    clip_norm: float = 1.0
    memory: int = 2**30
    mode: str = "copy"
    global_norm: bool | None = None
    """Of a group; None for an array."""

    def prepare(self, folder):
        """Make the source, and an array to replace."""
        if self.global_norm is not None:
            group = zarr.create_group(folder / "x")
            group.create_array("n", shape=(6,), chunks=(3,), dtype="i4")[:] = range(6)
            shapes = {"a": (12, 4), "in/b": (9,), "in/c": (2, 3)}
            if self.axes is not None:
                shapes = {"a": (8, 4), "in/b": (8, 2), "in/c": (8, 3)}
            for name, shape in shapes.items():
                chunks = (2, 4)[-len(shape) :]
                array = group.create_array(
                    name, shape=shape, chunks=chunks, dtype="f4", compressors=None
                )
                array[...] = some(shape, "f4", len(name))
            return
        values = some((12, 8), "f4")
        values[4:8] *= 1e-6
        values[:, 4:] *= 1e-6  # blocks where nothing is clipped, by rows and by columns
        create(folder / "x", values, (2, 4), compressors=None)
        if self.mode == "overwrite":
            create(folder / "y", some((4, 4), "f4", seed=1), (2, 4))

    def run(self, folder, clip_norm=None, scheduler="synchronous"):
        """Status and norms of the run."""
        options = {} if self.mode == "copy" else {self.mode: True}
        options |= {"global_norm": True} if self.global_norm else {}
        target = None if self.mode == "in_place" else folder / "y"
        with dask.config.set(scheduler=scheduler):
            report = clip_zarr(
                folder / "x",
                target,
                clip_norm or self.clip_norm,
                self.axes,
                memory=self.memory,
                **options,
            )
        return [report.status, report.clipped, report.largest_norm, report.smallest_norm]


CASES = [
    Case("copy in two passes", 0, memory=312),
    Case("copy in one pass", 1),
    Case("overwrite in two passes", None, memory=572, mode="overwrite"),
    Case("in place in one pass", 1, mode="in_place"),
    Case("in place in two passes", 0, memory=312, mode="in_place"),
    Case("a group by its own norms, in place", None, mode="in_place", global_norm=False),
    Case("a group by one norm", None, memory=572, global_norm=True),
    Case("a group by joint norms", 1, global_norm=True),
    Case("a group by joint norms in two passes", 1, memory=700, global_norm=True),
]


@cache
def warm():
    """Load in this process what every child would load again."""
    with room() as folder:
        CASES[0].prepare(folder)
        replace(CASES[0], memory=2**30).run(folder)


@cache
def prepared(case):
    """A folder with the source of a case, to be copied."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    case.prepare(folder)
    return folder


def contents(folder, name):
    """Files of an array, without its record; None if it does not exist."""
    return stored(folder / name) if (folder / name).exists() else None


class Sweep:
    """A case, its undisturbed result, and the violations found when it was disturbed."""

    def __init__(self, case, defect=None):
        self.case, self.defect = case, defect
        self.violations = []
        self.points = self.lost = 0
        warm()
        with self.folder() as folder:
            self.before = {name: contents(folder, name) for name in "xy"}
            self.outcome = in_child(lambda: case.run(folder))
            self.wanted = {name: contents(folder, name) for name in "xy"}
            self.operations = self.outcome["operations"]
        assert "value" in self.outcome, self.outcome

    @contextmanager
    def folder(self):
        with room() as folder:
            shutil.copytree(prepared(self.case), folder, dirs_exist_ok=True)
            yield folder

    def kills(self, numbers, power=False):
        """Kill the run before and after each of these operations."""
        # two at a time: each is a process
        with ThreadPoolExecutor(2) as pool:
            futures = [
                pool.submit(self.kill, number, after, power)
                for number in numbers
                for after in (False, True)
            ]
        for future in futures:
            future.result()

    def fails(self, numbers, codes):
        """For each of these operations, let it and all later ones fail, with the codes in turn."""
        with ThreadPoolExecutor(2) as pool:
            pairs = zip(numbers, cycle(codes), strict=False)
            futures = [pool.submit(self.fail, number, code) for number, code in pairs]
        for future in futures:
            future.result()

    def kill(self, number, after, power):
        """Kill the run at an operation, then repeat it."""
        when = f"{'after' if after else 'before'} {number}"
        with self.folder() as folder, room() as aside:
            log = aside / "log"
            log.touch()
            hooks = Hooks(kill=number, after=after, log=log if power else None)
            killed = in_child(lambda: self.case.run(folder), hooks, self.defect)
            self.points += "killed" in killed  # two threads may make one operation less
            if power:
                self.lost += lose_power(log)
            self.look(folder, when)
            self.again(folder, when)

    def fail(self, number, code):
        """Let all operations from one on fail, then repeat the run without failures."""
        when = f"{errno.errorcode[code]} from {number}"
        with self.folder() as folder:
            hooks = Hooks(fail=number, number=code)
            outcome = in_child(lambda: self.case.run(folder), hooks, self.defect)
            self.points += 1
            if "bug" in outcome or "killed" in outcome or "\n" in outcome.get("error", ""):
                self.violations.append((when, outcome))
            self.look(folder, when)
            self.again(folder, when)

    def look(self, folder, when):
        """Check that each array is either as before or as wanted."""
        for name in "xy":
            if contents(folder, name) not in (self.before[name], self.wanted[name]):
                self.violations.append((when, f"{name} is neither old nor new"))

    def again(self, folder, when):
        """Check that the repeated run gives the same bytes and norms, and leaves no files."""
        outcome = in_child(lambda: self.case.run(folder), defect=self.defect)
        value = outcome.get("value")
        if value is None or value[1:] != self.outcome["value"][1:]:
            self.violations.append((when, outcome))
        elif {name: contents(folder, name) for name in "xy"} != self.wanted:
            self.violations.append((when, "other bytes after the second run"))
        elif {p.name for p in folder.iterdir()} - {"x", "y"}:
            self.violations.append((when, "stray files"))
