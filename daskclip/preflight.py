"""What may not be at a target or around it; looked at before anything is made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from daskclip import files
from daskclip.errors import TargetError
from daskclip.hierarchy import DOCUMENTS, Hierarchy

CONSOLIDATED = ("zarr.json", ".zmetadata")
RECORD = ".daskclip"
"""Journal of the run that made what is in a folder, there; zarr takes no notice of it."""


def check_nesting(path: Path, source: Path | None) -> None:
    """Refuse a target and a source that lie in each other."""
    if source is None:
        return
    source = source.resolve()
    if path == source:
        raise TargetError(f"target {path} is the source; clip it in place or choose another path")
    if path.is_relative_to(source):
        raise TargetError(f"target {path} lies inside the source {source}; choose another path")
    if source.is_relative_to(path):
        raise TargetError(f"source {source} lies inside the target {path}; choose another path")


def refuse_consolidated(folder: Path, target: Path) -> None:
    """A group with consolidated metadata would not list what is added behind its back."""
    for name in CONSOLIDATED:
        if is_consolidated(name, _document(folder / name)):
            raise consolidated(target, folder)


def is_consolidated(name: str, document: dict[str, Any]) -> bool:
    """Whether metadata of a group, in a file of that name, lists the arrays in it."""
    return bool(document) and (name == ".zmetadata" or bool(document.get("consolidated_metadata")))


def consolidated(target: Any, group: Any) -> TargetError:
    """The reason not to make an array in a group."""
    return TargetError(
        f"target {target} lies in a group with consolidated metadata ({group}); write elsewhere, "
        "or remove the consolidated metadata and make it again afterwards"
    )


def is_array(folder: Path) -> bool:
    """Whether there is an array in a folder."""
    document = _document(folder / "zarr.json")
    return document.get("node_type") == "array" or (folder / ".zarray").is_file()


def is_group(folder: Path) -> bool:
    """Whether there is a group in a folder."""
    document = _document(folder / "zarr.json")
    return document.get("node_type") == "group" or (folder / ".zgroup").is_file()


def _document(path: Path) -> dict[str, Any]:
    try:
        return document(path.read_bytes())
    except OSError:
        return {}


def document(data: bytes) -> dict[str, Any]:
    """A JSON object; empty if it is none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def refuse_strangers(source: Hierarchy) -> None:
    """Refuse folders with files that would be lost when others take their place."""
    for path in _strangers(source):
        raise TargetError(f"{path} is no part of what is stored in {source}; move it away")


def _strangers(there: Hierarchy) -> Iterator[str]:
    """What is in the folders of arrays and groups, and is no part of them."""
    nodes = {*there.groups, *there.arrays}
    folder = there.folder or Path()
    for name in nodes:
        for own in os.listdir(folder / name):
            inside = f"{name}/{own}".lstrip("/")
            part = own in DOCUMENTS or inside in nodes or own == RECORD
            if not (part or (name in there.arrays and files.CHUNK.fullmatch(own))):
                yield f"{folder}/{inside}"


def require_exchange(work: Path) -> None:
    """Refuse a file system on which two folders cannot change places."""
    pair = work / "a", work / "b"
    for path in pair:
        path.mkdir(exist_ok=True)
    try:
        files.exchange(*pair)
    except OSError as error:
        raise TargetError(
            f"the file system of {work.parent} cannot exchange folders ({error.strerror}), which "
            "overwriting and clipping in place need; clip to a new target"
        ) from error
    finally:
        for path in pair:
            path.rmdir()
