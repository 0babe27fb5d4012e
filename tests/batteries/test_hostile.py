"""Hostile metadata, links and files are refused on one line, or read as zarr reads them.

Each document is read in a separate process with little memory and time, forked from this file run
as a script, which imports once.
"""

import copy
import json
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr
from damage import Payload, dangle, folder, link, loop, pipe
from reference import bits
from stores import create, read, some
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from daskclip import clip_by_norm, clip_zarr, plan_zarr, verify_zarr
from daskclip.errors import DaskClipError, SourceError, TargetError, TargetExistsError

MEMORY, SECONDS = 2**30, 5
HUGE = 2**30
"""Bytes of an array that is only planned: clipping more takes longer, and may be what is meant."""
SHAPE, CHUNKS = (4, 8), (2, 4)
TEMPLATES = {
    "format 3": {
        "compressors": [BloscCodec(cname="zstd"), Crc32cCodec()],
        "dimension_names": ["a", "b"],
        "attributes": {"unit": "K"},
    },
    "format 2": {
        "zarr_format": 2,
        "filters": [numcodecs.Shuffle(4)],
        "compressors": numcodecs.Blosc(),
    },
    "shards": {"shards": (4, 8), "compressors": ZstdCodec(), "attributes": {"unit": "K"}},
}
DEEP = "of depth 100000"
VALUES = [
    *(None, True, -1, 0, 7, 2**31, 10**15, 10**400, 1.5, float("nan"), float("-inf")),
    *("", "x", "../../x", "/etc/passwd", "a\nb", "\ud800", "float64", "|O", "int64", "pickle"),
    *([], [0], [0, 0], [-1, -1], [10**15] * 2, [3, 3], [[1, 2], [3, 4]], [None], ["x", "x"]),
    *({}, {"id": "pickle", "protocol": 5}, {"name": "numcodecs.pickle"}, {"x": {}}, DEEP),
]


def places(document, path=()):
    """Paths of everything in a JSON document."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def changed(document, path, value):
    """A copy with another value at one path."""
    new = copy.deepcopy(document)
    inner = new
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return new


def without(document, path):
    """A copy without the value at one path."""
    new = changed(document, path, None)
    inner = new
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return new


def encoded(document):
    """Bytes of a document, with ``of depth N`` replaced by N nested lists."""
    text = re.sub(
        r'"of depth (\d+)"', lambda m: "[" * int(m[1]) + "]" * int(m[1]), json.dumps(document)
    )
    return text.encode()


def replaced(template, document):
    """Yield documents with each field replaced by each value, and left out."""
    for path in places(document):
        where = f"{template} {'/'.join(map(str, path))}"
        for n, value in enumerate(VALUES):
            yield f"{where} {n}", changed(document, path, value)
        yield f"{where} left out", without(document, path)


def whole(template, document):
    """Yield documents that are malformed as a whole."""
    plain = json.dumps(document)
    for n, data in enumerate(
        [
            *(b"", b"\0", b"null", b"[]", b"{}", b"3", b'"x"', b"NaN", b"[" * 100_000),
            *(plain[:-1].encode(), plain.encode() + b"}", plain.encode() + b" " * 10**6),
            *(plain.encode("utf-8-sig"), plain.encode("utf-16"), plain.encode("utf-32")),
            plain.replace("shape", "sh\xe4pe").encode("latin-1"),
            plain.replace("{", '{"shape": [1], "chunks": [1], "zarr_format": 9, ', 1).encode(),
            (plain[:-1] + ', "shape": [2, 4]}').encode(),
            (plain[:-1] + ', "shape": [8, 8], "zarr_format": 2}').encode(),
            (plain[:-1] + ', "shape": [1' + "0" * 10_000 + ", 8]}").encode(),
            (plain[:-1] + ', "x": 1e999, "y": -0, "attributes": {"x": 1e999}}').encode(),
            (plain[:-1] + ', "' + "x" * 10**6 + '": {}}').encode(),
            (plain[:-1] + ', "must": {"must_understand": true}}').encode(),
            (plain[:-1] + ', "may": {"must_understand": false}}').encode(),
        ]
    ):
        yield f"{template} whole {n}", data
    for n, attributes in enumerate(
        [
            *({"x": f"of depth {depth}"} for depth in (100, 400, 900, 990, 2000, 8000, 30_000)),
            *({"x": "y" * 10**7}, {"x": "y" * 2 * 10**7}, {str(n): n for n in range(2 * 10**5)}),
            *({"x": [{}] * 10**6}, {"\ud800": "\0"}, {"x": 10**4000}, {"": {"": {"": []}}}),
        ]
    ):
        yield f"{template} attributes {n}", document | {"attributes": attributes}


def payloads(documents):
    """Yield documents with which zarr alone would unpickle a payload."""
    two, three, shards = (documents[name] for name in ("format 2", "format 3", "shards"))
    codec = {"id": "pickle", "protocol": 5}
    for dtype in ("|O", "<f4", [["a", "|O"]], "|V8", "<U4", "<M8[s]"):
        for filters in (codec, {"id": "json2"}, {"id": "msgpack2"}, {"id": "vlen-array"}, None):
            for compressor in (codec, two["compressor"], None):
                document = two | {"dtype": dtype, "compressor": compressor, "fill_value": None}
                document |= {"filters": [filters] if filters else None}
                yield f"format 2 payload {len(json.dumps(document))}", document
    for name in ("pickle", "numcodecs.pickle", "json2", "numcodecs.json2", "os.system"):
        codec = {"name": name, "configuration": {"protocol": 5}}
        for codecs in ([codec], [{"name": "bytes"}, codec], [codec, {"name": "bytes"}]):
            yield f"format 3 payload {name} {len(codecs)}", three | {"codecs": codecs}
            inner = changed(shards, ("codecs", 0, "configuration", "codecs"), codecs)
            yield f"shards payload {name} {len(codecs)}", inner
            index = changed(shards, ("codecs", 0, "configuration", "index_codecs"), codecs)
            yield f"shards payload of the index {name} {len(codecs)}", index
    for dtype in ("object", "variable_length_bytes", "string", {"name": "numpy.object"}):
        yield f"format 3 payload {dtype}", three | {"data_type": dtype}


def mutations(folder):
    """Yield name and bytes or content of all documents; templates are made in ``folder``."""
    documents = {}
    for name, options in TEMPLATES.items():
        create(folder / name, some(SHAPE, "f4"), CHUNKS, **options)
        document = ".zarray" if name == "format 2" else "zarr.json"
        documents[name] = json.loads((folder / name / document).read_bytes())
    for name, document in documents.items():
        yield from replaced(name, document)
        yield from whole(name, document)
    yield from payloads(documents)


def make_mutated(folder, every):
    """Make sources of one in ``every`` mutations, of more with payloads; returns the number."""
    templates = folder / "templates"
    chosen = list(mutations(templates))
    random.Random(0).shuffle(chosen)
    dangerous = [m for m in chosen if " payload " in m[0]]
    chosen = chosen[::every] + dangerous[:: every // 10]
    payload = pickle.dumps(Payload(folder / "unpickled"))
    for n, (name, data) in enumerate(chosen):
        template = next(t for t in TEMPLATES if name.startswith(t))
        source = folder / "tried" / str(n) / "x"
        shutil.copytree(templates / template, source)
        data = data if isinstance(data, bytes) else encoded(data)
        (source / (".zarray" if template == "format 2" else "zarr.json")).write_bytes(data)
        if " payload " in name:
            for chunk in source.rglob("*"):
                if chunk.is_file() and not chunk.name.startswith((".z", "zarr")):
                    chunk.write_bytes(payload)
        (source.parent / "name").write_text(name)
    return len(chosen)


def clip_hostile(source):
    """Outcome, message and exit code of clipping one source."""
    target = source.with_name("y")
    try:
        if plan_zarr(source, target, 1.0).nbytes > HUGE:
            return "planned", "", 0
        clip_zarr(source, target, 1.0)
    except DaskClipError as error:
        return "refused", str(error), error.exit_code
    except BaseException:
        return "raised", traceback.format_exc(), None
    same = bits(read(target)) == bits(clip_by_norm(read(source), 1.0))
    return "right" if same else "wrong", "", 0


def attempt(source):
    """Outcome in a forked process, or how that process died."""
    answers, answer = os.pipe()
    child = os.fork()
    if not child:
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        os.close(answers)
        with open(answer, "w") as file:
            json.dump(clip_hostile(source), file)
        os._exit(0)
    os.close(answer)
    with open(answers) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text and not status else ("died", f"status {status}: {text}", None)


def attempt_all(folder):
    """Print the outcome of every source in a folder, a JSON line each."""
    warnings.simplefilter("ignore")
    for place in sorted(Path(folder).iterdir()):
        print(json.dumps([str(place), *attempt(place / "x")]), flush=True)


@pytest.mark.parametrize("every", [100, pytest.param(12, marks=pytest.mark.slow)])
def test_documents_are_refused_or_read_as_zarr_reads_them(tmp_path, every):
    number = make_mutated(tmp_path, every)
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # forking needs one thread
    command = [sys.executable, __file__, str(tmp_path / "tried")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert len(lines) == number >= (40 if every == 100 else 360)
    bad = []
    for place, kind, text, code in lines:
        left = sorted(p.name for p in Path(place).iterdir() if p.name not in ("name", "x"))
        fine = (kind == "right" and left == ["y"]) or (kind == "planned" and not left)
        if kind == "refused":
            fine = "\n" not in text and code in (1, 3) and "y" not in left
            fine &= code == 1 or not left
        if not fine:
            bad.append(((Path(place) / "name").read_text(), kind, text[-2000:], left))
    assert not bad, f"{len(bad)} of {number}: {bad[:5]}"
    assert not (tmp_path / "unpickled").exists()
    # the Blosc library itself prints warnings about its parameters
    printed = [line for line in done.stderr.splitlines() if " parameter must be " not in line]
    assert not printed
    kinds = Counter(kind for _, kind, *_ in lines)
    assert kinds["refused"] > number / 2
    assert kinds["right"]


# --- links and special files ---------------------------------------------------------------------

LAYOUTS = {"format 3": "c/1/0", "format 2": "1.0", "shards": "c/0/0"}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture
def source(tmp_path, layout):
    options = {"shards": {"shards": (4, 8)}, "format 2": {"zarr_format": 2}}.get(layout, {})
    return create(tmp_path / "x", some(SHAPE, "f4"), CHUNKS, **options)


def modes_and_links(folder):
    """Mode and link target of every path below a folder; links are not followed."""
    return {
        str(p.relative_to(folder)): (p.lstat().st_mode, p.is_symlink() and os.readlink(p))
        for p in folder.rglob("*")
    }


def assert_refused_unchanged(kind, code, *words, **call):
    """Check that clipping and planning fail alike, on one line, and change no file."""
    folder = Path(call["source"]).parent
    before = modes_and_links(folder)
    for function in (clip_zarr, plan_zarr):
        with pytest.raises(kind) as caught:
            function(**{"clip_norm": 1.0} | call)
        assert caught.value.exit_code == code
        assert "\n" not in str(caught.value)
        for word in words:
            assert word in str(caught.value)
    assert modes_and_links(folder) == before


@pytest.mark.parametrize("change", [link, dangle, loop, folder, pipe])
@pytest.mark.parametrize("in_place", [False, True])
def test_chunks_that_are_no_files_are_refused(tmp_path, source, layout, change, in_place):
    change(source, LAYOUTS[layout])
    before = modes_and_links(tmp_path)
    with pytest.raises(SourceError, match=LAYOUTS[layout]) as caught:
        clip_zarr(source, None if in_place else tmp_path / "y", 1.0, in_place=in_place)
    assert (caught.value.exit_code, "\n" in str(caught.value)) == (3, False)
    assert modes_and_links(tmp_path) == before


def test_a_folder_of_chunks_that_is_a_link_is_refused(tmp_path):
    source = create(tmp_path / "x", some(SHAPE, "f4"), CHUNKS)
    (source / "c/1").rename(tmp_path / "elsewhere")
    (source / "c/1").symlink_to(tmp_path / "elsewhere")
    before = modes_and_links(tmp_path)
    with pytest.raises(SourceError, match="c/1 is a symbolic link"):
        clip_zarr(source, tmp_path / "y", 1.0)
    assert modes_and_links(tmp_path) == before


@pytest.mark.parametrize("change", [link, dangle, loop, folder, pipe])
def test_metadata_that_is_no_file_is_refused(tmp_path, source, layout, change):
    (tmp_path / "deep" / "deep").mkdir(parents=True)
    source = source.rename(tmp_path / "deep" / "deep" / "x")
    change(source, ".zarray" if layout == "format 2" else "zarr.json")
    assert_refused_unchanged(SourceError, 3, source=source, target=source.with_name("y"))


def test_attributes_that_are_a_link_are_refused(tmp_path):
    options = {"zarr_format": 2, "attributes": {"a": 1}}
    source = create(tmp_path / "x", some(SHAPE, "f4"), CHUNKS, **options)
    (source / ".zattrs").rename(tmp_path / "elsewhere")
    (source / ".zattrs").symlink_to(tmp_path / "elsewhere")
    words = (".zattrs", "symbolic link")
    assert_refused_unchanged(SourceError, 3, *words, source=source, target=tmp_path / "y")


@pytest.mark.parametrize("there", ["array", "nothing", "itself"])
def test_a_target_that_is_a_link_is_refused(tmp_path, there):
    source = create(tmp_path / "x", some(SHAPE, "f4"), CHUNKS)
    target = tmp_path / "y"
    if there == "array":
        clip_zarr(source, tmp_path / "array", 1.0)
    target.symlink_to(target if there == "itself" else tmp_path / there)
    call = {"source": source, "target": target}
    assert_refused_unchanged(DaskClipError, 3, "is a link", **call, overwrite=True)
    if there == "array":
        # the link leads to the result of the same call, but is still not written to
        assert_refused_unchanged(TargetError, 3, "is a link", **call)
    else:
        assert_refused_unchanged(TargetExistsError, 5, "exists", **call)


def test_a_target_in_a_linked_folder_is_made_where_it_leads(tmp_path):
    source = create(tmp_path / "x", some(SHAPE, "f4"), CHUNKS)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    report = clip_zarr(source, tmp_path / "link" / "y", 1.0)
    assert report.target == str(tmp_path / "real" / "y")
    assert bits(read(tmp_path / "real" / "y")) == bits(clip_by_norm(read(source), 1.0))
    assert sorted(p.name for p in (tmp_path / "real").iterdir()) == ["y"]
    assert (tmp_path / "link").is_symlink()
    for name in ("real", "link", "real/../link", "link/./"):
        again = clip_zarr(source, f"{tmp_path}/{name}/y", 1.0)
        assert again.status == "up to date"
    verify_zarr(tmp_path / "link" / "y", tmp_path / "x")


@pytest.mark.parametrize("where", ["deep/../y", "deep/deep/../../y", "link/../y", "link/../../y"])
def test_a_target_with_dots_is_made_where_the_system_finds_it(tmp_path, where):
    source = create(tmp_path / "x", some(SHAPE, "f4"), CHUNKS)
    (tmp_path / "deep" / "deep" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "deep")
    clip_zarr(source, f"{tmp_path}/{where}", 1.0)
    assert bits(read(f"{tmp_path}/{where}")) == bits(clip_by_norm(read(source), 1.0))


@pytest.mark.parametrize("where", ["link/y", "link/../x/y", "x/../x/y", "link"])
def test_no_name_hides_that_a_target_lies_inside_the_source(tmp_path, where):
    source = create(tmp_path / "x", some(SHAPE, "f4"), CHUNKS)
    (tmp_path / "link").symlink_to(source)
    for name in (source, tmp_path / "link"):
        for overwrite in (False, True):
            before = modes_and_links(tmp_path)
            with pytest.raises(DaskClipError):
                clip_zarr(name, f"{tmp_path}/{where}", 1.0, overwrite=overwrite)
            assert modes_and_links(tmp_path) == before


@pytest.mark.parametrize("where", ["link", "deep/../x", "deep/../link/", "./x"])
def test_a_source_may_be_given_by_any_name(tmp_path, monkeypatch, where):
    create(tmp_path / "x", some(SHAPE, "f4"), CHUNKS)
    wanted = bits(clip_by_norm(read(tmp_path / "x"), 1.0))
    (tmp_path / "deep").mkdir()
    (tmp_path / "link").symlink_to("x")
    monkeypatch.chdir(tmp_path)
    report = clip_zarr(where, "y", 1.0)
    assert (report.source, report.target) == (str(tmp_path / "x"), str(tmp_path / "y"))
    assert bits(read(tmp_path / "y")) == wanted
    clip_zarr(where, None, 1.0, in_place=True)
    assert (tmp_path / "link").is_symlink()
    assert bits(read(tmp_path / "x")) == wanted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "link", "x", "y"]


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_an_array_of_objects_is_refused_before_anything_is_decoded(tmp_path, zarr_format):
    options = {"shape": 3, "chunks": 2, "zarr_format": zarr_format, "dtype": str}
    source = tmp_path / "x"
    zarr.create_array(source, **options)[:] = np.array(["a", "b", "c"], object)
    for chunk in source.rglob("*"):
        if chunk.is_file() and not chunk.name.startswith((".z", "zarr")):
            chunk.write_bytes(pickle.dumps(Payload(tmp_path / "unpickled")))
    assert_refused_unchanged(TypeError, 3, source=source, target=tmp_path / "y")
    assert not (tmp_path / "unpickled").exists()


if __name__ == "__main__":
    attempt_all(sys.argv[1])
