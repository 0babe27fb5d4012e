"""The target's place: what may not be there, the work directory beside it, and the rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

try:
    import fcntl
except ImportError:  # not POSIX: importing daskclip must work all the same
    fcntl = None  # type: ignore[assignment]

from daskclip.errors import TargetError, TargetExistsError, TargetPermissionError, shown

CONSOLIDATED = ("zarr.json", ".zmetadata")


def check_target(target: Any, source: Path | None) -> Path:
    """Absolute path of a target that can be made, or the reason why not; changes nothing."""
    if not isinstance(target, str | os.PathLike) or "://" in os.fspath(target):
        raise TargetError(f"target {shown(target)} is not a path; give one on a local file system")
    if fcntl is None:
        raise TargetError("this system has no flock; use clip_by_norm, which needs none")
    path = Path(os.path.abspath(os.fspath(target)))
    if os.path.lexists(path):
        raise TargetExistsError(f"target {path} exists; remove it or choose another path")
    parent = path.parent
    if not parent.is_dir():
        raise TargetError(f"folder {parent} of the target does not exist; create it")
    if source is not None and _inside(path, source):
        raise TargetError(f"target {path} lies inside the source {source}; choose another path")
    for folder in (parent, *parent.parents):
        _refuse_consolidated(folder, path)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise TargetPermissionError(
            f"folder {parent} of the target cannot be written; choose another or change its mode"
        )
    return path


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _refuse_consolidated(folder: Path, target: Path) -> None:
    """A group with consolidated metadata would not list what is added behind its back."""
    for name in CONSOLIDATED:
        try:
            document = json.loads((folder / name).read_bytes())
        except (OSError, ValueError):
            continue
        if name == ".zmetadata" or document.get("consolidated_metadata"):
            raise TargetError(
                f"target {target} lies in a group with consolidated metadata ({folder}); write "
                "elsewhere, or remove the consolidated metadata and make it again afterwards"
            )


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A path beside ``target`` that becomes ``target`` if the block ends well, else is removed."""
    work = target.parent / f".{target.name}.daskclip"
    try:
        work.mkdir(exist_ok=True)
    except OSError as error:
        raise TargetPermissionError(
            f"folder {target.parent} of the target cannot be written ({error.strerror}); "
            "choose another"
        ) from error
    busy = f"target {target} is being written by another run; wait for it or stop it"
    try:
        lock = (work / "lock").open("w")
    except FileNotFoundError:
        raise TargetExistsError(busy) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the run before may have ended, and removed what was just opened
            mine = os.fstat(lock.fileno()).st_ino == (work / "lock").stat().st_ino
        except OSError:
            mine = False
        if not mine:
            raise TargetExistsError(busy)
        try:
            staged = work / uuid4().hex
            yield staged
            if os.path.lexists(target):
                raise TargetExistsError(
                    f"target {target} was made by something else meanwhile; remove it and run again"
                )
            staged.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
