"""Servers on loopback: object stores, each a process stopped by its id, and Dask clusters."""

import asyncio
import contextlib
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

from distributed import Client, LocalCluster
from zarr.storage import FsspecStore, ObjectStore

BIN = Path(sys.executable).parent
USERS = {
    "user": ["Admin", "Read", "Write", "List", "Tagging"],
    "reader": ["Read", "List"],
    "writer": ["Read", "Write", "List"],
}


def missing(*what):
    """Reason to skip a test, with the commands and packages that are not installed, or ''."""
    gone = [w for w in what if not (find_spec(w) or shutil.which(w) or (BIN / w).exists())]
    return f"not installed: {', '.join(gone)}" if gone else ""


def free_port(beside=0):
    """A free port; the port ``beside`` above it is free too."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                if beside:
                    other.bind(("127.0.0.1", port + beside))
            except (OSError, OverflowError):
                continue
            return port


def local_cluster(workers):
    """A cluster of worker processes, each of one thread."""
    # by default the dashboard takes a fixed port, and warns if it is in use
    return LocalCluster(
        n_workers=workers, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
    )


def local_client(workers):
    """A client of workers that are threads of this process."""
    return Client(
        n_workers=workers, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
    )


class Server:
    """A process that answers HTTP on a port."""

    def __init__(self, log):
        self.log, self.process = log, None

    def start(self):
        """Start or restart the server on its folder; returns when it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        end = time.monotonic() + 60
        while not self.answers():
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            assert time.monotonic() < end, self.log.read_text()[-2000:]
            time.sleep(0.05)

    def answers(self):
        try:
            urllib.request.urlopen(f"{self.url}/", timeout=5)
        except urllib.error.HTTPError as error:
            return error.code < 500
        except OSError:
            return False
        return True

    def kill(self):
        self.process.kill()
        self.process.wait()


class SeaweedFS(Server):
    """An S3 server that honours conditional puts."""

    def __init__(self, folder):
        super().__init__(folder / "log")
        identities = [
            {
                "name": key,
                "credentials": [{"accessKey": key, "secretKey": "secret"}],
                "actions": actions,
            }
            for key, actions in USERS.items()
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        master, volume, filer, self.port = (free_port(10000) for _ in range(4))
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [
            BIN / "weed", "-logtostderr=true", "server", f"-dir={folder}", "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1", f"-master.port={master}", f"-volume.port={volume}", "-filer",
            f"-filer.port={filer}", "-s3", f"-s3.port={self.port}", f"-s3.config={folder}/s3.json",
            "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", "-volume.max=100",
            "-master.volumeSizeLimitMB=1024", "-master.telemetry=false",
        ]  # fmt: skip


class Rclone(Server):
    """An S3 server that ignores the conditions of puts."""

    def __init__(self, folder):
        super().__init__(folder / "log")
        (folder / "store" / "bucket").mkdir(parents=True)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [
            BIN / "rclone", "serve", "s3", "--auth-key", "user,secret",
            "--addr", f"127.0.0.1:{self.port}", "--config", "/dev/null", folder / "store",
        ]  # fmt: skip


class Place:
    """A prefix of its own in a bucket of a server."""

    number = itertools.count()

    def __init__(self, server, bucket="bucket", key="user", secret="secret"):
        self.url, self.bucket, self.key, self.secret = server.url, bucket, key, secret
        self.prefix = f"p{next(self.number)}/y"

    @property
    def name(self):
        return f"s3://{self.bucket}/{self.prefix}"

    @property
    def options(self):
        client = {"endpoint_url": self.url, "region_name": "us-east-1"}
        return {"key": self.key, "secret": self.secret, "client_kwargs": client}

    @property
    def environment(self):
        return os.environ | {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def make_bucket(self):
        import s3fs

        s3fs.S3FileSystem(**self.options).mkdir(self.bucket)

    def fsspec(self):
        return FsspecStore.from_url(self.name, self.options)

    def obstore(self, **retries):
        from obstore.store import S3Store

        return ObjectStore(
            S3Store(
                self.bucket,
                prefix=self.prefix,
                endpoint=self.url,
                access_key_id=self.key,
                secret_access_key=self.secret,
                region="us-east-1",
                client_options={"allow_http": True},
                **retries,
            )
        )

    def as_(self, kind):
        """Target of some kind, and the options that it needs."""
        if kind == "url":
            return self.name, {"storage_options": self.options}
        return getattr(self, kind)(), {}

    def objects(self):
        """Bytes of all objects except the journal, by key."""
        store = self.obstore().store
        found = [about["path"] for batch in store.list() for about in batch]
        return {
            key: store.get(key).bytes().to_bytes()
            for key in sorted(found)
            if ".daskclip/journal" not in key
        }


class Proxy:
    """Passes bytes on to a port, and aborts each connection after a random number of them."""

    def __init__(self, port, most, folder):
        self.log = folder / "cuts"
        with self.log.open("wb") as log:
            command = [sys.executable, __file__, str(port), str(most)]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    @property
    def cuts(self):
        return self.log.read_text().count("cut\n")

    def kill(self):
        self.process.kill()
        self.process.communicate()


async def proxy(port, most):
    """Serve as the process of a `Proxy`."""
    rng = random.Random(0)

    async def accept(reader, writer):
        there, back = await asyncio.open_connection("127.0.0.1", port)
        left = rng.randrange(most)

        async def pass_on(source, sink):
            nonlocal left
            with contextlib.suppress(OSError):
                while data := await source.read(1 << 14):
                    left -= len(data)
                    if left < 0:
                        print("cut", file=sys.stderr, flush=True)
                        break
                    sink.write(data)
                    await sink.drain()
            writer.transport.abort()
            back.transport.abort()

        await asyncio.gather(pass_on(reader, back), pass_on(there, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(proxy(*map(int, sys.argv[1:])))
