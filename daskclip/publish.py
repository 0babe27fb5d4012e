"""The target's place: what may not be there, the work directory beside it, and the rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not POSIX: importing daskclip must work all the same
    fcntl = None  # type: ignore[assignment]

from daskclip import files
from daskclip.errors import TargetError, TargetExistsError, TargetPermissionError, shown
from daskclip.journal import header

CONSOLIDATED = ("zarr.json", ".zmetadata")
JOURNAL = "journal"
RECORD = ".daskclip"
"""Journal of the run that made an array, in its folder; zarr takes no notice of it."""


def check_target(target: Any, source: Path | None, overwrite: bool) -> Path:
    """Path of a target that can be made, or the reason why not; changes nothing.

    None stands for the source, in place.
    """
    if target is None:
        if source is None:
            raise TargetError("the source is on no local file system; clip it to a new target")
        path = source.resolve()
    else:
        path = local_target(target)
    if target is not None and not overwrite and not (path / RECORD).exists():
        refuse_existing(path)
    if path.is_symlink() or os.path.ismount(path):
        raise TargetError(f"target {path} is a link or a mount point; give the path of a folder")
    parent = path.parent
    if not parent.is_dir():
        raise TargetError(f"folder {parent} of the target does not exist; create it")
    if target is not None:
        _check_nesting(path, source)
        for folder in (parent, *parent.parents):
            _refuse_consolidated(folder, path)
        if overwrite and path.exists() and not _is_array(path):
            raise TargetError(f"target {path} is no zarr array; remove it or choose another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise TargetPermissionError(
            f"folder {parent} of the target cannot be written; choose another or change its mode"
        )
    return path


def local_target(target: Any) -> Path:
    """Path of a target, its folder free of links and ``..``."""
    if not isinstance(target, str | os.PathLike) or "://" in os.fspath(target):
        raise TargetError(f"target {shown(target)} is not a path; give one on a local file system")
    if fcntl is None:
        raise TargetError("this system has no flock; use clip_by_norm, which needs none")
    path = Path(target)
    if path.name in ("", ".."):
        path = path.resolve()
    return Path(os.path.realpath(path.parent), path.name)


def refuse_existing(path: Path) -> None:
    """Refuse a target that something is at."""
    if os.path.lexists(path):
        raise TargetExistsError(
            f"target {path} exists; remove it or choose another path, or overwrite it"
        )


def _check_nesting(path: Path, source: Path | None) -> None:
    if source is None:
        return
    source = source.resolve()
    if path == source:
        raise TargetError(f"target {path} is the source; clip it in place or choose another path")
    if path.is_relative_to(source):
        raise TargetError(f"target {path} lies inside the source {source}; choose another path")
    if source.is_relative_to(path):
        raise TargetError(f"source {source} lies inside the target {path}; choose another path")


def _refuse_consolidated(folder: Path, target: Path) -> None:
    """A group with consolidated metadata would not list what is added behind its back."""
    for name in CONSOLIDATED:
        document = _document(folder / name)
        if document and (name == ".zmetadata" or document.get("consolidated_metadata")):
            raise TargetError(
                f"target {target} lies in a group with consolidated metadata ({folder}); write "
                "elsewhere, or remove the consolidated metadata and make it again afterwards"
            )


def _is_array(folder: Path) -> bool:
    document = _document(folder / "zarr.json")
    return document.get("node_type") == "array" or (folder / ".zarray").is_file()


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def refuse_strangers(folder: Path, known: tuple[str, ...]) -> None:
    """Refuse a folder with files that would be lost when another takes its place."""
    for entry in os.scandir(folder):
        part = files.CHUNK.fullmatch(entry.name) or entry.name in (*known, RECORD)
        if not part:
            raise TargetError(f"{entry.path} is no part of the array in its folder; move it away")


def work_of(target: Path) -> Path:
    """Where a run keeps what is not yet published."""
    return target.parent / f".{target.name}.daskclip"


@contextmanager
def locked(target: Path) -> Iterator[Path]:
    """The work directory of ``target``, for one alone; removed unless it holds a journal."""
    work = work_of(target)
    try:
        work.mkdir(exist_ok=True)
    except OSError as error:
        raise TargetPermissionError(
            f"folder {target.parent} of the target cannot be written ({error.strerror}); "
            "choose another"
        ) from error
    taken = f"target {target} is being written by another run; wait for it or stop it"
    try:
        lock = (work / "lock").open("w")
    except FileNotFoundError:
        raise TargetExistsError(taken) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the run before may have ended, and removed what was just opened
            mine = os.fstat(lock.fileno()).st_ino == (work / "lock").stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise TargetExistsError(taken)
        try:
            _finish(work, target)
            yield work
        finally:
            if not (work / JOURNAL).exists():
                shutil.rmtree(work, ignore_errors=True)


def busy(work: Path) -> bool:
    """Whether a run holds the lock."""
    try:
        with (work / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def _finish(work: Path, target: Path) -> None:
    """Clean up after a run that was stopped between publishing and cleaning up."""
    run = header(work / JOURNAL)
    if run and run == header(target / RECORD):
        clear(work)


def clear(work: Path) -> None:
    """Remove all that a run keeps but its lock; without a journal the rest means nothing."""
    (work / JOURNAL).unlink(missing_ok=True)
    files.sync(work)
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


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


def publish(work: Path, staged: Path, target: Path, replace: bool) -> None:
    """Let the complete array appear in one step, then remove what it replaced."""
    if not replace and os.path.lexists(target):
        raise TargetExistsError(
            f"target {target} was made by something else meanwhile; remove it and run again"
        )
    shutil.copyfile(work / JOURNAL, staged / RECORD)
    files.sync(staged)
    if target.exists():
        files.exchange(staged, target)
    else:
        os.rename(staged, target)
    files.sync(target.parent)
    clear(work)
