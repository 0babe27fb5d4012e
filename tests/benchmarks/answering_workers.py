"""Workers that only answer, many in a process, for `tests.benchmarks.scale`.

Each speaks the protocol of a Dask worker, heartbeats included, and does its tasks in the loop of
the process. For the time of the blocks of a task it only keeps one of its threads, which do not
exist: a machine carries as many workers as its scheduler can take.
"""

import asyncio
import os
import pickle
import sys
import time
from functools import cache
from importlib import metadata, util

from dask.sizeof import sizeof
from distributed import worker
from distributed.batched import BatchedSend
from distributed.comm import connect
from distributed.core import Server, Status
from distributed.protocol import to_serialize
from distributed.utils_comm import gather_from_workers
from distributed.versions import get_versions

from . import scale_blocks

SECONDS = float(os.environ.get("ANSWER_SECONDS", "0"))  # of a block
METRICS = {
    "task_counts": {}, "digests_total_since_heartbeat": {}, "managed_bytes": 0, "memory": 10**8,
    "bandwidth": {"total": 10**8, "workers": {}, "types": {}}, "event_loop_interval": 0.02,
    "spilled_bytes": {"memory": 0, "disk": 0}, "cpu": 0.0,
}  # fmt: skip


class AnsweringWorker(Server):
    """A worker of a cluster."""

    def __init__(self, scheduler, threads, versions):
        self.data = {}
        self.address_of_scheduler, self.threads, self.versions = scheduler, threads, versions
        self.stream, self.idle = BatchedSend("2ms"), asyncio.Semaphore(threads)
        handlers = {"get_data": self.get_data, "run": self.run}
        streams = {"compute-task": self.begin, "free-keys": self.free, "steal-request": self.keep}
        ignored = ["cancel-compute", "remove-worker", "worker-status-change", "refresh-who-has"]
        super().__init__(
            handlers, stream_handlers=streams | dict.fromkeys(ignored, lambda **_: None)
        )

    async def start_unsafe(self):
        await self.listen("tcp://127.0.0.1:0")
        comm = await connect(self.address_of_scheduler)
        await comm.write(
            {
                "op": "register-worker", "reply": False, "address": self.address, "nanny": None,
                "status": "running", "nthreads": self.threads, "name": self.address,
                "now": time.time(), "resources": {}, "memory_limit": 0, "local_directory": "",
                "services": {}, "pid": os.getpid(), "versions": self.versions,
                "metrics": METRICS | {"time": time.time()}, "extra": {}, "server_id": self.id,
                "stimulus_id": "worker-connect",
            }
        )  # fmt: skip
        answer = await comm.read()
        assert answer["status"] == "OK", answer
        self.stream.start(comm)
        self._ongoing_background_tasks.call_soon(self.handle_stream, comm)
        self._ongoing_background_tasks.call_soon(self.beat, answer["heartbeat-interval"])
        return self

    async def beat(self, seconds):
        """Send heartbeats as often as the scheduler asks for."""
        scheduler = self.rpc(self.address_of_scheduler)
        while self.status != Status.closed:
            await asyncio.sleep(seconds)
            answer = await scheduler.heartbeat_worker(
                address=self.address, now=time.time(), metrics=METRICS | {"time": time.time()},
                executing={}, extensions={},
            )  # fmt: skip
            seconds = answer["heartbeat-interval"]

    def begin(self, **message):
        self._ongoing_background_tasks.call_soon(self.compute, **message)

    async def compute(self, key, run_spec, run_id, who_has, stimulus_id, **_):
        """Do a task when a thread is idle, and say that it is done when its blocks would be."""
        async with self.idle:
            began = time.time()
            missing = {name: [*there] for name, there in who_has.items() if name not in self.data}
            found = dict(self.data)
            if missing:
                found |= (await gather_from_workers(missing, rpc=self.rpc))[0]
            before = len(scale_blocks.TIMES)
            value = run_spec({name: found[name] for name in who_has})
            if blocks := len(scale_blocks.TIMES) - before:
                await asyncio.sleep(SECONDS * blocks)
                scale_blocks.TIMES.append(time.time())
        self.data[key] = value
        stops = [{"action": "compute", "start": began, "stop": time.time()}]
        self.stream.send(
            {
                "op": "task-finished", "key": key, "run_id": run_id, "nbytes": sizeof(value),
                "type": pickle.dumps(type(value)), "typename": type(value).__name__,
                "metadata": {}, "thread": 0, "startstops": stops, "status": "OK",
                "stimulus_id": stimulus_id,
            }
        )  # fmt: skip

    def free(self, keys, **_):
        for key in keys:
            self.data.pop(key, None)

    def keep(self, key, stimulus_id, **_):
        """Refuse to give a task away."""
        answer = {"op": "steal-response", "key": key, "state": None, "stimulus_id": stimulus_id}
        self.stream.send(answer)

    async def get_data(self, comm, keys, **_):
        data = {key: to_serialize(self.data[key]) for key in keys if key in self.data}
        await comm.write({"status": "OK", "data": data})
        assert await comm.read() == "OK"
        return Status.dont_reply

    async def run(self, comm, **message):
        return await worker.run(self, comm, **message)


async def main(address, number, threads):
    """Run workers of this process until it is killed."""
    versions = get_versions()
    workers = [await AnsweringWorker(address, threads, versions) for _ in range(number)]
    await asyncio.gather(*(worker.finished() for worker in workers))


if __name__ == "__main__":
    # a worker of its own process would look once: here they all look in one loop
    metadata.version, util.find_spec = cache(metadata.version), cache(util.find_spec)
    scale_blocks.do_nothing()
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
