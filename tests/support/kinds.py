"""The same Zarr array in every kind of store that a run can read."""

import base64
import os
import warnings
import zipfile
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import fsspec
import zarr
from fsspec.implementations.reference import ReferenceFileSystem
from servers import Place, missing
from web import web
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import FsspecStore, LoggingStore, MemoryStore, ObjectStore, ZipStore

TO_BUFFER = default_buffer_prototype().buffer.from_bytes
ZEROED = 10**18  # a time in nanoseconds


def contents(folder):
    """Bytes of all files below a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Unlisted(MemoryStore):
    """A store without a call that lists."""

    supports_listing = False

    async def list_prefix(self, prefix):
        raise NotImplementedError
        yield

    list_dir = list_prefix


class Forbidden(MemoryStore):
    """A store that may not be listed."""

    async def list_prefix(self, prefix):
        raise PermissionError(13, "Access Denied")
        yield

    list_dir = list_prefix


def in_memory(kind, folder):
    return kind({key: TO_BUFFER(data) for key, data in contents(folder).items()})


def in_fsspec_memory(folder, name):
    memory = fsspec.filesystem("memory")
    if memory.exists(f"/{name}"):
        memory.rm(f"/{name}", recursive=True)
    for key, data in contents(folder).items():
        memory.pipe_file(f"/{name}/{key}", data)


def references(folder, inline):
    """References of fsspec to the files in a folder, or with their bytes."""
    return {
        k: "base64:" + base64.b64encode(data).decode() if inline else [str(folder / k)]
        for k, data in contents(folder).items()
    }


def in_references(folder, inline, path=""):
    fs = ReferenceFileSystem(
        references(folder, inline), asynchronous=True, skip_instance_cache=True,
        remote_protocol="file",
    )  # fmt: skip
    return FsspecStore(fs, path=path)


def zipped(folder, path):
    """Put all files of a folder into a zip file, unless it has them already."""
    found = contents(folder)
    if path.exists():
        with zipfile.ZipFile(path) as file:
            if {name: file.read(name) for name in file.namelist()} == found:
                return path
    with zipfile.ZipFile(path, "w") as file:
        for key, data in found.items():
            # without the time: the same bytes make the same file, but for what is in them
            file.writestr(zipfile.ZipInfo(key), data)
    os.utime(path, ns=(ZEROED, ZEROED))
    return path


def obstored(kind, folder):
    from obstore import store

    if kind == "local":
        return ObjectStore(store.LocalStore(prefix=str(folder)))
    if kind == "http":
        return ObjectStore(store.HTTPStore.from_url(folder, client_options={"allow_http": True}))
    made = store.MemoryStore()
    for key, data in contents(folder).items():
        made.put(key, data)
    return ObjectStore(made)


def in_icechunk(folder, repository, read_only):
    """A session of a repository, to which what changed in the folder is committed."""
    import icechunk

    storage = icechunk.local_filesystem_storage(str(repository))
    repo = icechunk.Repository.open_or_create(storage)
    found, session = contents(folder), repo.writable_session("main")
    stored = zarr.core.sync.sync(_contents(session.store))
    for key in found:
        if stored.get(key) != found[key]:
            zarr.core.sync.sync(session.store.set(key, TO_BUFFER(found[key])))
    if session.has_uncommitted_changes and read_only:
        session.commit("changed")
    return (repo.readonly_session("main") if read_only else session).store


def in_bucket(kind, folder, url):
    """A store of an S3 server, to which what changed in the folder is put."""
    server, _, prefix = url.partition(" ")
    place = Place(SimpleNamespace(url=server))
    place.prefix = prefix
    store, found = place.obstore().store, contents(folder)
    stored = {about["path"] for batch in store.list() for about in batch}
    for key in found:
        if key not in stored or store.get(key).bytes().to_bytes() != found[key]:
            store.put(key, found[key])
    for key in stored - found.keys():
        store.delete(key)
    return getattr(place, kind.partition(" ")[2])()


async def _contents(store: Store):
    keys = [key async for key in store.list()]
    prototype = default_buffer_prototype()
    return {key: (await store.get(key, prototype)).to_bytes() for key in keys}


def closed(store):
    store._sync_open()
    store.close()
    return store


WEB = {
    "web": {},
    "web, no page": {"listing": 404},
    "web, forbidden": {"listing": 403},
    "web, no method": {"listing": 405},
    "web, not implemented": {"listing": 501},
    "web, no links": {"listing": "page"},
    "web, loop": {"listing": "loop"},
    "web, etags": {"etags": True},
    "obstore web": {},
    "obstore web, no method": {"listing": 405},
}
LOCAL = {
    "folder": lambda folder, _: folder,
    "file URL": lambda folder, _: f"file://{folder}",
    "local URL": lambda folder, _: f"local://{folder}",
    "fsspec local": lambda folder, _: FsspecStore.from_url(f"file://{folder}"),
    "zip": lambda folder, beside: zipped(folder, beside / "x.zip"),
    "zip store": lambda folder, beside: ZipStore(zipped(folder, beside / "x.zip"), mode="r"),
    "closed zip store": lambda folder, b: closed(ZipStore(zipped(folder, b / "x.zip"), mode="r")),
    "zip of fsspec": lambda folder, beside: f"zip://::{zipped(folder, beside / 'x.zip')}",
    "memory": lambda folder, _: in_memory(MemoryStore, folder),
    "logging": lambda folder, _: LoggingStore(in_memory(MemoryStore, folder), log_level="ERROR"),
    "unlisted": lambda folder, _: in_memory(Unlisted, folder),
    "forbidden": lambda folder, _: in_memory(Forbidden, folder),
    "fsspec memory": lambda folder, b: in_fsspec_memory(folder, b.name) or f"memory://{b.name}",
    "references": lambda folder, _: in_references(folder, False),
    "inline references": lambda folder, _: in_references(folder, True),
    "obstore local": lambda folder, _: obstored("local", folder),
    "obstore memory": lambda folder, _: obstored("memory", folder),
    "icechunk": lambda folder, beside: in_icechunk(folder, beside / "icechunk", True),
    "icechunk session": lambda folder, beside: in_icechunk(folder, beside / "icechunk", False),
}
S3 = ["s3 fsspec", "s3 obstore"]
KINDS = [*LOCAL, *WEB, *S3]
# what needs other packages, or differs only in a listing, which a web server is not asked for
SLOW = [k for k in KINDS if any(word in k for word in ("obstore", "icechunk", "web,", "s3"))]
NEEDS = {"obstore": ["obstore"], "icechunk": ["icechunk"], "web": ["aiohttp"]}
NEEDS |= {"s3": ["weed", "s3fs", "obstore"]}


def lacking(kind):
    """Reason to skip a kind, or ''."""
    return missing(*(what for word, needed in NEEDS.items() if word in kind for what in needed))


@contextmanager
def served(kind, folder):
    """Serve a folder if the kind is that of a web server; yields its URL, or ''."""
    with web(folder, **WEB[kind]) if kind in WEB else nullcontext("") as url:
        yield url


def opened(kind, folder, url=""):
    """What names the array in ``folder`` in a store of a kind, as it is now."""
    folder = Path(folder)
    if kind in WEB:
        return obstored("http", url) if kind.startswith("obstore") else url
    if kind in S3:
        return in_bucket(kind, folder, url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LOCAL[kind](folder, folder.parent)


def change_chunk(folder, key="c/0/1"):
    """Change some bits of a chunk; its size and the times that can be set stay as they are."""
    path = folder / key
    times, data = path.stat(), bytearray(path.read_bytes())
    data[2] ^= 7
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
