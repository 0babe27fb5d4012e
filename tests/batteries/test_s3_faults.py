"""Object stores whose client, server or connections die during a run: the bytes are right."""

import json
import random
import subprocess
import sys

import pytest
from servers import Place, Proxy, missing
from sizes import SMALL
from stores import create, files_of, some

from daskclip import clip_zarr
from daskclip.errors import TemporaryError
from daskclip.target import lease as leases

WITHOUT = missing("weed", "s3fs", "obstore")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(WITHOUT), reason=WITHOUT),
    # of aiohttp, for connections that were cut
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
SIZES = SMALL | {"block_nbytes": 4096}
BEATS = {"HEARTBEAT_S": 0.2, "LEASE_TIMEOUT_S": 2.0}
PATCHES = (
    "from daskclip import cli; from daskclip.target import lease as leases; "
    f"from sizes import use; use(**{SIZES}); "
    + "".join(f"leases.{name} = {size}; " for name, size in BEATS.items())
)
MEMORY = 30_000


@pytest.fixture
def case(tmp_path, small, monkeypatch, request):
    """A source, and the bytes that clipping it gives."""
    rows = getattr(request, "param", 256)
    for name, seconds in BEATS.items():
        monkeypatch.setattr(leases, name, seconds)
    source = create(tmp_path / "x", some((rows, 64), "f4"), (16, 16), compressors=None)
    clip_zarr(source, tmp_path / "y", 1.0, 0, memory=MEMORY)
    return source, files_of(tmp_path / "y")


def started(source, place):
    """Start the command, which reports each window on stderr."""
    options = ["--clip-norm", 1, "--axes", 0, "--memory", MEMORY, "--progress", "json", "--json"]
    command = [sys.executable, "-c", f"{PATCHES} cli.main()", "run", source, place.name, *options]
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=place.environment,
    )


def ended(process):
    """Exit code, and report or last line."""
    out, err = process.communicate(timeout=240)
    assert "Traceback" not in err, err
    return process.returncode, json.loads(out) if out else err.splitlines()[-1]


# more records than the kills wait for: each comes when the next ones may be there too
@pytest.mark.parametrize("case", [1024], indirect=True)
def test_a_client_that_is_killed(weed, case):
    source, wanted = case
    place, rng = Place(weed), random.Random(5)
    for _ in range(6):
        process = started(source, place)
        for _ in range(rng.randrange(5, 11)):
            assert process.stderr.readline().startswith("{")
        process.kill()
        process.communicate()
        assert "zarr.json" not in place.objects()
    code, report = ended(started(source, place))
    assert (code, report["status"]) == (0, "clipped")
    assert place.objects() == wanted
    # finished blocks were not repeated
    planned = 2 * 1024 * 64 * 4
    assert report["bytes_read"] < planned / 2


def test_a_server_that_is_killed_and_started_again(weed, case):
    source, wanted = case
    place, codes = Place(weed), []
    for kill in (2, 7, None):
        process = started(source, place)
        for n, line in enumerate(process.stderr):
            if n == kill and line.startswith("{"):
                weed.kill()
                weed.start()
        process.stderr = None
        process.wait()
        codes.append(process.returncode)
    assert set(codes) <= {0, 75}
    assert codes[-1] == 0
    assert place.objects() == wanted


@pytest.mark.parametrize("kind", ["url", "obstore"])
@pytest.mark.parametrize("most", [20_000, 50_000])
def test_connections_that_are_cut(weed, case, tmp_path, kind, most):
    source, wanted = case
    direct = Place(weed)
    proxy = Proxy(weed.port, most, tmp_path)
    try:
        place = Place(proxy)
        place.prefix = direct.prefix

        def call(*args):
            for _ in range(40):
                try:
                    return clip_zarr(*args, 1.0, 0, memory=MEMORY, **options)
                except TemporaryError:
                    pass
            raise AssertionError("it never came through")

        target, options = place.as_(kind)
        call(source, target)
        assert direct.objects() == wanted
        call(target, tmp_path / "z")
        assert files_of(tmp_path / "z") == wanted
        assert proxy.cuts > 5, proxy.cuts
    finally:
        proxy.kill()
