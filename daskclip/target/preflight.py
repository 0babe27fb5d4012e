"""Checks of a target and its surroundings before anything is made there."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

from daskclip.errors import TargetError, TargetExistsError, TargetPermissionError
from daskclip.storage import Hierarchy, durable, is_part

CONSOLIDATED = ("zarr.json", ".zmetadata")
IN_PLACE = "clip it in place (--in-place, and no target)"
RECORD = ".daskclip"
"""Name, in a target, of the journal of the run that made it; zarr ignores it."""


class _Target(Protocol):
    def exists(self) -> bool: ...


def refuse_existing(target: _Target, otherwise: str = "") -> None:
    """Refuse a target whose place is taken; ``otherwise`` is one more remedy."""
    if target.exists():
        raise TargetExistsError(
            f"target {target} exists; remove it or choose another path{otherwise and ', or '}"
            f"{otherwise}"
        )


def check_nesting(path: Path, source: Path | None) -> None:
    """Refuse a target and a source that lie in each other."""
    if source is None:
        return
    if path == source:
        raise TargetError(f"target {path} is the source; {IN_PLACE} or choose another path")
    if path.is_relative_to(source):
        raise TargetError(f"target {path} lies inside the source {source}; choose another path")
    if source.is_relative_to(path):
        raise TargetError(f"source {source} lies inside the target {path}; choose another path")


def check_files(path: Path, source: Hierarchy) -> None:
    """Refuse a target in the place of files of a source, or of a folder that they are in."""
    for file in source.paths if source.folder is None else ():
        if Path(os.path.realpath(file)).is_relative_to(path):
            raise TargetError(f"target {path} is or holds the source {file}; choose another path")


def refuse_consolidated(target: object, group: object, new: bytes, old: bytes) -> None:
    """Refuse a target in a group whose `CONSOLIDATED` files would not list it."""
    # readers of such a group ask that document only, and would never see the new array
    if _document(new).get("consolidated_metadata") or _document(old):
        raise TargetError(
            f"target {target} lies in a group with consolidated metadata ({group}); write "
            "elsewhere, or remove the consolidated metadata and make it again afterwards"
        )


def is_node(folder: Path, kind: str) -> bool:
    """Whether there is an array, or a group, in a folder."""
    # read as JSON: zarr would also need the codecs of an array that is about to be replaced
    document = _document(content(folder / "zarr.json"))
    return document.get("node_type") == kind or (folder / f".z{kind}").is_file()


def content(path: Path) -> bytes:
    """Bytes of a file; none if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _document(data: bytes) -> dict[str, Any]:
    """Parse a JSON object; empty if it is none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def require_no_foreign_files(source: Hierarchy) -> None:
    """Refuse a source with files that a target in its place would lose.

    In arrays these are all but chunks. Other files in a group are carried over, but not the work
    folder of another run.
    """
    folder = source.folder or Path()
    for name in source.groups:
        for own in os.listdir(folder / name):
            if own.startswith(".") and own.endswith(RECORD) and own != RECORD:
                raise _foreign(folder / name / own, source)
    for name in source.arrays:
        for inside, _, names in os.walk(folder / name):
            for path in (Path(inside, own) for own in names):
                if not (is_part(str(path.relative_to(folder / name))) or path.name == RECORD):
                    raise _foreign(path, source)


def _foreign(path: Path, source: Hierarchy) -> TargetError:
    return TargetError(f"{path} is no part of what is stored in {source}; move it away")


def require_exchange(work: Path, target: Path) -> None:
    """Refuse a file system that cannot exchange two folders, and a target that cannot be moved."""
    pair = work / "a", work / "b"
    # may be there: a process that was killed here left them
    for path in pair:
        (path / "inside").mkdir(parents=True, exist_ok=True)
    try:
        # not every file system can: NFS, for one, refuses the call
        durable.exchange_directories(*pair)
        # overlayfs cannot move a folder of a lower layer; onto one that is not empty, no move
        # succeeds, so that this changes nothing
        os.rename(target, pair[0])
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return
        raise TargetError(
            f"the file system cannot exchange folders {target} and {work} ({error.strerror}), "
            "which overwriting and clipping in place need; clip to a new target"
        ) from error
    finally:
        for path in pair:
            shutil.rmtree(path)


def require_removable(file: Path, target: Path) -> None:
    """Refuse a target that is an empty folder which no rename could replace."""
    try:
        # no folder takes the place of a file, so that this changes nothing; nor, by the slash,
        # does anything else that was put there meanwhile
        os.rename(f"{target}/", file)
    except PermissionError as error:  # of another user, where only owners may remove
        raise TargetPermissionError(
            f"target {target} is an empty folder that cannot be replaced ({error.strerror}); "
            "choose another path"
        ) from error
    except OSError:
        return
