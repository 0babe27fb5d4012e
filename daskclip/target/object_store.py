"""A target in an object store: chunks where they stay, metadata last; no array until then."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from daskclip.errors import TargetError, TargetExistsError, TargetPermissionError
from daskclip.storage import Hierarchy, ObjectPrefix
from daskclip.target.directory import JOURNAL
from daskclip.target.lease import Lease
from daskclip.target.preflight import CONSOLIDATED, RECORD, refuse_consolidated

if TYPE_CHECKING:
    from daskclip.target.journal import Entry

LINES = 64  # of a journal, in one object: each window stores its object again
PUT_BATCH = 64  # documents stored at a time
LOCK, DISCARDED = f"{RECORD}/lock", f"{RECORD}/discarded"


class ObjectStoreTarget(ObjectPrefix):
    """A target in an object store; what a run keeps lies below it, under ``.daskclip/``."""

    @property
    def kept(self) -> str:
        """Name below which the journal is."""
        home = self.open().record_array if self.exists() else ""
        return f"{home}/{RECORD}".lstrip("/")

    def exists(self) -> bool:
        return self.has_node()

    def open(self) -> Hierarchy:
        """What is there."""
        return Hierarchy.open(self.store, self.path)

    def check(self, source: Hierarchy, *, overwrite: bool, in_place: bool) -> None:
        """Refuse a place where the target of a source cannot be made; changes nothing."""
        if overwrite or in_place:
            raise TargetError(
                f"target {self} is in an object store, where nothing can be replaced in one step; "
                "clip to a new target and remove the old one"
            )
        if not self.can_create:
            raise TargetError(
                f"target {self} is in a {type(self.store).__name__}, which cannot be locked; give "
                "a path, a URL, or a store of fsspec or obstore"
            )
        if self.store.read_only:
            raise TargetPermissionError(
                f"the store of target {self} is read-only; open it to write"
            )
        here, there = f"{source}/", f"{self}/"
        if here.startswith(there) or there.startswith(here):
            raise TargetError(
                f"target {there} and source {here} lie in each other; choose another target"
            )
        parts = self.path.split("/")
        for i in range(len(parts) if self.path else 0):
            group = ObjectPrefix(self.store, "/".join(parts[:i]))
            found = (b"" if data is None else data for data in group.get(*CONSOLIDATED))
            refuse_consolidated(self, group, *found)

    @contextmanager
    def locked(self) -> Iterator[ObjectStoreTransaction]:
        """What a run keeps, for one alone; removed unless there is a journal."""
        with Lease(self, LOCK).held() as require:
            kept = self.kept
            if kept != RECORD:
                self.tidy(LOCK)  # stopped between publishing and cleaning up
            with _pulled(self, kept) as folder:
                work = ObjectStoreTransaction(folder, self, require)
                if self.get(DISCARDED) != [None]:
                    work.clear()
                yield work

    def tidy(self, *stays: str) -> None:
        """Remove what a run kept that has ended, but what begins with one of those names."""
        names = self.names(RECORD)
        self.delete([name for name in names if not name.startswith(stays)])

    def busy(self) -> bool:
        """Whether a run holds the lock."""
        return Lease(self, LOCK).is_held()

    @contextmanager
    def journals(self) -> Iterator[tuple[Path, Path]]:
        """Journals of the run that made the array and of one that is not finished, if any."""
        with _pulled(self, self.kept) as folder:
            both = folder / JOURNAL, folder / "none"
            yield both if self.exists() else both[::-1]

    def unfinished(self) -> bool:
        """Whether a run has left something that is no array yet."""
        return not self.exists() and bool(self.names())


@dataclass
class ObjectStoreTransaction:
    """A run to a prefix, under its lock; the journal is in a local folder too."""

    folder: Path
    target: ObjectStoreTarget
    require: Callable[[], None]
    """Raises once another run has taken over the lock."""

    @property
    def record(self) -> Path:
        """Journal of the run that made the array, if there is one."""
        return self.folder / (JOURNAL if self.target.exists() else "none")

    def mirror(self) -> RemoteJournal:
        """What keeps the journal in the store too."""
        return RemoteJournal(self.target, self.folder / JOURNAL, self.require)

    @property
    def files(self) -> list[str]:
        """Files that whoever writes must see."""
        return []

    def begin(self, source: Hierarchy, name: str) -> None:
        """Require that nothing is there yet."""
        there = [n for n in self.target.names() if not n.startswith(RECORD)]
        if there:
            raise TargetExistsError(
                f"there are objects at target {self.target} ({there[0]}); remove them or choose "
                "another target"
            )

    def staging(self, source: Hierarchy, name: str) -> tuple[Hierarchy, None]:
        """What to write, whose chunks stay where they are put."""
        return source.moved_to(self.target.store, self.target.path), None

    def complete(self, source: Hierarchy, name: str, last: Entry) -> bool:
        """Whether all chunks are there, if the end of the journal tells of them."""
        return "made" not in last or last["made"] == self.fingerprint_staged(
            source, self.staging(source, "")[0]
        )

    def remove_stray_files(self, staged: Hierarchy) -> None:
        """Do nothing: a store holds no unfinished objects."""

    def fingerprint_staged(self, source: Hierarchy, staged: Hierarchy) -> Entry:
        """Fingerprint of what was stored, as it is once its metadata is there."""
        return staged.fingerprint(changes=False)

    def publish(self, source: Hierarchy, staged: Hierarchy, replace: bool) -> None:
        """Let what is complete appear by its metadata."""
        self.require()
        there, (*documents, last) = self.target, source.documents.items()
        if source.record_array:
            journal = (self.folder / JOURNAL).read_bytes()
            there.put(f"{source.record_array}/{RECORD}/{JOURNAL}", journal)
        for i in range(0, len(documents), PUT_BATCH):
            there.put_once(documents[i : i + PUT_BATCH])
        there.put_once([last])
        self.target.tidy(LOCK, *(() if source.record_array else (f"{RECORD}/{JOURNAL}",)))

    def clear(self) -> None:
        """Remove all that a run has stored but its lock."""
        there = self.target
        there.put(DISCARDED, b"")  # from here on the journal means nothing
        names = [n for n in there.names() if not n.startswith((LOCK, DISCARDED))]
        there.delete([n for n in names if not n.startswith(RECORD)])
        there.delete([n for n in names if n.startswith(RECORD)])
        there.delete([DISCARDED])
        for path in self.folder.iterdir():
            path.unlink()


class RemoteJournal:
    """A journal's lines as objects of some lines each, and its sums."""

    def __init__(self, there: ObjectPrefix, journal: Path, require: Callable[[], None]) -> None:
        self._there, self._require = there, require
        self._lines: list[bytes] = []
        self._number = 0
        with journal.open("rb") as file:
            for line in file:
                self._add(line)
        kept = there.names(RECORD)
        there.delete([n for n in kept if n.startswith(f"{RECORD}/{JOURNAL}") and n > self._name])
        self._store()

    @property
    def _name(self) -> str:
        return f"{RECORD}/{JOURNAL}-{self._number:09}"

    def append(self, line: bytes) -> None:
        """Add a line; it is in the store when this returns."""
        self._add(line)
        self._store()

    def save(self, name: str, data: bytes) -> None:
        """Keep a file of sums."""
        self._there.put(f"{RECORD}/{name}", data)

    def forget(self, name: str) -> None:
        """Remove a file of sums."""
        self._there.delete([f"{RECORD}/{name}"])

    def _add(self, line: bytes) -> None:
        if len(self._lines) == LINES:
            self._lines, self._number = [], self._number + 1
        self._lines.append(line)

    def _store(self) -> None:
        self._require()
        self._there.put(self._name, b"".join(self._lines))


@contextmanager
def _pulled(there: ObjectPrefix, place: str) -> Iterator[Path]:
    """A scratch folder with the journal and its sums, if there are any."""
    with tempfile.TemporaryDirectory(prefix="daskclip-") as scratch:
        folder = Path(scratch)
        for name in there.names(place):
            kind = Path(name).name
            if name.startswith((LOCK, DISCARDED)):
                continue
            (data,) = there.get(name)
            with (folder / (JOURNAL if kind.startswith(JOURNAL) else kind)).open("ab") as file:
                file.write(b"" if data is None else data.tobytes())
        yield folder
