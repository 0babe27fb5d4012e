"""Journals: a record of the run, then records of blocks that are done, each with a checksum.

A journal is a file of lines: eight hexadecimal digits, a space and a JSON object. Arrays that a
record names are files beside it.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from daskclip.storage import ObjectPrefix, durable
from daskclip.target.preflight import RECORD

JOURNAL = "journal"
LINES = 64  # of a journal, in one object: each new line stores its object again
VERSION = 7
"""Version of the records below, with the fields of `SliceCounts`, which are stored by position.
A run of another version can neither be resumed nor verified."""

Json = dict[str, Any]
Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """The first record of a journal; fields that are None or "" are not stored."""

    version: int = VERSION
    parameters: Json = field(default_factory=dict)
    """Arguments of the run; two runs with equal ones are the same."""
    source: Json = field(default_factory=dict)
    """Fingerprint of the source."""
    limit: float | None = None
    """The measured limit, if clip_norm was given as a quantile."""
    id: str = ""
    """Random id of the run; ``run`` in JSON."""
    began: str = ""
    """When the run began, in UTC."""
    plans: dict[str, Json] | None = None
    """Fields of the plan of each array."""

    @property
    def is_readable(self) -> bool:
        """Whether this version of daskclip can use what the journal holds."""
        return self.version == VERSION

    @property
    def clip_norm(self) -> float | None:
        """The limit in numbers; None if each slice has its own, or none was measured yet."""
        if self.limit is None:
            with suppress(ValueError):  # "None", or a quantile
                return float(self.parameters["clip_norm"])
        return self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksRecord:
    """Work on some blocks since the record before; fields that are None are not stored."""

    tally: Sequence[Any] | None = None
    """Counts over slices, for `SliceCounts.from_json`."""
    target: dict[int, int] | None = None
    """Digest of the files of each block that was written, by its number."""
    kept: Sequence[int] | None = None
    """Numbers of the blocks that are done and were not written."""
    counted: dict[str, bool] | None = None
    """Names of slabs of two passes whose slices are in ``tally``; whether one becomes NaN."""
    slab: str | None = None
    """Name of the slab that ``sums`` and ``source`` are about."""
    sums: str | None = None
    """Name of the arrays with the sums of all its blocks so far."""
    source: dict[int, int] | None = None
    """Digest of the values of each block whose sums were added, by its number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalRecord:
    """The last record of a complete journal; fields that are None are not stored."""

    report: Json | None = None
    """Report of a run."""
    made: Json | None = None
    """Fingerprint of what a run wrote."""
    others: int | None = None
    """Digest of the files that belong to no array."""
    total: Sequence[Any] | None = None
    """Counts over all slices whose norms were saved."""


Record = RunRecord | BlocksRecord | FinalRecord
_JSON = {"id": "run"}  # names of fields that have other ones in JSON


def _to_json(record: Record) -> Json:
    named = ((f.name, getattr(record, f.name)) for f in fields(record))
    return {_JSON.get(name, name): value for name, value in named if value not in (None, "")}


def _from_json(line: Json, *, first: bool) -> Record:
    if first:
        # another version, which is refused later, may have other fields
        names = {f.name: _JSON.get(f.name, f.name) for f in fields(RunRecord)}
        found = {name: line[key] for name, key in names.items() if key in line}
        # a first line without a version is of blocks: the record of the run was lost
        return RunRecord(**{"version": 0} | found)
    if "made" in line or "total" in line:
        return FinalRecord(**line)
    for name in {"target", "source"} & line.keys():
        line[name] = {int(number): digest for number, digest in line[name].items()}
    return BlocksRecord(**line)


def begin(path: Path, run: RunRecord) -> None:
    """Make a journal that holds the record of its run."""
    durable.write_durably(path, _line(run))


def entries(path: Path | bytes) -> Iterator[tuple[Json, int]]:
    """JSON of each line and the offset of its end, up to the first that is torn or changed.

    A journal is given by its path, or by what it holds.
    """
    with io.BytesIO(path) if isinstance(path, bytes) else path.open("rb") as file:
        for line in file:
            text = line[9:-1]
            if not line.endswith(b"\n") or line[:9] != _checksum(text) + b" ":
                return
            yield json.loads(text), file.tell()


def records(path: Path | bytes) -> Iterator[Record]:
    """All records of a journal."""
    return (_from_json(line, first=i == 0) for i, (line, _) in enumerate(entries(path)))


def header(path: Path | bytes) -> RunRecord | None:
    """Record of the run, or None where there is no journal."""
    # a target may be a plain file, below which no path exists
    with suppress(FileNotFoundError, NotADirectoryError):
        for first in records(path):
            return first if isinstance(first, RunRecord) else None
    return None


def final(path: Path | bytes) -> FinalRecord | None:
    """Last record of a complete journal, or None."""
    *_, last = records(path)
    return last if isinstance(last, FinalRecord) else None


def cut_torn_end(path: Path) -> None:
    """Cut a journal off after its last line that is whole."""
    *_, (_, end) = entries(path)
    os.truncate(path, end)


@dataclass(frozen=True, slots=True)
class ArrayFiles:
    """Files of arrays, for every process that sees their place."""

    place: Path | ObjectPrefix
    below: str = ""
    """Name below a prefix of a store."""

    def save(self, name: str, arrays: Arrays) -> None:
        """Keep arrays under a name; they are there for good when this returns."""
        buffer = io.BytesIO()
        # not by numpy.savez: an interrupt in a zip file ends as an error that hides it
        for array in (np.array([*arrays]), *arrays.values()):
            np.save(buffer, array, allow_pickle=False)
        buffer.write(_checksum(buffer.getbuffer()))
        if isinstance(self.place, Path):
            durable.write_durably(self.place / name, buffer.getvalue())
        else:
            self.place.put(f"{self.below}/{name}", buffer.getvalue())

    def load(self, name: str) -> dict[str, npt.NDArray[Any]]:
        """Arrays of that name; raises an error of any kind if they are not whole."""
        if isinstance(self.place, Path):
            data = (self.place / name).read_bytes()
        else:
            (found,) = self.place.get(f"{self.below}/{name}")
            data = b"" if found is None else found.tobytes()
        if data[-8:] != _checksum(memoryview(data)[:-8]):
            raise ValueError(f"{name} is damaged")
        buffer = io.BytesIO(data)
        return {str(key): np.load(buffer) for key in np.load(buffer)}

    def forget(self, name: str) -> None:
        """Remove the arrays of that name, if there are any."""
        if isinstance(self.place, Path):
            (self.place / name).unlink(missing_ok=True)
        else:
            self.place.delete([f"{self.below}/{name}"])


class Journal:
    """An open journal: records of earlier attempts, then new ones, and the arrays they name."""

    def __init__(
        self, path: Path, remote: RemoteJournal | None = None, arrays: ArrayFiles | None = None
    ) -> None:
        self.arrays = arrays or (remote.arrays if remote else ArrayFiles(path.parent))
        """Arrays that records name."""
        self._remote = remote
        self._last: FinalRecord | None = None
        self._old = records(path)
        next(self._old)  # the record of the run
        # read line by line, up to the end before the first append: new lines are not replayed
        self._file = path.open("ab")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def replay(self) -> Iterator[BlocksRecord]:
        """Records of earlier attempts."""
        for record in self._old:
            if isinstance(record, FinalRecord):
                self._last = record
            elif isinstance(record, BlocksRecord):
                yield record

    def ended(self) -> FinalRecord | None:
        """Final record of an earlier attempt, if it came so far; known after `replay`."""
        return self._last

    def append(self, record: BlocksRecord | FinalRecord) -> None:
        """Add a record; it is on disk when this returns."""
        line = _line(record)
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._remote is not None:
            self._remote.append(line)


class RemoteJournal:
    """A copy of a journal in an object store: objects of some lines each, and its arrays."""

    def __init__(self, prefix: ObjectPrefix, require: Callable[[], None]) -> None:
        self._prefix, self._require = prefix, require
        self._lines: list[bytes] = []
        self._number = 0

    def replace(self, path: Path) -> None:
        """Store the lines of a journal in place of those that are stored."""
        with path.open("rb") as file:
            for line in file:
                self._add(line)
        # later objects hold lines that were cut off, and must not follow new ones
        later = [n for n in self._prefix.names(RECORD) if n > self._name]
        self._prefix.delete([n for n in later if n.startswith(f"{RECORD}/{JOURNAL}")])
        self._store()

    @property
    def _name(self) -> str:
        # of fixed width, so that a store lists them in order
        return f"{RECORD}/{JOURNAL}-{self._number:09}"

    def append(self, line: bytes) -> None:
        """Add a line; it is in the store when this returns."""
        self._add(line)
        self._store()

    @property
    def arrays(self) -> ArrayFiles:
        """Arrays that records name."""
        return ArrayFiles(self._prefix, RECORD)

    def _add(self, line: bytes) -> None:
        if len(self._lines) == LINES:
            self._lines, self._number = [], self._number + 1
        self._lines.append(line)

    def _store(self) -> None:
        # another run that has taken over the lock writes to the same objects
        self._require()
        self._prefix.put(self._name, b"".join(self._lines))


def _line(record: Record) -> bytes:
    text = json.dumps(_to_json(record), separators=(",", ":")).encode()
    return b"%s %s\n" % (_checksum(text), text)


def _checksum(data: bytes | memoryview) -> bytes:
    """CRC-32C in eight hexadecimal digits."""
    return b"%08x" % durable.digest(np.frombuffer(data, np.uint8))
