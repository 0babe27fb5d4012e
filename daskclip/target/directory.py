"""Targets in local folders: a work directory beside each, and one rename at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

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
from daskclip.target import preflight
from daskclip.target.journal import JOURNAL, FinalRecord, Journal, Json, cut_torn_end, header


@dataclass(frozen=True)
class DirectoryTarget:
    """A target on a local file system."""

    path: Path

    def __post_init__(self) -> None:
        if fcntl is None:
            raise TargetError("this system has no flock; use clip_by_norm, which needs none")

    def __str__(self) -> str:
        return str(self.path)

    @property
    def work(self) -> Path:
        """Work directory: the lock, the journal and staging of a run."""
        return self.path.parent / f".{self.path.name}.daskclip"

    @property
    def record(self) -> Path:
        """Path of the journal of the run that made the target; there may be none."""
        home = ""
        # anything may be at the path: a file, or a folder with broken metadata
        with suppress(OSError, ValueError):
            home = self.open().record_array
        return self.path / home / preflight.RECORD

    def exists(self) -> bool:
        # an empty folder holds nothing, and the rename of a target takes its place
        with suppress(OSError), os.scandir(self.path) as inside:
            return self.path.is_symlink() or any(inside)
        return os.path.lexists(self.path)

    def open(self) -> Hierarchy:
        """Metadata of the target."""
        return Hierarchy.open(self.path)

    def check(self, source: Hierarchy, *, overwrite: bool, in_place: bool) -> None:
        """Refuse a path where the target of a source cannot be made; changes nothing."""
        path, parent = self.path, self.path.parent
        taken = not (overwrite or in_place or self.record.exists())
        if taken and path == source.folder:
            raise TargetExistsError(
                f"target {path} exists and is the source; {preflight.IN_PLACE} or choose another "
                "path"
            )
        # first: what holds the source is not to be removed
        if not in_place:
            preflight.check_nesting(path, source.folder)
            preflight.check_files(path, source)
        if taken:
            self.require_free(source)
        # renaming a folder onto a link would replace the link, and a mount point refuses it
        if path.is_symlink() or os.path.ismount(path):
            raise TargetError(
                f"target {path} is a link or a mount point; give the path of a folder"
            )
        if not parent.is_dir():
            raise TargetError(f"folder {parent} of the target does not exist; create it")
        if not in_place:
            for folder in (parent, *parent.parents):
                documents = (preflight.content(folder / n) for n in preflight.CONSOLIDATED)
                preflight.refuse_consolidated(path, folder, *documents)
            kind = "group" if source.is_group else "array"
            # `overwrite` must not remove a folder that holds something else, such as a home
            if overwrite and self.exists() and not preflight.is_node(path, kind):
                raise TargetError(
                    f"target {path} is no zarr {kind}; remove it or choose another path"
                )
        if not os.access(parent, os.W_OK | os.X_OK):
            raise TargetPermissionError(
                f"folder {parent} of the target cannot be written; choose another or change its "
                "mode"
            )

    def require_free(self, source: Hierarchy) -> None:
        """Refuse a target whose place is taken; say to overwrite it only if that is possible."""
        otherwise = ""
        with suppress(DaskClipError):
            self.check(source, overwrite=True, in_place=False)
            otherwise = "overwrite it (--overwrite)"
        preflight.refuse_existing(self, otherwise)

    @contextmanager
    def locked(self) -> Iterator[DirectoryTransaction]:
        """Lock the target for one run; the work directory is kept only with a journal."""
        work = self.work
        taken = f"target {self} is being written by another run; wait for it or stop it"
        try:
            work.mkdir(exist_ok=True)
        except OSError as error:
            # the run before removed the folder while it was looked at
            if isinstance(error, FileExistsError) and not os.path.lexists(work):
                raise TargetExistsError(taken) from None
            raise TargetPermissionError(
                f"folder {work.parent} of the target cannot be written ({error.strerror}); "
                "choose another"
            ) from error
        try:
            lock = (work / "lock").open("w")
        except FileNotFoundError:  # or when it was found
            raise TargetExistsError(taken) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # the run before may have removed the file after it was opened here
                mine = os.fstat(lock.fileno()).st_ino == (work / "lock").stat().st_ino
            except (BlockingIOError, FileNotFoundError):
                mine = False
            if not mine:
                raise TargetExistsError(taken)
            try:
                held = DirectoryTransaction(work, self)
                run = header(held.journal)
                # a run that was stopped between publishing and cleaning up
                if run and run == header(held.record):
                    held.clear()
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
        """Yield paths of the journals of the run that made the target and of an unfinished one."""
        yield self.record, self.work / JOURNAL

    def unfinished(self) -> bool:
        """Whether there is an unfinished run."""
        return self.work.exists()


@dataclass(frozen=True)
class DirectoryTransaction:
    """A run to a folder, under its lock: the journal and staging are in ``folder``."""

    folder: Path
    target: DirectoryTarget

    @property
    def journal(self) -> Path:
        """Path of the journal of this run."""
        return self.folder / JOURNAL

    @property
    def record(self) -> Path:
        """Path of the journal of the run that made the target; there may be none."""
        return self.target.record

    @property
    def files(self) -> list[str]:
        """Files that every worker must see."""
        return [str(self.folder / "lock")]

    def open_journal(self) -> Journal:
        """Open the journal of this run, without its torn end."""
        cut_torn_end(self.journal)
        return Journal(self.journal)

    def require_place(self) -> None:
        """Refuse a target that could not be replaced, or whose empty folder could not."""
        if self.target.exists():
            preflight.require_exchange(self.folder, self.target.path)
        elif self.target.path.is_dir():
            preflight.require_removable(self.folder / "lock", self.target.path)

    def begin(self, source: Hierarchy, run: str) -> None:
        """Make the metadata of a source in the staging folder of a run."""
        self.clear()  # of a run that was stopped before it had a journal
        self.require_place()
        if self.target.path == source.folder:
            preflight.require_no_foreign_files(source)
        source.write_documents(self.folder / run)
        durable.sync_filesystem(self.folder)

    def stage(self, source: Hierarchy, run: str) -> tuple[Hierarchy, str]:
        """Arrays that a run writes, and the folder that they are in."""
        staged = source.moved_to(self.folder / run)
        with suppress(ValueError):  # of metadata that is no JSON any more
            if staged.reread().documents == staged.documents:
                return staged, str(staged)
        raise StorageError(
            f"metadata in {staged} is not what it was; discard the run and begin again"
        )

    def is_complete(self, source: Hierarchy, run: str, last: FinalRecord | None) -> bool:
        """Whether staging is there, and holds what the end of the journal says, if it ended."""
        if not (self.folder / run).is_dir():
            return False
        # after an exchange of folders, the old target is in staging
        return last is None or matches_record(lambda: self.stage(source, run)[0], last)

    def finish(self, staged: Hierarchy) -> Json:
        """Remove stray files from staging; return its fingerprint, without reading chunks."""
        for array in staged.arrays.values():
            for key, *_ in array.listed():
                # zarr writes to a temporary file first, which a killed process leaves behind
                if not is_part(key):
                    Path(array.location, key).unlink()
        return staged.reread().fingerprint(changes=False)

    def publish(self, source: Hierarchy, staged: Hierarchy, replace: bool) -> None:
        """Let the target appear in one step, then remove what it replaced."""
        folder, path = Path(str(staged)), self.target.path
        if not replace and self.target.exists():
            raise TargetExistsError(
                f"target {path} was made by something else meanwhile; remove it and run again"
            )
        shutil.copyfile(self.journal, folder / source.record_array / preflight.RECORD)
        # else the rename could survive a crash, and not the files
        durable.sync_filesystem(folder)
        if self.target.exists():
            durable.exchange_directories(folder, path)
        else:
            os.rename(folder, path)
        durable.sync_filesystem(path.parent)
        self.clear()

    def open_new(self, made: Hierarchy) -> Hierarchy:
        """Return the arrays to write of a hierarchy that was made in ``folder``."""
        self.require_place()
        return made

    def publish_new(self, made: Hierarchy) -> None:
        """Let what was made in ``folder`` appear, with all that is in its folder."""
        folder = Path(str(made))
        durable.sync_filesystem(folder)
        preflight.refuse_existing(self.target)
        # between the check and this, only an empty folder could be replaced
        os.rename(folder, self.target.path)
        durable.sync_filesystem(self.target.path.parent)

    def clear(self) -> None:
        """Remove all that a run keeps but its lock."""
        # the journal first: without it the rest means nothing
        self.journal.unlink(missing_ok=True)
        durable.sync_filesystem(self.folder)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()


def matches_record(open_target: Callable[[], Hierarchy], last: FinalRecord | None) -> bool:
    """Whether a target is what the last record of its journal says."""
    # zarr raises errors of any kind for an array that was damaged or removed
    with suppress(Exception):
        return last is not None and last.made == open_target().fingerprint(changes=False)
    return False
