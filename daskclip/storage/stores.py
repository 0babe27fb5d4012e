"""Stores by path, URL or object, and what they lack: versions, listings, and being written."""

import asyncio
import os
import pickle
import re
from html import unescape
from typing import Any
from urllib.parse import quote, unquote

import zarr
from fsspec import url_to_fs
from fsspec.core import split_protocol
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.local import LocalFileSystem
from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, ObjectStore, StorePath, ZipStore

from daskclip.errors import InvalidValueError, error_text
from daskclip.storage import durable
from daskclip.storage.foreign.store import FlatStore

UNQUOTED = "/:@!$&'()*+,;=~"  # in paths of URLs as yarl, which requests them, writes them
WEB_DEPTH, WEB_FOLDERS = 64, 10_000  # levels and folders of links that are followed
LINK = re.compile(r"(\./)?(?!\.\.?/?$|(javascript|mailto|tel):|data:[,;])[^/?#]+/?")
"""Link, quoted, to what is in the same folder."""
PROTOCOL = re.compile(r"(?:^|::)([^:/]+)(?=::|://)")
# in these nothing can be created that all processes see; fsspec finds that out late, or never
READ_ONLY = {"http", "https", "memory", "reference", "zip", "tar", "libarchive"}
READ_ONLY |= {"simplecache", "filecache", "blockcache"}


def require_settings() -> None:
    """Refuse settings of zarr with which it cannot open any array, once one cannot be opened."""
    serializer: Any = {"name": "bytes", "configuration": {"endian": "little"}}
    compressors: Any = [{"name": n, "configuration": {}} for n in ("blosc", "gzip", "zstd")]
    try:
        zarr.create_array(
            {}, shape=1, dtype="float32", zarr_format=3, serializer=serializer,
            compressors=compressors,
        )  # fmt: skip
    except Exception as error:  # of whatever a setting is taken for
        raise InvalidValueError(
            f"zarr cannot open any array ({error_text(error)}); check its settings: variables "
            "ZARR_* and files of its configuration"
        ) from error


def parse_location(
    location: object, options: dict[str, Any] | None
) -> str | tuple[Store, str] | None:
    """Folder, or store and key, that an argument of the user names; None for other types.

    ``options`` are passed to fsspec for a URL.
    """
    if isinstance(location, zarr.Array | zarr.Group):
        location = location.store_path
    if isinstance(location, str | os.PathLike):
        name = os.fspath(location)
        if split_protocol(name)[0] in LocalFileSystem.protocol and "::" not in name:
            name = LocalFileSystem._strip_protocol(name)
        if "://" in name or ("::" in name and not os.path.lexists(name)):
            location = StorePath(*open_url(name, options))
        else:
            name = os.path.expanduser(name)
            is_zip = name.lower().endswith(".zip") and os.path.isfile(name)
            return (_opened(name), "") if is_zip else name
    if isinstance(location, Store):
        location = StorePath(location)
    if not isinstance(location, StorePath):
        return None
    store, path = location.store, location.path
    # opened again: it may be closed, or the file replaced; one that is being written stays as it is
    if isinstance(store, ZipStore) and (store.read_only or not store._is_open):
        store = _opened(store.path)
    if isinstance(store, FlatStore):
        store.require_same()
    fs = getattr(store, "fs", None)
    if isinstance(store, FsspecStore) and isinstance(getattr(fs, "sync_fs", fs), LocalFileSystem):
        return f"{store.path}/{path}".rstrip("/")
    # zarr has opened its own store for a local path; only the path is kept
    return str(store.root / path) if isinstance(store, LocalStore) else (store, path)


def read_only_protocol(location: object) -> str:
    """Protocol of a URL by which nothing can be created, or ''; decided without opening it."""
    name = os.fspath(location) if isinstance(location, str | os.PathLike) else ""
    found = [] if os.path.lexists(name) else PROTOCOL.findall(name)
    return next((one.lower() for one in found if one.lower() in READ_ONLY), "")


def _opened(path: str | os.PathLike[str]) -> ZipStore:
    # workers may have another working directory
    store = ZipStore(os.path.realpath(path))
    ensure_open(store)
    return store


def open_url(url: str, options: dict[str, Any] | None) -> tuple[Store, str]:
    """Store of a whole bucket, and the key in it that a URL names."""
    if "::" in url:
        # zarr takes a cache for asynchronous, which it is not
        fs, path = url_to_fs(url, **(options or {}))
        return FsspecStore(AsyncFileSystemWrapper(fs, asynchronous=True), path=path), ""
    found = FsspecStore.from_url(url, options)
    path = found.path
    # a web server has no buckets, and its paths are URLs
    if "://" in path or "/" not in path[1:]:
        return found, ""
    # the whole bucket, since groups above a target are checked too
    cut = path.index("/", 1)
    return FsspecStore(found.fs, path=path[:cut]), path[cut:].strip("/")


def path_in(store: FsspecStore, key: str) -> str:
    """Path of a key in the file system of a store; as for zarr, the root of all adds nothing."""
    root = store.path.rstrip("/")
    return f"{root}/{key}".rstrip("/") if root else key.rstrip("/")


def ensure_open(store: Store) -> None:
    """Open a store that is not open yet."""
    sync(StorePath.open(store, ""))


def store_version(store: Any) -> str:
    """Version of all that is stored, if the store has one, or ''."""
    if isinstance(store, ZipStore) and store.read_only:
        return durable.file_status(store.path)
    if isinstance(store, FlatStore):
        return store.version
    # of Icechunk, whose read-only sessions show a snapshot; other files may hold its chunks
    session: Any = getattr(store, "session", None)
    if getattr(session, "read_only", False) and not session.all_virtual_chunk_locations():
        return str(session.snapshot_id)
    return ""


def is_web(store: Store) -> bool:
    """Whether a listing of a store is made of the links on pages of a web server."""
    return any("http" in protocols for protocols in protocols_of(store))


def is_private(store: Store) -> bool:
    """Whether other processes do not see what a store holds."""
    if any("memory" in protocols for protocols in protocols_of(store)):
        return True
    # another process would open it once more to write, which may empty the file
    if isinstance(store, ZipStore) and not store.read_only:
        return True
    try:
        pickle.dumps(store)
    except Exception:  # some stores refuse with an error of their own
        return True
    return False


def protocols_of(store: Any) -> list[set[str]]:
    """Protocols of a store's file systems: the outer one, then those that it reads through."""
    while isinstance(inner := getattr(store, "_store", None), Store):
        store = inner
    if isinstance(store, ObjectStore):
        return [{"http"}] if type(store.store).__name__ == "HTTPStore" else []
    found = []
    layer = getattr(store, "fs", None)
    while layer is not None:
        found.append({layer.protocol} if isinstance(layer.protocol, str) else {*layer.protocol})
        layer = getattr(layer, "sync_fs", None) or getattr(layer, "fs", None)
    return found


def quoted(store: Any, key: str) -> str:
    """A key as a store takes it; file systems of web servers take it for a part of a URL."""
    while isinstance(inner := getattr(store, "_store", None), Store):
        store = inner
    is_url = isinstance(store, FsspecStore) and store.path.lower().startswith(("http:", "https:"))
    return quote(key, UNQUOTED, errors="surrogateescape") if is_url else key


async def linked_files(store: Store, prefix: str) -> list[str]:
    """Names of the files below a folder that the pages of a web server link to."""
    if not isinstance(store, FsspecStore):
        raise NotImplementedError("this store has no listing of web servers")
    top = f"{store.path.rstrip('/')}/{quoted(store, prefix)}".rstrip("/")
    files, folders, count = list[str](), [""], 0
    # pages may link in circles, or deeper and deeper
    for _ in range(WEB_DEPTH):
        count += len(folders)
        if not folders or count > WEB_FOLDERS:
            break
        urls = [f"{top}/{quoted(store, folder)}" for folder in folders]
        pages = await asyncio.gather(*map(store.fs._ls, urls))
        # fsspec drops links that do not begin as the URL of their page does
        if not all(pages):
            raise NotImplementedError("a page of this web server links to nothing")
        links = [
            folder + unquote(name.removeprefix("./"), errors="surrogateescape")
            for folder, url, page in zip(folders, urls, pages, strict=True)
            for name in (unescape(link["name"][len(url) :]) for link in page)
            if LINK.fullmatch(name)
        ]
        files += (link for link in links if not link.endswith("/"))
        folders = [link for link in links if link.endswith("/")]
    if folders:
        raise NotImplementedError("the pages of this web server link to too many folders")
    return files
