"""Clusters whose scheduler and workers are processes that a test can kill, freeze and restart."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager

from distributed import Client
from waiting import until


class Cluster:
    """A scheduler and its workers, each a child process."""

    def __init__(self, folder, **settings):
        self.folder, self.port = folder, 0
        prefix = "DASK_DISTRIBUTED__"
        self.environment = os.environ | {f"{prefix}{k}": str(v) for k, v in settings.items()}
        self.workers = []
        self.started = 0
        self.start_scheduler()

    def start(self, *command):
        self.started += 1
        with (self.folder / f"log{self.started}").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *command, "--host", "127.0.0.1", "--no-dashboard"],
                stdout=log,
                stderr=log,
                env=self.environment,
            )

    def start_scheduler(self):
        """Start a scheduler, at the address of the previous one if there was one."""
        file = self.folder / "scheduler.json"
        file.unlink(missing_ok=True)
        self.scheduler = self.start(
            "distributed.cli.dask_scheduler", "--port", str(self.port), "--scheduler-file", file
        )
        until(lambda: file.exists() and file.read_text().endswith("}"))
        self.address = json.loads(file.read_text())["address"]
        self.port = self.address.rpartition(":")[2]

    def start_workers(self, number, *options):
        command = ["distributed.cli.dask_worker", self.address, "--nthreads", "1", *options]
        options = () if "--nanny" in options else ("--no-nanny",)
        for _ in range(number):
            self.workers.append(self.start(*command, *options))
        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(len(self.workers), timeout=120)

    def kill_worker(self):
        worker = self.workers.pop(0)
        worker.kill()
        worker.wait()

    def kill_scheduler(self):
        self.scheduler.kill()
        self.scheduler.wait()

    def close(self):
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            worker.wait(120)
        self.scheduler.kill()
        self.scheduler.wait()


@contextmanager
def cluster_in(folder, **settings):
    folder.mkdir(exist_ok=True)
    cluster = Cluster(folder, **settings)
    try:
        yield cluster
    finally:
        cluster.close()
