"""Targets in object stores: chunks are stored where they stay, and metadata last.

Until then readers find no array. An object store has no rename.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from daskclip.errors import TargetError, TargetExistsError
from daskclip.storage import Hierarchy, ObjectPrefix
from daskclip.target.journal import JOURNAL, FinalRecord, Journal, Json, RemoteJournal, cut_torn_end
from daskclip.target.lease import Lease
from daskclip.target.preflight import CONSOLIDATED, RECORD, refuse_consolidated, refuse_existing

PUT_BATCH = 64  # documents that are stored at a time
NO_JOURNAL = "none"  # a name that no file has
LOCK, DISCARDED = f"{RECORD}/lock", f"{RECORD}/discarded"


def cannot_be_written(protocol: str) -> TargetError:
    """Return the refusal of a target whose store is only read."""
    return TargetError(
        f"{protocol}:// cannot be written; give a path, or a URL of an object store such as s3://"
    )


class ObjectStoreTarget(ObjectPrefix):
    """A target in an object store; a run keeps its state under ``.daskclip/`` below it."""

    @property
    def journal_prefix(self) -> str:
        """Prefix of the journal's objects: of the unfinished run, or of the one that ended."""
        home = self.open().record_array if self.exists() else ""
        return f"{home}/{RECORD}".lstrip("/")

    def exists(self) -> bool:
        return self.has_node()

    def open(self) -> Hierarchy:
        """Metadata of the target."""
        return Hierarchy.open(self.store, self.path)

    def check(self, source: Hierarchy, *, overwrite: bool, in_place: bool) -> None:
        """Refuse a prefix where the target of a source cannot be made; changes nothing."""
        if self.is_read_only:
            raise cannot_be_written(str(self).partition("://")[0])
        if not self.can_create:
            raise TargetError(
                f"target {self} is in a {type(self.store).__name__}, which cannot be locked; give "
                "a path, a URL, or a store of fsspec or obstore"
            )
        if overwrite or in_place:
            raise TargetError(
                f"target {self} is in an object store, where nothing can be replaced in one step; "
                "clip to a new target and remove the old one"
            )
        here, there = f"{source}/", f"{self}/"
        # without a URL, only the store itself tells which it is
        both = "://" in here or source.store == self.store
        if both and (here.startswith(there) or there.startswith(here)):
            raise TargetError(
                f"target {there} and source {here} lie in each other; choose another target"
            )
        # the names in other stores are text; listing them can take long
        others = source.others() if source.folder else ()
        for key in chain(source.documents, (stored.key for stored in others)):
            try:
                key.encode()
            except UnicodeEncodeError as error:
                raise TargetError(
                    f"name {key!a} in source {source} is not UTF-8, which target {self} needs; "
                    "rename it"
                ) from error
        parts = self.path.split("/")
        for i in range(len(parts) if self.path else 0):
            group = ObjectPrefix(self.store, "/".join(parts[:i]))
            found = (b"" if data is None else data.tobytes() for data in group.get(*CONSOLIDATED))
            refuse_consolidated(self, group, *found)

    def require_free(self, source: Hierarchy) -> None:
        """Refuse a target whose place is taken; objects cannot be replaced."""
        refuse_existing(self)

    @contextmanager
    def locked(self) -> Iterator[ObjectStoreTransaction]:
        """Lock the target for one run, with a local copy of its journal."""
        with Lease(self, LOCK).held() as require:
            prefix = self.journal_prefix
            # a run that was stopped between publishing and cleaning up
            if prefix != RECORD:
                self.tidy(LOCK)
            with _pulled(self, prefix) as folder:
                work = ObjectStoreTransaction(folder, self, require)
                # objects cannot be removed in one step: what was left of a run is removed first
                if self.get(DISCARDED)[0] is not None:
                    work.clear()
                yield work

    def tidy(self, *stays: str) -> None:
        """Remove the state of a run that has ended, except names that begin with ``stays``."""
        names = self.names(RECORD)
        self.delete([name for name in names if not name.startswith(stays)])

    def busy(self) -> bool:
        """Whether a run holds the lock."""
        return Lease(self, LOCK).is_held()

    @contextmanager
    def journals(self) -> Iterator[tuple[Path, Path]]:
        """Paths of the journals of the run that made the target and of an unfinished one."""
        with _pulled(self, self.journal_prefix) as folder:
            both = folder / JOURNAL, folder / NO_JOURNAL
            yield both if self.exists() else both[::-1]

    def unfinished(self) -> bool:
        """Whether there is an unfinished run."""
        return not self.exists() and bool(self.names())


@dataclass(frozen=True)
class ObjectStoreTransaction:
    """A run to an object store, under its lock; ``folder`` has a local copy of its journal."""

    folder: Path
    target: ObjectStoreTarget
    require: Callable[[], None]
    """Raises once another run has taken over the lock."""
    files: tuple[str, ...] = ()
    """Files that every worker must see."""

    @property
    def journal(self) -> Path:
        """Path of the local copy of the journal of this run."""
        return self.folder / JOURNAL

    @property
    def record(self) -> Path:
        """Path of the journal of the run that made the target; there may be none."""
        # one request: there is one journal, and with metadata beside it its run has ended
        return self.folder / (JOURNAL if self.target.exists() else NO_JOURNAL)

    def open_journal(self) -> Journal:
        """Open the journal of this run, without its torn end, here and in the store."""
        cut_torn_end(self.journal)
        remote = RemoteJournal(self.target, self.require)
        remote.replace(self.journal)
        return Journal(self.journal, remote)

    def begin(self, source: Hierarchy, run: str) -> None:
        """Require that nothing is there yet."""
        for name in self.target.names():
            if not name.startswith(RECORD):
                raise TargetExistsError(
                    f"there are objects at target {self.target} ({name}); remove them or choose "
                    "another target"
                )

    def stage(self, source: Hierarchy, run: str) -> tuple[Hierarchy, None]:
        """Arrays that a run writes, whose chunks stay where they are stored."""
        return source.moved_to(self.target.store, self.target.path), None

    def is_complete(self, source: Hierarchy, run: str, last: FinalRecord | None) -> bool:
        """Whether all chunks are there, if the journal ended."""
        return last is None or last.made == self.finish(self.stage(source, run)[0])

    def finish(self, staged: Hierarchy) -> Json:
        """Fingerprint of what was stored, as it is once its metadata is there."""
        # nothing to remove: a store never shows an object that is not complete
        return staged.fingerprint(changes=False)

    def publish(self, source: Hierarchy, staged: Hierarchy, replace: bool) -> None:
        """Let the target appear by its metadata."""
        self.require()
        target = self.target
        if source.record_array:
            target.put(f"{source.record_array}/{RECORD}/{JOURNAL}", self.journal.read_bytes())
        self._put_documents(source)
        target.tidy(LOCK, *(() if source.record_array else (f"{RECORD}/{JOURNAL}",)))

    def open_new(self, made: Hierarchy) -> Hierarchy:
        """Return the arrays to write of a hierarchy that was made elsewhere."""
        self.begin(made, "")
        # if this stops half-way, the next run clears what it left
        self.target.put(DISCARDED, b"")
        return made.moved_to(self.target.store, self.target.path)

    def publish_new(self, made: Hierarchy) -> None:
        """Let what was written appear."""
        self.require()
        self.target.tidy(LOCK)
        self._put_documents(made)

    def _put_documents(self, source: Hierarchy) -> None:
        target, (*documents, last) = self.target, source.target_documents.items()
        for i in range(0, len(documents), PUT_BATCH):
            target.put_once(documents[i : i + PUT_BATCH])
        # that of the root: readers find nothing without it
        target.put_once([last])

    def clear(self) -> None:
        """Remove all that a run has stored but its lock."""
        target = self.target
        # the journal is void from here on: if this stops half-way, the next run clears the rest
        target.put(DISCARDED, b"")
        target.delete([n for n in target.names() if not n.startswith((LOCK, DISCARDED))])
        target.delete([DISCARDED])
        for path in self.folder.iterdir():
            path.unlink()


@contextmanager
def _pulled(prefix: ObjectPrefix, below: str) -> Iterator[Path]:
    """Download a journal and its arrays, if there are any, to a scratch folder."""
    with tempfile.TemporaryDirectory(prefix="daskclip-") as scratch:
        folder = Path(scratch)
        for name in prefix.names(below):
            if name.startswith((LOCK, DISCARDED)):
                continue
            kind = Path(name).name
            (data,) = prefix.get(name)
            # listed by name, which is the order of the lines that the objects of a journal hold
            with (folder / (JOURNAL if kind.startswith(JOURNAL) else kind)).open("ab") as file:
                file.write(b"" if data is None else data.tobytes())
        yield folder
