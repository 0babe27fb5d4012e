"""What is in a group: the arrays to clip, and those that are carried over as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from daskclip.errors import InvalidTypeError, InvalidValueError, SourceError, short_repr
from daskclip.storage.array import attributes, dimension_names
from daskclip.storage.cf import require_decoded
from daskclip.storage.hierarchy import Hierarchy


def select_arrays(
    source: Hierarchy,
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    dtypes: Sequence[str],
) -> list[str]:
    """Names of the arrays of a source that are clipped; '' for one that is an array itself."""
    chosen = patterns(include, "include"), patterns(exclude, "exclude")
    if not source.is_group:
        if any(chosen):
            raise InvalidValueError(
                f"source {source} is an array; include and exclude choose among those of a group"
            )
        return [""]
    if not source.arrays:
        raise SourceError(f"source {source} is an empty group; give one with arrays")
    included, excluded = (_matching(source, wanted) for wanted in chosen)
    excluded |= _coordinates(source)
    wanted = included if chosen[0] else source.arrays.keys()
    found = [name for name in source.arrays if name in wanted and name not in excluded]
    for name in found:
        array = source.arrays[name]
        if array.dtype.kind in "iu":
            require_decoded(array.dtype, attributes(array), f"array {name} of source {source}")
    clipped = [name for name in found if source.arrays[name].dtype.name in dtypes]
    if not clipped:
        raise SourceError(
            f"source {source} has no floating point or complex array to clip among "
            f"{_some(source.arrays)}; check include and exclude"
        )
    return clipped


def patterns(given: Any, what: str) -> list[str]:
    """Names or patterns as a list."""
    if given is None:
        return []
    one = isinstance(given, str | bytes) or not isinstance(given, Iterable)
    found = [given] if one else list(given)
    for pattern in found:
        if not isinstance(pattern, str):
            raise InvalidTypeError(
                f"{what} {short_repr(pattern)} is no text; give names or patterns"
            )
    return found


def _matching(source: Hierarchy, wanted: list[str]) -> set[str]:
    """Names that match one of the patterns; each has to match something."""
    found = set()
    for pattern in wanted:
        matching = {name for name in source.arrays if fnmatchcase(name, pattern)}
        if not matching:
            raise InvalidValueError(
                f"pattern {pattern!r} matches no array of source {source}; it has "
                f"{_some(source.arrays)}"
            )
        found |= matching
    return found


def _coordinates(source: Hierarchy) -> set[str]:
    """Arrays named after their only dimension, or listed by another as coordinates or bounds."""
    found = {
        n for n in source.arrays if dimension_names(source.arrays[n]) == [n.rpartition("/")[2]]
    }
    for node in (*source.groups, *source.arrays):
        group = node.rpartition("/")[0] if node in source.arrays else node
        for listed in map(source.attributes(node).get, ("coordinates", "bounds")):
            if isinstance(listed, str):
                found |= {f"{group}/{name}".lstrip("/") for name in listed.split()}
    return found


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
