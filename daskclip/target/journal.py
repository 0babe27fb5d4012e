"""What is done: a line about the run, then one for each window, each with a checksum."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from daskclip.storage import durable

Entry = dict[str, Any]
Arrays = dict[str, npt.NDArray[Any]]


def begin(path: Path, first: Entry) -> None:
    """Make a journal that holds the line about its run."""
    durable.write_durably(path, _line(first))


def header(path: Path) -> Entry | None:
    """The line about the run, or None where there is no journal."""
    try:
        return next((entry for entry, _ in entries(path)), None)
    except (FileNotFoundError, NotADirectoryError):
        return None


def entries(path: Path) -> Iterator[tuple[Entry, int]]:
    """Entries with the place where each ends, up to the first line that is torn or changed."""
    with path.open("rb") as file:
        for line in file:
            text = line[9:-1]
            if not line.endswith(b"\n") or line[:9] != b"%08x " % durable.digest(text):
                return
            yield json.loads(text), file.tell()


class Journal:
    """The entries of earlier attempts at a run, one after the other, then new ones.

    An entry may name a file of arrays beside the journal, in ``sums``. ``mirror`` gives what is
    told of each line and file, if anything.
    """

    def __init__(self, path: Path, mirror: Callable[[], Any] = bool) -> None:
        self._folder = path.parent
        self._last: tuple[str, Arrays] = "", {}
        ends = [(end, entry.get("sums")) for entry, end in entries(path)]
        while ends[-1][1] and not self._readable(ends[-1][1]):
            ends.pop()
        os.truncate(path, ends[-1][0])
        self._mirror = mirror()
        self._old = entries(path)
        next(self._old)
        self._file = path.open("ab")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def replay(self) -> Entry | None:
        """Next entry of earlier attempts, or None from where new work begins."""
        return next((entry for entry, _ in self._old), None)

    def append(self, entry: Entry) -> None:
        """Add an entry; it is on disk when this returns."""
        line = _line(entry)
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._mirror:
            self._mirror.append(line)

    def save(self, name: str, arrays: Arrays) -> None:
        """Keep arrays in a file of that name."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        durable.write_durably(self._folder / name, buffer.getvalue())
        if self._mirror:
            self._mirror.save(name, buffer.getvalue())
        self._last = name, arrays

    def load(self, name: str) -> Arrays:
        """Load the arrays of that name."""
        if self._last[0] != name:
            self._last = name, load(self._folder / name)
        return self._last[1]

    def forget(self, name: str) -> None:
        """Remove the arrays of that name, if there are any."""
        if name:
            (self._folder / name).unlink(missing_ok=True)
            if self._mirror:
                self._mirror.forget(name)

    def _readable(self, name: str) -> bool:
        try:
            return bool(self.load(name))
        except Exception:  # of a file that is torn, numpy and zipfile raise anything
            return False


def load(path: Path) -> Arrays:
    """Load the arrays in a file."""
    # numpy leaves open what it opened itself, if it is torn
    with path.open("rb") as file, np.load(file) as stored:
        return {name: stored[name] for name in stored.files}


def _line(entry: Entry) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %s\n" % (durable.digest(text), text)
