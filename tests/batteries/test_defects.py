"""Deliberate defects, one at a time: the battery detects each, and nothing when there is none."""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
from faults import CASES, Hooks, Sweep, contents, in_child, warm
from servers import local_client

from daskclip import verify_zarr
from daskclip.engine import clip as engine
from daskclip.engine import front, stages
from daskclip.engine import run_record as resume
from daskclip.engine.front import BlockId, Front
from daskclip.engine.passes import Passes, SlabState
from daskclip.errors import DaskClipError
from daskclip.storage import Hierarchy, StoredArray, durable
from daskclip.target import directory as publish
from daskclip.target import journal
from daskclip.target.journal import BlocksRecord, Journal
from daskclip.worker import add_sums, tasks
from daskclip.worker.context import PROCESS, ProcessState

COPY, ONE_PASS, OVERWRITE = CASES[:3]
REAL = SimpleNamespace(
    append=Journal.append,
    rescale=tasks.rescale_block,
    batch=tasks.run_batch,
    combine=stages.Slab._combine,
)


# --- the battery: each test returns the violations it finds --------------------------------------


def kills(case, step, power=False):
    """Kill a run at some of its file operations."""

    def look(defect):
        if defect is None:
            return []  # test_kills.py has looked at every operation
        sweep = Sweep(case, defect)
        sweep.kills(range(1, sweep.operations + 1, step), power)
        return sweep.violations

    return look


def after_window(number, action):
    """Call something once a run has journalled that many windows."""
    seen = []

    def append(self, entry):
        REAL.append(self, entry)
        seen.append(None)
        if len(seen) == number:
            action()

    Journal.append = append


def stop():
    raise KeyboardInterrupt


def change(folder):
    """Replace the bytes of one chunk; length and modification time stay the same."""
    chunk = folder / "x/c/5/0"
    status, data = chunk.stat(), bytearray(chunk.read_bytes())
    data[0] ^= 1
    chunk.write_bytes(data)
    os.utime(chunk, ns=(status.st_atime_ns, status.st_mtime_ns))


def a_source_that_changes(case, window, words):
    """Change a chunk during the run: it must stop with this message."""

    def look(defect):
        sweep = Sweep(case)
        with sweep.folder() as folder:

            def run():
                after_window(window, lambda: change(folder))
                return case.run(folder)

            outcome = in_child(run, defect=defect)
            return [] if words in outcome.get("error", "") else [outcome]

    return look


def late_tasks():
    """List of calls of `rescale_block`, what takes them into it, and what runs them once more."""
    taken = []

    def take(job, *args):
        taken.append((job, *args))
        return REAL.rescale(job, *args)

    def wake():
        PROCESS._drained.clear()  # they were in another process
        for late in taken:
            with suppress(DaskClipError):
                REAL.rescale(*late)

    return taken, take, wake


def a_block_of_an_earlier_run(defect):
    """A delayed task of one run ends during another run."""
    other, (taken, take, wake) = replace(COPY, clip_norm=2.0), late_tasks()
    sweep = Sweep(other)
    with sweep.folder() as folder:

        def run():
            tasks.rescale_block = take
            after_window(4, stop)
            with suppress(KeyboardInterrupt):
                COPY.run(folder)
            assert taken
            resume.discard(folder / "y")
            tasks.rescale_block = REAL.rescale
            after_window(4, wake)
            return other.run(folder)

        outcome = in_child(run, defect=defect)
        assert "bug" not in outcome, outcome
        return [] if contents(folder, "y") == sweep.wanted["y"] else [outcome]


def a_late_task_of_a_run_that_was_published(defect):
    """A task that another worker has done too wakes up when the target is there."""
    sweep, (taken, take, wake) = Sweep(COPY), late_tasks()
    with sweep.folder() as folder:

        def run():
            tasks.rescale_block = take
            COPY.run(folder)
            wake()
            return len(taken)

        outcome = in_child(run, defect=defect)
        assert outcome.get("value"), outcome
        right = {path.name for path in folder.iterdir()} == {"x", "y"}
        return [] if right and contents(folder, "y") == sweep.wanted["y"] else [outcome]


def a_late_task_of_a_run_that_was_stopped(defect):
    """A task that waited in a worker begins after its run was stopped: it must not."""
    sweep, taken = Sweep(COPY), []
    with sweep.folder() as folder:

        def take(function, *args):
            taken.append((function, *args))
            return REAL.batch(function, *args)

        def run():
            tasks.run_batch = take
            after_window(4, stop)
            with suppress(KeyboardInterrupt):
                COPY.run(folder)
            begun = []
            for late in taken:
                with suppress(DaskClipError):
                    begun.append(len(REAL.batch(*late)))
            return len(taken), begun

        taken_tasks, begun = in_child(run, defect=defect)["value"]
        assert taken_tasks
        return begun


def every_task_twice(defect):
    """Two workers get every task, and both give its result."""
    found = []
    for case in (COPY, ONE_PASS):
        sweep = Sweep(case)
        with sweep.folder() as folder:

            def run(case=case, folder=folder):
                # at once, and until both are there
                front.LATE = front.VERY_LATE = front.LATE_S = 0
                with local_client(2):
                    return case.run(folder, scheduler=None)

            outcome = in_child(run, defect=defect)
            same = {name: contents(folder, name) for name in "xy"} == sweep.wanted
            if outcome.get("value") != sweep.outcome["value"] or not same:
                found.append(outcome)
    return found


def two_at_once(defect):
    """Start a second client during a run: it must be refused."""
    sweep = Sweep(COPY)
    with sweep.folder() as folder:
        seen = []

        def second():
            try:
                COPY.run(folder)
            except DaskClipError as error:
                seen.append(str(error))

        def run():
            after_window(2, second)
            with suppress(Exception):
                COPY.run(folder)
            return seen

        lines = in_child(run, defect=defect)["value"]
        return [] if "being written by another run" in "".join(lines) else [lines]


def interrupted(folder, case, number):
    """Leave an unfinished run behind."""
    assert "killed" in in_child(lambda: case.run(folder), Hooks(kill=number))


def other_parameters(defect):
    """Run again with another limit: refused, or right bits."""
    sweep = Sweep(COPY)
    with sweep.folder() as folder:
        interrupted(folder, COPY, 60)
        outcome = in_child(lambda: replace(COPY, clip_norm=0.5).run(folder), defect=defect)
        return [] if outcome.get("code") == 5 else [outcome]


def a_journal_with_another_digit(defect):
    """Change one digit of the journal: the run must still give the right bits."""
    sweep, seen = Sweep(ONE_PASS), []
    for place in range(0, 60, 4):
        with sweep.folder() as folder:
            interrupted(folder, ONE_PASS, 48)
            path = folder / ".y.daskclip/journal"
            data = bytearray(path.read_bytes())
            start = data.index(b'"tally"') + 9
            digits = [i for i in range(start, len(data)) if chr(data[i]).isdigit()]
            at = digits[place % len(digits)]
            data[at] = ord("1") + (data[at] - ord("0")) % 9
            path.write_bytes(data)
            outcome = in_child(lambda folder=folder: ONE_PASS.run(folder), defect=defect)
            right = outcome.get("value", [])[1:] == sweep.outcome["value"][1:]
            checked = in_child(lambda folder=folder: bool(verify_zarr(folder / "y")))
            if not right or "value" not in checked:
                seen.append((outcome, checked))
    return seen


def kills_while_discarding(defect):
    """Kill `discard` at every operation, then run again."""
    sweep = Sweep(ONE_PASS)
    for number in range(1, 40):
        with sweep.folder() as folder:
            interrupted(folder, ONE_PASS, 48)
            in_child(lambda f=folder: resume.discard(f / "y"), Hooks(kill=number), defect)
            sweep.again(folder, number)
    return sweep.violations


# --- the defects ---------------------------------------------------------------------------------


def journal_before_data():
    write, append, waiting = StoredArray.write, Journal.append, []
    StoredArray.write = lambda *args: waiting.append(args) or 0

    def early(self, entry):
        append(self, entry)
        while waiting:
            write(*waiting.pop())

    Journal.append = early


def no_digest_of_what_is_read():
    tasks._read_same = lambda job, region, expected, empty: tasks._read(job, region)


def no_look_at_the_source_before_publishing():
    Hierarchy.fingerprint = lambda self, *, changes: {}


def rename_before_sync():
    def unsynced(work, source, staged, replace):
        folder, target = staged.folder, work.target.path
        shutil.copyfile(work.folder / "journal", folder / ".daskclip")
        (durable.exchange_directories if target.exists() else os.rename)(folder, target)
        durable.sync_filesystem(target.parent)
        work.clear()

    publish.DirectoryTransaction.publish = unsynced


def one_staging_folder_for_all_runs():
    resume.uuid4 = lambda: SimpleNamespace(hex="staging")


def no_lock():
    publish.fcntl = SimpleNamespace(flock=lambda *_: None, LOCK_EX=0, LOCK_NB=0)


def blocks_are_not_synced():
    tasks.durable = SimpleNamespace(**vars(durable) | {"sync_filesystem": lambda folder: None})


def journal_removed_last():
    def clear(work):
        for path in [p for p in work.folder.iterdir() if p.is_dir()]:
            shutil.rmtree(path)
        for path in [p for p in work.folder.iterdir() if p.name != "lock"]:
            path.unlink()

    publish.DirectoryTransaction.clear = clear


def parameters_are_not_compared():
    compared = resume.find_unfinished

    def find_unfinished(work, source, run):
        old = journal.header(work.folder / "journal") or run
        return compared(work, source, replace(run, parameters=old.parameters))

    engine.find_unfinished = find_unfinished


def checksums_of_lines_are_not_compared():
    def entries(path):
        with path.open("rb") as file:
            for line in file:
                with suppress(ValueError):
                    yield json.loads(line[9:]), file.tell()

    journal.entries = entries


def strays_are_published():
    publish.is_part = lambda key: True


def blocks_recorded_before_their_sums():
    def combine(slab, parts):
        passes = slab.passes
        if known := passes.slabs.get(slab.name, SlabState()).sums:
            found = add_sums(parts, int(slab._has_total)).digests
            numbers = {passes.number(BlockId(*block)): digest for block, digest in found.items()}
            passes.journal.append(BlocksRecord(slab=slab.name, sums=known, source=numbers))
        REAL.combine(slab, parts)

    stages.Slab._combine = combine


def counts_recorded_before_their_slab():
    count = Passes.count

    def early(passes, slab, counts, has_nan):
        if not passes.slabs.setdefault(slab, SlabState()).is_counted:
            passes.journal.append(BlocksRecord(tally=counts))
            passes.total = passes.total.add(counts)
        count(passes, slab, counts.empty(), has_nan)

    Passes.count = early


def both_results_count():
    def forget(self, task, ended):
        self._blocks -= len(task.blocks)
        self._done_nbytes += task.nbytes
        del self._tasks[ended]

    Front._forget = forget


def late_tasks_make_their_folder_again():
    tasks._require_staged = lambda task: os.makedirs(task.staged, exist_ok=True)


def tasks_of_stopped_runs_begin():
    ProcessState.drain = lambda self, attempt_id: None


def old_array_removed_first():
    def publishing(work, source, staged, replace):
        folder, target = staged.folder, work.target.path
        shutil.copyfile(work.folder / "journal", folder / ".daskclip")
        durable.sync_filesystem(folder)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(folder, target)
        durable.sync_filesystem(target.parent)
        work.clear()

    publish.DirectoryTransaction.publish = publishing


DEFECTS = [
    (journal_before_data, kills(COPY, 2)),
    (no_digest_of_what_is_read, a_source_that_changes(COPY, 1, "between the passes")),
    (no_look_at_the_source_before_publishing, a_source_that_changes(ONE_PASS, 1, "during the run")),
    (rename_before_sync, kills(OVERWRITE, 2, power=True)),
    (one_staging_folder_for_all_runs, a_block_of_an_earlier_run),
    (no_lock, two_at_once),
    (blocks_are_not_synced, kills(ONE_PASS, 2, power=True)),
    (journal_removed_last, kills_while_discarding),
    (parameters_are_not_compared, other_parameters),
    (checksums_of_lines_are_not_compared, a_journal_with_another_digit),
    (strays_are_published, kills(ONE_PASS, 2)),
    (old_array_removed_first, kills(OVERWRITE, 2)),
    (blocks_recorded_before_their_sums, kills(COPY, 2)),
    (counts_recorded_before_their_slab, kills(COPY, 2)),
    (both_results_count, every_task_twice),
    (late_tasks_make_their_folder_again, a_late_task_of_a_run_that_was_published),
    (tasks_of_stopped_runs_begin, a_late_task_of_a_run_that_was_stopped),
]


@pytest.mark.slow
@pytest.mark.parametrize(("defect", "look"), DEFECTS, ids=[d.__name__ for d, _ in DEFECTS])
def test_a_deliberate_defect_is_seen(defect, look):
    warm()
    assert not look(None)
    assert look(defect)
