"""Calls of `clip_zarr` in a process that dies or waits before a chosen operation on files."""

import builtins
import fcntl
import io
import os
import pickle
import re
import signal
import traceback
import warnings
from dataclasses import dataclass
from functools import wraps
from threading import Lock

from daskclip import clip_zarr
from daskclip.errors import DaskClipError
from daskclip.storage import durable
from daskclip.target import directory as publish

AMPLE = 2**30
# exit code and message, remedy included, of every possible refusal
REFUSALS = {
    "exists": (5, r"target .* exists; remove it or choose another path, or overwrite it"),
    "locked": (5, r"target .* is being written by another run; wait for it or stop it"),
    "other parameters": (5, r"has .* and not .*; finish it, or discard it with: "),
    "source changed": (5, r"changed since the unfinished run to .* began; discard it with: "),
    "staging lost": (5, r"has lost its files; discard it with: "),
    "other version": (5, r"has version \d+ and not \d+; finish it .*, or discard it with: "),
    "memory": (3, r"memory .* holds less than .*; give memory='.*', or discard it with: "),
    "missing": (3, r"chunk \S+ of .* is missing; restore it, or use missing='fill'"),
    "absent": (3, r"target .* does not exist, or is an empty folder; check the path"),
    "not what was written": (4, r"; (clip it again|remove it|verify what daskclip run wrote)$"),
}


@dataclass(frozen=True)
class Call:
    """Arguments of `clip_zarr` in a folder with the source x and the target y."""

    way: str
    clip_norm: float = 0.5
    axes: int | tuple[int, ...] | None = 0
    missing: str = "fill"
    memory: int = AMPLE

    @property
    def place(self):
        return "x" if self.way == "in place" else "y"

    def same(self, other):
        """Whether both calls describe the same run to a journal."""
        return (self.place, self.clip_norm, self.axes, self.missing) == (
            other.place, other.clip_norm, other.axes, other.missing
        )  # fmt: skip

    def start(self, folder):
        in_place = self.way == "in place"
        return clip_zarr(
            folder / "x",
            None if in_place else folder / "y",
            self.clip_norm,
            self.axes,
            memory=self.memory,
            missing=self.missing,
            overwrite=self.way == "overwrite",
            in_place=in_place,
        )


def outcome(function, *args):
    """Status of the report of a call, or the kind of its refusal, which must be exactly one."""
    try:
        return getattr(function(*args), "status", "right")
    except DaskClipError as error:
        code, text = error.exit_code, str(error)
    kinds = [
        kind for kind, like in REFUSALS.items() if like[0] == code and re.search(like[1], text)
    ]
    assert len(kinds) == 1, (code, text)
    assert "\n" not in text
    return kinds[0]


def hook_file_operations(reached):
    """Call ``reached`` before every operation that changes files or makes them durable."""

    def wrap(owner, name, counts):
        original = getattr(owner, name)

        @wraps(original)
        def operation(*args, **kwargs):
            if counts(*args, **kwargs):
                reached()
            return original(*args, **kwargs)

        setattr(owner, name, operation)

    names = ["replace", "rename", "link", "unlink", "mkdir", "rmdir", "truncate", "fsync"]
    for owner, name in [
        *((os, n) for n in names),
        (durable, "sync_filesystem"),
        (durable, "exchange_directories"),
    ]:
        wrap(owner, name, lambda *_, **__: True)
    wrap(os, "open", lambda path, flags, *_, **__: flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    for owner in (io, builtins):
        wrap(owner, "open", lambda file, mode="r", *_, **__: set(mode) & set("wax+"))


class Child:
    """A forked process that makes a call, and dies or waits before one of its operations.

    Operations are counted from ``since`` on: the start, the lock or the publishing.
    """

    def __init__(self, call, folder, since, number, wait=False):
        self._results, results = os.pipe()
        words, self._words = os.pipe()
        with warnings.catch_warnings():
            # zarr's threads are idle, and the child starts its own
            warnings.filterwarnings("ignore", "This process .* is multi-threaded")
            self._pid = os.fork()
        if not self._pid:
            try:
                os.close(self._results)
                os.close(self._words)
                self._count(since, number, (results, words) if wait else None, folder / call.place)
                os.write(results, b"r" + pickle.dumps(_answer(call, folder)))
            finally:
                os._exit(0)
        os.close(results)
        os.close(words)
        self.waits = False
        self.result = None
        self._listen()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self._words)  # one that waits dies
        os.waitpid(self._pid, 0)
        os.close(self._results)

    def go_on(self):
        os.write(self._words, b"g")
        self._listen()

    def die(self):
        os.write(self._words, b"d")
        self._listen()

    def _listen(self):
        """Return once the process waits, has finished or is dead."""
        kind = os.read(self._results, 1)
        self.waits = kind == b"w"
        if kind == b"r":
            with open(self._results, "rb", closefd=False) as results:
                self.result, failure = pickle.load(results)
            assert failure is None, failure

    @staticmethod
    def _count(since, number, pipes, path):
        left, begun, guard = number, since == "start", Lock()
        lock = path.with_name(f".{path.name}.daskclip") / "lock"

        def reached():
            nonlocal left
            with guard:
                left -= begun
                # without the lock, which may be gone already, a second client is not refused
                if left or not begun or (pipes and not lock.exists()):
                    return
                if pipes:
                    os.write(pipes[0], b"w")
                    if os.read(pipes[1], 1) == b"g":
                        return
                os.kill(os.getpid(), signal.SIGKILL)

        def begin(owner, name, after):
            original = getattr(owner, name)

            def beginning(*args):
                nonlocal begun
                begun = begun or not after
                original(*args)
                begun = True

            setattr(owner, name, beginning)

        if since == "lock":
            begin(fcntl, "flock", after=True)
        if since == "publish":
            begin(publish.DirectoryTransaction, "publish", after=False)
        hook_file_operations(reached)


def _answer(call, folder):
    try:
        return outcome(call.start, folder), None
    except BaseException:
        return None, traceback.format_exc()
