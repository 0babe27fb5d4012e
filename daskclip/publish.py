"""A target in a folder: what may not be there, the work directory beside it, and the rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not POSIX: importing daskclip must work all the same
    fcntl = None  # type: ignore[assignment]

from daskclip import files, storage
from daskclip.errors import TargetError, TargetExistsError, TargetPermissionError
from daskclip.journal import Entry, header

CONSOLIDATED = ("zarr.json", ".zmetadata")
JOURNAL = "journal"
RECORD = ".daskclip"
"""Journal of the run that made an array, in its folder; zarr takes no notice of it."""
TAKEN = "is being written by another run; wait for it or stop it"


@dataclass(frozen=True)
class Folder:
    """A target on a local file system."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def work(self) -> Path:
        """Where a run keeps what is not yet published."""
        return self.path.parent / f".{self.path.name}.daskclip"

    def exists(self) -> bool:
        return os.path.lexists(self.path)

    def open(self) -> Any:
        """The array that is there."""
        return storage.open_made(self.path)

    def check(self, source: Any, *, overwrite: bool, in_place: bool) -> None:
        """Refuse a place where the target of a source cannot be made; changes nothing."""
        path, parent = self.path, self.path.parent
        if not (overwrite or in_place or (path / RECORD).exists()):
            refuse_existing(self)
        if path.is_symlink() or os.path.ismount(path):
            raise TargetError(
                f"target {path} is a link or a mount point; give the path of a folder"
            )
        if not parent.is_dir():
            raise TargetError(f"folder {parent} of the target does not exist; create it")
        if not in_place:
            _check_nesting(path, storage.local_path(source))
            for folder in (parent, *parent.parents):
                _refuse_consolidated(folder, path)
            if overwrite and path.exists() and not _is_array(path):
                raise TargetError(
                    f"target {path} is no zarr array; remove it or choose another path"
                )
        if not os.access(parent, os.W_OK | os.X_OK):
            raise TargetPermissionError(
                f"folder {parent} of the target cannot be written; choose another or change its "
                "mode"
            )

    @contextmanager
    def locked(self) -> Iterator[FolderWork]:
        """What a run keeps, for one alone; removed unless there is a journal."""
        work, taken = self.work, f"target {self} {TAKEN}"
        try:
            work.mkdir(exist_ok=True)
        except OSError as error:
            raise TargetPermissionError(
                f"folder {work.parent} of the target cannot be written ({error.strerror}); "
                "choose another"
            ) from error
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
                held = FolderWork(work, self)
                run = header(work / JOURNAL)
                if run and run == header(held.record):
                    held.clear()  # stopped between publishing and cleaning up
                yield held
            finally:
                if not (work / JOURNAL).exists():
                    shutil.rmtree(work, ignore_errors=True)

    def busy(self) -> bool:
        """Whether a run holds the lock."""
        try:
            with (self.work / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            pass
        return False

    @contextmanager
    def journals(self) -> Iterator[tuple[Path, Path]]:
        """Journals of the run that made the array and of one that is not finished, if any."""
        yield self.path / RECORD, self.work / JOURNAL

    def unfinished(self) -> bool:
        """Whether a run has left something that is no array yet."""
        return self.work.exists()


@dataclass
class FolderWork:
    """A run to a folder, under its lock: the journal and the staging array are in ``folder``."""

    folder: Path
    target: Folder

    @property
    def record(self) -> Path:
        """Journal of the run that made the array, if there is one."""
        return self.target.path / RECORD

    def mirror(self) -> None:
        """What keeps the journal elsewhere too."""

    @property
    def files(self) -> list[str]:
        """Files that whoever writes must see."""
        return [str(self.folder / "lock")]

    def begin(self, source: Any, name: str) -> None:
        """Make an array without chunks in staging, of that name."""
        self.clear()  # of a run that was stopped before it had a journal
        if self.target.exists():
            _require_exchange(self.folder)
            if self.target.path == storage.local_path(source):
                _refuse_strangers(self.target.path)
        storage.create_like(source, self.folder / name)
        files.sync(self.folder)

    def staging(self, source: Any, name: str) -> tuple[Any, str]:
        """Array to write, and its folder."""
        return storage.open_made(self.folder / name), str(self.folder / name)

    def complete(self, source: Any, name: str, last: Entry) -> bool:
        """Whether what was staged is there, and not what it was exchanged for."""
        if not (self.folder / name).is_dir():
            return False
        return "made" not in last or is_made(lambda: self.staging(source, name)[0], last)

    def made(self, source: Any, staged: Any) -> Entry:
        """What tells what was staged from another state; of exactly the files to be published."""
        folder = Path(storage.location(staged))
        for key, *_ in storage.listed(staged):
            if not files.CHUNK.fullmatch(key) and key not in storage.METADATA:
                (folder / key).unlink()
        return storage.fingerprint(staged, changes=False)

    def publish(self, source: Any, staged: Any, replace: bool) -> None:
        """Let the complete array appear in one step, then remove what it replaced."""
        folder, path = Path(storage.location(staged)), self.target.path
        if not replace and self.target.exists():
            raise TargetExistsError(
                f"target {path} was made by something else meanwhile; remove it and run again"
            )
        shutil.copyfile(self.folder / JOURNAL, folder / RECORD)
        files.sync(folder)
        if self.target.exists():
            files.exchange(folder, path)
        else:
            os.rename(folder, path)
        files.sync(path.parent)
        self.clear()

    def clear(self) -> None:
        """Remove all that a run keeps but its lock; without a journal the rest means nothing."""
        (self.folder / JOURNAL).unlink(missing_ok=True)
        files.sync(self.folder)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()


def can_lock() -> bool:
    """Whether this system has what a lock in a folder takes."""
    return fcntl is not None


def is_made(opened: Callable[[], Any], last: Entry) -> bool:
    """Whether an array is what the last entry of its journal says."""
    with suppress(Exception):  # zarr raises anything for what is no array any more
        return bool(last["made"] == storage.fingerprint(opened(), changes=False))
    return False


def refuse_existing(target: Any) -> None:
    """Refuse a target that something is at."""
    if target.exists():
        raise TargetExistsError(
            f"target {target} exists; remove it or choose another path, or overwrite it"
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


def _is_array(folder: Path) -> bool:
    document = _document(folder / "zarr.json")
    return document.get("node_type") == "array" or (folder / ".zarray").is_file()


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


def _refuse_strangers(folder: Path) -> None:
    """Refuse a folder with files that would be lost when another takes its place."""
    for entry in os.scandir(folder):
        part = files.CHUNK.fullmatch(entry.name) or entry.name in (*storage.METADATA, RECORD)
        if not part:
            raise TargetError(f"{entry.path} is no part of the array in its folder; move it away")


def _require_exchange(work: Path) -> None:
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
