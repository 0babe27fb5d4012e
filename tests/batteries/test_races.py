"""Runs that start at the same instant, runs that are interrupted, and what the next run does."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from functools import partial, wraps
from itertools import count
from multiprocessing import get_context
from threading import Lock

import dask
import pytest
import zarr
from command_line import assert_fails, run
from reference import bits
from sizes import SMALL, resize
from stores import create, read, some, stopping_at, stored
from waiting import until

from daskclip import clip_by_norm, clip_zarr, stats_zarr, verify_zarr
from daskclip.engine import passes
from daskclip.engine.passes import Passes
from daskclip.storage import StoredArray, files
from daskclip.target import directory as publish
from daskclip.target.journal import Journal, entries
from daskclip.worker import tasks

SIZES = SMALL | {"block_nbytes": 128}
SHAPE, CHUNKS = (16, 32), (2, 8)
TIGHT = 400  # windows of two blocks of a chunk, in two passes over columns
PROCESSES = get_context("spawn")


@pytest.fixture
def sequential():
    """Blocks one after the other."""
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture
def x(tmp_path):
    return create(tmp_path / "x", some(SHAPE, "f4"), CHUNKS)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- at the same instant -------------------------------------------------------------------------


def compete(number, barrier, results, folder, limits):
    """Run the command line in each round, together with the others, and report how it ended."""
    for target, limit in enumerate(limits):
        options = ["--clip-norm", limit, "--json", "--progress", "none"]
        barrier.wait(120)
        done = run("run", folder / "x", folder / f"y{target}", *options)
        results.put((target, number, done.exit_code, done.stdout, done.stderr))


def compete_in_four(folder, limits):
    """Exit code, stdout and stderr of four processes, for each round."""
    barrier, results = PROCESSES.Barrier(4), PROCESSES.Queue()
    processes = [
        PROCESSES.Process(target=compete, args=(n, barrier, results, folder, limits[n]))
        for n in range(4)
    ]
    for process in processes:
        process.start()
    rounds = [[None] * 4 for _ in limits[0]]
    for _ in range(4 * len(rounds)):
        target, number, *done = results.get(timeout=120)
        rounds[target][number] = done
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    results.close()
    results.join_thread()
    return rounds


@pytest.mark.parametrize("rounds", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_of_four_processes_with_other_limits_one_publishes(tmp_path, x, rounds):
    limits = [[1.0 + n + 4 * r for r in range(rounds)] for n in range(4)]
    before = stored(x)
    for r, results in enumerate(compete_in_four(tmp_path, limits)):
        won = [n for n, (code, _, _) in enumerate(results) if code == 0]
        assert len(won) == 1
        limit = limits[won[0]][r]
        figures = json.loads(results[won[0]][1])
        assert (figures["status"], figures["clip_norm"]) == ("clipped", limit)
        assert bits(read(tmp_path / f"y{r}")) == bits(clip_by_norm(read(x), limit))
        for n in {0, 1, 2, 3} - {*won}:
            code, out, err = results[n]
            assert (code, out, err.count("\n")) == (5, "", 1)
            assert re.search("is being written by another run|exists; remove it", err)
    assert names(tmp_path) == sorted(["x", *(f"y{r}" for r in range(rounds))])
    assert stored(x) == before


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [25])
def test_of_four_processes_with_the_same_command_one_clips(tmp_path, x, rounds):
    for r, results in enumerate(compete_in_four(tmp_path, [[1.0] * rounds] * 4)):
        status = Counter(json.loads(out)["status"] for code, out, _ in results if code == 0)
        assert status["clipped"] == 1
        assert {*status} <= {"clipped", "up to date"}
        assert {code for code, _, _ in results} <= {0, 5}
        assert bits(read(tmp_path / f"y{r}")) == bits(clip_by_norm(read(x), 1.0))
    assert names(tmp_path) == sorted(["x", *(f"y{r}" for r in range(rounds))])


# --- interrupted ---------------------------------------------------------------------------------

PATCHES = f"from daskclip import cli; from sizes import use; use(**{SIZES})"
# blocks report that they begin; from one on they wait until the process has the signal, so that it
# comes in the middle of a block, and blocks that begin afterwards are counted
TELLING = """
import time
from pathlib import Path
from daskclip.storage import StoredArray
told, stopped = Path({told!r}), Path({stopped!r})
def telling(*args, original=StoredArray.read):
    with told.open("a") as file:
        file.write(chr(10))
    end = time.monotonic() + 120
    while told.stat().st_size >= {limit} and not stopped.exists() and time.monotonic() < end:
        time.sleep(0.001)
    return original(*args)
if StoredArray.read.__name__ != "telling":
    StoredArray.read = telling
"""
WAITING = 40  # blocks: in the third window on threads, in the second on two workers


def size(path):
    return path.stat().st_size if path.exists() else 0


def pending(pid, number):
    """Whether a signal to a process is still pending."""
    with open(f"/proc/{pid}/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["ShdPnd"], 16) >> (number - 1) & 1


def start(code, *args, **options):
    """Start the command line in a process of its own, after some code."""
    return subprocess.Popen(
        [sys.executable, "-c", f"{PATCHES}\n{code}\ncli.main()", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("workers", "group"),
    [
        (0, False),
        pytest.param(2, False, marks=[pytest.mark.distributed, pytest.mark.slow]),
        # as a terminal does
        pytest.param(2, True, marks=[pytest.mark.distributed, pytest.mark.slow]),
    ],
    ids=["threads", "workers", "workers that get it too"],
)
def test_an_interrupted_run_stops_and_can_go_on(tmp_path, number, workers, group):
    told, stopped = tmp_path / "told", tmp_path / "stopped"
    folder = tmp_path / "data"
    folder.mkdir()
    x = create(folder / "x", some((16, 64), "f4"), CHUNKS)
    preload = tmp_path / "telling.py"
    code = TELLING.format(told=str(told), stopped=str(stopped), limit=WAITING)
    preload.write_text(code)
    environment = os.environ | {"DASK_DISTRIBUTED__WORKER__PRELOAD": f'["{preload}"]'}
    # the signal is ignored by default in background processes of a shell
    code += "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = ["run", x, folder / "y", "--clip-norm", 1, "--axes", 0, "--progress", "json"]
    command += ["--memory", 700, *(["--workers", workers] if workers else [])]
    with start(code, *command, env=environment, start_new_session=True) as child:
        until(lambda: size(told) >= WAITING)
        (os.killpg if group else os.kill)(child.pid, number)
        until(lambda: not pending(child.pid, number))
        begun = size(told)
        stopped.touch()
        out, err = child.communicate(timeout=120)
    assert (child.returncode, out) == (75, ""), err
    *progress, last = err.splitlines()
    assert last == "daskclip: interrupted; run the same command again to resume"
    states = [json.loads(line) for line in progress]
    if workers:
        assert states.pop(0).keys() == {"dashboard"}
    assert states
    # of the dozens left, at most those that were under way: on threads one for each of two; on two
    # workers twice as many, and each was given to the other one too if it was late
    assert size(told) - begun <= (7 if workers else 2)
    journal = folder / ".y.daskclip" / "journal"
    # the last record may have been made and not shown
    assert len(list(entries(journal))) - len(states) in (1, 2)
    assert names(folder) == [".y.daskclip", "x"]
    with start("", *command) as child:
        _, err = child.communicate(timeout=120)
    assert child.returncode == 0
    again = [json.loads(line) for line in err.splitlines()][1 if workers else 0 :]
    assert again[0]["done"] >= states[-1]["done"]
    assert bits(read(folder / "y")) == bits(clip_by_norm(read(x), 1.0, 0))
    assert names(folder) == ["x", "y"]


class Stopping:
    """Counts blocks as they begin, and interrupts the process at one of them."""

    def __init__(self, monkeypatch, at=None):
        self.at, self.counts, self.lock = at, Counter(), Lock()
        for name in ("sum_block", "rescale_block", "clip_slab", "copy_block"):
            monkeypatch.setattr(tasks, name, self.counted(getattr(tasks, name)))
        append = Journal.append
        self.lines = 0

        def counted(journal, entry):
            append(journal, entry)
            self.lines += 1

        monkeypatch.setattr(Journal, "append", counted)

    def counted(self, function):
        @wraps(function)
        def counting(*args):
            with self.lock:
                self.counts[function.__name__, *args[1:3]] += 1
                stop = self.at == self.counts.total()
            if stop:
                os.kill(os.getpid(), signal.SIGINT)
            return function(*args)

        return counting


@pytest.fixture
def interruptible():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# axes, options, memory, blocks of a window
KINDS = {
    "two passes": (0, {}, TIGHT, 2),
    "one pass": (1, {}, 2**30, 2),
    "in place in two passes": (0, {"in_place": True}, TIGHT, 2),
    "in place in one pass": (1, {"in_place": True}, 2**30, 2),
}


# an interrupt between the opening of a file and the block that closes it leaves that to Python
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.usefixtures("small", "sequential", "interruptible")
@pytest.mark.parametrize(
    "scheduler", [pytest.param("synchronous", marks=pytest.mark.slow), "threads"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_goes_to_the_caller_and_repeats_one_window(
    tmp_path, monkeypatch, kind, scheduler
):
    axes, options, memory, window = KINDS[kind]
    values = some(SHAPE, "f4")
    values[:, 16:] *= 1e-9
    values[8:] *= 1e-9  # so that blocks stay as they are, by columns and by rows
    limit = 10.0
    wanted = bits(clip_by_norm(values, limit, axes))
    total = None
    for n in (None, 1, 6, 17, 40, 63):
        if n is not None and n > total:
            break
        folder = tmp_path / str(n)
        folder.mkdir()
        x = create(folder / "x", values, CHUNKS)
        target = None if options else folder / "y"
        call = partial(clip_zarr, x, target, limit, axes, memory=memory, **options)
        made = x if options else folder / "y"
        with monkeypatch.context() as patch, dask.config.set(scheduler=scheduler, num_workers=2):
            stopping = Stopping(patch, n)
            if n is None:
                call()
                total = stopping.counts.total()
                assert max(stopping.counts.values()) == 1
                continue
            with pytest.raises(KeyboardInterrupt):
                call()
            journal = folder / f".{made.name}.daskclip" / "journal"
            # the last one may have been made and not counted
            assert len(list(entries(journal))) - stopping.lines in (1, 2)
            assert stopping.lines >= (n - 1) // (window * 2) - 1
            stopping.at = None
            call()
        assert bits(read(made)) == wanted
        assert stopping.counts.total() - total <= window * (2 if scheduler == "threads" else 1)
        assert names(folder) == sorted({"x", made.name})
    assert total >= 8


RECORDING = [Passes.sum, Passes.count, Passes.done, Passes.flush]


@pytest.mark.usefixtures("small", "sequential")
@pytest.mark.parametrize("function", RECORDING, ids=lambda f: f.__name__)
@pytest.mark.parametrize("axes", [0, 1])
def test_slices_are_counted_once_whatever_line_stops(tmp_path, monkeypatch, function, axes):
    # records of several blocks
    monkeypatch.setattr(passes, "RECORD_S", math.inf)
    resize(monkeypatch, block_nbytes=128, window_blocks=64)
    x = create(tmp_path / "x", some((16, 16), "f4"), CHUNKS)
    memory = 700 if axes == 0 else 2**30
    wanted, left = clip_zarr(x, tmp_path / "wanted", 1.0, axes, memory=memory), 0

    def at_line(frame, event, _):
        nonlocal left
        left -= event == "line"
        if not left:
            sys.settrace(None)
            raise KeyboardInterrupt
        return at_line

    def tracing(frame, event, _):
        return at_line if frame.f_code is function.__code__ else None

    for line in count(1):
        left, target = line, tmp_path / f"y{line}"
        try:
            sys.settrace(tracing)
            report = clip_zarr(x, target, 1.0, axes, memory=memory)
        except KeyboardInterrupt:
            report = clip_zarr(x, target, 1.0, axes, memory=memory)
        finally:
            sys.settrace(None)
        for name in ("slices", "clipped", "zeros", "smallest_norm", "largest_norm", "digest"):
            assert getattr(report, name) == getattr(wanted, name), (line, name)
        if left > 0:
            break
    assert line > 3 or axes == 1


@pytest.mark.usefixtures("sequential")
@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: clip_zarr(x, y.with_name("z"), 1.0),
        lambda x, _: stats_zarr(x),
        lambda _, y: verify_zarr(y),
    ],
    ids=["clip", "stats", "verify"],
)
def test_an_interrupt_is_not_hidden_by_an_error_that_follows(tmp_path, monkeypatch, x, call):
    y = tmp_path / "y"
    clip_zarr(x, y, 1.0)

    def read(*_):
        try:
            raise KeyboardInterrupt
        finally:  # as a file does that cannot be closed half-way
            raise ValueError("an open handle")

    monkeypatch.setattr(StoredArray, "read", read)
    monkeypatch.setattr(files, "read", read)
    with pytest.raises(KeyboardInterrupt):
        call(x, y)


# --- identical runs, and other ones --------------------------------------------------------------


def chunk_accesses(monkeypatch):
    """List of the reads and writes of chunks, by file and by block."""
    seen = []
    for module in (files, StoredArray):
        for name in ("read", "write"):
            original = getattr(module, name)
            what = f"{module.__name__.rpartition('.')[2]}.{name}"

            def counting(*args, original=original, what=what):
                seen.append((what, args[1:2]))
                return original(*args)

            monkeypatch.setattr(module, name, counting)
    return seen


def state(folder):
    """Inode, size and times of every path in a folder, which change with any access to it."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        s = path.stat()
        found[path.relative_to(folder)] = (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
    return found


@pytest.mark.parametrize("option", [[], ["--overwrite"], ["--in-place"]], ids=str)
def test_an_identical_run_is_up_to_date(tmp_path, monkeypatch, x, option):
    target = [] if option == ["--in-place"] else [tmp_path / "y"]
    command = ["run", x, *target, "--clip-norm", 1, "--axes", 1, "--progress", "none", "--json"]
    first = json.loads(run(*command, *option).stdout)
    assert first["status"] == "clipped"
    before = state(x) | state(tmp_path / "y" if target else x)
    seen = chunk_accesses(monkeypatch)
    done = run(*command, *option)
    assert (done.exit_code, done.stderr, seen) == (0, "", [])
    figures = json.loads(done.stdout)
    assert (figures["status"], figures["bytes_read"], figures["bytes_written"]) == (
        "up to date",
        0,
        0,
    )
    changing = {"status", "bytes_read", "bytes_written", "seconds"}
    assert {k: v for k, v in figures.items() if k not in changing} == {
        k: v for k, v in first.items() if k not in changing
    }
    assert state(x) | state(tmp_path / "y" if target else x) == before
    assert names(tmp_path) == ["x", *(["y"] if target else [])]
    # the counter does see accesses
    run("run", x, tmp_path / "z", "--clip-norm", 1)
    wanted = {"files.read", "files.write", "StoredArray.read", "StoredArray.write"}
    assert {name for name, _ in seen} == wanted


def stop_after(monkeypatch, lines, call):
    """Interrupt a call when the journal has that many lines."""
    with monkeypatch.context() as patch:
        stopping_at(patch)[0] = lines
        with pytest.raises(KeyboardInterrupt):
            call()


@pytest.fixture
def unfinished(small, sequential, monkeypatch, tmp_path, x):
    """An unfinished run over columns, with a limit of 1."""
    call = partial(clip_zarr, x, tmp_path / "y", 1.0, 0, memory=TIGHT)
    stop_after(monkeypatch, 6, call)
    assert names(tmp_path) == [".y.daskclip", "x"]
    return call


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--clip-norm", 2, "--axes", 0], ["clip_norm 1.0 and not 2.0"]),
        (["--clip-norm", 1, "--axes", 1], ["axes [0] and not [1]"]),
        (["--clip-norm", 1, "--axes", 0, "--nonfinite", "omit"], ["propagate and not omit"]),
        (["--clip-norm", 1, "--axes", 0, "--missing", "error"], ["missing fill and not error"]),
    ],
    ids=str,
)
def test_an_unfinished_run_with_other_parameters_is_refused(unfinished, tmp_path, options, words):
    before = stored(tmp_path)
    done = run("run", tmp_path / "x", tmp_path / "y", "--memory", TIGHT, *options)
    assert_fails(done, 5, "unfinished run", *words, "daskclip discard")
    assert stored(tmp_path) == before
    assert unfinished().status == "clipped"
    assert names(tmp_path) == ["x", "y"]


def test_an_unfinished_run_from_another_source_is_refused(unfinished, tmp_path):
    create(tmp_path / "other", some(SHAPE, "f4", seed=1), CHUNKS)
    before = stored(tmp_path)
    options = ["--clip-norm", 1, "--axes", 0, "--memory", TIGHT]
    done = run("run", tmp_path / "other", tmp_path / "y", *options)
    assert_fails(done, 5, f"source {tmp_path / 'x'} and not {tmp_path / 'other'}")
    assert stored(tmp_path) == before


@pytest.mark.parametrize("change", ["other values", "the same bytes again"])
def test_a_source_that_changed_since_is_refused(unfinished, tmp_path, change):
    chunk = tmp_path / "x" / "c" / "3" / "1"
    if change == "other values":
        zarr.open_array(tmp_path / "x", mode="r+")[6:8, 8:16] = 7.0
    else:
        chunk.write_bytes(chunk.read_bytes())
    before = stored(tmp_path)
    options = ["--clip-norm", 1, "--axes", 0, "--memory", TIGHT]
    done = run("run", tmp_path / "x", tmp_path / "y", *options)
    assert_fails(done, 5, tmp_path / "x", "chunk c/3/1", "changed", "daskclip discard")
    assert stored(tmp_path) == before
    assert run("discard", tmp_path / "y").stdout == "discarded\n"
    assert run("run", tmp_path / "x", tmp_path / "y", *options).exit_code == 0
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(tmp_path / "x"), 1.0, 0))


def test_a_published_target_of_another_run_is_refused(tmp_path, x):
    assert run("run", x, tmp_path / "y", "--clip-norm", 1).exit_code == 0
    before = stored(tmp_path)
    assert_fails(run("run", x, tmp_path / "y", "--clip-norm", 2), 5, "exists", "overwrite")
    zarr.open_array(x, mode="r+")[0, 0] = 9.0
    before |= {f"x/{key}": value for key, value in stored(x).items()}
    assert_fails(run("run", x, tmp_path / "y", "--clip-norm", 1), 5, "exists", "overwrite")
    assert stored(tmp_path) == before


# --- status, discard, verify ---------------------------------------------------------------------


def rows(done):
    assert (done.exit_code, done.stderr) == (0, "")
    return {line[:10].strip(): line[10:].strip() for line in done.stdout.splitlines()}


def test_status_discard_and_verify_where_there_is_nothing(tmp_path):
    target = tmp_path / "y"
    assert rows(run("status", target)) == {"target": f"{target} does not exist"}
    done = run("discard", target)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "there is no unfinished run\n", "")
    assert_fails(run("verify", target), 3, target, "does not exist")
    assert not names(tmp_path)


def test_status_discard_and_verify_of_an_unfinished_run(unfinished, tmp_path):
    target = tmp_path / "y"
    found = rows(run("status", target))
    assert found["target"] == f"{target} does not exist"
    assert re.fullmatch("run [0-9a-f]{32}", found["unfinished"])
    assert found["journal"] == "6 records, not running"
    assert (found["source"], found["clip_norm"], found["axes"]) == (
        str(tmp_path / "x"),
        "1.0",
        "[0]",
    )
    assert_fails(run("verify", target), 3, target, "does not exist")
    assert run("discard", target).stdout == "discarded\n"
    assert names(tmp_path) == ["x"]
    assert rows(run("status", target)) == {"target": f"{target} does not exist"}
    assert run("discard", target).stdout == "there is no unfinished run\n"
    assert names(tmp_path) == ["x"]
    assert unfinished().bytes_read == 2 * read(tmp_path / "x").nbytes


def test_status_discard_and_verify_during_a_run(small, sequential, monkeypatch, tmp_path, x):
    target = tmp_path / "y"
    append, seen = Journal.append, []

    def looking(self, entry):
        append(self, entry)
        if len(seen) < 3:
            seen.append(rows(run("status", target))["journal"])
            assert_fails(run("discard", target), 5, "being written by another run")
            assert_fails(run("verify", target), 3, "does not exist")

    monkeypatch.setattr(Journal, "append", looking)
    clip_zarr(x, target, 1.0, 0, memory=TIGHT)
    assert seen == [f"{n} records, running" for n in (1, 2, 3)]
    assert bits(read(target)) == bits(clip_by_norm(read(x), 1.0, 0))
    assert names(tmp_path) == ["x", "y"]


def test_status_discard_and_verify_of_a_published_array(tmp_path, x):
    target = tmp_path / "y"
    run("run", x, target, "--clip-norm", 1, "--axes", 0)
    before = state(tmp_path)
    found = rows(run("status", target))
    assert found["target"] == f"{target} exists"
    assert re.fullmatch("run [0-9a-f]{32}", found["made by"])
    assert (found["clip_norm"], found["axes"]) == ("1.0", "[0]")
    assert not {"journal", "unfinished"} & {*found}
    for options in ([], ["--source", x]):
        done = run("verify", target, *options)
        assert (done.exit_code, done.stderr) == (0, "")
        assert str(target) in done.stdout
    assert run("discard", target).stdout == "there is no unfinished run\n"
    assert state(tmp_path) == before
    chunk = target / "c" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    assert_fails(run("verify", target), 4, target, "c/0/0")
    assert_fails(run("verify", x), 4, x, "no record")


# --- in place and over another -------------------------------------------------------------------


@pytest.mark.usefixtures("small", "sequential")
@pytest.mark.parametrize(("axes", "memory"), [(0, TIGHT), (1, 2**30)], ids=["two", "one"])
def test_in_place_with_nothing_to_clip_touches_nothing(tmp_path, x, axes, memory):
    before = state(x)
    report = clip_zarr(x, None, 1e9, axes, memory=memory, in_place=True)
    assert (report.status, report.clipped, report.bytes_written) == ("nothing to clip", 0, 0)
    assert report.bytes_read == report.passes * read(x).nbytes
    assert report.passes == (2 if axes == 0 else 1)
    assert state(x) == before
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("kind", ["file", "folder", "group", "torn"])
def test_only_an_array_is_overwritten(tmp_path, x, kind):
    target = tmp_path / "y"
    if kind == "file":
        target.write_text("precious")
    elif kind == "group":
        zarr.create_group(target)
    else:
        target.mkdir()
        (target / "zarr.json" if kind == "torn" else target / "data").write_text('{"node_type"')
    before = state(tmp_path)
    done = run("run", x, target, "--clip-norm", 1, "--overwrite")
    assert_fails(done, 3, target, "is no zarr array", "choose another path")
    assert state(tmp_path) == before


@pytest.mark.usefixtures("small", "sequential")
@pytest.mark.parametrize("options", [{"overwrite": True}, {"in_place": True}], ids=str)
def test_the_old_data_can_be_read_until_the_exchange(tmp_path, monkeypatch, x, options):
    wanted = bits(clip_by_norm(read(x), 1.0, 0))
    target = x if "in_place" in options else create(tmp_path / "y", some((4, 4), "f2"), (2, 4))
    old = bits(read(target))
    append, exchange, seen = Journal.append, publish.durable.exchange_directories, []

    def reading(journal, entry):
        append(journal, entry)
        assert bits(read(target)) == old
        seen.append("line")

    def exchanging(a, b):
        if b == target:
            assert bits(read(target)) == old
        exchange(a, b)
        if b == target:
            assert bits(read(target)) == wanted
            seen.append("exchange")

    monkeypatch.setattr(Journal, "append", reading)
    monkeypatch.setattr(publish.durable, "exchange_directories", exchanging)
    clip_zarr(x, None if target == x else target, 1.0, 0, memory=TIGHT, **options)
    assert seen[-1] == "exchange"
    assert seen.count("exchange") == 1
    assert seen.count("line") > 10
    assert bits(read(target)) == wanted
    assert names(tmp_path) == sorted({"x", target.name})
