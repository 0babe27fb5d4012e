"""A target in a folder: what may not be there, the work directory beside it, and the rename."""

from __future__ import annotations

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

from daskclip.errors import (
    DaskClipError,
    StorageError,
    TargetError,
    TargetExistsError,
    TargetPermissionError,
)
from daskclip.storage import Hierarchy, durable, is_part
from daskclip.target.journal import Entry, header
from daskclip.target.preflight import (
    CONSOLIDATED,
    RECORD,
    check_nesting,
    content,
    is_node,
    refuse_consolidated,
    require_exchange,
    require_no_foreign_files,
)

JOURNAL = "journal"


@dataclass(frozen=True)
class DirectoryTarget:
    """A target on a local file system."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def work(self) -> Path:
        """Where a run keeps what is not yet published."""
        return self.path.parent / f".{self.path.name}.daskclip"

    @property
    def record(self) -> Path:
        """Journal of the run that made what is there, if there is one."""
        home = ""
        with suppress(OSError, ValueError, DaskClipError):  # else there is none
            home = self.open().record_array
        return self.path / home / RECORD

    def exists(self) -> bool:
        return os.path.lexists(self.path)

    def open(self) -> Hierarchy:
        """What is there."""
        return Hierarchy.open(self.path)

    def check(self, source: Hierarchy, *, overwrite: bool, in_place: bool) -> None:
        """Refuse a place where the target of a source cannot be made; changes nothing."""
        path, parent = self.path, self.path.parent
        if not (overwrite or in_place or self.record.exists()):
            refuse_existing(self)
        if path.is_symlink() or os.path.ismount(path):
            raise TargetError(
                f"target {path} is a link or a mount point; give the path of a folder"
            )
        if not parent.is_dir():
            raise TargetError(f"folder {parent} of the target does not exist; create it")
        if not in_place:
            check_nesting(path, source.folder)
            for folder in (parent, *parent.parents):
                refuse_consolidated(path, folder, *(content(folder / n) for n in CONSOLIDATED))
            kind = "group" if source.is_group else "array"
            if overwrite and path.exists() and not is_node(path, kind):
                raise TargetError(
                    f"target {path} is no zarr {kind}; remove it or choose another path"
                )
        if not os.access(parent, os.W_OK | os.X_OK):
            raise TargetPermissionError(
                f"folder {parent} of the target cannot be written; choose another or change its "
                "mode"
            )

    @contextmanager
    def locked(self) -> Iterator[DirectoryTransaction]:
        """What a run keeps, for one alone; removed unless there is a journal."""
        work = self.work
        taken = f"target {self} is being written by another run; wait for it or stop it"
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
                held = DirectoryTransaction(work, self)
                run = header(work / JOURNAL)
                if run and run == header(held.record):
                    held.clear()  # stopped between publishing and cleaning up
                yield held
            finally:
                if not (work / JOURNAL).exists():
                    shutil.rmtree(work, ignore_errors=True)

    def busy(self) -> bool:
        """Whether a run holds the lock."""
        with suppress(FileNotFoundError), (self.work / "lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    @contextmanager
    def journals(self) -> Iterator[tuple[Path, Path]]:
        """Journals of the run that made the array and of one that is not finished, if any."""
        yield self.record, self.work / JOURNAL

    def unfinished(self) -> bool:
        """Whether a run has left something that is no array yet."""
        return self.work.exists()


@dataclass
class DirectoryTransaction:
    """A run to a folder, under its lock: the journal and the staging array are in ``folder``."""

    folder: Path
    target: DirectoryTarget

    @property
    def record(self) -> Path:
        """Journal of the run that made what is there, if there is one."""
        return self.target.record

    def mirror(self) -> None:
        """What keeps the journal elsewhere too."""

    @property
    def files(self) -> list[str]:
        """Files that whoever writes must see."""
        return [str(self.folder / "lock")]

    def begin(self, source: Hierarchy, name: str) -> None:
        """Make the metadata without chunks in staging, of that name."""
        self.clear()  # of a run that was stopped before it had a journal
        if self.target.exists():
            require_exchange(self.folder)
            if self.target.path == source.folder:
                require_no_foreign_files(source)
        source.write_documents(self.folder / name)
        durable.sync_filesystem(self.folder)

    def staging(self, source: Hierarchy, name: str) -> tuple[Hierarchy, str]:
        """What to write, and its folder."""
        staged = source.moved_to(self.folder / name)
        with suppress(ValueError):  # of metadata that is no JSON any more
            if staged.reread().documents == source.documents:
                return staged, str(staged)
        raise StorageError(
            f"metadata in {staged} is not what it was; discard the run and begin again"
        )

    def complete(self, source: Hierarchy, name: str, last: Entry) -> bool:
        """Whether what was staged is there, and not what it was exchanged for."""
        if not (self.folder / name).is_dir():
            return False
        return "made" not in last or matches_record(lambda: self.staging(source, name)[0], last)

    def remove_stray_files(self, staged: Hierarchy) -> None:
        """Remove files from staging that are neither chunks nor metadata."""
        for array in staged.arrays.values():
            for key, *_ in array.listed():
                if not is_part(key, of_array=True):
                    Path(array.location, key).unlink()

    def fingerprint_staged(self, source: Hierarchy, staged: Hierarchy) -> Entry:
        """Fingerprint of what was staged, without reading chunks."""
        return staged.reread().fingerprint(changes=False)

    def publish(self, source: Hierarchy, staged: Hierarchy, replace: bool) -> None:
        """Let what is complete appear in one step, then remove what it replaced."""
        folder, path = Path(str(staged)), self.target.path
        if not replace and self.target.exists():
            raise TargetExistsError(
                f"target {path} was made by something else meanwhile; remove it and run again"
            )
        shutil.copyfile(self.folder / JOURNAL, folder / source.record_array / RECORD)
        durable.sync_filesystem(folder)
        if self.target.exists():
            durable.exchange_directories(folder, path)
        else:
            os.rename(folder, path)
        durable.sync_filesystem(path.parent)
        self.clear()

    def clear(self) -> None:
        """Remove all that a run keeps but its lock; without a journal the rest means nothing."""
        (self.folder / JOURNAL).unlink(missing_ok=True)
        durable.sync_filesystem(self.folder)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()


def can_lock() -> bool:
    """Whether this system has what a lock in a folder takes."""
    return fcntl is not None


def matches_record(opened: Callable[[], Any], last: Entry) -> bool:
    """Whether an array is what the last entry of its journal says."""
    with suppress(Exception):  # zarr raises anything for what is no array any more
        return bool(last["made"] == opened().fingerprint(changes=False))
    return False


def refuse_existing(target: Any) -> None:
    """Refuse a target that something is at."""
    if target.exists():
        raise TargetExistsError(
            f"target {target} exists; remove it or choose another path, or overwrite it"
        )
