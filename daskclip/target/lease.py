"""A lock in an object store, which is void once its holder stops renewing it."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Event, Thread
from uuid import uuid4

from daskclip.errors import DaskClipError, TargetError, TargetExistsError
from daskclip.storage import ObjectPrefix

log = logging.getLogger("daskclip")
HEARTBEAT_S = 5.0
LEASE_TIMEOUT_S = 20.0  # a lease that was not renewed for so long is void


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
            # whoever took over created a later name, and may not have removed this one yet
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
        # it exists now: a store that creates it again would give two runs the lock
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
        waited = "waiting for a sign of the run that writes %s, %g s at most"
        log.info(waited, self.objects, LEASE_TIMEOUT_S)
        # by the clock of this machine alone: those of others may differ
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
