"""Cluster processes that are killed, frozen and restarted during a run."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from clusters import cluster_in
from command_line import DASKCLIP, shell
from distributed import Client
from reference import bits
from sizes import SMALL
from stores import create, finished, read, some, stored
from waiting import until

from daskclip import clip_by_norm, clip_zarr
from daskclip.errors import StorageError
from daskclip.target.journal import Journal

pytestmark = pytest.mark.distributed

SHAPE, CHUNKS = (32, 32), (2, 8)
SIZES = SMALL | {"window_blocks": 1}
# over columns: 64 blocks of one chunk in four slabs; over rows: 16 blocks, each a slab
MEMORY = {0: 360, 1: 4096}
PASSES = {0: 2, 1: 1}
CLIP_NORM = 100.0
RESIZE = f"from sizes import use; use(**{SIZES}); "
# waits after some records of blocks for a file each
GATED = """
import os, time
from daskclip.target.journal import Journal
append, lines = Journal.append, []
def gated(self, entry):
    append(self, entry)
    lines.append(entry)
    end = time.monotonic() + 120
    gate = {gates!r}.get(len(lines))
    while gate and not os.path.exists(gate) and time.monotonic() < end:
        time.sleep(0.001)
Journal.append = gated
"""
# kills its process whenever it reaches one block
DEADLY = """
import os, signal
from daskclip.storage import StoredArray
def deadly(array, region, *args, original=StoredArray.{0}):
    if [s.start for s in region] == {1}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(array, region, *args)
StoredArray.{0} = deadly
"""
# stops its process once, between the look at the staging folder and the writing into it
FREEZING = """
import os, signal, threading
from pathlib import Path
from daskclip.storage import StoredArray
frozen, woken = Path({!r}), Path({!r})
def freezing(*args, original=StoredArray.write):
    try:
        os.close(os.open(frozen, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return original(*args)
    frozen.write_text(str(os.getpid()))
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    try:
        return original(*args)
    finally:
        woken.touch()
StoredArray.write = freezing
"""


# reads each block slowly, so that a run has several records
SLOW = """
import time
from daskclip.storage import StoredArray
def slow(*args, original=StoredArray.read):
    time.sleep(0.05)
    return original(*args)
StoredArray.read = slow
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with cluster_in(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def two(shared):
    """A cluster of two workers."""
    shared.start_workers(2 - len(shared.workers))
    return shared


@pytest.fixture
def folder(tmp_path):
    """A source of which some columns and some rows exceed the limit."""
    folder = tmp_path / "data"
    folder.mkdir()
    values = some(SHAPE, "f4")
    values[:, 8:16] *= 1e-3
    values[:8] *= 1e-3
    create(folder / "x", values, CHUNKS)
    return folder


class Run:
    """A run from the shell or from Python, in a process of its own."""

    def __init__(self, folder, axes=0, mode="copy", clip_norm=CLIP_NORM, gates=None):
        self.folder, self.axes, self.mode, self.clip_norm = folder, axes, mode, clip_norm
        waits = {line: str(path) for line, path in (gates or {}).items()}
        self.code = RESIZE + GATED.format(gates=waits)
        self.values = read(folder / "x")
        self.source = stored(folder / "x")
        self.target = folder / ("x" if mode == "in_place" else "y")
        if mode == "overwrite" and not self.target.exists():
            create(self.target, some((4, 4), "f4", seed=1), (2, 4))

    def shell(self, address=None):
        """Start the command line."""
        options = ["--clip-norm", self.clip_norm, "--axes", self.axes, "--progress", "none"]
        options += ["--memory", MEMORY[self.axes], "--json"]
        options += ["--scheduler", address] if address else []
        options += {"copy": [], "overwrite": ["--overwrite"], "in_place": ["--in-place"]}[self.mode]
        target = [] if self.mode == "in_place" else [self.target]
        code = f"{self.code}\n{DASKCLIP[2]}"
        return self._start(code, "run", self.folder / "x", *target, *options)

    def python(self, address):
        """Start the library, with a client that soon gives up on its scheduler."""
        target = None if self.mode == "in_place" else str(self.target)
        call = f"clip_zarr({str(self.folder / 'x')!r}, {target!r}, {self.clip_norm}, {self.axes}"
        call += f", memory={MEMORY[self.axes]}"
        call += "" if self.mode == "copy" else f", {self.mode}=True"
        code = f"""{self.code}
import sys
from distributed import Client
from daskclip import clip_zarr
from daskclip.errors import DaskClipError
with Client({address!r}, timeout=5):
    try:
        print({call}).to_json())
    except DaskClipError as error:
        print("daskclip:", error, file=sys.stderr)
        code = error.exit_code
    else:
        code = 0
sys.exit(code)
"""
        return self._start(code)

    def _start(self, code, *args):
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def reach(self, line):
        """Wait until the journal has that many lines."""
        journal = self.folder / f".{self.target.name}.daskclip" / "journal"

        def reached():
            try:
                return journal.read_bytes().count(b"\n") >= line
            except FileNotFoundError:
                return False

        until(reached)

    def finish(self, process):
        """Check that the run succeeds with NumPy's bits, and leaves only source and target."""
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
        self.check()
        figures = json.loads(out)
        assert figures["passes"] == PASSES[self.axes]
        assert 0 < figures["clipped"] < figures["slices"]
        return figures

    def check(self):
        wanted = clip_by_norm(self.values, self.clip_norm, self.axes)
        assert bits(read(self.target)) == bits(wanted)
        if self.mode != "in_place":
            assert stored(self.folder / "x") == self.source
        assert {p.name for p in self.folder.iterdir()} == {"x", self.target.name}


def kill(process):
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "lines", [(5,), pytest.param((2, 12, 25, 55), marks=pytest.mark.slow)], ids=str
)
def test_workers_that_are_killed_change_nothing(folder, two, monkeypatch, lines):
    run = Run(folder)
    append, done = Journal.append, []

    def killing(self, entry):
        append(self, entry)
        done.append(entry)
        if len(done) in lines:
            two.kill_worker()
            two.start_workers(len(lines) > 1)

    monkeypatch.setattr(Journal, "append", killing)
    with Client(two.address):
        report = clip_zarr(folder / "x", folder / "y", CLIP_NORM, 0, memory=MEMORY[0])
    assert (report.passes, report.blocks) == (2, 64)
    assert len(done) > max(lines)
    run.check()


@pytest.mark.slow
def test_a_worker_that_is_killed_in_the_middle_of_a_run_from_the_shell(folder, two):
    gates = {line: folder.parent / f"gate{line}" for line in (2, 19)}
    run = Run(folder, mode="overwrite", gates=gates)
    process = run.shell(two.address)
    for line, gate in gates.items():
        run.reach(1 + line)  # the first one is of the run
        two.kill_worker()
        two.start_workers(1)
        gate.touch()
    assert run.finish(process)["bytes_read"] == 2 * read(folder / "x").nbytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "mode", "axes", "line"),
    [
        (Run.shell, "copy", 0, 1),
        (Run.python, "copy", 0, 12),
        (Run.shell, "overwrite", 0, 22),
        (Run.python, "in_place", 0, 5),
        (Run.shell, "in_place", 1, 3),
        (Run.python, "overwrite", 1, 4),
    ],
)
def test_a_client_that_is_killed_can_run_again(folder, two, start, mode, axes, line):
    # it waits there until it is killed; the first line is of the run
    run = Run(folder, axes, mode, gates={line - 1: folder.parent / "gate"})
    before = run.target.exists() and stored(run.target)
    process = start(run, two.address)
    run.reach(line)
    kill(process)
    (folder.parent / "gate").touch()
    assert stored(folder / "x") == run.source
    assert (run.target.exists() and stored(run.target)) == before
    figures = run.finish(start(run, two.address))
    assert figures["bytes_read"] < PASSES[axes] * run.values.nbytes or line == 1


@pytest.mark.slow
def test_a_scheduler_that_is_killed_ends_the_run_which_can_go_on(folder, tmp_path):
    run = Run(folder)
    with cluster_in(tmp_path / "cluster") as cluster:
        for start, line in ((Run.python, 1), (Run.shell, 8), (Run.python, 30)):
            cluster.start_workers(2)
            process = start(run, cluster.address)
            run.reach(line)
            cluster.kill_scheduler()
            out, err = process.communicate(timeout=120)
            cluster.kill_worker()
            cluster.kill_worker()
            assert (process.returncode, out) == (75, "")
            # in the library, the caller decides what distributed logs; the command line is silent
            lines = err.splitlines() if start is Run.shell else re.findall("daskclip: .*", err)
            assert len(lines) == 1
            assert lines[0].startswith("daskclip: the cluster was lost")
            assert "run the same command again" in lines[0]
            assert stored(folder / "x") == run.source
            assert not run.target.exists()
            cluster.start_scheduler()
        cluster.start_workers(2)
        figures = run.finish(run.shell(cluster.address))
        assert figures["bytes_read"] < 2 * run.values.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("end", ["published", "abandoned"])
def test_a_frozen_worker_that_wakes_hurts_no_later_run(folder, tmp_path, end):
    frozen, woken, go = (tmp_path / name for name in ("frozen", "woken", "go"))
    preload = tmp_path / "freezing.py"
    preload.write_text(FREEZING.format(str(frozen), str(woken)))
    with cluster_in(tmp_path / "cluster", SCHEDULER__WORKER_TTL="2s") as cluster:
        cluster.start_workers(2, "--preload", preload)
        run = Run(folder)
        process = run.shell(cluster.address)
        if end == "published":
            run.finish(process)
        until(lambda: frozen.exists() and frozen.read_text())
        if end == "abandoned":
            kill(process)
            subprocess.run([*DASKCLIP, "discard", run.target], check=True, capture_output=True)
        assert {p.name for p in folder.iterdir()} - {"y"} == {"x"}
        mode = "overwrite" if end == "published" else "copy"
        other = Run(folder, 1, mode, 2 * CLIP_NORM, gates={5: go})
        process = other.shell()
        other.reach(6)
        assert not woken.exists()
        os.kill(int(frozen.read_text()), signal.SIGCONT)
        until(woken.exists)
        if end == "published":
            assert bits(read(run.target)) == bits(clip_by_norm(run.values, CLIP_NORM, 0))
        go.touch()
        other.finish(process)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "place", "window"),
    [("read", [4, 16], ("2:4", "4:6", "6:8")), ("write", [18, 0], ("16:18", "18:20", "20:22"))],
    ids=["first", "second"],
)
@pytest.mark.usefixtures("small")
def test_a_block_that_kills_its_workers_is_named(folder, tmp_path, function, place, window):
    preload = tmp_path / "deadly.py"
    preload.write_text(DEADLY.format(function, place))
    run, before = Run(folder), stored(folder)
    # Dask may blame the next block, which waits on the same worker, and the one before, of whose
    # end the scheduler may not have heard
    columns = f"{place[1]}:{place[1] + 8}"
    wanted = [f"while block [{rows}, {columns}] of {folder / 'x'} or one" for rows in window]
    with cluster_in(tmp_path / "cluster", SCHEDULER__ALLOWED_FAILURES=1) as cluster:
        cluster.start_workers(2, "--nanny", "--preload", preload)
        with Client(cluster.address), pytest.raises(StorageError) as caught:
            clip_zarr(folder / "x", folder / "y", CLIP_NORM, 0, memory=MEMORY[0])
    assert "\n" not in str(caught.value)
    assert any(text in str(caught.value) for text in wanted)
    assert caught.value.exit_code == 1
    assert finished(folder) == before
    # once nothing kills workers, the same call resumes
    report = clip_zarr(folder / "x", folder / "y", CLIP_NORM, 0, memory=MEMORY[0])
    assert report.status == "clipped"
    run.check()


# --- unsuitable workers --------------------------------------------------------------------------


@contextmanager
def worker(cluster, *before, **environment):
    """A worker whose command is prefixed with ``before``."""
    command = ["-m", "distributed.cli.dask_worker", cluster.address, "--no-nanny", "--nthreads"]
    process = subprocess.Popen(
        [*before, sys.executable, *command, "1", "--host", "127.0.0.1", "--no-dashboard"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=cluster.environment | environment,
    )
    try:
        with Client(cluster.address, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=120)
        yield
    finally:
        process.terminate()
        process.wait(60)


def refusal(cluster, folder):
    """Error line of a run that is refused by its workers and leaves no files."""
    x = create(folder / "x", some((4, 4), "f4"), (2, 4))
    before = stored(folder)
    done = shell("run", x, folder / "y", "--clip-norm", 1, "--scheduler", cluster.address)
    assert (done.returncode, stored(folder)) == (3, before)
    with Client(cluster.address), pytest.raises(RuntimeError) as caught:
        clip_zarr(x, folder / "y", 1.0)
    _, line = done.stderr.splitlines()  # the first one names the dashboard
    assert line == f"daskclip: {caught.value}"
    assert stored(folder) == before
    return line


@pytest.mark.parametrize("package", ["daskclip", "zarr"])
def test_workers_of_another_version_are_refused(tmp_path, package):
    # the first metadata on the path counts, as with a second installation
    (tmp_path / "data").mkdir()
    info = tmp_path / "path" / f"{package}-0.0.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.0.9\n")
    with cluster_in(tmp_path / "logs") as cluster, worker(cluster, PYTHONPATH=str(info.parent)):
        assert f" has {package} 0.0.9 and not " in refusal(cluster, tmp_path / "data")


def test_workers_that_do_not_see_the_files_are_refused(tmp_path):
    (tmp_path / "data").mkdir()
    hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"']
    if subprocess.run([*hidden, tmp_path, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting is refused here")
    with cluster_in(tmp_path / "logs") as cluster, worker(cluster, *hidden, str(tmp_path / "data")):
        assert " does not see " in refusal(cluster, tmp_path / "data")


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("axes", [0, 1])
def test_a_worker_that_is_frozen_in_a_run_holds_nobody_up(tmp_path, axes):
    """The others take over its blocks; when it wakes up, it can change nothing."""
    x = create(tmp_path / "x", some(SHAPE, "f4"), CHUNKS)
    with cluster_in(tmp_path / "cluster") as cluster:
        preload = tmp_path / "preload.py"
        preload.write_text(SLOW)
        cluster.start_workers(3, "--preload", str(preload))
        frozen = cluster.workers[0]
        append, lines = Journal.append, []

        def freezing(self, entry):
            append(self, entry)
            lines.append(entry)
            if len(lines) == 3:
                os.kill(frozen.pid, signal.SIGSTOP)

        with Client(cluster.address) as client, pytest.MonkeyPatch.context() as patch:
            patch.setattr(Journal, "append", freezing)
            clip_zarr(x, tmp_path / "y", CLIP_NORM, axes, memory=MEMORY[axes])
            assert len(lines) > 3
            before = stored(tmp_path / "y")
            os.kill(frozen.pid, signal.SIGCONT)
            assert len(client.run(os.getpid)) == 3
        assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(x), CLIP_NORM, axes))
        assert stored(tmp_path / "y") == before
