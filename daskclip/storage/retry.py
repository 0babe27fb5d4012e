"""Errors of file systems and stores: which are transient, retries, and translation."""

import errno
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from daskclip.errors import DaskClipError, StorageError, TemporaryError, error_text

T = TypeVar("T")

log = logging.getLogger("daskclip")

ATTEMPTS = 5
FIRST, LONGEST = 0.2, 5.0  # longest delay before the second attempt, and before any; seconds
ERRNOS = {
    errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE, errno.EPIPE, errno.ECONNRESET,
    errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO,
}  # fmt: skip
# errors of libraries for object stores that mean a lost connection; by name, since importing the
# libraries would be slow
LOST = {"ClientConnectionError", "ClientPayloadError", "HTTPClientError", "IncompleteReadError"}
LOST |= {"ConnectionError", "TransportError", "GenericError"}
STATUS = re.compile(r"status code: (\d+)")


@contextmanager
def translating_storage_errors(doing: str) -> Iterator[None]:
    """Raise errors of file systems and stores as `StorageError`, on one line."""
    try:
        yield
    except DaskClipError:
        raise
    except Exception as error:
        expected = isinstance(error, OSError | MemoryError)
        if not (expected or is_transient(error) or is_refused(error)):
            raise
        kind, remedy = kind_and_remedy(error)
        raise kind(f"{doing} failed: {error_text(error)}; {remedy}") from error


def retrying(function: Callable[..., T], *args: object) -> T:
    """Result of a call, repeated after transient errors with growing delays."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return function(*args)
        except Exception as error:
            if not is_transient(error):
                raise
            # random, so that a thousand workers do not return at the same moment
            seconds = random.uniform(0, min(LONGEST, FIRST * 2**attempt))
            log.warning("%s: %s; again in %.1f s", type(error).__name__, error_text(error), seconds)
        # outside the handler: the traceback would keep the buffers of the failed call
        time.sleep(seconds)
    return function(*args)


def kind_and_remedy(error: BaseException) -> tuple[type[StorageError], str]:
    """Class of error to raise for a failure, and its remedy."""
    again = "run the same command again to resume"
    if is_transient(error):
        return TemporaryError, again
    return StorageError, f"mend the cause and {again}"


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    return any(_transient(e) for e in _chain(error))


def is_refused(error: BaseException) -> bool:
    """Whether credentials are missing, wrong, or insufficient."""
    return any(
        isinstance(e, PermissionError)
        or _status(e) in (401, 403)
        or type(e).__name__ in ("NoCredentialsError", "PermissionDeniedError")
        for e in _chain(error)
    )


def http_status(error: BaseException) -> int:
    """HTTP status of an error of any library, or of what caused it; 0 if none."""
    return next(filter(None, map(_status, _chain(error))), 0)


def _transient(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None and error.errno != errno.EINVAL:
        return error.errno in ERRNOS
    status = _status(error)
    if status:
        # 501: the server does not have the method
        return status == 429 or (500 <= status < 600 and status != 501)
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & LOST) or isinstance(error, TimeoutError | ConnectionError)


def _status(error: BaseException) -> int:
    """HTTP status of an error of botocore, aiohttp, requests, httpx or obstore; 0 if none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    found = [getattr(e, k, None) for e in (error, response) for k in ("status", "status_code")]
    # obstore has the status in its text only
    if type(error).__module__.startswith("obstore"):
        found += map(int, STATUS.findall(str(error))[:1])
    return next((status for status in found if isinstance(status, int)), 0)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
