"""Runs, kills, damage and second clients in any order: a result that is right, or none."""

import builtins
import fcntl
import io
import os
import pickle
import re
import shutil
import signal
import tempfile
import traceback
import warnings
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cache, wraps
from pathlib import Path
from threading import Lock

import dask
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from reference import bits
from stores import FORMATS, create, read, some

from daskclip import clip_by_norm, clip_zarr, plan_zarr, verify_zarr
from daskclip.engine import request as prepare
from daskclip.engine.run_record import discard, status
from daskclip.errors import DaskClipError, MemoryBudgetError
from daskclip.plan import array as plan
from daskclip.storage import files
from daskclip.target import directory as publish
from daskclip.target import journal

SHAPE, CHUNKS = (12, 8), (2, 4)
# plans of several slabs, windows and passes for an array of 384 bytes
SIZES = {"BLOCK": 64, "FIXED": 0, "SCRATCH": 0, "SLICE": 0, "WINDOW": 2}
AMPLE = 2**30
# exit code and text, remedy included, of every refusal that there may be
REFUSALS = {
    "exists": (5, r"target .* exists; remove it or choose another path, or overwrite it"),
    "locked": (5, r"target .* is being written by another run; wait for it or stop it"),
    "other parameters": (5, r"has .* and not .*; finish it, or discard it with: "),
    "source changed": (5, r"changed since the unfinished run to .* began; discard it with: "),
    "staging lost": (5, r"has lost its files; discard it with: "),
    "other version": (5, r"has version \d+ and not \d+; finish it .*, or discard it with: "),
    "memory": (3, r"memory .* holds less than .*; give memory='.*', or discard it with: "),
    "missing": (3, r"chunk \S+ of .* is missing; restore it, or use missing='fill'"),
    "absent": (3, r"target .* does not exist; check the path"),
    "not what was written": (4, r"; (clip it again|remove it)$"),
}
OF_A_JOURNAL = {"other parameters", "source changed", "staging lost"}


@dataclass(frozen=True)
class Call:
    """What is asked of `clip_zarr`, in a folder with the source x and the target y."""

    way: str
    clip_norm: float = 0.5
    axes: int | tuple[int, ...] | None = 0
    missing: str = "fill"
    memory: int = AMPLE

    @property
    def place(self):
        return "x" if self.way == "in place" else "y"

    def same(self, other):
        """Whether a journal cannot tell them apart."""
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
    """What a call comes to: the status of its report, or the one kind of refusal that it is."""
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


def counted(reached):
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
    for owner, name in [*((os, n) for n in names), (files, "sync"), (files, "exchange")]:
        wrap(owner, name, lambda *_, **__: True)
    wrap(os, "open", lambda path, flags, *_, **__: flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    for owner in (io, builtins):
        wrap(owner, "open", lambda file, mode="r", *_, **__: set(mode) & set("wax+"))


class Child:
    """A process that makes a call, and dies or waits before an operation of it.

    Operations are counted from ``since`` on: the start, the lock or the publishing.
    """

    def __init__(self, call, folder, since, number, wait=False):
        self._results, results = os.pipe()
        words, self._words = os.pipe()
        with warnings.catch_warnings():
            # of zarr's threads, which wait; the child starts its own
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
        """Return once it waits, is done or is dead."""
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
                # the lock may be gone already, and with it what a second client would respect
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
        counted(reached)


def _answer(call, folder):
    try:
        return outcome(call.start, folder), None
    except BaseException:
        return None, traceback.format_exc()


def chunks(folder):
    """All stored chunks of an array, in a fixed order."""
    known = (".daskclip", "zarr.json", ".zarray", ".zattrs")
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in known)


def looks(folder):
    """What a copy of the chunks has in common with them."""
    status = {str(p.relative_to(folder)): p.stat() for p in chunks(folder)}
    return {key: (s.st_size, s.st_mtime_ns) for key, s in status.items()}


def tree(folder):
    """Bytes of every file below a folder, hidden ones too; None if there is no folder."""
    if not folder.exists():
        return None
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def first_line(path):
    """The line about the run, of a journal or a record."""
    return path.read_bytes().split(b"\n")[0] if path.exists() else None


@cache
def tight(layout, axes):
    """The smallest budget that there is a plan for."""
    with tempfile.TemporaryDirectory() as name:
        source = create(Path(name, "x"), some(SHAPE, "f4"), CHUNKS, **FORMATS[layout])
        array = zarr.open_array(source, mode="r")

        def fits(memory):
            try:
                return bool(plan_zarr(array, f"{name}/y", 1.0, axes, memory=memory))
            except MemoryBudgetError:
                return False

        return 1 + bisect_left(range(1, 2**14), True, key=fits)


@dataclass
class Made:
    """An array that is complete, and the call that made it; None if another program did."""

    call: Call | None
    state: int
    """Of the source that it was made from."""
    values: np.ndarray
    tree: dict
    looks: dict


@dataclass
class Unfinished:
    """A run that was killed."""

    call: Call
    state: int
    """Of the source when it began."""
    needs: int
    """Bytes of memory."""
    line: bytes
    """The first of its journal."""
    readable: bool = True
    """Whether that line is as it was written."""
    staged: bool = True
    """Whether what it wrote is there."""


calls = st.builds(
    Call,
    way=st.sampled_from(("overwrite", "in place", "copy", "overwrite")),
    clip_norm=st.sampled_from((0.5, 2.0, 0.1, 1e9)),
    axes=st.sampled_from((None, 0, 1, ())),
    missing=st.sampled_from(("fill", "fill", "fill", "error")),
    # 0 stands for the smallest budget
    memory=st.sampled_from((0, 0, 0, AMPLE)),
)
places = st.sampled_from("xy")
numbers = st.integers(0, 2**16)
# a run has 27 to 153 operations, and 8 to 29 more from its publishing on
early = st.sampled_from((*range(12, 60), *range(1, 12), *range(60, 150, 3)))
late = st.sampled_from((*range(1, 9), *range(9, 29, 3)))
# what is damaged, where, and whether it may be the line about the run
damages = st.tuples(
    st.sampled_from((None, "staging", "source", "sums", "sums", "flip", "cut")),
    numbers,
    st.sampled_from((False, False, True)),
)


def unfinished():
    """Rules about an unfinished run."""
    return precondition(lambda self: any(self.unfinished.values()))


def remove_or_cut(path, at):
    data = path.read_bytes()
    if at % 2:
        path.unlink()
    else:
        path.write_bytes(data[: at % len(data)])


class Machine(RuleBasedStateMachine):
    """A folder with a source and a target, and what must be in it."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp()).resolve()
        self.patch = pytest.MonkeyPatch()
        for name, size in SIZES.items():
            self.patch.setattr(plan, name, size)
        self.patch.setattr(prepare, "STATE", {2: 1, 4: 1, 8: 1})
        # one operation after the other, so that a number always means the same one
        self.configured = [
            dask.config.set(scheduler="synchronous"),
            zarr.config.set({"async.concurrency": 1, "threading.max_workers": 1}),
        ]
        self.made = {"x": None, "y": None}
        self.unfinished = {"x": None, "y": None}
        self.tree = {"x": None, "y": None}
        self.state = 0
        self.used = False

    def teardown(self):
        for configured in reversed(self.configured):
            configured.__exit__(None, None, None)
        self.patch.undo()
        shutil.rmtree(self.folder)

    @initialize(layout=st.sampled_from(list(FORMATS)), there=st.booleans())
    def begin(self, layout, there):
        self.layout, self.values = layout, some(SHAPE, "f4")
        self.store("x", self.values)
        if there:
            other = some(SHAPE, "f4", seed=1)
            self.store("y", other)
            self.made["y"] = Made(None, 0, other, self.tree["y"], looks(self.folder / "y"))

    def store(self, place, values):
        create(self.folder / place, values, CHUNKS, **FORMATS[self.layout])
        self.tree[place] = tree(self.folder / place)

    def work(self, place):
        return self.folder / f".{place}.daskclip"

    def journal(self, place):
        return self.work(place) / "journal"

    def prepared(self, call):
        return replace(call, memory=call.memory or tight(self.layout, call.axes))

    def some_place(self, number, test):
        found = [p for p in "xy" if test(p)]
        return found[number % len(found)]

    # what must come of a call, in the order of its checks

    def expected(self, call):
        self.used = True
        made, run = self.made[call.place], self.unfinished[call.place]
        if self.is_done(call, made):
            return {"up to date"}
        if call.way == "copy" and made:
            return {"exists"}
        if run and not run.readable:
            # which run it was is lost: it may be refused, or done from the start
            return {self.end(call), *OF_A_JOURNAL, "memory"}
        if run and not call.same(run.call):
            return {"other parameters"}
        if run and run.state != self.state:
            return {"source changed"}
        if run and not run.staged:
            return {"staging lost"}
        if run and run.needs > call.memory:
            return {"memory"}
        return {self.end(call)}

    def is_done(self, call, made):
        return (
            made is not None
            and made.call is not None
            and made.call.same(call)
            and (call.way == "in place" or made.state == self.state)
            and made.looks == looks(self.folder / call.place)
        )

    def end(self, call):
        """What a run ends with that is begun."""
        if call.missing == "error" and self.lacks_chunks():
            return "missing"
        return "clipped" if call.place == "y" or self.is_clipped(call) else "nothing to clip"

    def lacks_chunks(self):
        units = FORMATS[self.layout].get("shards", CHUNKS)
        cells = [-(-n // u) for n, u in zip(SHAPE, units, strict=True)]
        return len(chunks(self.folder / "x")) < np.prod(cells)

    def is_clipped(self, call):
        return bits(clip_by_norm(self.values, call.clip_norm, call.axes)) != bits(self.values)

    # what has come of it

    def ended(self, call, wanted, found):
        """A call has returned."""
        assert found in wanted
        place = call.place
        foreign = self.made[place] and not self.made[place].call
        if found == "clipped":
            self.published(call)
        if found in ("clipped", "nothing to clip", "missing"):
            self.unfinished[place] = None
        # what is refused at the first look leaves alone what a kill may have left
        if not (found == "exists" and foreign):
            assert self.work(place).exists() == bool(self.unfinished[place])
        if run := self.unfinished[place]:
            assert first_line(self.journal(place)) == run.line

    def published(self, call):
        path = self.folder / call.place
        values = clip_by_norm(self.values, call.clip_norm, call.axes)
        assert bits(read(path)) == bits(values)
        verify_zarr(path)
        if call.place == "x":
            self.values, self.state = values, self.state + 1
        self.tree[call.place] = tree(path)
        self.made[call.place] = Made(call, self.state, values, tree(path), looks(path))
        self.unfinished[call.place] = None

    def killed(self, call, wanted, record):
        """A call was killed; ``record`` was that of the target before."""
        place = call.place
        before, line = self.unfinished[place], first_line(self.journal(place))
        after = first_line(self.folder / place / ".daskclip")
        if after != record:
            assert "clipped" in wanted
            self.published(call)
        elif before and before.readable and line == before.line:
            pass
        elif line is None or line == after:
            assert not (before and before.readable) or wanted & {"nothing to clip", "missing"}
            self.unfinished[place] = None
        elif not before or line != before.line:
            assert not (before and before.readable)
            assert wanted & {"clipped", "nothing to clip", "missing"}
            absent = self.folder / "absent"
            planned = plan_zarr(self.folder / "x", absent, 1.0, call.axes, memory=call.memory)
            needs = planned.projected_memory
            self.unfinished[place] = Unfinished(call, self.state, needs, line)

    def make(self, call):
        wanted = self.expected(call)
        found = outcome(call.start, self.folder)
        self.ended(call, wanted, found)
        return found

    def ended_or_killed(self, call, wanted, record, result):
        if result is None:
            self.killed(call, wanted, record)
        else:
            self.ended(call, wanted, result)

    # rules: calls

    # Hypothesis leaves most rules out of most examples, so that several do what matters most

    @rule(call=calls, again=st.sampled_from((True, True, False)), damage=damages)
    def run(self, call, again, damage):
        if again and self.unfinished[call.place]:
            self.damage(call.place, *damage)
            self.run_again(call.place, call.memory)
        else:
            self.make(self.prepared(call))

    @rule(call=calls, number=early, again=st.sampled_from((True, True, False)), damage=damages)
    def kill(self, call, number, again, damage):
        self.run_and_kill(call, "start", number)
        if again and self.unfinished[call.place]:
            self.arrays_are_whole()
            self.damage(call.place, *damage)
            self.run_again(call.place, call.memory)

    @rule(call=calls, number=late)
    def kill_while_publishing(self, call, number):
        self.run_and_kill(call, "publish", number)

    def run_and_kill(self, call, since, number):
        if run := self.unfinished[call.place]:
            call = run.call
        if call.way == "copy" and self.made["y"]:
            call = replace(call, way="overwrite")
        call = self.prepared(call)
        wanted = self.expected(call)
        record = first_line(self.folder / call.place / ".daskclip")
        with Child(call, self.folder, since, number) as child:
            self.ended_or_killed(call, wanted, record, child.result)

    @unfinished()
    @rule(number=numbers, memory=st.sampled_from((0, AMPLE)))
    def resume(self, number, memory):
        self.run_again(self.some_place(number, self.unfinished.get), memory)

    def run_again(self, place, memory):
        call = self.prepared(replace(self.unfinished[place].call, memory=memory))
        if self.make(call) in OF_A_JOURNAL:
            # the remedy that is named
            self.discard(place)
            assert self.make(call) in ("clipped", "nothing to clip", "missing")

    @unfinished()
    @rule(number=numbers, clip_norm=st.sampled_from((3.0, None)), axes=st.sampled_from((None, 0)))
    def run_with_other_parameters(self, number, clip_norm, axes):
        call = self.unfinished[self.some_place(number, self.unfinished.get)].call
        if clip_norm is None:
            other = replace(call, axes=axes, memory=AMPLE)
        else:
            other = replace(call, clip_norm=clip_norm)
        self.make(other)

    @rule(call=calls, other=calls, number=early, goes_on=st.booleans())
    def run_while_another_one_is_running(self, call, other, number, goes_on):
        call, other = self.prepared(call), self.prepared(other)
        if other.place != call.place:
            other = replace(other, way=call.way)
        wanted = self.expected(call)
        path = self.folder / call.place
        record = first_line(path / ".daskclip")
        foreign = self.made[call.place] and not self.made[call.place].call
        with Child(call, self.folder, "lock", number, wait=True) as child:
            if child.waits:
                before = tree(self.folder)
                refusals = {"locked", "exists"} if foreign and other.way == "copy" else {"locked"}
                assert outcome(other.start, self.folder) in refusals
                assert outcome(discard, path) == "locked"
                if "journal" in (rows := status(path)):
                    assert rows["journal"].endswith(" windows done, running")
                assert tree(self.folder) == before
                if goes_on:
                    child.go_on()
                else:
                    child.die()
            self.ended_or_killed(call, wanted, record, child.result)

    @precondition(lambda self: self.used)
    @rule(place=places)
    def discard(self, place):
        there = self.work(place).exists()
        assert discard(self.folder / place) == there
        self.unfinished[place] = None
        assert not self.work(place).exists()

    @rule(place=places, how=st.sampled_from(("status", "verify", "verify again")))
    def look(self, place, how):
        if how == "status":
            self.status(place)
        else:
            self.verify(place, how == "verify again")

    def status(self, place):
        path, run = self.folder / place, self.unfinished[place]
        before = tree(self.folder)
        rows = status(path)
        assert rows["target"] == f"{path} {'exists' if path.exists() else 'does not exist'}"
        made = self.made[place]
        assert ("made by" in rows) == bool(made and made.call)
        if run and run.readable:
            assert "unfinished" in rows
            assert rows["clip_norm"] == str(run.call.clip_norm)
        if run:
            assert re.fullmatch(r"\d+ windows done, not running", rows["journal"])
        assert tree(self.folder) == before

    def verify(self, place, again):
        path, made = self.folder / place, self.made[place]
        if not path.exists():
            wanted = {"absent"}
        elif not made or not made.call or tree(path) != made.tree:
            wanted = {"not what was written"}
        elif place == "y" and again:
            values = clip_by_norm(self.values, made.call.clip_norm, made.call.axes)
            wanted = {"right" if bits(values) == bits(made.values) else "not what was written"}
            if made.call.missing == "error" and self.lacks_chunks():
                wanted |= {"missing"}
        else:
            wanted = {"right"}
        source = self.folder / "x" if place == "y" and again else None
        assert outcome(verify_zarr, path, source) in wanted

    # rules: what others do

    @precondition(lambda self: self.used)
    @rule(number=numbers, delete=st.sampled_from((False, False, True)))
    def change_the_source(self, number, delete):
        stored = chunks(self.folder / "x")
        if delete and stored:
            stored[number % len(stored)].unlink()
            self.values = read(self.folder / "x")
        else:
            self.rewrite_a_chunk(number)
        self.used = False
        self.state += 1
        self.tree["x"] = tree(self.folder / "x")

    def rewrite_a_chunk(self, number):
        """Give a chunk other values and its old time."""
        unit = FORMATS[self.layout].get("shards", CHUNKS)
        cells = list(np.ndindex(*(n // u for n, u in zip(SHAPE, unit, strict=True))))
        cell = cells[number % len(cells)]
        region = tuple(slice(i * u, (i + 1) * u) for i, u in zip(cell, unit, strict=True))
        before = {p: p.stat() for p in chunks(self.folder / "x")}
        self.values = self.values.copy()
        self.values[region] = some(unit, "f4", seed=2 + self.state + number)
        array = zarr.open_array(self.folder / "x", mode="r+", config={"write_empty_chunks": True})
        array[region] = self.values[region]
        for path, stat in before.items():
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    @unfinished()
    @rule(number=numbers, damage=damages)
    def damage_an_unfinished_run(self, number, damage):
        self.damage(self.some_place(number, self.unfinished.get), *damage)

    def damage(self, place, what, at, header):
        if what == "staging":
            self.remove_the_staging_folder(place)
        elif what == "source":
            self.change_the_source(at, delete=header)
        elif what == "sums" and (sums := sorted(self.work(place).glob("sums-*.npz"))):
            remove_or_cut(sums[at % len(sums)], at)
        elif what:
            self.cut_or_flip_the_journal(place, what, at, header)

    def remove_the_staging_folder(self, place):
        for path in self.work(place).iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        self.unfinished[place].staged = False

    def cut_or_flip_the_journal(self, place, what, at, header):
        run = self.unfinished[place]
        data = bytearray(self.journal(place).read_bytes())
        # the line about the run is the longest by far
        first = len(run.line) + 1
        span = range(first) if header else range(first, len(data)) or range(first, first + 1)
        where = span[at % len(span)]
        if what == "flip" and where < len(data):
            data[where] ^= 1 << at % 8
        else:
            del data[where:]
        self.journal(place).write_bytes(data)
        if where < first:
            run.readable = False
            run.line = bytes(data).split(b"\n")[0]

    @precondition(lambda self: self.made["y"])
    @rule(number=numbers, at=numbers, remove=st.booleans())
    def flip_a_byte_of_the_target_or_remove_it(self, number, at, remove):
        path = self.folder / "y"
        stored = chunks(path)
        if remove or not stored:
            shutil.rmtree(path)
            self.target_removed(self.made["y"])
        else:
            chunk = stored[number % len(stored)]
            data = bytearray(chunk.read_bytes())
            data[at % len(data)] ^= 0xFF
            chunk.write_bytes(data)
            self.tree["y"] = tree(path)
            self.verify("y", again=False)

    def target_removed(self, made):
        self.made["y"] = self.tree["y"] = None
        line = first_line(self.journal("y"))
        if line is not None and not self.unfinished["y"]:
            # of the run that was killed after publishing it: what is staged now is an older target
            self.unfinished["y"] = Unfinished(made.call, made.state, 0, line, staged=False)

    # after each step

    @invariant()
    def arrays_are_whole(self):
        for place in "xy":
            assert tree(self.folder / place) == self.tree[place]
        assert bits(read(self.folder / "x")) == bits(self.values)
        made = self.made["y"]
        if made and self.tree["y"] == made.tree:
            assert bits(read(self.folder / "y")) == bits(made.values)

    @invariant()
    def nothing_else_is_left(self):
        names = {p.name for p in self.folder.iterdir()}
        assert names <= {"x", "y", ".x.daskclip", ".y.daskclip"}
        assert all(self.journal(p).exists() for p in "xy" if self.unfinished[p])


def check(examples, steps):
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            suppress_health_check=[HealthCheck.too_slow],
            report_multiple_bugs=False,
            # a failure is shown as it was found: making it shorter takes minutes
            phases=[Phase.generate],
        ),
    )


@pytest.mark.timeout(900)
def test_a_few_steps_in_any_order():
    check(5, 8)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_steps_in_any_order():
    check(60, 15)


@pytest.mark.parametrize("number", [40, 110])
@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("what", [None, "sums", "source", "staging", "flip", "cut"])
def test_each_kind_of_damage(what, header, number):
    machine = Machine()
    try:
        machine.begin("format 3", there=False)
        machine.run_and_kill(Call("overwrite", axes=None, memory=0), "start", number)
        assert list(machine.work("y").glob("sums-*.npz"))
        machine.damage("y", what, number + header, header)
        machine.arrays_are_whole()
        machine.run_again("y", 0)
        machine.arrays_are_whole()
        machine.nothing_else_is_left()
    finally:
        machine.teardown()


@pytest.fixture
def small(monkeypatch):
    """Several blocks and windows, and operations in the order in which they are counted."""
    for name, size in SIZES.items():
        monkeypatch.setattr(plan, name, size)
    sequential = {"async.concurrency": 1, "threading.max_workers": 1}
    with dask.config.set(scheduler="synchronous"), zarr.config.set(sequential):
        yield


def source_of(folder, way):
    """A source of two chunks, with a target to replace; returns what clipping makes of it."""
    values = some((4, 4), "f4")
    create(folder / "x", values, CHUNKS)
    if way == "overwrite":
        create(folder / "y", some((4, 4), "f4", seed=1), CHUNKS)
    return bits(clip_by_norm(values, 0.5, 0))


def killed_while_publishing(call, folder, number):
    """Whether the run was killed before that operation; it may have fewer."""
    with Child(call, folder, "publish", number) as child:
        return child.result is None


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("way", ["copy", "overwrite", "in place"])
def test_a_run_that_is_killed_after_publishing_is_recognised(tmp_path, way):
    call, seen = Call(way), []
    for number in range(1, 100):
        folder = tmp_path / str(number)
        folder.mkdir()
        wanted = source_of(folder, way)
        before = tree(folder / call.place)
        if not killed_while_publishing(call, folder, number):
            break
        published = tree(folder / call.place) != before
        if published:
            assert bits(read(folder / call.place)) == wanted
        seen.append((published, (folder / f".{call.place}.daskclip").exists()))
        report = call.start(folder)
        assert report.status == ("up to date" if published else "clipped")
        # all windows were done before
        assert report.bytes_read == report.bytes_written == 0
        assert bits(read(folder / call.place)) == wanted
        names = ["x"] if way == "in place" else ["x", "y"]
        assert sorted(p.name for p in folder.iterdir()) == names
        shutil.rmtree(folder)
    # before and after the renaming, and the last thing to go is the work directory
    assert seen == sorted(seen)
    assert {(False, True), (True, True)} == set(seen)


@pytest.mark.usefixtures("small")
def test_what_was_replaced_is_not_taken_for_what_was_staged(tmp_path):
    call = Call("overwrite")
    wanted = source_of(tmp_path, "overwrite")
    # before the journal is removed: the old target is where the new one was
    assert killed_while_publishing(call, tmp_path, 5)
    assert bits(read(tmp_path / "y")) == wanted
    shutil.rmtree(tmp_path / "y")
    assert outcome(call.start, tmp_path) == "staging lost"
    assert not (tmp_path / "y").exists()
    assert discard(tmp_path / "y")
    assert call.start(tmp_path).status == "clipped"
    assert bits(read(tmp_path / "y")) == wanted


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("way", ["copy", "in place"])
def test_a_journal_of_another_version_is_refused(tmp_path, way):
    call = Call(way)
    wanted = source_of(tmp_path, way)
    assert killed_while_publishing(call, tmp_path, 1)
    path = tmp_path / f".{call.place}.daskclip" / "journal"
    run = journal.header(path)
    journal.begin(path, replace(run, version=run.version + 1))
    before = tree(tmp_path)
    assert outcome(call.start, tmp_path) == "other version"
    assert tree(tmp_path) == before
    assert discard(tmp_path / call.place)
    assert call.start(tmp_path).status == "clipped"
    assert bits(read(tmp_path / call.place)) == wanted
