"""Storage that fails temporarily or permanently: what is retried, and the errors."""

import errno
import os
from collections import Counter
from threading import Lock

import dask
import pytest
import zarr
from reference import bits
from sizes import resize
from stores import create, read, some, stored
from zarr.storage import LocalStore, WrapperStore

from daskclip import clip_by_norm, clip_zarr
from daskclip.cli import main
from daskclip.errors import StorageError, TemporaryError
from daskclip.storage import files
from daskclip.storage import retry as retries

SHAPE, CHUNKS = (8, 8), (2, 8)
CHUNK = "c/2/0"


class ResponseError(Exception):
    """Like aiohttp's ClientResponseError."""

    def __init__(self, status):
        super().__init__(f"{status}, message='no'")
        self.status = status


class ClientError(Exception):
    """Like botocore's ClientError."""

    def __init__(self, status):
        super().__init__(f"An error occurred ({status}) when calling GetObject")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {}}


class StatusError(Exception):
    """Like the HTTP errors of requests and httpx."""

    def __init__(self, status):
        super().__init__(f"{status} for url")
        self.response = type("Response", (), {"status_code": status})()


def caused(error, cause):
    """An error of a library around one of another."""
    error.__cause__ = cause
    return error


def numbered(number):
    return OSError(number, os.strerror(number))


TRANSIENT = {
    "ESTALE": lambda: numbered(errno.ESTALE),
    "ETIMEDOUT": lambda: numbered(errno.ETIMEDOUT),
    "ECONNRESET": lambda: numbered(errno.ECONNRESET),
    "a time-out": lambda: TimeoutError("timed out"),
    "a lost connection": lambda: ConnectionError("closed"),
    "aiohttp 429": lambda: ResponseError(429),
    "aiohttp 503": lambda: ResponseError(503),
    "botocore 429": lambda: ClientError(429),
    "botocore 503": lambda: ClientError(503),
    "requests 503": lambda: StatusError(503),
    "a cause": lambda: caused(OSError("please reduce your request rate"), ClientError(503)),
}
PERMANENT = {
    "ENOSPC": lambda: numbered(errno.ENOSPC),
    "EROFS": lambda: numbered(errno.EROFS),
    "EACCES": lambda: numbered(errno.EACCES),
    "EIO": lambda: numbered(errno.EIO),
    "aiohttp 403": lambda: ResponseError(403),
    "aiohttp 501": lambda: ResponseError(501),
    "botocore 403": lambda: ClientError(403),
    "botocore 404": lambda: ClientError(404),
    "without a number": lambda: caused(PermissionError("Forbidden"), ClientError(403)),
}


class Failing(WrapperStore):
    """A store that fails for one chunk, a number of times."""

    def __init__(self, store, error, times):
        super().__init__(store)
        self.error, self.times = error, times
        self.calls, self.seen, self.lock = Counter(), set(), Lock()

    async def get(self, key, *args, **kwargs):
        with self.lock:
            # all chunks are read once before the run, since this store has no versions of them
            self.calls[key] += key in self.seen
            fails = key.endswith(CHUNK) and key in self.seen and self.calls[key] <= self.times
            self.seen.add(key)
        if fails:
            raise self.error()
        return await self._store.get(key, *args, **kwargs)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Blocks one after the other, of two chunks each, without waiting."""
    resize(monkeypatch, block_nbytes=128)
    monkeypatch.setattr(retries, "FIRST", 1e-4)
    monkeypatch.setattr(retries, "LONGEST", 1e-3)
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture
def x(tmp_path):
    return create(tmp_path / "x", some(SHAPE, "f4"), CHUNKS)


def failing(x, error, times):
    """The source in a store that fails."""
    return zarr.open_array(Failing(LocalStore(x, read_only=True), error, times), mode="r")


def calls(source):
    """Number of reads of each chunk."""
    return {key: n for key, n in source.store.calls.items() if key.startswith("c/")}


@pytest.mark.parametrize("times", [1, retries.ATTEMPTS - 1])
@pytest.mark.parametrize("error", TRANSIENT)
def test_a_read_that_fails_now_and_then_is_tried_again(tmp_path, x, error, times):
    source = failing(x, TRANSIENT[error], times)
    report = clip_zarr(source, tmp_path / "y", 1.0, 1)
    assert report.passes == 1
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(x), 1.0, 1))
    # the whole block is read again, and no other one; and all once more after the run
    again = 1 + times
    assert calls(source) == {"c/0/0": 2, "c/1/0": 2, "c/2/0": again + 1, "c/3/0": again + 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y"]


@pytest.mark.parametrize("error", TRANSIENT)
def test_a_read_that_goes_on_failing_is_temporary(tmp_path, x, error):
    source = failing(x, TRANSIENT[error], 10**9)
    with pytest.raises(TemporaryError) as caught:
        clip_zarr(source, tmp_path / "y", 1.0, 1)
    assert_names_chunk(caught.value, 75, "reading", "[4:8, 0:8]", "Failing", TRANSIENT[error]())
    # once more for the chunk alone, to name it
    assert source.store.calls[CHUNK] == retries.ATTEMPTS + 1
    assert not (tmp_path / "y").exists()
    source.store.times = 0
    assert clip_zarr(source, tmp_path / "y", 1.0, 1).status == "clipped"
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(x), 1.0, 1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y"]


@pytest.mark.parametrize("error", PERMANENT)
def test_a_read_that_will_not_do_is_not_tried_again(tmp_path, x, error):
    source = failing(x, PERMANENT[error], 10**9)
    with pytest.raises(StorageError) as caught:
        clip_zarr(source, tmp_path / "y", 1.0, 1)
    assert_names_chunk(caught.value, 1, "reading", "[4:8, 0:8]", "Failing", PERMANENT[error]())
    assert source.store.calls[CHUNK] == 1 + 1  # the second names the chunk
    assert not (tmp_path / "y").exists()


def assert_names_chunk(error, code, doing, block, path, cause):
    """Check that the error names block, array, chunk and cause on one line."""
    assert type(error) is (TemporaryError if code == 75 else StorageError)
    assert error.exit_code == code
    text = str(error)
    assert "\n" not in text
    assert text.startswith(f"{doing} block {block} of {path}")
    assert f"failed at chunk {CHUNK}: {type(cause).__name__}: {cause}; " in text
    assert text.endswith("run the same command again to resume")
    assert ("mend the cause" in text) == (code == 1)
    if isinstance(cause, OSError) and cause.errno:
        assert f"[Errno {cause.errno}] {os.strerror(cause.errno)}" in text


def fail_writing(monkeypatch, error, times):
    """Let writing one chunk of any array fail so many times; gives the calls for it."""
    original, done = files.write, []

    def failing(folder, key, *args):
        if key == CHUNK:
            done.append(key)
            if len(done) <= times:
                raise error()
        return original(folder, key, *args)

    monkeypatch.setattr(files, "write", failing)
    return done


@pytest.mark.parametrize("error", ["ESTALE", "ETIMEDOUT", "a time-out"])
def test_a_write_that_fails_now_and_then_is_tried_again(tmp_path, monkeypatch, x, error):
    done = fail_writing(monkeypatch, TRANSIENT[error], 3)
    clip_zarr(x, tmp_path / "y", 1.0, 1)
    assert len(done) == 4
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(x), 1.0, 1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y"]


@pytest.mark.parametrize(
    ("error", "code", "times"),
    [("ESTALE", 75, 6), ("ENOSPC", 1, 2), ("EROFS", 1, 2), ("EACCES", 1, 2), ("EIO", 1, 2)],
)
def test_a_write_that_goes_on_failing_is_told(tmp_path, monkeypatch, x, error, code, times):
    cause = {**TRANSIENT, **PERMANENT}[error]
    done = fail_writing(monkeypatch, cause, 10**9)
    before = stored(x)
    with pytest.raises(StorageError) as caught:
        clip_zarr(x, tmp_path / "y", 1.0, 1)
    assert_names_chunk(
        caught.value, code, "writing", "[4:8, 0:8]", tmp_path / ".y.daskclip", cause()
    )
    assert len(done) == times
    assert stored(x) == before
    monkeypatch.undo()
    clip_zarr(x, tmp_path / "y", 1.0, 1)
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(x), 1.0, 1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y"]


@pytest.mark.parametrize(("error", "code"), [("ESTALE", 75), ("ENOSPC", 1)])
def test_the_shell_says_it_on_one_line(tmp_path, monkeypatch, capsys, x, error, code):
    cause = {**TRANSIENT, **PERMANENT}[error]
    fail_writing(monkeypatch, cause, 10**9)
    command = ["run", str(x), str(tmp_path / "y"), "--clip-norm", "1", "--axes", "1"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--progress", "none"])
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (code, "", 1)
    assert f"chunk {CHUNK}: OSError: [Errno {cause().errno}]" in err


def waits(monkeypatch, first, longest, attempts):
    """Seconds between the attempts at a call that always fails."""
    monkeypatch.setattr(retries, "FIRST", first)
    monkeypatch.setattr(retries, "LONGEST", longest)
    monkeypatch.setattr(retries, "ATTEMPTS", attempts)
    waited, tried = [], []
    monkeypatch.setattr(retries.time, "sleep", waited.append)

    def never():
        tried.append(len(waited))
        raise TRANSIENT["ESTALE"]()

    with pytest.raises(OSError, match="Errno"):
        retries.retrying(never)
    # one between each two
    assert tried == list(range(attempts))
    return waited


def test_waiting_grows_to_a_cap_and_is_at_random(monkeypatch):
    caps = [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    rounds = [waits(monkeypatch, 0.2, 5.0, 9) for _ in range(200)]
    for cap, waited in zip(caps, zip(*rounds, strict=True), strict=True):
        assert 0 <= min(waited) < 0.25 * cap
        assert 0.75 * cap < max(waited) <= cap
        assert len(set(waited)) > 190


def test_no_time_is_lost_where_nothing_fails(monkeypatch):
    monkeypatch.setattr(retries.time, "sleep", lambda _: pytest.fail("it waited"))
    assert retries.retrying(lambda: 3) == 3
    with pytest.raises(OSError, match="No space"):
        retries.retrying(lambda: (_ for _ in ()).throw(PERMANENT["ENOSPC"]()))
