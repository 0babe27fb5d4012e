"""Sources and targets in object stores: a real S3 server, and one without conditional puts."""

import gzip
import itertools
import math
import os
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import zarr
from command_line import shell
from reference import bits
from servers import Place, Rclone, missing
from stores import FORMATS, create, files_of, read, some
from zarr.codecs import GzipCodec

from daskclip import clip_by_norm, clip_zarr, plan_zarr, verify_zarr
from daskclip.engine.run_record import discard, status
from daskclip.errors import DaskClipError, SourceChangedError, TargetExistsError, TemporaryError
from daskclip.storage import StoredArray
from daskclip.storage import retry as retries
from daskclip.target import lease as leases

WITHOUT = missing("weed", "rclone", "s3fs", "obstore")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(WITHOUT), reason=WITHOUT),
    # of botocore and aiohttp when connections are cut
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def place(weed):
    return Place(weed)


VALUES = some((19, 18), "f4")
VALUES[8:16, 8:16] = 0.0


@pytest.fixture(scope="module", params=FORMATS)
def arrays(request, tmp_path_factory):
    """A source and what clipping it to a folder gives, for all and for rows."""
    folder = tmp_path_factory.mktemp("arrays")
    array = zarr.create_array(
        folder / "x", shape=VALUES.shape, chunks=(2, 4), dtype="f4", **FORMATS[request.param]
    )
    array[...] = VALUES
    return {
        axes: (folder / "x", clip_zarr(folder / "x", folder / f"y{axes}", 1.0, axes))
        for axes in (None, 1)
    }


@pytest.mark.parametrize("kind", ["url", "obstore"])
@pytest.mark.parametrize("what", ["array", "file"])
def test_names_that_are_not_utf_8_are_refused_by_name(place, tmp_path, kind, what):
    create(tmp_path / "x" / "a", VALUES, (2, 4))
    zarr.create_group(tmp_path / "x")
    name = os.fsdecode(b"\xe9")
    if what == "array":
        (tmp_path / "x" / "a").rename(tmp_path / "x" / name)
    else:
        (tmp_path / "x" / name).write_text("mine")
    target, options = place.as_(kind)
    with pytest.raises(DaskClipError) as caught:
        clip_zarr(tmp_path / "x", target, 1.0, **options)
    assert str(caught.value).isprintable()
    assert "udce9" in str(caught.value)


def test_large_and_empty_files_of_a_group_are_carried(place, tmp_path):
    create(tmp_path / "x" / "a", VALUES, (2, 4))
    zarr.create_group(tmp_path / "x")
    data = os.urandom(1 << 20) * 110  # in several parts
    (tmp_path / "x" / "large").write_bytes(data)
    (tmp_path / "x" / "empty").write_bytes(b"")
    for kind in ("fsspec", "obstore"):
        place = Place(place)
        place.bucket = "bucket"
        target, options = place.as_(kind)
        clip_zarr(tmp_path / "x", target, 1.0, **options)
        assert (place.objects()["large"], place.objects()["empty"]) == (data, b"")
        clip_zarr(target, tmp_path / kind, 1.0, **options)
        assert (tmp_path / kind / "large").read_bytes() == data


@pytest.mark.parametrize("kind", ["url", "fsspec", "obstore"])
@pytest.mark.parametrize("axes", [None, 1])
def test_the_bytes_and_digests_are_those_of_a_folder(arrays, place, tmp_path, kind, axes):
    source, local = arrays[axes]
    target, options = place.as_(kind)
    report = clip_zarr(source, target, 1.0, axes, **options)
    assert place.objects() == files_of(source.parent / f"y{axes}")
    assert (report.digest, report.target) == (local.digest, place.name)
    assert clip_zarr(source, target, 1.0, axes, **options).status == "up to date"
    # from the store to another prefix of it, and to a folder
    again = Place(place, place.bucket)
    there, more = again.as_(kind)
    copied = clip_zarr(target, there, 1.0, axes, **options | more)
    assert (again.objects(), copied.clipped) == (place.objects(), 0)
    back = clip_zarr(target, tmp_path / "back", 1.0, axes, **options)
    assert (files_of(tmp_path / "back"), back.digest) == (place.objects(), local.digest)
    if kind != "url":
        verified = verify_zarr(target, source)
        assert (verified.slices, verified.target) == (local.slices, place.name)


@pytest.mark.parametrize("kind", ["url", "fsspec", "obstore"])
@pytest.mark.parametrize("global_norm", [False, True])
def test_a_group_goes_there_and_back(place, tmp_path, kind, global_norm):
    group = zarr.create_group(tmp_path / "x", attributes={"step": 1})
    for i, name in enumerate(["b", "in/a", "in/deep/er"]):
        group.create_array(name, shape=(5, 3), chunks=(2, 3), dtype="f4")[...] = i + 1.0
    group.create_array("n", shape=(4,), chunks=(2,), dtype="i4")[:] = 1
    local = clip_zarr(tmp_path / "x", tmp_path / "y", 2.0, global_norm=global_norm)
    target, options = place.as_(kind)
    report = clip_zarr(tmp_path / "x", target, 2.0, global_norm=global_norm, **options)
    assert place.objects() == files_of(tmp_path / "y")
    assert report.digest == local.digest
    again = clip_zarr(tmp_path / "x", target, 2.0, global_norm=global_norm, **options)
    assert again.status == "up to date"
    back = clip_zarr(target, tmp_path / "back", math.inf, global_norm=global_norm, **options)
    assert (files_of(tmp_path / "back"), back.digest) == (place.objects(), local.digest)


def test_a_source_of_other_bytes_is_copied_to_the_byte(place, tmp_path):
    # another level of compression than what zarr would write
    source = create(tmp_path / "x", some((8, 8), "f4"), (4, 8), compressors=None)
    clip_zarr(source, place.fsspec(), 1e9)
    assert place.objects() == files_of(source)
    clip_zarr(place.fsspec(), tmp_path / "y", 1e9)
    assert files_of(tmp_path / "y") == files_of(source)


def test_an_object_store_is_named_by_its_url(place, tmp_path):
    source = create(tmp_path / "x", some((4, 4), "f4"), (2, 4))
    for store in (place.fsspec(), place.obstore()):
        assert status(store) == {"target": f"{place.name} does not exist"}
    clip_zarr(source, place.obstore(), 1.0)
    assert status(place.fsspec())["made by"].startswith("run ")
    assert not discard(place.fsspec())
    assert bits(zarr.open_array(place.obstore(), mode="r")[...]) == bits(
        clip_by_norm(read(source), 1.0)
    )


# --- refused -------------------------------------------------------------------------------------


def refusal(place, *options, code, source, env=None):
    """Error line of a command that is refused before it reads any chunk."""
    done = shell(
        "run", source, place.name, "--clip-norm", 1, *options,
        code="from daskclip.storage import StoredArray; StoredArray.read = None",
        env=env or place.environment,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("daskclip: ")
    return line


@pytest.fixture
def source(tmp_path):
    return create(tmp_path / "x", some((8, 8), "f4"), (2, 4))


def test_wrong_credentials_are_refused(weed, source):
    place = Place(weed, secret="wrong")
    assert "check credentials" in refusal(place, code=3, source=source)
    inside = Place(weed)
    clip_zarr(source, inside.fsspec(), 1.0)
    there = Place(weed, secret="wrong")
    there.prefix = inside.prefix
    assert "check credentials" in refusal(place, code=3, source=there.name)


def test_no_permission_to_write(weed, source):
    place = Place(weed, key="reader")
    assert "check credentials" in refusal(place, code=3, source=source)
    assert not Place(weed).objects()


def test_missing_bucket(weed, source):
    place = Place(weed, bucket="nothing-here", key="writer")
    assert "nothing-here" in refusal(place, code=3, source=source)
    assert "nothing-here" in refusal(Place(weed), code=3, source=place.name)


def test_a_prefix_in_use(place, source):
    store = place.obstore().store
    store.put("c/0/0", b"a chunk of another one")
    assert "c/0/0" in refusal(place, code=5, source=source)
    assert place.objects() == {"c/0/0": b"a chunk of another one"}
    store.delete("c/0/0")
    create(place.fsspec(), some((2, 2), "f4"), (2, 2))
    before = place.objects()
    assert "exists" in refusal(place, code=5, source=source)
    assert place.objects() == before


def test_what_cannot_be_done_in_an_object_store(place, source):
    assert "replaced" in refusal(place, "--overwrite", code=3, source=source)
    clip_zarr(source, place.fsspec(), 1.0)
    with pytest.raises(ValueError, match="replaced"):
        clip_zarr(place.fsspec(), None, 1.0, in_place=True)
    with pytest.raises(ValueError, match="lie in each other"):
        clip_zarr(place.fsspec(), f"{place.name}/inside", 1.0, storage_options=place.options)
    with pytest.raises(PermissionError, match="read-only"):
        clip_zarr(source, Place(place).fsspec().with_read_only(True), 1.0)
    with pytest.raises(ValueError, match="MemoryStore"):
        clip_zarr(source, zarr.storage.MemoryStore(), 1.0)


def test_a_group_with_consolidated_metadata(place, source):
    group = zarr.open_group(place.fsspec(), mode="w", zarr_format=2)
    group.create_array("a", shape=(2,), dtype="f4")
    zarr.consolidate_metadata(place.fsspec())
    before = place.objects()
    with pytest.raises(ValueError, match="consolidated"):
        clip_zarr(source, f"{place.name}/b", 1.0, storage_options=place.options)
    assert place.objects() == before


def test_a_store_without_conditional_puts(tmp_path, source):
    server = Rclone(tmp_path)
    server.start()
    try:
        place = Place(server)
        line = refusal(place, code=3, source=source)
        assert "If-None-Match" in line
        assert not place.objects()
        # it will do as a source
        create(place.fsspec(), read(source), (2, 4))
        report = clip_zarr(place.obstore(), tmp_path / "y", 1.0)
        assert report.clipped == 1
    finally:
        server.kill()


def test_a_server_that_does_not_answer_is_named(source, monkeypatch):
    monkeypatch.setattr(retries, "ATTEMPTS", 1)
    place = Place(SimpleNamespace(url="http://127.0.0.1:9"))
    store = place.obstore(retry_config={"max_retries": 1, "retry_timeout": timedelta(seconds=1)})
    for call in (clip_zarr, plan_zarr):
        with pytest.raises(TemporaryError, match=r"run the same command again") as caught:
            call(source, store, 1.0)
        assert "\n" not in str(caught.value)
    with pytest.raises(TemporaryError, match=r"cannot be reached"):
        plan_zarr(store, source.parent / "y", 1.0)


def test_a_store_that_is_not_installed(source, tmp_path):
    with pytest.raises(DaskClipError, match="no://b/y"):
        plan_zarr(source, "no://b/y", 1.0)
    with pytest.raises(DaskClipError, match="no://b/y"):
        plan_zarr("no://b/y", tmp_path / "y", 1.0)


# --- changed, written twice, taken over -----------------------------------------------------------


def test_an_object_of_the_source_that_changes(place, source, tmp_path, monkeypatch):
    clip_zarr(source, place.fsspec(), 1e9)
    store, original, changed = place.obstore().store, StoredArray.read, []

    def changing(array, region, *args):
        x = original(array, region, *args)
        if not changed:
            data = store.get("c/0/0").bytes().to_bytes()
            store.put("c/0/0", store.get("c/1/0").bytes().to_bytes())
            changed.append(data)
        return x

    monkeypatch.setattr(StoredArray, "read", changing)
    with pytest.raises(SourceChangedError, match="changed during the run"):
        clip_zarr(place.fsspec(), tmp_path / "y", 1.0, axes=1)
    assert sorted(os.listdir(tmp_path)) == ["x"]


def test_an_object_that_another_wrote_is_not_replaced(place, source, monkeypatch):
    store, original = place.obstore().store, StoredArray.write

    def writing(array, region, values):
        store.put("c/3/1", b"a stranger's")
        return original(array, region, values)

    monkeypatch.setattr(StoredArray, "write", writing)
    with pytest.raises(DaskClipError, match=r"c/3/1.* was written by something else"):
        clip_zarr(source, place.fsspec(), 1.0)
    assert store.get("c/3/1").bytes().to_bytes() == b"a stranger's"
    monkeypatch.undo()
    assert discard(place.fsspec())
    assert not place.objects()


@pytest.mark.parametrize("codec", ["zstd", "gzip"])
def test_a_block_that_is_written_twice_is_the_same(place, source, monkeypatch, codec, tmp_path):
    original, clock = StoredArray.write, itertools.count(time.time())
    if codec == "gzip":  # its header holds the time
        source = create(tmp_path / "gzip", read(source), (2, 4), compressors=GzipCodec())
        monkeypatch.setattr(gzip.time, "time", lambda: next(clock))

    def twice(array, region, values):
        assert original(array, region, values) == original(array, region, values)
        return original(array, region, values)

    monkeypatch.setattr(StoredArray, "write", twice)
    clip_zarr(source, place.obstore(), 1.0)
    assert bits(zarr.open_array(place.fsspec(), mode="r")[...]) == bits(
        clip_by_norm(read(source), 1.0)
    )


def test_a_second_run_waits_for_a_sign_of_the_first_and_is_refused(place, source, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_S", 0.1)
    original, seen = StoredArray.read, []

    def second(*args):
        if not seen:
            seen.append(None)
            with pytest.raises(TargetExistsError, match="another run") as caught:
                clip_zarr(source, place.fsspec(), 1.0)
            seen.append(caught.value)
        return original(*args)

    monkeypatch.setattr(StoredArray, "read", second)
    assert clip_zarr(source, place.obstore(), 1.0).status == "clipped"
    assert seen[1].exit_code == 5


def test_only_one_of_many_gets_the_lock(place):
    held, refused_, ready = [], [], threading.Barrier(8)
    stop = threading.Event()

    def hold():
        lease = leases.Lease(leases.ObjectPrefix(place.fsspec(), ""), ".daskclip/lock")
        ready.wait()
        try:
            with lease.held() as require:
                require()
                held.append(1)
                stop.wait(60)
        except Exception as error:
            refused_.append(error)
        if len(held) + len(refused_) == 8:
            stop.set()

    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(held) + len(refused_) < 8:
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    assert {type(error) for error in refused_} == {TargetExistsError}
    assert (len(held), len(refused_)) == (1, 7)
    assert not place.objects()


def test_a_holder_without_a_sign_of_life_is_replaced_and_told(place, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(leases, "LEASE_TIMEOUT_S", 1.0)
    lease = leases.Lease(leases.ObjectPrefix(place.fsspec(), ""), ".daskclip/lock")
    with lease.held() as require:
        monkeypatch.setattr(leases.ObjectPrefix, "put", lambda *_: time.sleep(3))
        require()
        with lease.held() as taken:
            taken()
            with pytest.raises(TargetExistsError):
                require()
