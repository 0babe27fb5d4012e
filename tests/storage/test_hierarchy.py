"""Groups: metadata of any size, other files, arrays that cannot be opened, names of dimensions."""

import json
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from command_line import run
from kinds import Forbidden, Unlisted, opened, zipped
from reference import bits
from stores import create, read, some, stopping_at, stored
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ZipStore

from daskclip import clip_by_norm, clip_zarr, plan_zarr, verify_zarr
from daskclip.errors import (
    DaskClipError,
    InvalidValueError,
    SourceError,
    TargetExistsError,
    VerificationError,
)
from daskclip.storage import Hierarchy
from daskclip.storage.metadata import PARSED, metadata_limit

pytestmark = pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part")

LATIN = os.fsdecode(b"\xe9")


def make(place, names, zarr_format=3, **options):
    """Make a group of float32 arrays of shape (4, 6); returns the group."""
    group = zarr.create_group(place, zarr_format=zarr_format)
    for i, name in enumerate(names):
        one = group.create_array(name, shape=(4, 6), chunks=(2, 6), dtype="f4", **options)
        one[...] = some((4, 6), "f4", i) * 10
    return group


# metadata ----------------------------------------------------------------------------------------

HOSTILE = {
    "lists in lists": b"[" + (b"[" * 900 + b"]" * 900 + b",") * 200 + b"0]",
    "wide text": ("[" + ("[" * 900 + "]" * 900 + ",") * 200 + '"\U0001f600"]').encode(),
    "objects": b"[" + b'{"":{}},' * 50_000 + b"0]",
    "names": b"{" + b",".join(b'"%x":[[]]' % i for i in range(50_000)) + b"}",
    "numbers": b"[" + b"1e9," * 50_000 + b"0]",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_parsing_takes_no_more_memory_than_the_limit_of_metadata_assumes(kind):
    tracemalloc.start()
    try:
        json.loads(HOSTILE[kind])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < PARSED * len(HOSTILE[kind])


@pytest.mark.parametrize("kind", ["attributes", "consolidated metadata"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_metadata_that_could_fill_the_memory_is_refused_by_what_is_large(
    tmp_path, kind, zarr_format
):
    make(tmp_path / "x", "a", zarr_format)
    if kind == "attributes":
        zarr.open_group(tmp_path / "x").attrs["large"] = 1
    else:
        zarr.consolidate_metadata(tmp_path / "x")
    name = "zarr.json" if zarr_format == 3 else {"a": ".zattrs", "c": ".zmetadata"}[kind[0]]
    os.truncate(tmp_path / "x" / name, metadata_limit() + 1)
    with pytest.raises(SourceError, match=rf"{name} has \d+ bytes, mostly {kind}, above .*memory"):
        plan_zarr(tmp_path / "x", tmp_path / "y", 1.0)


def test_consolidated_metadata_of_ten_thousand_sharded_arrays(tmp_path):
    array = zarr.create_array(
        tmp_path / "x" / "one", shape=(8, 8), chunks=(2, 2), shards=(4, 4), dtype="f4",
        dimension_names=["latitude", "longitude"], attributes={"standard_name": "a" * 1000},
    )  # fmt: skip
    array[...] = 2.0
    zarr.create_group(tmp_path / "x")
    path = tmp_path / "x" / "zarr.json"
    one = json.loads((tmp_path / "x" / "one" / "zarr.json").read_text())
    inside = {"kind": "inline", "must_understand": False}
    inside["metadata"] = {"one": one} | {f"group/array-{i:05}": one for i in range(10_000)}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"consolidated_metadata": inside}))
    assert 1 << 24 < path.stat().st_size < metadata_limit()
    # what consolidated metadata names and is not there is no array
    assert [*plan_zarr(tmp_path / "x", tmp_path / "y", 1.0).plans] == ["one"]


@pytest.mark.parametrize("text", ["no json", "[]", '{"node_type": "table"}', "[" * 100_000])
def test_broken_metadata_in_a_group_is_named(tmp_path, text):
    make(tmp_path / "x", "ab")
    (tmp_path / "x" / "a" / "zarr.json").write_text(text)
    with pytest.raises(SourceError, match=r"/x/a is not a zarr .*restore its metadata") as caught:
        clip_zarr(tmp_path / "x", tmp_path / "y", 1.0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["g/../../b", "/etc/b", "g//b", "./b"])
def test_keys_that_lead_out_of_a_folder_are_refused(tmp_path, name):
    store = MemoryStore()
    make(store, "a")
    store._store_dict |= {f"{name}/file": store._store_dict["zarr.json"]}
    with pytest.raises(SourceError, match=f"{name}/file' is not a path in a folder"):
        clip_zarr(store, tmp_path / "y", 1.0)
    assert os.listdir(tmp_path) == []


def test_consolidated_metadata_names_arrays_only_where_a_store_cannot_be_listed(tmp_path):
    store = MemoryStore()
    make(store, "a")
    zarr.consolidate_metadata(store)
    make_later = zarr.open_group(store, use_consolidated=False)
    make_later.create_array("later", shape=(2,), chunks=(2,), dtype="f4")[...] = 9
    assert clip_zarr(store, tmp_path / "y", 1.0).arrays == 2
    assert [*Hierarchy.open(Unlisted(store._store_dict)).arrays] == ["a"]
    make(alone := MemoryStore(), "a")
    with pytest.raises(SourceError, match="cannot be listed, and has no consolidated metadata"):
        clip_zarr(Unlisted(alone._store_dict), tmp_path / "z", 1.0)


@pytest.mark.parametrize("kind", [Unlisted, Forbidden])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_document_that_an_unlisted_store_lacks_is_named(tmp_path, kind, zarr_format):
    store = MemoryStore()
    make(store, ["a", "s/b"], zarr_format, attributes={"n": 1})
    zarr.consolidate_metadata(store)
    assert clip_zarr(kind(store._store_dict), tmp_path / "y", 1.0).arrays == 2
    # the empty attributes of a group need not be stored
    keys = [k for k in store._store_dict if k.startswith("s/") and "z" in k and k != "s/.zattrs"]
    assert len(keys) == (2 if zarr_format == 3 else 3)
    for key in keys:
        data = store._store_dict.pop(key)
        with pytest.raises(SourceError, match=f"{key} is missing, which consolidated") as caught:
            clip_zarr(kind(store._store_dict), tmp_path / "z", 1.0)
        assert "\n" not in str(caught.value)
        store._store_dict[key] = data


# other files -------------------------------------------------------------------------------------

OTHERS = ["OME/METADATA.ome.xml", "README", ".DS_Store", "deep/er/0", "c/0/0", "é/empty", "n" * 255]


def add(folder, names=OTHERS):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"" if name.endswith("empty") else os.urandom(99))


def test_verify_finds_a_change_in_any_other_file(tmp_path):
    make(tmp_path / "x", "a")
    add(tmp_path / "x")
    clip_zarr(tmp_path / "x", tmp_path / "y", 1.0)
    verify_zarr(tmp_path / "y", tmp_path / "x")
    for name in OTHERS:
        path = tmp_path / "y" / name
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([(data or b"?")[-1] ^ 1]))
        with pytest.raises(VerificationError, match=r"files .* belong to no array"):
            verify_zarr(tmp_path / "y")
        path.write_bytes(data)
    verify_zarr(tmp_path / "y")
    (tmp_path / "y" / "more").write_text("")
    with pytest.raises(VerificationError, match=r"files .* belong to no array"):
        verify_zarr(tmp_path / "y")
    (tmp_path / "y" / "more").unlink()
    (tmp_path / "x" / "README").write_text("other")
    with pytest.raises(VerificationError, match=r"files of source .* differ"):
        verify_zarr(tmp_path / "y", tmp_path / "x")


@pytest.mark.parametrize("kind", ["folder", "memory"])
@pytest.mark.parametrize("change", ["changed", "added", "removed"])
def test_another_file_that_changed_is_a_changed_source(tmp_path, monkeypatch, kind, change):
    make(tmp_path / "x", "ab")
    add(tmp_path / "x")
    place = tmp_path / "x"
    if kind == "memory":
        from zarr.core.buffer import cpu

        files = {k: v for k, v in stored(place).items() if v is not None}
        place = MemoryStore({k: cpu.Buffer.from_bytes(v) for k, v in files.items()})

    def write(name, data):
        if kind == "folder":
            (place / name).write_bytes(data)
        else:
            place._store_dict[name] = cpu.Buffer.from_bytes(data)

    def edit():
        if change == "removed":
            (place / "README").unlink() if kind == "folder" else place._store_dict.pop("README")
        else:
            write("README" if change == "changed" else "more", b"x" * 99)

    clip_zarr(place, tmp_path / "y", 1.0)
    assert clip_zarr(place, tmp_path / "y", 1.0).status == "up to date"
    left = stopping_at(monkeypatch)
    left[0] = 1
    with pytest.raises(KeyboardInterrupt):
        clip_zarr(place, tmp_path / "z", 1.0)
    edit()
    with pytest.raises(TargetExistsError, match="exists"):
        clip_zarr(place, tmp_path / "y", 1.0)
    with pytest.raises(TargetExistsError, match="changed since"):
        clip_zarr(place, tmp_path / "z", 1.0)


def test_a_run_that_stops_after_its_last_record_is_resumed_with_other_files(tmp_path, monkeypatch):
    make(tmp_path / "x", "a")
    add(tmp_path / "x")
    clip_zarr(tmp_path / "x", tmp_path / "whole", 1.0)
    left = stopping_at(monkeypatch)
    for lines in (1, 2):
        left[0] = lines
        target = tmp_path / f"y{lines}"
        with pytest.raises(KeyboardInterrupt):
            clip_zarr(tmp_path / "x", target, 1.0)
        if lines == 1:  # a process that is killed while it copies leaves a part of a file
            (staging,) = (tmp_path / f".y{lines}.daskclip").glob("*/")
            (staging / "0123.partial").write_text("part")
        assert clip_zarr(tmp_path / "x", target, 1.0).status == "clipped"
        assert stored(target) == stored(tmp_path / "whole")
        assert clip_zarr(tmp_path / "x", target, 1.0).status == "up to date"
        verify_zarr(target, tmp_path / "x")


@pytest.mark.parametrize("kind", ["folder", "store", "zip"])
def test_a_large_file_is_never_held_whole(tmp_path, kind):
    make(tmp_path / "x", "a")
    with (tmp_path / "x" / "movie.bin").open("wb") as file:
        file.write(b"start")
        file.truncate(1 << 28)
    place = tmp_path / "x"
    if kind == "store":
        place = FsspecStore.from_url(f"file://{place}", {"auto_mkdir": False})
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as file:
            for path in filter(Path.is_file, place.rglob("*")):
                file.write(path, path.relative_to(place))
        place = ZipStore(tmp_path / "x.zip", mode="r")
        place._sync_open()
    tracemalloc.start()
    try:
        hierarchy = Hierarchy.open(place)
        (tmp_path / "y").mkdir()
        hierarchy.copy_others(hierarchy.moved_to(tmp_path / "y"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 26
    assert (tmp_path / "y" / "movie.bin").stat().st_size == 1 << 28


@pytest.mark.parametrize("in_place", [False, True])
def test_links_among_other_files_are_refused(tmp_path, in_place):
    make(tmp_path / "x", "a")
    (tmp_path / "x" / "link").symlink_to("a")
    with pytest.raises(SourceError, match="link is a symbolic link"):
        clip_zarr(tmp_path / "x", None if in_place else tmp_path / "y", 1.0, in_place=in_place)


def test_files_in_an_array_are_refused_in_place_at_any_depth(tmp_path):
    make(tmp_path / "x", "a")
    for name in ("a/notes", "a/c/0/notes", "a/c/.hidden"):
        (tmp_path / "x" / name).write_text("mine")
        with pytest.raises(DaskClipError, match=f"{name} is no part"):
            clip_zarr(tmp_path / "x", None, 1.0, in_place=True)
        (tmp_path / "x" / name).unlink()


INSIDE = ["notes.txt", "c/stray", "c/0/x.bak", "0.bak", "b/zarr.json", "0/.zarray", "0/zarr.json"]


@pytest.mark.parametrize("kind", ["folder", "memory", "zip", "fsspec memory"])
@pytest.mark.parametrize("alone", [True, False])
def test_what_lies_in_an_array_is_refused_and_named(tmp_path, kind, alone):
    make(tmp_path / "x", "ab")
    x = tmp_path / "x" / ("a" if alone else "")
    for name in INSIDE:
        path = tmp_path / "x" / "a" / name
        is_new = not path.parent.exists()
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
        words = {} if alone else {"exclude": "a"}  # one that is only copied
        with pytest.raises(SourceError, match=f"{name} is no part of what is stored in") as caught:
            clip_zarr(opened(kind, x), tmp_path / "y", 1.0, **words)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "y").exists()
        path.unlink()
        if is_new:
            path.parent.rmdir()
        for extra in tmp_path.rglob("x.zip"):
            extra.unlink()
    assert clip_zarr(opened(kind, x), tmp_path / "y", 1.0).arrays == 2 - alone


BOTH = ["n.txt", "s", "a", "zarr.json", "in", "s/zarr.json"]


@pytest.mark.parametrize("kind", ["memory", "zip"])
@pytest.mark.parametrize("name", BOTH)
def test_an_object_that_would_be_a_file_and_a_folder_is_refused(tmp_path, name, kind):
    make(tmp_path / "x", ["a", "s/b", "in/deep/c"])
    (tmp_path / "x" / "in" / "zarr.json").unlink()
    path = zipped(tmp_path / "x", tmp_path / "x.zip")
    with zipfile.ZipFile(path, "a") as file:
        if name not in ("a", "s", "in"):
            file.writestr(f"{name}/x", b"below")
        if not name.endswith("json"):
            file.writestr(name, b"above")
    store = ZipStore(path, mode="r")
    if kind == "memory":
        from zarr.core.buffer import cpu

        with zipfile.ZipFile(path) as file:
            found = {n: cpu.Buffer.from_bytes(file.read(n)) for n in file.namelist()}
        store = MemoryStore(found)
    with pytest.raises(SourceError, match=f"/{name} is an object with others below it") as caught:
        clip_zarr(store, tmp_path / "y", 1.0)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*y*"))


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_what_interrupted_writes_leave_is_no_fault(tmp_path, kind):
    make(tmp_path / "x", "ab")
    token = "0123456789abcdef" * 2
    for name in (f"zarr.{token}.partial", f"c/0/0.{token}.partial", f"c/0/1.{token}", "c/.nfs01"):
        (tmp_path / "x" / "a" / name).write_text("part")
    assert clip_zarr(opened(kind, tmp_path / "x"), tmp_path / "y", 1.0).arrays == 2


def test_the_work_of_another_run_is_not_carried(tmp_path, monkeypatch):
    make(tmp_path / "x", "a")
    create(tmp_path / "source", some((4, 6), "f4"), (2, 6))
    left = stopping_at(monkeypatch)
    left[0] = 1
    with pytest.raises(KeyboardInterrupt):
        clip_zarr(tmp_path / "source", tmp_path / "x" / "b", 1.0)
    assert (tmp_path / "x" / ".b.daskclip").exists()
    assert clip_zarr(tmp_path / "x", tmp_path / "y", 1.0).arrays == 1
    assert not (tmp_path / "y" / ".b.daskclip").exists()
    with pytest.raises(DaskClipError, match=r"\.b\.daskclip is no part"):
        clip_zarr(tmp_path / "x", None, 1.0, in_place=True)


# arrays that cannot be opened --------------------------------------------------------------------


def break_codec(path, data_type):
    document = json.loads((path / "zarr.json").read_text())
    document["data_type"] = data_type
    document["codecs"] = [{"name": "imagecodecs_avif"}]
    (path / "zarr.json").write_text(json.dumps(document))


@pytest.mark.parametrize("data_type", ["float32", "bfloat16", "complex64", "float8_e5m2"])
def test_floats_that_cannot_be_opened_are_refused_until_they_are_excluded(tmp_path, data_type):
    make(tmp_path / "x", ["a", "b[0]"])
    break_codec(tmp_path / "x" / "b[0]", data_type)
    for include in (None, "*", ["b[0]"]):
        with pytest.raises(SourceError, match=r"^array b\[0\] of .* cannot be opened .*exclude"):
            clip_zarr(tmp_path / "x", tmp_path / "y", 1.0, include=include)
    assert clip_zarr(tmp_path / "x", tmp_path / "y", 1.0, exclude="b[0]").arrays == 1
    assert stored(tmp_path / "y" / "b[0]") == stored(tmp_path / "x" / "b[0]")
    path = tmp_path / "y" / "b[0]" / "c" / "0" / "0"
    path.write_bytes(path.read_bytes() + b"?")
    with pytest.raises(VerificationError):
        verify_zarr(tmp_path / "y")


@pytest.mark.parametrize("data_type", ["uint8", {"name": "r24"}, "numpy.object", "string"])
def test_what_cannot_be_clipped_need_not_be_opened(tmp_path, data_type):
    make(tmp_path / "x", "ab")
    break_codec(tmp_path / "x" / "b", data_type)
    assert clip_zarr(tmp_path / "x", tmp_path / "y", 1.0).arrays == 1
    assert stored(tmp_path / "y" / "b") == stored(tmp_path / "x" / "b")
    with pytest.raises(SourceError, match=r"^array b of .* cannot be opened"):
        clip_zarr(tmp_path / "x", tmp_path / "z", 1.0, include=["a", "b"])


def test_packed_integers_that_cannot_be_opened_are_refused(tmp_path):
    group = make(tmp_path / "x", "ab")
    group["b"].attrs["scale_factor"] = 0.1
    break_codec(tmp_path / "x" / "b", "int16")
    with pytest.raises(DaskClipError, match="packed"):
        clip_zarr(tmp_path / "x", tmp_path / "y", 1.0)


# names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["['w']", "layer[0]", "a*", "?", "[!a]", "x\\y"])
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_name_in_the_group_matches_itself(tmp_path, name, option):
    group = make(tmp_path / "x", ["a", "ab", "l", "layer0"])
    os.rename(tmp_path / "x" / "l", tmp_path / "x" / name)
    report = clip_zarr(group, tmp_path / "y", 1.0, **{option: name})
    assert report.arrays == (1 if option == "include" else 3)
    with pytest.raises(InvalidValueError, match="matches no array"):
        clip_zarr(group, tmp_path / "z", 1.0, **{option: f"{name}/none"})


@pytest.mark.parametrize("where", ["array", "file", "chunk", "group"])
@pytest.mark.parametrize("in_place", [False, True])
def test_names_that_are_not_utf_8(tmp_path, where, in_place):
    folder = tmp_path / (LATIN if where == "group" else "g")
    folder.mkdir()
    values = {n: some((4, 6), "f4", i) * 10 for i, n in enumerate("ab")}
    make(folder / "x", "ab")
    if where == "array":
        (folder / "x" / "b").rename(folder / "x" / LATIN)
        values[LATIN] = values.pop("b")
    if where == "file":
        (folder / "x" / LATIN).write_text("mine")
    if where == "chunk":
        (folder / "x" / "a" / "c" / (LATIN + ".partial")).write_text("stray")
        in_place = False
    target = folder / ("x" if in_place else "y")
    words = ["--in-place"] if in_place else [target]
    done = run(
        "run",
        folder / "x",
        *words,
        "--clip-norm",
        1,
        "--html",
        folder / "r.html",
        "--progress",
        "none",
    )
    assert (done.exit_code, done.stderr.count("\n")) == (0, 0), done.stderr
    for name, x in values.items():
        assert bits(read(target / name)) == bits(clip_by_norm(x, 1.0))
    assert (target / LATIN).exists() == (where in ("array", "file"))
    verify_zarr(target, None if in_place else folder / "x")
    assert run("status", target).exit_code == 0


def test_a_message_about_any_name_is_one_line(tmp_path):
    make(tmp_path / "x", "ab")
    break_codec(tmp_path / "x" / "b", "float32")
    for name in ("b\nc", "\x1b[31mred", LATIN, "b\u2028c"):
        (tmp_path / "x" / "b").rename(tmp_path / "x" / name)
        with pytest.raises(SourceError, match="cannot be opened") as caught:
            clip_zarr(tmp_path / "x", tmp_path / "y", 1.0)
        assert str(caught.value).isprintable()
        (tmp_path / "x" / name).rename(tmp_path / "x" / "b")


# images ------------------------------------------------------------------------------------------

AXES = {
    "0.3": (2, ["t", "y", "x"], False),
    "0.4": (2, [{"name": n, "type": "space"} for n in "tyx"], False),
    "0.5": (3, [{"name": n} for n in "tyx"], True),
}


def image(place, version, paths=("0", "s/1")):
    zarr_format, axes, inside = AXES[version]
    scales = {"axes": axes, "datasets": [{"path": path} for path in paths]}
    found = {"multiscales": [{"version": version}, scales]}
    group = zarr.create_group(
        place, zarr_format=zarr_format, attributes={"ome": found} if inside else found
    )
    for i, path in enumerate(paths):
        shape = (2, 4 >> i, 6 >> i)
        group.create_array(path, shape=shape, chunks=shape, dtype="f4")[...] = some(shape, "f4", i)


@pytest.mark.parametrize("version", AXES)
@pytest.mark.parametrize("below", ["", "plate/A/1"])
@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_dimensions_are_those_of_the_image(tmp_path, version, below, kind):
    place = tmp_path / "x" if kind == "folder" else MemoryStore()
    if below:
        zarr.create_group(place, zarr_format=AXES[version][0])
    image(zarr.storage.StorePath(LocalStore(place) if kind == "folder" else place, below), version)
    report = clip_zarr(place, tmp_path / "y", 1.0, dim="y")
    assert report.arrays == 2
    for i, path in enumerate(["0", "s/1"]):
        x = some((2, 4 >> i, 6 >> i), "f4", i)
        name = f"{below}/{path}".lstrip("/")
        assert bits(read(tmp_path / "y" / name)) == bits(clip_by_norm(x, 1.0, 1))
        # the level by itself
        one = zarr.open_array(place, path=name, mode="r")
        clip_zarr(one, tmp_path / f"y{i}", 1.0, dim=["y"])
        assert bits(read(tmp_path / f"y{i}")) == bits(clip_by_norm(x, 1.0, 1))


@pytest.mark.parametrize(
    "attributes",
    [
        {"multiscales": 1}, {"multiscales": [1]}, {"ome": 1}, {"ome": {"multiscales": [{}]}},
        {"multiscales": [{"axes": ["y"], "datasets": [{"path": "a"}]}]},
        {"multiscales": [{"axes": [1, {}], "datasets": [1, {"path": "a"}]}]},
    ],
    ids=str,
)  # fmt: skip
def test_attributes_that_are_no_image_name_no_dimension(tmp_path, attributes):
    make(tmp_path / "x", "a").attrs.update(attributes)
    for source in ("x", "x/a"):
        with pytest.raises(InvalidValueError, match="dim"):
            clip_zarr(tmp_path / source, tmp_path / "y", 1.0, dim="y")


def test_own_names_of_dimensions_go_before_those_of_the_image(tmp_path):
    image(tmp_path / "x", "0.5")
    group = zarr.open_group(tmp_path / "x")
    group.create_array(
        "0", shape=(2, 3, 4), chunks=(2, 3, 4), dtype="f4", dimension_names=list("abc"),
        overwrite=True,
    )[...] = np.ones((2, 3, 4))  # fmt: skip
    clip_zarr(tmp_path / "x" / "0", tmp_path / "y", 1.0, dim="b")
    with pytest.raises(InvalidValueError, match="dim"):
        clip_zarr(tmp_path / "x" / "0", tmp_path / "z", 1.0, dim="y")
