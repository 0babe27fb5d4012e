"""Open and check sources, and select their arrays; reads metadata only."""

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from daskclip import errors
from daskclip.errors import DaskClipError, InvalidValueError, SourceError, error_text, short_repr
from daskclip.grid import grid_shape
from daskclip.storage.array import V2_NAMES, StoredArray
from daskclip.storage.codecs import chain, codec_name
from daskclip.storage.foreign.store import open_flat_store
from daskclip.storage.hierarchy import Hierarchy
from daskclip.storage.metadata import require_decoded
from daskclip.storage.retry import is_refused, is_transient
from daskclip.storage.stores import ensure_open, parse_location, require_settings

# codecs that keep every bit; a lossy one could lift a clipped slice above its limit again
LOSSLESS = {
    "bytes", "endian", "transpose", "sharding_indexed", "crc32c",
    "blosc", "gzip", "zstd", "zlib", "lz4", "bz2", "lzma", "shuffle", "pcodec",
    "crc32", "adler32", "fletcher32", "jenkins_lookup3",
}  # fmt: skip
UNITS = 10**10  # chunks or shards: no file system holds more files


def open_source(source: object, storage_options: dict[str, Any] | None = None) -> Hierarchy:
    """Open what a path, URL, store or zarr object names, or raise why that is impossible."""
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else short_repr(source)
    try:
        found = parse_location(source, storage_options)
        flat = open_flat_store(source if found is None else found)
        if flat is not None:
            found = flat, ""
        if found is None:
            raise SourceError(
                f"source is a {type(source).__name__}; give a path, a URL, a NumPy array, or a "
                "zarr array, group or store"
            )
        if isinstance(found, str):
            if "\0" in found:
                raise SourceError(f"source {short_repr(found)} is no path: it holds NUL; remove it")
            if not os.path.exists(found):
                raise errors.SourceNotFoundError(f"source {found} does not exist; check the path")
            # workers may have another working directory
            opened = Hierarchy.open(os.path.realpath(found))
        else:
            ensure_open(found[0])
            opened = Hierarchy.open(*found)
        if not opened.documents:
            raise SourceError(f"source {name} is not a zarr array or group; give the path of one")
        _ = opened.arrays  # parsed here, where errors are translated; the result is cached
    except DaskClipError:
        raise
    except Exception as error:  # broken metadata makes zarr raise anything
        raise _open_error(f"source {name}", error) from error
    return opened


def _open_error(where: str, error: Exception) -> DaskClipError:
    """The error to raise for an error of zarr or of a store."""
    require_settings()
    # the words of zarr for a dtype that it does not know
    why = error_text(error)
    if isinstance(error, ImportError):
        return SourceError(f"{where} needs what is not installed ({why}); install it")
    # the words of fsspec
    if "Protocol not known" in str(error):
        return SourceError(f"{where} has an unknown protocol ({why}); check the URL")
    if "data type" in str(error):
        return errors.DTypeError(
            f"{where} has a dtype that cannot be clipped ({why}); store it as floating point or "
            "complex"
        )
    if is_refused(error):
        return SourceError(f"{where} cannot be read ({why}); check credentials and rights")
    if is_transient(error):
        return errors.TemporaryError(f"{where} cannot be reached ({why}); run again")
    return SourceError(f"{where} is not a zarr array or group ({why}); give the path of one")


def check_source(array: StoredArray, check_dtype: Callable[[np.dtype[Any]], None]) -> None:
    """Refuse an array that cannot be clipped correctly."""
    where = f"source {array}"
    named = dict(array.attributes)
    if V2_NAMES in named:  # xarray takes the fill value of such arrays for missing data
        named.setdefault("_FillValue", array.array.fill_value)
    require_decoded(array.dtype, named, where)
    check_dtype(array.dtype)
    for codec in _codecs(array):
        if codec not in LOSSLESS:
            raise SourceError(
                f"{where} is stored with {codec}, which is not known to be "
                "lossless, so that the bound could not hold; store it with another codec"
            )
    _check_chunks(array, where)
    try:
        chain(array.array)
    except Exception as error:  # zarr checks some codecs only when it reads
        raise SourceError(
            f"{where} has codecs that do not fit it ({error_text(error)}); check its metadata"
        ) from error


def _check_chunks(array: StoredArray, where: str) -> None:
    """Refuse a grid of chunks that cannot be stored."""
    try:
        unit, chunks = array.unit, array.array.chunks
    except NotImplementedError as error:
        raise SourceError(
            f"{where} has chunks of uneven sizes; store it with a regular grid"
        ) from error
    if min((*array.shape, 0)) < 0 or min((*unit, *chunks, 1)) < 1:
        raise SourceError(
            f"{where} has shape {array.shape} in chunks of {chunks}; "
            "store it with chunks of at least one element"
        )
    if math.prod(grid_shape(array.shape, unit)) > UNITS:
        raise SourceError(
            f"{where} has more than the {UNITS:.0e} chunks or shards that can be stored; "
            "check its metadata"
        )


def _codecs(array: StoredArray) -> list[str]:
    """Names of all codecs, those inside shards too, without the prefix of their library."""
    document: dict[str, Any] = dict(array.array.metadata.to_dict())
    if document["zarr_format"] == 2:
        used = [*(document.get("filters") or ()), document.get("compressor")]
        return [codec["id"] for codec in used if codec]
    names = []
    queue: list[Any] = list(document["codecs"])
    while queue:
        codec = queue.pop()
        names.append(codec_name(codec["name"]))
        configuration = codec.get("configuration", {})
        queue += [*configuration.get("codecs", ()), *configuration.get("index_codecs", ())]
    return names


def select_arrays(
    source: Hierarchy,
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    dtypes: Sequence[str],
) -> list[str]:
    """Names of the arrays to clip in a source; only '' if the source is an array itself."""
    chosen = parse_patterns(include, "include"), parse_patterns(exclude, "exclude")
    if not source.is_group:
        if any(chosen):
            raise InvalidValueError(
                f"source {source} is an array; include and exclude choose among those of a group"
            )
        return [""]
    names = sorted([*source.arrays, *source.unopened])
    if not names:
        raise SourceError(f"source {source} is an empty group; give one with arrays")
    included, excluded = (_matching(source, names, wanted) for wanted in chosen)
    # coordinates are excluded even if included by a pattern: clipped, they would misplace data
    excluded |= _coordinates(source)
    wanted = included if chosen[0] else {*names}
    found = [name for name in names if name in wanted and name not in excluded]
    _check_unopened(source, found, chosen[0])
    found = [name for name in found if name in source.arrays]
    for name in found:
        array = source.arrays[name]
        if array.dtype.kind in "iu":
            require_decoded(array.dtype, array.attributes, f"array {name} of source {source}")
    clipped = [name for name in found if source.arrays[name].dtype.name in dtypes]
    if not clipped:
        raise SourceError(
            f"source {source} has no floating point or complex array to clip among "
            f"{_some(names)}; check include and exclude"
        )
    return clipped


def _check_unopened(source: Hierarchy, names: list[str], included: list[str]) -> None:
    """Refuse arrays that should be clipped and that zarr cannot open; others are only copied."""
    for name in names:
        if name not in source.unopened:
            continue
        document, where = source.document(name), f"array {name} of source {source}"
        dtype = _dtype(document.get("data_type", document.get("dtype")))
        if dtype.kind in "fc" or name in included:
            require_settings()
            raise SourceError(
                f"{where} cannot be opened ({source.unopened[name]}); exclude it, or install what "
                "it needs"
            )
        require_decoded(dtype, source.attributes(name), where)


def _dtype(data_type: object) -> np.dtype[Any]:
    """Dtype that metadata names: float64 for any floating point one, void if unknown."""
    found = data_type.get("name") if isinstance(data_type, dict) else data_type
    if not isinstance(found, str):
        return np.dtype(np.void)
    # first, since packages may add bfloat16 to NumPy, with a kind of its own
    if re.search("float|complex", found):
        return np.dtype(np.float64)
    with suppress(TypeError, ValueError, SyntaxError):
        return np.dtype(found)
    return np.dtype(np.void)


def parse_patterns(given: object, what: str) -> list[str]:
    """Return one or several names or patterns, or None, as a list."""
    if given is None:
        return []
    one = isinstance(given, str | bytes) or not isinstance(given, Iterable)
    found: list[Any] = [given] if one else [*given]  # type: ignore[misc]
    for pattern in found:
        if not isinstance(pattern, str):
            raise errors.InvalidTypeError(
                f"{what} {short_repr(pattern)} is no text; give names or patterns"
            )
    return found


def _matching(source: Hierarchy, names: list[str], wanted: list[str]) -> set[str]:
    """Names that match any of the patterns; each pattern must match something."""
    found = set()
    for pattern in wanted:
        # a name may look like a pattern
        exact = [name for name in names if name == pattern]
        matching = exact or [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise InvalidValueError(
                f"pattern {pattern!r} matches no array of source {source}; it has {_some(names)}"
            )
        found |= {*matching}
    return found


def _coordinates(source: Hierarchy) -> set[str]:
    """Arrays named after their only dimension, or listed by another as coordinates or bounds."""
    found = {n for n, a in source.arrays.items() if a.dimension_names == [n.rpartition("/")[2]]}
    groups = {*source.groups}
    for node in (*groups, *source.arrays, *source.unopened):
        group = node if node in groups else node.rpartition("/")[0]
        for listed in map(source.attributes(node).get, ("coordinates", "bounds")):
            if isinstance(listed, str):
                found |= {f"{group}/{name}".lstrip("/") for name in listed.split()}
    return found


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
