"""Runs, kills, damage and second clients in any order: the right result, or none."""

import os
import re
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

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
from sizes import SMALL, resize
from stopped_calls import AMPLE, Call, Child, outcome
from stores import FORMATS, create, least_memory, read, some

from daskclip import clip_by_norm, plan_zarr, verify_zarr
from daskclip.engine.run_record import discard, status
from daskclip.target import journal

SHAPE, CHUNKS = (12, 8), (2, 4)
# plans of several slabs, windows and passes for an array of 384 bytes
SIZES = SMALL | {"block_nbytes": 64}
OF_A_JOURNAL = {"other parameters", "source changed", "staging lost"}


def chunks(folder):
    """All stored chunks of an array, in a fixed order."""
    known = (".daskclip", "zarr.json", ".zarray", ".zattrs")
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in known)


def looks(folder):
    """Size and time of each chunk, which a copy of the array preserves."""
    status = {str(p.relative_to(folder)): p.stat() for p in chunks(folder)}
    return {key: (s.st_size, s.st_mtime_ns) for key, s in status.items()}


def tree(folder):
    """Bytes of every file below a folder, hidden ones included; None if it does not exist."""
    if not folder.exists():
        return None
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def first_line(path):
    """First line of a journal or a record, which describes the run."""
    return path.read_bytes().split(b"\n")[0] if path.exists() else None


@cache
def smallest_budget(layout, axes):
    """The smallest budget for which there is a plan."""
    with tempfile.TemporaryDirectory() as name:
        source = create(Path(name, "x"), some(SHAPE, "f4"), CHUNKS, **FORMATS[layout])
        return least_memory(source, axes)


@dataclass
class Made:
    """A complete array, and the call that made it; None if another program did."""

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
    """A folder with a source and a target, and what it must hold."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp()).resolve()
        self.patch = pytest.MonkeyPatch()
        resize(self.patch, **SIZES)
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
        return replace(call, memory=call.memory or smallest_budget(self.layout, call.axes))

    def some_place(self, number, test):
        found = [p for p in "xy" if test(p)]
        return found[number % len(found)]

    # expected outcomes of a call, in the order of its checks

    def expected(self, call):
        self.used = True
        made, run = self.made[call.place], self.unfinished[call.place]
        if self.is_done(call, made):
            return {"up to date"}
        if call.way == "copy" and made:
            return {"exists"}
        if run and not run.readable:
            # the description of the run is lost: the call may be refused, or start again
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
        """Status with which a run ends once it has begun."""
        if call.missing == "error" and self.lacks_chunks():
            return "missing"
        return "clipped" if call.place == "y" or self.is_clipped(call) else "nothing to clip"

    def lacks_chunks(self):
        units = FORMATS[self.layout].get("shards", CHUNKS)
        cells = [-(-n // u) for n, u in zip(SHAPE, units, strict=True)]
        return len(chunks(self.folder / "x")) < np.prod(cells)

    def is_clipped(self, call):
        return bits(clip_by_norm(self.values, call.clip_norm, call.axes)) != bits(self.values)

    # checks after a call

    def ended(self, call, wanted, found):
        """Check the folder after a call that returned."""
        assert found in wanted
        place = call.place
        foreign = self.made[place] and not self.made[place].call
        if found == "clipped":
            self.published(call)
        if found in ("clipped", "nothing to clip", "missing"):
            self.unfinished[place] = None
        # a call refused at its first check does not clean up after a kill
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
        """Check the folder after a killed call; ``record`` is that of the target before."""
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

    # Hypothesis leaves most rules out of most examples, so several rules do what matters most

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
            # the remedy in the message
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
                    assert rows["journal"].endswith(" records, running")
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
            assert re.fullmatch(r"\d+ records, not running", rows["journal"])
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

    # rules: changes by other programs

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
        """Give a chunk other values and restore its modification time."""
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
        elif what == "sums" and (sums := sorted(self.work(place).glob("sums-*"))):
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
            # the run was killed after it had published: the staging folder holds the older target
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
            # without shrinking, which takes minutes
            phases=[Phase.generate],
        ),
    )


@pytest.mark.timeout(900)
def test_a_few_steps_in_any_order_leave_whole_arrays():
    check(5, 8)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_steps_in_any_order_leave_whole_arrays():
    check(60, 15)


@pytest.mark.parametrize("number", [40, 110])
@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("what", [None, "sums", "source", "staging", "flip", "cut"])
def test_each_kind_of_damage_is_refused_or_repaired(what, header, number):
    machine = Machine()
    try:
        machine.begin("format 3", there=False)
        machine.run_and_kill(Call("overwrite", axes=None, memory=0), "start", number)
        assert list(machine.work("y").glob("sums-*"))
        machine.damage("y", what, number + header, header)
        machine.arrays_are_whole()
        machine.run_again("y", 0)
        machine.arrays_are_whole()
        machine.nothing_else_is_left()
    finally:
        machine.teardown()


@pytest.fixture
def sequential():
    """Operations in the order in which they are counted."""
    one_at_a_time = {"async.concurrency": 1, "threading.max_workers": 1}
    with dask.config.set(scheduler="synchronous"), zarr.config.set(one_at_a_time):
        yield


def source_of(folder, way):
    """Make a source of two chunks, and a target to replace; returns the bits of the result."""
    values = some((4, 4), "f4")
    create(folder / "x", values, CHUNKS)
    if way == "overwrite":
        create(folder / "y", some((4, 4), "f4", seed=1), CHUNKS)
    return bits(clip_by_norm(values, 0.5, 0))


def killed_while_publishing(call, folder, number):
    """Kill a run before one operation of its publishing; False if it has fewer operations."""
    with Child(call, folder, "publish", number) as child:
        return child.result is None


@pytest.mark.usefixtures("small", "sequential")
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


@pytest.mark.usefixtures("small", "sequential")
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


@pytest.mark.usefixtures("small", "sequential")
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
