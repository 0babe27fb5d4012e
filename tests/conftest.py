"""Fixtures for several test files, and where a test goes.

A test of one module goes to the folder of its room, in a file named after the module:

numerics, storage, target, plan, report, lazy, engine: the rooms of the package, a folder each
test_arguments.py, test_cli*.py, test_xarray*.py: modules that are in no room
batteries: tests across rooms: kills, races, damage, clusters, memory, properties
house: the layout of the package, README and the examples
support: shared helpers: stores, servers, faults, strategies, the exact reference
benchmarks: times and tables, without assertions

A fault goes first to the battery of its kind, then, as an example, to the file of its module.
"""

import os
from pathlib import Path

import pytest
from servers import Place, SeaweedFS
from sizes import SMALL, resize

# child processes of tests import the helpers too
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).parent / "support"), os.environ.get("PYTHONPATH")))
)


@pytest.fixture(scope="module")
def weed(tmp_path_factory):
    """An S3 server with a bucket, for each test file its own."""
    server = SeaweedFS(tmp_path_factory.mktemp("weed"))
    server.start()
    try:
        Place(server).make_bucket()
        yield server
    finally:
        server.kill()


@pytest.fixture
def small(request, monkeypatch):
    """Blocks of a few small chunks, of the ``SIZES`` of the test's file if it has any."""
    resize(monkeypatch, **getattr(request.module, "SIZES", SMALL))
