"""Metadata: documents of all nodes of an array or a group, and conventions of their attributes."""

import base64
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from zarr.abc.store import Store

from daskclip.errors import DTypeError, SourceError, error_text, short_repr
from daskclip.storage import object_store as objects
from daskclip.storage.files import DOCUMENTS, NODE_DOCUMENTS, OURS
from daskclip.storage.stores import is_web

SCALES = ("scale_factor", "add_offset")
LEVEL_KEYS = ("datasets", "axes")  # of an image: its arrays, one for each resolution
SENTINELS = ("_FillValue", "missing_value")
# encoding with which saving rounds, so that the bound would not hold after reading the values back
ROUNDING = {
    *SCALES, "_Unsigned", "filters", "serializer",
    "least_significant_digit", "significant_digits", "quantize_mode",
}  # fmt: skip
_DECODE = (
    "open it with xarray and mask_and_scale=True, its default, and clip that, or store that after "
    "drop_encoding()"
)
Documents = dict[str, bytes]

PARSED = 64
"""Bytes of memory that parsing takes for a byte of JSON at most, which lists in lists take."""
FETCH_BATCH = 64  # documents fetched together
SEARCHED = 1 << 20  # bytes of a document that is too large in which its contents are looked for


def read_documents(folder: Path) -> Documents:
    """Metadata in a folder and, of a group, below it; symbolic links are refused.

    A folder without metadata is no node, but zarr reads arrays below it by their path.
    """
    found: Documents = {}
    folders = [""]
    while folders:
        prefix, inside = folders.pop(), []
        own: Documents = {}
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                if entry.name in DOCUMENTS:
                    own[entry.name] = _document(entry)
                elif entry.is_dir() and not OURS.fullmatch(entry.name):
                    inside.append(entry)
        if not prefix and not own.keys() & set(NODE_DOCUMENTS):
            return {}
        found |= {prefix + kind: data for kind, data in own.items()}
        # below an array are its chunks
        for entry in () if is_array(own, f"{folder / prefix}") else inside:
            if entry.is_symlink():
                raise SourceError(f"{entry.path} is a symbolic link; copy what it leads to")
            folders.append(f"{prefix}{entry.name}/")
    return _in_order(found)


def _document(entry: os.DirEntry[str]) -> bytes:
    if entry.is_symlink():
        raise SourceError(f"{entry.path} is a symbolic link; copy what it leads to")
    if not entry.is_file():
        raise SourceError(f"{entry.path} is not a regular file; move it away")
    with open(entry.path, "rb") as file:
        size = entry.stat().st_size
        if size > metadata_limit():
            raise _too_large(entry.path, size, file.read(SEARCHED))
        return file.read()


def fetch_documents(store: Store, path: str) -> Documents:
    """Metadata at a key of an object store and, of a group, below it."""
    root = get_documents(store, path, DOCUMENTS)
    if not root.keys() & set(NODE_DOCUMENTS) or is_array(root, objects.url(store, path)):
        return _in_order(root)
    keys, rest, named = _keys(store, path, root)
    nodes = dict[str, Documents]()
    for i in range(0, len(keys), FETCH_BATCH):
        for key, data in get_documents(store, path, keys[i : i + FETCH_BATCH]).items():
            name, kind = split(key)
            nodes.setdefault(name, {})[kind] = data
            named.discard(key)
    for key in sorted(named):
        raise SourceError(
            f"{objects.url(store, objects.join(path, key))} is missing, which consolidated "
            "metadata names; restore it, or consolidate again"
        )
    found: Documents = {}
    arrays = set[str]()
    for name in sorted(nodes):  # outer ones first, since below an array are its chunks
        if not arrays.intersection(ancestors(name)):
            found |= {objects.join(name, kind): data for kind, data in nodes[name].items()}
            if is_array(nodes[name], objects.url(store, objects.join(path, name))):
                arrays.add(name)
    _require_files(store, path, [k for k in rest if arrays.isdisjoint(ancestors(k))], nodes)
    return _in_order(found)


def _keys(store: Store, path: str, root: Documents) -> tuple[list[str], list[str], set[str]]:
    """Keys of all documents below a group, other links of a web server, and documents that must be.

    A listing names them; where it need not be complete, the metadata of the group does too.
    """
    keys, rest, named, web = list[str](), list[str](), set[str](), is_web(store)
    try:
        for key in (stored.key for stored in objects.listed(store, path)):
            if split(key)[1] in DOCUMENTS:
                keys.append(key)
            elif web:
                rest.append(key)
    except Exception as error:
        if not objects.cannot_list(error):
            raise
    # consolidated metadata may be older than the store; a listing may be empty, as of a web server
    is_listed = root.keys() <= {*keys}
    if web or not is_listed:
        named = _consolidated(root, objects.url(store, path), is_listed)
        keys += [*root, *sorted(named)]
    return [key for key in dict.fromkeys(keys) if not is_ours(key)], rest, named


def _consolidated(root: Documents, where: str, is_listed: bool) -> set[str]:
    """Keys of documents that the metadata of a group names."""
    if ".zmetadata" not in root:
        inside = parse(root.get("zarr.json", b"{}"), where).get("consolidated_metadata")
        suffix = "/zarr.json"
    else:
        inside, suffix = parse(root[".zmetadata"], where), ""
    names = inside.get("metadata") if isinstance(inside, dict) else None
    if isinstance(names, dict):
        keys = {f"{name}{suffix}": document for name, document in names.items()}
        # empty attributes need not be stored
        return {k for k, v in keys.items() if (v or split(k)[1] != ".zattrs") and not is_ours(k)}
    if is_listed:
        return set()
    raise SourceError(
        f"{where} is a group that cannot be listed, and has no consolidated metadata; "
        "consolidate it, or give one array"
    )


def _require_files(store: Store, path: str, links: list[str], nodes: Mapping[str, object]) -> None:
    """Refuse links without a slash to folders of arrays or groups that are not known."""
    links = [key for key in links if key not in nodes]
    for i in range(0, len(links), FETCH_BATCH):
        keys = (f"{key}/{kind}" for key in links[i : i + FETCH_BATCH] for kind in NODE_DOCUMENTS)
        for key in get_documents(store, path, [*keys]):
            raise SourceError(
                f"{objects.url(store, objects.join(path, split(key)[0]))} is a folder, which the "
                "web server does not say; consolidate the metadata of the group"
            )


def get_documents(store: Store, path: str, keys: Sequence[str]) -> Documents:
    """Documents at keys relative to a path, as far as they exist."""
    places = [objects.join(path, objects.checked(key)) for key in keys]
    found = {}
    for key, place, data in zip(keys, places, objects.get(store, places), strict=True):
        if data is not None:
            if len(data) > metadata_limit():
                raise _too_large(objects.url(store, place), len(data), data[:SEARCHED].tobytes())
            found[key] = data.tobytes()
    return found


def _too_large(where: str, size: int, start: bytes) -> SourceError:
    what, remedy = "attributes", "move large ones elsewhere"
    if where.endswith(".zmetadata") or b'"consolidated_metadata"' in start:
        what, remedy = "consolidated metadata", "remove it, since it only repeats what is stored"
    return SourceError(
        f"{where} has {size} bytes, mostly {what}, above the {metadata_limit()} whose parsing fits "
        f"the memory here; {remedy}, or use a machine with more memory"
    )


@cache
def metadata_limit() -> int:
    """Size in bytes of a metadata document that can be parsed here, whatever is in it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # there is no such group, or it has no limit
            limits.append(int(Path(path).read_text()))
    return min(limits) // PARSED


def parse(data: bytes, where: str) -> dict[str, Any]:
    """JSON object of a document."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _no_node(where, error_text(error)) from error
    if not isinstance(found, dict):
        raise _no_node(where, f"a {type(found).__name__} as metadata")
    return found


def _no_node(where: str, why: str) -> SourceError:
    return SourceError(
        f"{where} is not a zarr array or group ({why}); restore its metadata, or give the path of "
        "one"
    )


def is_array(documents: Documents, where: str) -> bool:
    """Whether documents of a node, by kind, are those of an array; as for zarr, format 3 wins."""
    if "zarr.json" not in documents:
        return ".zarray" in documents
    kind = parse(documents["zarr.json"], where).get("node_type")
    if kind not in ("array", "group"):
        raise _no_node(where, f"node_type {short_repr(kind)}")
    return bool(kind == "array")


def split(key: str) -> tuple[str, str]:
    """Name of a node, and that of its document."""
    name, _, kind = key.rpartition("/")
    return name, kind


def ancestors(key: str) -> Iterator[str]:
    """Names of the folders that a key is in, inner ones first, without the root."""
    while key := key.rpartition("/")[0]:
        yield key


def is_ours(key: str) -> bool:
    """Whether a key is in the record or the work folder of a run."""
    return any(map(OURS.fullmatch, key.split("/")))


def _in_order(documents: Documents) -> Documents:
    """Sort documents as they are written: a group's after its members', what makes a node last."""
    kinds: Iterable[str] = sorted(documents, key=lambda key: DOCUMENTS.index(split(key)[1]))
    return {key: documents[key] for key in sorted(kinds, key=lambda k: split(k)[0], reverse=True)}


# --- conventions of attributes --------------------------------------------------------------------


def require_decoded(dtype: object, attributes: Mapping[Any, Any], what: str) -> None:
    """Refuse packed integers, and data in which numbers mark missing values."""
    scales = [f"{name} {short_repr(attributes[name])}" for name in SCALES if name in attributes]
    if scales and getattr(dtype, "kind", "") in "iu":
        raise DTypeError(f"{what} is packed as {dtype} with {', '.join(scales)}; {_DECODE}")
    for name in SENTINELS:
        for number in numbers(attributes.get(name)):
            # a zero adds nothing to a norm and stays zero; NaN has a policy of its own
            if number and not math.isnan(number) and getattr(dtype, "kind", "") in "fc":
                raise SourceError(
                    f"{what} has {name} {number:g}, which would count as data and be clipped; "
                    f"{_DECODE}"
                )


def numbers(value: object) -> Iterator[float]:
    """Numbers in an attribute: one or several, or float64 in base64, as xarray stores them.

    Examples
    --------
    >>> list(numbers([-999, "AAAAAAAA+H8="]))
    [-999.0, nan]
    """
    # an attribute may be anything; what is no number marks nothing
    for item in np.asarray(value, object).ravel().tolist():
        try:
            yield float(item)
        except (TypeError, ValueError, OverflowError):
            try:
                yield struct.unpack("<d", base64.b64decode(item))[0]
            except (TypeError, ValueError, struct.error):
                continue


def axes_of(attributes: Mapping[str, Any], path: str) -> list[str | None] | None:
    """Names of the axes of an array at a path in a group, if that is an image in OME-Zarr.

    Examples
    --------
    >>> image = {"axes": [{"name": "y"}, {"name": "x"}], "datasets": [{"path": "0"}]}
    >>> axes_of({"multiscales": [image]}, "0")
    ['y', 'x']
    """
    found = attributes.get("ome")  # since version 0.5
    images = (found if isinstance(found, Mapping) else attributes).get("multiscales")
    for image in images if isinstance(images, list) else ():
        levels, axes = (image.get(k) if isinstance(image, dict) else None for k in LEVEL_KEYS)
        if isinstance(levels, list) and isinstance(axes, list):
            paths = [level.get("path") for level in levels if isinstance(level, dict)]
            if path in paths:
                # names alone in version 0.3
                names = [axis.get("name") if isinstance(axis, dict) else axis for axis in axes]
                return [name if isinstance(name, str) else None for name in names]
    return None


def exact_encoding(
    encoding: Mapping[Any, Any], dtype: np.dtype[Any], largest: float
) -> dict[Any, Any]:
    """The part of an encoding that saves values of ``dtype`` up to ``largest`` unchanged."""
    kept = {k: v for k, v in encoding.items() if k not in ROUNDING}
    # the sentinels of packed data are packed values, which mean nothing without the packing
    is_packed = any(name in encoding for name in SCALES)
    if not np.can_cast(dtype, encoding.get("dtype", dtype), "equiv"):
        is_packed = True
        del kept["dtype"]
    for name in SENTINELS:
        values = numbers(kept.get(name))
        if is_packed or not all(math.isnan(n) or abs(n) > largest for n in values):
            kept.pop(name, None)
    return kept
