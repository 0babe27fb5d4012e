"""What may not be at a target or around it; looked at before anything is made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from daskclip.errors import TargetError
from daskclip.storage import Hierarchy, durable, is_part

CONSOLIDATED = ("zarr.json", ".zmetadata")
RECORD = ".daskclip"
"""Journal of the run that made what is in a folder, there; zarr takes no notice of it."""


def check_nesting(path: Path, source: Path | None) -> None:
    """Refuse a target and a source that lie in each other."""
    if source is None:
        return
    if path == source:
        raise TargetError(f"target {path} is the source; clip it in place or choose another path")
    if path.is_relative_to(source):
        raise TargetError(f"target {path} lies inside the source {source}; choose another path")
    if source.is_relative_to(path):
        raise TargetError(f"source {source} lies inside the target {path}; choose another path")


def refuse_consolidated(target: Any, group: Any, new: Any, old: Any) -> None:
    """A group whose `CONSOLIDATED` files list what is in it would not list what is added."""
    if _document(new).get("consolidated_metadata") or _document(old):
        raise TargetError(
            f"target {target} lies in a group with consolidated metadata ({group}); write "
            "elsewhere, or remove the consolidated metadata and make it again afterwards"
        )


def is_node(folder: Path, kind: str) -> bool:
    """Whether there is an array, or a group, in a folder."""
    document = _document(content(folder / "zarr.json"))
    return document.get("node_type") == kind or (folder / f".z{kind}").is_file()


def content(path: Path) -> bytes:
    """Bytes of a file; none if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _document(data: Any) -> dict[str, Any]:
    """A JSON object; empty if it is none."""
    try:
        found = json.loads(bytes(data))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def require_no_foreign_files(source: Hierarchy) -> None:
    """Refuse folders with files that would be lost when others take their place."""
    nodes = {*source.groups, *source.arrays}
    folder = source.folder or Path()
    for name in nodes:
        for own in os.listdir(folder / name):
            inside = f"{name}/{own}".lstrip("/")
            part = inside in nodes or own == RECORD
            if not (part or is_part(own, of_array=name in source.arrays)):
                raise TargetError(
                    f"{folder}/{inside} is no part of what is stored in {source}; move it away"
                )


def require_exchange(work: Path) -> None:
    """Refuse a file system on which two folders cannot change places."""
    pair = work / "a", work / "b"
    for path in pair:
        path.mkdir(exist_ok=True)
    try:
        durable.exchange_directories(*pair)
    except OSError as error:
        raise TargetError(
            f"the file system of {work.parent} cannot exchange folders ({error.strerror}), which "
            "overwriting and clipping in place need; clip to a new target"
        ) from error
    finally:
        for path in pair:
            path.rmdir()
