"""What several files of tests start."""

import pytest
from servers import Place, SeaweedFS


@pytest.fixture(scope="module")
def weed(tmp_path_factory):
    """An S3 server of its own for each file, with a bucket."""
    server = SeaweedFS(tmp_path_factory.mktemp("weed"))
    server.start()
    try:
        Place(server).make_bucket()
        yield server
    finally:
        server.kill()
