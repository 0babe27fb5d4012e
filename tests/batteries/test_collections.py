"""Random trees of groups, arrays and other files, from every kind of store.

The target holds every array of the source, clipped ones with NumPy's bits, and every other byte
as it was, or the run is refused, as where something lies in an array that is no chunk.
"""

import json
import os
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import bits
from servers import Place, missing
from stores import some, stored
from zarr.storage import MemoryStore, ZipStore

from daskclip import clip_by_norm, clip_zarr, verify_zarr
from daskclip.errors import DaskClipError

TAME = ["a", "b", "layer[0]", "a b", "é", "0", "c"]
ODD = [*TAME, "['w']", "a*", "*", "x\\y", ".hidden", ".DS_Store", "zarr", "c.0", "e\u0301", "$(x)"]
LATIN = "n\udcff"  # of a file system: the byte 255, which is not UTF-8
STRAYS = ["note", "c/note", "in/zarr.json", "0/.zarray", "x.bak", "in/deep/er"]
FLOATS = ["f4", ">f8", "f2", "c8"]
# arrays that zarr cannot open, and whether their metadata says that they could be clipped
UNOPENED = {"codec of int": False, "codec of float": True, "bfloat16": True, "object": False}
DOCUMENTS = {2: (".zgroup", ".zarray"), 3: ("zarr.json", "zarr.json")}


def array_files(kind, zarr_format, seed):
    """Files of an array at the root of a store, by key, and its values if it can be clipped."""
    store, x = MemoryStore(), some((3, 5), kind if kind in FLOATS else "f4", seed) * 10
    if kind not in FLOATS:
        x = x.astype("f4" if kind in ("codec of float", "bfloat16") else "i4")
    array = zarr.create_array(
        store, shape=x.shape, chunks=(2, 3), dtype=x.dtype, zarr_format=zarr_format
    )
    array[...] = x
    files = {key: value.to_bytes() for key, value in store._store_dict.items()}
    document = json.loads(files[DOCUMENTS[zarr_format][1]])
    if kind.startswith("codec"):
        if zarr_format == 3:
            document["codecs"].append({"name": "imagecodecs_jpegxl"})
        else:
            document["compressor"] = {"id": "imagecodecs_jpegxl"}
    elif kind in ("bfloat16", "object"):
        document["data_type" if zarr_format == 3 else "dtype"] = kind
    files[DOCUMENTS[zarr_format][1]] = json.dumps(document, indent=3).encode()
    return files, x if kind in FLOATS else None


def group_files(zarr_format):
    store = MemoryStore()
    zarr.create_group(store, zarr_format=zarr_format, attributes={"n": 1})
    return {key: value.to_bytes() for key, value in store._store_dict.items()}


def consolidated(files, zarr_format):
    """The document of a root group that also has what all documents say."""
    names = ("zarr.json",) if zarr_format == 3 else (".zgroup", ".zarray", ".zattrs")
    inside = {k: json.loads(v) for k, v in files.items() if k.rpartition("/")[2] in names}
    if zarr_format == 2:
        return {
            ".zmetadata": json.dumps({"zarr_consolidated_format": 1, "metadata": inside}).encode()
        }
    root = inside.pop("zarr.json")
    inside = {key.removesuffix("/zarr.json"): document for key, document in inside.items()}
    root["consolidated_metadata"] = {
        "kind": "inline", "must_understand": False, "metadata": inside,
    }  # fmt: skip
    return {"zarr.json": json.dumps(root).encode()}


class Tree:
    """Files of a group by key, and what is known of its arrays."""

    def __init__(self):
        self.files, self.kinds, self.values, self.strays = {}, {}, {}, []

    @property
    def unopened_floats(self):
        return [name for name, kind in self.kinds.items() if UNOPENED.get(kind)]

    def below_arrays(self, key):
        """Whether a key is below an array that can be opened."""
        return any(key.startswith(f"{n}/") for n, k in self.kinds.items() if k not in UNOPENED)


@st.composite
def trees(draw, names=ODD):
    zarr_format, tree = draw(st.sampled_from([2, 3])), Tree()
    one = st.sampled_from(names)
    paths = draw(
        st.lists(st.lists(one, min_size=1, max_size=3).map("/".join), min_size=1, max_size=6)
    )
    kinds = draw(st.sampled_from([[*FLOATS, "i4", "file"], [*FLOATS, "i4", "file", *UNOPENED]]))
    stale = draw(st.sampled_from([None, 0, len(paths) // 2, len(paths)]))
    tree.files = group_files(zarr_format)
    for i, path in enumerate(paths):
        if i == stale:
            tree.files |= consolidated(tree.files, zarr_format)
        taken = [*tree.kinds, *(key for key in tree.files if tree.files[key][:4] == b"file")]
        if any(f"{path}/".startswith(f"{t}/") or f"{t}/".startswith(f"{path}/") for t in taken):
            continue
        kind = draw(st.sampled_from(kinds))
        if any(key.startswith(f"{path}/") for key in tree.files):
            continue
        if kind == "file":
            tree.files[path] = b"file" + draw(st.binary(max_size=9))
            continue
        inside, values = array_files(kind, zarr_format, i)
        tree.files |= {f"{path}/{key}": data for key, data in inside.items()}
        tree.kinds[path] = kind
        if values is not None:
            tree.values[path] = values
        for end in [j for j, letter in enumerate(path) if letter == "/"]:
            if draw(st.booleans()):
                own = {f"{path[:end]}/{k}": v for k, v in group_files(zarr_format).items()}
                tree.files = own | tree.files
    return tree


def into_folder(files, folder):
    for key, data in files.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@contextmanager
def opened(kind, files, folder):
    """A source of some kind that holds files."""
    if kind == "folder":
        yield into_folder(files, folder / "x")
    elif kind == "memory":
        from zarr.core.buffer import cpu

        yield MemoryStore({key: cpu.Buffer.from_bytes(data) for key, data in files.items()})
    else:
        with zipfile.ZipFile(folder / "x.zip", "w") as file:
            for key, data in files.items():
                file.writestr(key, data)
        store = ZipStore(folder / "x.zip", mode="r")
        store._sync_open()
        yield store
        store.close()


def values_in(files, name):
    """Values of an array, from the files of a group."""
    with tempfile.TemporaryDirectory() as folder:
        inside = {k[len(name) + 1 :]: v for k, v in files.items() if k.startswith(f"{name}/")}
        return zarr.open_array(into_folder(inside, Path(folder) / "x"), mode="r")[...]


def contents(folder):
    """Bytes of all files in a folder, by key, without the record of a run."""
    return {k: v for k, v in stored(folder).items() if v is not None}


def assert_target(tree, made, clipped):
    """Check the files of a target of a tree in which some arrays were clipped."""
    for name in clipped:
        assert bits(values_in(made, name)) == bits(clip_by_norm(tree.values[name], 1.0)), name
    untouched = {
        key: data
        for key, data in tree.files.items()
        if not any(key.startswith(f"{name}/") for name in clipped)
        or key.rpartition("/")[2] in (".zarray", ".zattrs", "zarr.json")
    }
    assert made.keys() == tree.files.keys()
    assert {key: made[key] for key in untouched} == untouched


def check(tree, source, target, excluded, read, **options):
    """Clip a tree, or check that it is refused for a reason that it has; returns if it was not."""
    clipped = [name for name in tree.values if name not in excluded]

    def clip():
        return clip_zarr(source, target, 1.0, exclude=excluded or None, **options)

    if not clipped or tree.strays or {*tree.unopened_floats} - {*excluded}:
        with pytest.raises(DaskClipError) as caught:
            clip()
        assert "\n" not in str(caught.value)
        return False
    report = clip()
    assert report.arrays == len(clipped)
    assert_target(tree, read(), clipped)
    return True


def add_stray(draw, tree):
    """Put something into the folder of an array."""
    key = f"{draw(st.sampled_from([*tree.kinds]))}/{draw(st.sampled_from(STRAYS))}"
    tree.files[key] = b"{}"
    # in an array that cannot be opened it is carried
    tree.strays += [key] if tree.below_arrays(key) else []


@st.composite
def cases(draw, names=ODD):
    tree = draw(trees(names))
    if tree.kinds and not draw(st.integers(0, 3)):
        add_stray(draw, tree)
    some_of = [n for n in tree.kinds if draw(st.booleans())] if draw(st.booleans()) else []
    # mostly without what would be refused
    out = tree.unopened_floats if draw(st.integers(0, 4)) else []
    return tree, [n for n in tree.kinds if n in {*some_of, *out}]


@settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(case=cases([*ODD, LATIN]), in_place=st.booleans())
def test_a_folder_is_carried_whole(case, in_place):
    tree, excluded = case
    with tempfile.TemporaryDirectory() as folder, opened("folder", tree.files, Path(folder)) as x:
        y = x if in_place else Path(folder) / "y"
        target = None if in_place else y
        whole = check(tree, x, target, excluded, lambda: contents(y), in_place=in_place)
        if not whole:
            assert contents(x) == tree.files
            assert os.listdir(folder) == ["x"]
        elif not in_place:
            verify_zarr(y, x)
            report = clip_zarr(x, y, 1.0, exclude=excluded or None)
            assert report.status == "up to date"


@settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(case=cases(), kind=st.sampled_from(["memory", "zip"]))
def test_a_store_is_carried_whole(case, kind):
    tree, excluded = case
    with tempfile.TemporaryDirectory() as folder, opened(kind, tree.files, Path(folder)) as x:
        y = Path(folder) / "y"
        if check(tree, x, y, excluded, lambda: contents(y)):
            verify_zarr(y, x)


WITHOUT = missing("weed", "s3fs", "obstore")


@pytest.mark.slow
@pytest.mark.skipif(bool(WITHOUT), reason=WITHOUT)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_object_store_is_carried_whole(weed):
    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(
        case=cases(TAME), kind=st.sampled_from(["url", "fsspec", "obstore"]), there=st.booleans()
    )
    def carried(case, kind, there):
        tree, excluded = case
        place, to = Place(weed), Place(weed)
        for key, data in tree.files.items():
            place.obstore().store.put(key, data)
        source, options = place.as_(kind)
        with tempfile.TemporaryDirectory() as folder:
            target, read = Path(folder) / "y", lambda: contents(Path(folder) / "y")
            if there:
                target, more = to.as_(kind)
                options, read = options | more, to.objects
            if check(tree, source, target, excluded, read, **options) and kind != "url":
                verify_zarr(target, source)

    carried()
