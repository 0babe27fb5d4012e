"""Objects below a prefix of an object store, and a lock among them that expires."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from threading import Event, Thread
from typing import Any
from uuid import uuid4

from daskclip.errors import (
    DaskClipError,
    TargetError,
    TargetExistsError,
    TargetPermissionError,
    error_text,
)
from daskclip.storage import T, is_refused, kind_and_remedy, retrying
from daskclip.storage import object_store as objects

log = logging.getLogger("daskclip")
HEARTBEAT_S = 5.0
LEASE_TIMEOUT_S = 20.0  # a lease that was not renewed for so long is void
DELETE_BATCH = 1000  # objects, the most that S3 removes in one request


@dataclass(frozen=True)
class ObjectPrefix:
    """Objects below a prefix of an object store, by their names below it."""

    store: Any
    path: str

    def __str__(self) -> str:
        return objects.url(self.store, self.path)

    def get(self, *names: str) -> list[Any]:
        """Bytes of each object, or None where there is none."""
        return self._do("reading", lambda: objects.get(self.store, [*map(self._key, names)]))

    def put(self, name: str, data: bytes) -> None:
        """Make or replace an object."""
        self._do("writing", lambda: objects.put(self.store, self._key(name), data))

    def create(self, name: str, data: bytes) -> bool:
        """Make an object; False if there is one, unless an earlier try made it."""
        (made,) = self._do("writing", lambda: objects.create(self.store, [(self._key(name), data)]))
        return made

    def put_once(self, named: Sequence[tuple[str, bytes]]) -> None:
        """Make objects, in no order; there may be the same ones."""
        keyed = [(self._key(name), data) for name, data in named]
        self._do("writing", lambda: objects.put_once(self.store, keyed))

    def names(self, below: str = "") -> list[str]:
        """Names of all objects, or of those below a name, in order."""
        top = self._key(below)
        keys = self._do("listing", lambda: [s.key for s in objects.listed(self.store, top)])
        return sorted(f"{below}/{key}".lstrip("/") for key in keys)

    def delete(self, names: list[str]) -> None:
        """Remove objects, in no order."""
        for i in range(0, len(names), DELETE_BATCH):
            keys = [*map(self._key, names[i : i + DELETE_BATCH])]
            self._do("removing", partial(objects.delete, self.store, keys))

    def _key(self, name: str) -> str:
        return f"{self.path}/{name}".strip("/")

    def _do(self, doing: str, function: Callable[[], T]) -> T:
        try:
            return retrying(function)
        except DaskClipError:
            raise
        except Exception as error:
            text = f"{doing} objects at {self} failed ({error_text(error)})"
            if is_refused(error):
                raise TargetPermissionError(f"{text}; check credentials and rights") from error
            if isinstance(error, FileNotFoundError):
                raise TargetError(f"{text}; check the bucket") from error
            kind, remedy = kind_and_remedy(error)
            raise kind(f"{text}; {remedy}") from error


@dataclass(frozen=True)
class Lease:
    """A lock in an object store with one holder, who renews it; void once that stops.

    Each holder creates the object with the next number, which only one can.
    """

    objects: ObjectPrefix
    name: str
    """Prefix of the names of the lock's objects."""

    @contextmanager
    def held(self) -> Iterator[Callable[[], None]]:
        """Hold the lock; yields a function that raises once another run has taken it over."""
        name, owner = self._take()
        stop = Event()

        def require() -> None:
            if self._names()[-1:] != [name]:
                raise self._taken()

        def beat() -> None:
            beats = 0
            while not stop.wait(HEARTBEAT_S):
                beats += 1
                # the next beat may succeed, and the journal calls `require` before it stores
                with suppress(Exception):
                    require()
                    self.objects.put(name, b"%s %d" % (owner, beats))

        beating = Thread(target=beat, daemon=True)
        beating.start()
        try:
            yield require
        finally:
            stop.set()
            beating.join()
            with suppress(DaskClipError):  # else it expires
                self.objects.delete([name])

    def is_held(self) -> bool:
        """Whether a run holds the lock; waits until it is renewed, or expires."""
        return any(map(self._lives, self._names()[-1:]))

    def _take(self) -> tuple[str, bytes]:
        before = self._names()
        if any(map(self._lives, before[-1:])):
            raise self._taken()
        number = int(before[-1].rpartition("/")[2]) + 1 if before else 0
        name = f"{self.name}/{number:06}"
        owner = f"{uuid4().hex} {socket.gethostname()} {os.getpid()}".encode()
        if not self.objects.create(name, owner):
            (found,) = self.objects.get(name)  # an earlier try may have made it
            if found is None or found.tobytes() != owner:
                raise self._taken()
        if self.objects.create(name, owner):
            self.objects.delete([name])
            raise TargetError(
                f"the store of {self.objects} replaces objects that it was told to create "
                "(If-None-Match), so that a run could not be alone; choose another store, or clip "
                "to a local folder and copy that"
            )
        self.objects.delete(before)
        return name, owner

    def _lives(self, name: str) -> bool:
        (seen,) = self.objects.get(name)
        log.info(
            "waiting for a sign of the run that writes %s, %g s at most",
            self.objects,
            LEASE_TIMEOUT_S,
        )
        end = time.monotonic() + LEASE_TIMEOUT_S
        while seen is not None and time.monotonic() < end:
            time.sleep(HEARTBEAT_S / 5)
            (now,) = self.objects.get(name)
            if now is None or now.tobytes() != seen.tobytes():
                return True
        return False

    def _names(self) -> list[str]:
        return self.objects.names(self.name)

    def _taken(self) -> TargetExistsError:
        return TargetExistsError(
            f"target {self.objects} is being written by another run; wait for it or stop it"
        )
