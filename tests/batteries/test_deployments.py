"""The same run in every deployment, each started for real: the same bytes and digests."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import dask
import numpy as np
import pytest
import slurm
import zarr
from distributed import Client, LocalCluster
from servers import BIN, Place, missing
from stores import files_of
from zarr.codecs import BloscCodec

from daskclip import clip_by_norm, clip_zarr

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.deployment]
WITHOUT_S3 = missing("weed", "s3fs", "obstore")
WITHOUT_SLURM = slurm.missing()
needs_s3 = pytest.mark.skipif(bool(WITHOUT_S3), reason=WITHOUT_S3)
needs_slurm = pytest.mark.skipif(bool(WITHOUT_SLURM), reason=WITHOUT_SLURM)
# 256 MiB: rows of 16 MiB norms, of which some are above the limit of their kind
SHAPE, CHUNKS = (4096, 16384), (1024, 1024)
LIMITS = {None: 100.0, 1: 128.0}
SBATCH = Path(__file__).parents[2] / "examples" / "pipelines" / "slurm.sbatch"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder of a source, and what a run on threads gives, by axes: files and digests."""
    folder = tmp_path_factory.mktemp("data")
    array = zarr.create_array(
        folder / "x", shape=SHAPE, chunks=CHUNKS, dtype="f4",
        compressors=BloscCodec(cname="lz4", clevel=1),
    )  # fmt: skip
    values = np.random.default_rng(0).integers(-256, 256, (64, SHAPE[1])).astype("f4") / 148
    for start in range(0, SHAPE[0], 64):
        array[start : start + 64] = np.roll(values, start, axis=1)
    reports = {}
    for axes, limit in LIMITS.items():
        with dask.config.set(num_workers=2):
            reports[axes] = clip_zarr(array, folder / f"y{axes}", limit, axes)
        some = zarr.open_array(folder / f"y{axes}", mode="r")[:]
        assert some.tobytes() == clip_by_norm(array[:], limit, axes).tobytes()
    assert 0 < reports[1].clipped < SHAPE[0]
    return folder, reports


@pytest.fixture
def agrees(data, record_property):
    """Run both cases with a function of source, target, limit and axes, and compare files."""
    folder, reports = data

    def check(name, run, source=folder / "x", target=None):
        for axes, limit in LIMITS.items():
            path = target or folder / "again"
            digest = run(source, path, limit, axes)
            assert digest == reports[axes].digest
            found = path.objects() if isinstance(path, Place) else files_of(path)
            assert found == files_of(folder / f"y{axes}")
            if isinstance(path, Place):
                store = path.obstore().store
                store.delete([o["path"] for batch in store.list() for o in batch])
            else:
                shutil.rmtree(path)
        record_property("deployment", name)

    return check


def library(source, target, limit, axes):
    return clip_zarr(source, target, limit, axes).digest


def command(*options, environment=None):
    """Run the command and read its report."""

    def run(source, target, limit, axes):
        words = [source, target, "--clip-norm", limit, "--json", *options]
        words += [] if axes is None else ["--axes", axes]
        done = subprocess.run(
            [BIN / "daskclip", "run", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["peak_memory"] <= report["projected_memory"]
        return report["digest"]

    return run


@contextmanager
def from_the_command_line(folder, workers=2):
    """Start a scheduler and workers; yields the scheduler file."""
    file, processes = folder / "scheduler.json", []
    local = ["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"]

    def start(*words):
        with (folder / f"log{len(processes)}").open("w") as log:
            processes.append(
                subprocess.Popen([BIN / "dask", *map(str, words), *local], stdout=log, stderr=log)
            )

    try:
        start("scheduler", "--port", "0", "--scheduler-file", file)
        while not (file.exists() and file.read_text().endswith("}")):
            assert processes[0].poll() is None
            time.sleep(0.05)
        for _ in range(workers):
            start("worker", "--scheduler-file", file, "--nthreads", "1")
        with Client(scheduler_file=str(file), set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=120)
        yield file
    finally:
        for process in processes[::-1]:
            process.terminate()
        for process in processes:
            process.wait(60)


def test_threads_from_the_shell(agrees):
    agrees("`daskclip run`, threads", command())


def test_local_workers_from_the_shell(agrees):
    agrees("`daskclip run --workers N`", command("--workers", 2))


def test_a_local_cluster(agrees):
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(host="127.0.0.1", **options) as cluster, Client(cluster):
        agrees("`clip_zarr` inside `with Client(LocalCluster())`", library)


def test_a_cluster_from_the_command_line(agrees, tmp_path):
    with from_the_command_line(tmp_path) as file:
        address = json.loads(file.read_text())["address"]
        name = "`dask scheduler` and `dask worker`: `daskclip run --scheduler "
        agrees(f"{name}ADDRESS`", command("--scheduler", address))
        agrees(f"{name}FILE`", command("--scheduler", file))
        with Client(address):
            agrees("`dask scheduler` and `dask worker`: `clip_zarr` inside `with Client`", library)


# --- SLURM ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")  # of the jobs too
        started = slurm.Slurm(tmp_path_factory.mktemp("slurm"))
        patch.setenv("SLURM_CONF", started.environment["SLURM_CONF"])
        try:
            yield started
        finally:
            started.close()


@needs_slurm
def test_a_slurm_job(agrees, cluster, tmp_path):
    def job(source, target, limit, axes):
        report = tmp_path / f"report{axes}"
        words = [source, target, "--clip-norm", limit, "--report", report]
        words += [] if axes is None else ["--axes", axes]
        number = cluster.submit("--output", tmp_path / "log", SBATCH, *words)
        cluster.until(lambda: cluster.state(number)[0] not in ("PENDING", "RUNNING", "COMPLETING"))
        assert cluster.state(number) == ("COMPLETED", 0), (tmp_path / "log").read_text()
        return json.loads(report.read_text())["digest"]

    agrees("SLURM: `sbatch examples/pipelines/slurm.sbatch`", job)


@needs_slurm
@pytest.mark.skipif(bool(missing("dask_jobqueue")), reason=missing("dask_jobqueue"))
def test_a_slurm_cluster(agrees, cluster, tmp_path):
    from dask_jobqueue import SLURMCluster

    options = {"cores": 1, "processes": 1, "memory": "2GB", "walltime": "00:05:00"}
    local = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    with (
        SLURMCluster(
            **options, scheduler_options=local, log_directory=tmp_path,
            worker_extra_args=["--host", "127.0.0.1"],
        ) as jobs,
        Client(jobs) as client,
    ):  # fmt: skip
        jobs.scale(2)
        client.wait_for_workers(2, timeout=120)
        agrees("SLURM: dask-jobqueue's `SLURMCluster`", library)


SLOW = """#!{python}
import time
from daskclip import cli
from daskclip.plan import sizing
from daskclip.target.journal import Journal
sizing.DEFAULT = sizing.Sizing(window_blocks=1, block_nbytes=1 << 22)
def slowly(self, entry, append=Journal.append):
    append(self, entry)
    time.sleep(0.5)
Journal.append = slowly
cli.main()
"""


@needs_slurm
def test_a_preempted_slurm_job(data, cluster, tmp_path, monkeypatch, record_property):
    folder, reports = data
    (tmp_path / "daskclip").write_text(SLOW.format(python=sys.executable))
    (tmp_path / "daskclip").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setitem(cluster.environment, "PATH", os.environ["PATH"])
    report, target = tmp_path / "report", tmp_path / "y"
    words = [folder / "x", target, "--clip-norm", LIMITS[None], "--report", report]
    number = cluster.submit("--output", tmp_path / "log", SBATCH, *words)
    journal = tmp_path / ".y.daskclip" / "journal"
    for preempted in (1, 2):
        lines = 12 * preempted  # a block each
        cluster.until(lambda n=lines: journal.exists() and journal.read_bytes().count(b"\n") > n)
        cluster("scontrol", "requeue", number)
        cluster.until(lambda n=preempted: cluster.state(number) == ("RUNNING", n))
    cluster.until(lambda: cluster.state(number)[0] == "COMPLETED")
    assert files_of(target) == files_of(folder / "yNone")
    done = json.loads(report.read_text())
    assert done["digest"] == reports[None].digest
    assert 0 < done["bytes_read"] < 0.9 * reports[None].bytes_read
    record_property("deployment", "SLURM: a job that is preempted twice and resumes")


# --- S3 ------------------------------------------------------------------------------------------


@needs_s3
def test_from_and_to_s3(agrees, data, weed):
    folder, _ = data
    inside = Place(weed)
    clip_zarr(folder / "x", inside.obstore(), np.inf)

    def to(source, target, limit, axes):
        return clip_zarr(source, target.obstore(), limit, axes).digest

    def by_url(source, target, limit, axes):
        options = target.options
        return clip_zarr(source, target.name, limit, axes, storage_options=options).digest

    shell = command(environment=inside.environment)
    agrees("folder to S3: a zarr store over obstore", to, target=Place(weed))
    agrees("folder to S3: `clip_zarr` of a URL, `storage_options`", by_url, target=Place(weed))
    agrees("S3 to folder: `daskclip run s3://...`", shell, source=inside.name)
    agrees("S3 to S3: a zarr store over obstore", to, inside.obstore(), Place(weed))


@needs_s3
def test_s3_on_a_cluster(agrees, data, weed, tmp_path):
    def fsspec(source, target, limit, axes):
        return clip_zarr(source, target.fsspec(), limit, axes).digest

    with from_the_command_line(tmp_path) as file, Client(scheduler_file=str(file)):
        agrees(
            "folder to S3 on a Dask cluster: a zarr store over fsspec", fsspec, target=Place(weed)
        )
