"""What goes through the client and the scheduler of a cluster: no blocks, sums or scales.

Each of the two is one process for all workers, so that what passes through it limits the cluster.
"""

import numpy as np
import pytest
import traffic
from clusters import cluster_in
from distributed import Client
from reference import bits
from sizes import resize
from stores import create, read

from daskclip import clip_by_norm, clip_zarr
from daskclip.engine import front
from daskclip.target.journal import Journal

pytestmark = pytest.mark.distributed

SIDE, LAYERS = 256, (40, 160)
NBYTES = SIDE * SIDE * 17  # of the sums of a window; those of scales are as many
BLOCK_NBYTES = 4000  # of messages about a block in both passes, on average


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Client of two workers and of a scheduler; both count their bytes."""
    monkeypatch.setattr(traffic.tcp.TCP, "write", traffic.tcp.TCP.write)
    monkeypatch.setattr(traffic.tcp, "read_bytes_rw", traffic.tcp.read_bytes_rw)
    traffic.count()
    resize(monkeypatch, block_nbytes=4 * SIDE * SIDE)  # of one layer
    # tasks of as many blocks as a thread may have, each run once, however fast the machine is
    monkeypatch.setattr(front, "SCHEDULER_S", 1e9)
    monkeypatch.setattr(front, "COPIES", 1)
    with cluster_in(tmp_path / "cluster", SCHEDULER__PRELOAD='["traffic"]') as cluster:
        cluster.start_workers(2)
        with Client(cluster.address) as client:
            yield client


class Clip:
    """A run over the first axis, and the bytes that go through scheduler and client."""

    def __init__(self, client, folder, layers):
        self.client, self.target = client, folder / f"y{layers}"
        rng = np.random.default_rng(layers)
        self.values = rng.standard_normal((layers, SIDE, SIDE), "f4")
        self.source = create(folder / f"x{layers}", self.values, (1, SIDE, SIDE))

    def traffic(self):
        """Bytes of both together."""
        return self.client.run_on_scheduler(traffic.total) + traffic.total()

    def run(self):
        """Bytes that this call took."""
        before = self.traffic()
        report = clip_zarr(self.source, self.target, 1.0, 0)
        assert (report.passes, report.blocks) == (2, len(self.values))
        assert bits(read(self.target)) == bits(clip_by_norm(self.values, 1.0, 0))
        return self.traffic() - before


def test_sums_and_scales_stay_on_the_workers(client, tmp_path):
    # pytest makes an error of the warning of Dask about large graphs
    few, many = (Clip(client, tmp_path, layers).run() for layers in LAYERS)
    assert 0 < few < NBYTES
    # nothing that there is once for each window
    assert many - few < BLOCK_NBYTES * (LAYERS[1] - LAYERS[0]) < NBYTES


@pytest.mark.parametrize("field", ["sums", "target"])
def test_saved_sums_are_not_sent_to_the_workers_of_a_resumed_run(
    client, tmp_path, monkeypatch, field
):
    clip, append = Clip(client, tmp_path, LAYERS[0]), Journal.append

    def stopping(self, entry):
        append(self, entry)
        if getattr(entry, field) is not None:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", stopping)
    with pytest.raises(KeyboardInterrupt):
        clip.run()
    monkeypatch.setattr(Journal, "append", append)
    assert list((tmp_path / f".{clip.target.name}.daskclip").glob("sums-*"))
    assert 0 < clip.run() < NBYTES
