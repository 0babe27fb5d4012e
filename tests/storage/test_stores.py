"""Paths, URLs and stores that name a source or a target: parsed, opened, or refused in one line."""

import json
import os
import sys
import warnings
import zipfile
from pathlib import Path

import dask
import pytest
import zarr
from command_line import assert_fails, run
from fsspec.registry import _registry as registry
from kinds import contents, in_fsspec_memory, in_memory, obstored, opened, references, zipped
from reference import bits
from servers import missing
from stores import create, read, some
from web import web
from zarr.storage import FsspecStore, MemoryStore, ObjectStore, ZipStore

from daskclip import clip_by_norm, clip_zarr, plan_zarr, stats_zarr, verify_zarr
from daskclip.engine.run_record import status
from daskclip.errors import DaskClipError, SourceError, SourceNotFoundError, TargetError
from daskclip.storage import object_store as objects
from daskclip.storage import parse_location, stores
from daskclip.storage.stores import store_version

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
needs_web = pytest.mark.skipif(bool(missing("aiohttp")), reason=missing("aiohttp"))
needs_obstore = pytest.mark.skipif(bool(missing("obstore")), reason=missing("obstore"))


@pytest.fixture
def x(tmp_path):
    return create(tmp_path / "x", some((8, 8), "f4"), (2, 4))


@pytest.fixture
def group(tmp_path):
    group = zarr.create_group(tmp_path / "g")
    for name in ("a", "in/b"):
        group.create_array(name, shape=(4, 4), chunks=(2, 2), dtype="f4")[...] = 2.0
    return tmp_path / "g"


@pytest.fixture
def server(tmp_path):
    with web(tmp_path) as url:
        yield url


def assert_clipped(source, x, target, **options):
    report = clip_zarr(source, target, 1.0, **options)
    assert bits(read(target)) == bits(clip_by_norm(read(x), 1.0))
    return report


def refusal(kind, *args, **options):
    with pytest.raises(kind) as caught:
        clip_zarr(*args, 1.0, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    return str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["file://{0}", "local://{0}", "file://{1}", "local://{1}", "file://./{1}", "{1}", "~/{1}"],
)
def test_urls_of_local_files_are_paths(x, tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assert_clipped(url.format(x, "x"), x, tmp_path / "y").source == str(x)
    assert clip_zarr(x, url.format(tmp_path / "z", "z"), 1.0).target == str(tmp_path / "z")
    assert clip_zarr(url.format(x, "x"), None, 1.0, in_place=True).target == str(x)


def test_a_name_with_colons_is_a_path_if_it_is_there(x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.rename(x, "a::b")
    assert_clipped("a::b", Path("a::b"), tmp_path / "y")


@needs_web
@pytest.mark.parametrize("end", ["", "/"])
def test_a_web_server_is_a_source_by_its_url(x, tmp_path, server, end):
    assert assert_clipped(f"{server}/x{end}", x, tmp_path / "y").source == f"{server}/x"


def test_the_memory_of_fsspec_is_a_source_by_its_url(x, tmp_path):
    in_fsspec_memory(x, "some/x")
    assert assert_clipped("memory://some/x", x, tmp_path / "y").source == "memory:///some/x"
    same = FsspecStore.from_url("memory://some/x")
    assert clip_zarr(same, tmp_path / "y", 1.0).status == "up to date"


@pytest.mark.parametrize(
    "url",
    [
        "simplecache::file://{x}",
        "zip://::{x}.zip",
        "zip://in/x::file://{x}.zip",
        "simplecache::zip://in/x::file://{x}.zip",
        "reference://::{x}.json",
        pytest.param("simplecache::{server}/x", marks=needs_web),
    ],
)
def test_chained_urls_are_those_of_fsspec(x, tmp_path, server, url):
    (tmp_path / "a").mkdir()
    within = tmp_path / ("a/in/x" if "in/x" in url else "a")
    os.makedirs(within.parent, exist_ok=True)
    create(within, read(x), (2, 4))
    zipped(tmp_path / "a", tmp_path / "x.zip")
    (tmp_path / "x.json").write_text(json.dumps(references(x, True)))
    report = assert_clipped(url.format(x=x, server=server), x, tmp_path / "y")
    assert "0x" not in report.source


def test_options_are_passed_to_file_systems(x, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(references(x, False)))
    options = {"fo": str(tmp_path / "x.json"), "remote_protocol": "file"}  # codespell:ignore fo
    assert_clipped("reference://", x, tmp_path / "y", storage_options=options)


# --- targets --------------------------------------------------------------------------------------


@needs_web
@pytest.mark.parametrize(
    "url",
    ["http://h/y", "https://h/y", "memory://b/y", "memory://y", "simplecache::{0}", "zip://y::{1}"],
)
def test_what_cannot_be_written_is_named(x, tmp_path, url):
    path = zipped(x, tmp_path / "x.zip")
    in_fsspec_memory(x, "b")
    scheme = url.split(":")[0]
    text = refusal(TargetError, x, url.format(f"file://{tmp_path}/y", path))
    assert text.startswith(f"{scheme}:// cannot be written; ")
    with pytest.raises(TargetError, match=f"{scheme}:// cannot"):
        plan_zarr(x, url.format(f"file://{tmp_path}/y", path), 1.0)


@pytest.mark.parametrize(
    "url", ["zip::file:///{0}/new.zip", "ZIP://y::file:///{0}/new.zip", "tar://::s3://no/new.tar"]
)
def test_what_cannot_be_written_is_told_before_it_is_opened(x, tmp_path, url):
    scheme = url.split(":")[0].lower()
    text = refusal(TargetError, x, url.format(tmp_path))
    assert text.startswith(f"{scheme}:// cannot be written; ")
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("url", ["foo://b", "foo://b/y", "simplecache::foo://b"])
def test_a_protocol_that_nobody_knows_is_named(x, tmp_path, url):
    text = refusal(SourceError, url, tmp_path / "y")
    assert f"source {url} has an unknown protocol (" in text
    assert "foo" in refusal(TargetError, x, url.removeprefix("simplecache::"))


@needs_web
@needs_obstore
def test_a_store_of_a_web_server_cannot_be_written(x, server):
    text = refusal(TargetError, x, obstored("http", f"{server}/y"))
    assert text.startswith("http:// cannot be written; ")


@pytest.mark.parametrize("name", ["o.zip", "o.ZIP", "file://{0}/o.zip", "x.zip"])
def test_a_zip_file_is_no_target(x, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    zipped(x, tmp_path / "x.zip")
    before = contents(tmp_path)
    text = refusal(TargetError, x, name.format(tmp_path))
    assert "zip" in text.lower()
    assert "; " in text
    assert contents(tmp_path) == before


@pytest.mark.parametrize("mode", ["r", "w"])
def test_a_store_of_a_zip_file_is_no_target(x, tmp_path, mode):
    zipped(x, tmp_path / "x.zip")
    before = contents(tmp_path)
    assert "; " in refusal(DaskClipError, x, ZipStore(tmp_path / "x.zip", mode=mode))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("scheme", "package"), [("gs", "gcsfs"), ("abfs", "adlfs"), ("s3", "s3fs")]
)
@pytest.mark.parametrize("role", ["source", "target"])
def test_a_package_that_is_missing_is_named(x, tmp_path, monkeypatch, scheme, package, role):
    places = [f"{scheme}://b/x", tmp_path / "y"] if role == "source" else [x, f"{scheme}://b/y"]
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(registry, scheme, raising=False)
    done = run("run", *places, "--clip-norm", 1)
    assert_fails(done, 3, f"{role} ", package, "; install it")


# --- stores that are not open, and zip files ------------------------------------------------------


@pytest.mark.parametrize("name", ["x.zip", "X.ZIP", "file://{0}/x.zip"])
def test_a_path_to_a_zip_file_is_a_source(x, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = zipped(x, tmp_path / name.rpartition("/")[2])
    assert assert_clipped(name.format(tmp_path), x, tmp_path / "y").source == str(path)


def test_a_zip_file_cannot_be_replaced_and_has_no_run(x, tmp_path):
    path = zipped(x, tmp_path / "x.zip")
    assert "ZipStore, which cannot be locked" in refusal(TargetError, path, None, in_place=True)
    assert status(path) == {"target": f"{path} exists"}
    with pytest.raises(DaskClipError, match="no record of a run"):
        verify_zarr(path)


def test_a_group_in_a_zip_file(group, tmp_path):
    path = zipped(group, tmp_path / "g.zip")
    assert clip_zarr(path, tmp_path / "y", 1.0).arrays == 2
    assert clip_zarr(ZipStore(path), tmp_path / "y", 1.0).status == "up to date"
    clip_zarr(zarr.open_group(ZipStore(path), mode="r")["in/b"], tmp_path / "z", 1.0)
    assert bits(read(tmp_path / "z")) == bits(read(tmp_path / "y/in/b"))


def test_a_folder_named_as_a_zip_file_stays_a_folder(tmp_path):
    source = create(tmp_path / "x.zip", some((4, 4), "f4"), (2, 2))
    assert_clipped(source, source, tmp_path / "y")
    assert clip_zarr(source, None, 1.0, in_place=True).status == "clipped"


def test_a_zip_file_that_is_missing_or_broken(tmp_path):
    assert "does not exist" in refusal(SourceNotFoundError, tmp_path / "no.zip", tmp_path / "y")
    (tmp_path / "x.zip").write_bytes(b"no zip file")
    assert "not a zip file" in refusal(SourceError, tmp_path / "x.zip", tmp_path / "y")


@pytest.mark.parametrize("mode", ["r", "a", "w"])
def test_a_zip_store_that_is_not_open_is_only_read(x, tmp_path, mode):
    path = zipped(x, tmp_path / "x.zip")
    before = path.read_bytes()
    assert_clipped(ZipStore(path, mode=mode), x, tmp_path / "y")
    assert path.read_bytes() == before


def test_a_zip_store_whose_file_was_replaced_is_read_from_the_new_one(x, tmp_path):
    path = zipped(x, tmp_path / "x.zip")
    store = ZipStore(path, mode="r")
    array = zarr.open_array(store, mode="r")
    other = create(tmp_path / "other", some((8, 8), "f4", 1), (2, 4))
    with zipfile.ZipFile(tmp_path / "new.zip", "w") as file:
        for key, data in contents(other).items():
            file.writestr(key, data)
    os.replace(tmp_path / "new.zip", path)
    assert_clipped(array, other, tmp_path / "y")
    store.close()


@needs_obstore
def test_stores_are_named_without_addresses(x, tmp_path):
    from obstore import store

    named = {
        "s3://b/p/q": store.S3Store("b", prefix="p", region="r"),
        "gs://b/q": store.GCSStore("b"),
        "az://c/q": store.AzureStore("c", account_name="a", access_key="aaaa"),
        "http://h/a/b/q": store.HTTPStore.from_url("http://h/a/b"),
        f"LocalStore/{str(x)[1:]}/q": store.LocalStore(str(x)),
        "MemoryStore/q": store.MemoryStore(),
    }
    for name, one in named.items():
        assert objects.url(ObjectStore(one), "q") == name
    assert objects.url(MemoryStore(), "q") == "MemoryStore/q"
    assert objects.url(ZipStore("x.zip"), "q") == f"{os.getcwd()}/x.zip/q"


@needs_obstore
def test_a_memory_store_is_not_another_one(x, tmp_path):
    source, target = obstored("memory", x), obstored("memory", tmp_path / "none")
    assert clip_zarr(source, target, 1.0).status == "clipped"
    assert clip_zarr(source, target, 1.0).status == "up to date"
    verify_zarr(target, source)
    source.store.put("c/0/0", source.store.get("c/1/0").bytes())
    with pytest.raises(FileExistsError):
        clip_zarr(source, target, 1.0)
    with pytest.raises(TargetError, match="lie in each other"):
        clip_zarr(source, zarr.storage.StorePath(source, "in"), 1.0)


@pytest.mark.parametrize(
    "kind", ["fsspec memory", "zip", pytest.param("obstore memory", marks=needs_obstore)]
)
def test_what_only_this_process_sees_is_not_given_to_others(x, tmp_path, kind):
    source = opened(kind, x)
    if kind == "zip":
        source = zarr.open_array(ZipStore(source, mode="a")).store
    with dask.config.set(scheduler="processes"):
        assert "other processes" in refusal(DaskClipError, source, tmp_path / "y")
        with pytest.raises(DaskClipError, match="other processes"):
            clip_zarr(x, tmp_path / "y", axes=[], limits=source)
        with pytest.raises(DaskClipError, match="other processes"):
            stats_zarr(source)
    with dask.config.set(scheduler="synchronous"):
        assert_clipped(source, x, tmp_path / "y")


# --- listings of web servers ----------------------------------------------------------------------


@needs_web
@pytest.mark.parametrize("listing", ["links", "page", "loop", 403, 404, 405, 501])
def test_listings_of_web_servers_end(tmp_path, listing):
    create(tmp_path / "a b/x", some((8, 8), "f4"), (2, 4))
    (tmp_path / "a b/note ä.txt").write_text("note")
    with web(tmp_path, listing) as url:
        store, path = parse_location(f"{url}/a b", None)
        if listing in ("links", "page"):
            wanted = contents(tmp_path / "a b") if listing == "links" else []
            assert sorted(s.key for s in objects.listed(store, path)) == sorted(wanted)
        else:
            with pytest.raises(Exception, match=r"too many|Not|Method|Forbidden|a b") as caught:
                list(objects.listed(store, path))
            assert objects.cannot_list(caught.value)


@needs_web
@pytest.mark.parametrize("listing", ["links", "page", "loop", 405, 501])
def test_a_chunk_that_no_page_links_to_is_read(tmp_path, listing):
    # those that are missing are not taken from a listing either
    x = create(tmp_path / "x", some((8, 8), "f4"), (2, 4))
    (x / "c/1/0").unlink()
    with web(tmp_path, listing) as url:
        assert_clipped(f"{url}/x", x, tmp_path / "y")


def test_versions_of_whole_stores(x, tmp_path):
    assert store_version(in_memory(MemoryStore, x)) == ""
    path = zipped(x, tmp_path / "x.zip")
    assert store_version(ZipStore(path))
    # what is written to it may not be in the file yet
    assert store_version(ZipStore(path, mode="a")) == ""


@needs_web
@pytest.mark.parametrize("listing", ["links", "page", "loop", 404, 405, 501])
def test_a_group_on_a_web_server_that_its_metadata_describes(group, tmp_path, monkeypatch, listing):
    monkeypatch.setattr(stores, "WEB_DEPTH", 8)  # or links would be followed for ten seconds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(group)
    with web(tmp_path, listing) as url:
        assert clip_zarr(f"{url}/g", tmp_path / "y", 1.0).arrays == 2
    for name in ("a", "in/b"):
        assert bits(read(tmp_path / "y" / name)) == bits(clip_by_norm(read(group / name), 1.0))


@needs_web
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("listing", ["links", "page", "loop", 404, 405, 501])
def test_a_group_on_a_web_server_is_whole_or_refused(group, tmp_path, listing):
    with web(tmp_path, listing) as url:
        if listing == "links":
            assert clip_zarr(f"{url}/g", tmp_path / "y", 1.0).arrays == 2
        else:
            refusal(SourceError, f"{url}/g", tmp_path / "y")


LISTINGS = ["links", "escaped", "absolute", "some", "no slash", "page", 403]
NAMES = [
    "kernel:0",
    "h#sh",
    "q?m",
    "per%cent",
    "per%25",
    "a b",
    "r&d",
    "é",
    "data:0",
    "x+y",
    "in/b",
]


@needs_web
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("consolidated", [True, False])
@pytest.mark.parametrize("listing", LISTINGS)
def test_members_of_any_name_on_a_web_server(tmp_path, listing, consolidated):
    group = zarr.create_group(tmp_path / "g", zarr_format=2 if listing == "escaped" else 3)
    values = {name: some((4, 4), "f4", i) * 9 for i, name in enumerate(["a", *NAMES])}
    for name, x in values.items():
        group.create_array(name, data=x, chunks=(2, 2))
    if consolidated:
        zarr.consolidate_metadata(tmp_path / "g")
    with web(tmp_path, listing) as url:
        if not consolidated and listing not in LISTINGS[:3]:
            if listing != "some":  # nothing says that there is more
                refusal(SourceError, f"{url}/g", tmp_path / "y")
            return
        assert clip_zarr(f"{url}/g", tmp_path / "y", 1.0).arrays == len(values)
    for name, x in values.items():
        assert bits(read(tmp_path / "y" / name)) == bits(clip_by_norm(x, 1.0))


@needs_web
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("listing", ["links", "some", 403])
def test_an_array_that_is_named_and_missing_is_refused(tmp_path, listing, zarr_format):
    group = zarr.create_group(tmp_path / "g", zarr_format=zarr_format)
    for name in "ab":
        group.create_array(name, shape=(4, 4), chunks=(2, 2), dtype="f4")
    zarr.consolidate_metadata(tmp_path / "g")
    key = "b/zarr.json" if zarr_format == 3 else "b/.zarray"
    (tmp_path / "g" / key).unlink()
    with web(tmp_path, listing) as url:
        text = refusal(SourceError, f"{url}/g", tmp_path / "y")
    assert f"/g/{key} is missing" in text
