"""Operations on a block whose storage may fail: tried again, or told by the chunk."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from daskclip import storage
from daskclip.blocks import Box, box_shape, boxes, shift
from daskclip.errors import DaskClipError, StorageError, TemporaryError, reason

T = TypeVar("T")

ATTEMPTS = 5
FIRST, LONGEST = 0.2, 5.0  # seconds, at most, before the second try and before any
ERRNOS = {
    errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE, errno.EPIPE, errno.ECONNRESET,
    errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO,
}  # fmt: skip


@contextmanager
def attempting(
    doing: str, array: Any, region: Box, operation: Callable[[Box], Any]
) -> Iterator[Callable[[Box], Any]]:
    """Try an operation on a block again where that helps, else say which chunk it fails for."""
    try:
        yield lambda part: retrying(lambda: operation(part))
    except DaskClipError:
        raise
    except Exception as error:
        chunk, cause = _culprit(array, region, operation, error)
        kind, mend = (
            (TemporaryError, "") if transient(cause) else (StorageError, "mend the cause and ")
        )
        raise kind(
            f"{doing} block {shown_region(region)} of {storage.location(array)} failed{chunk}: "
            f"{type(cause).__name__}: {reason(cause)}; {mend}run the same command again to resume"
        ) from error


def _culprit(
    array: Any, region: Box, operation: Callable[[Box], Any], error: Exception
) -> tuple[str, Exception]:
    """The first chunk of a block that the operation fails for alone."""
    for inside in boxes(box_shape(region), storage.write_unit(array)):
        part = shift(inside, region)
        key = next(storage.keys(array, part))
        try:
            operation(part)
        except Exception as own:
            return f" at chunk {key}", own
    return "", error


def shown_region(region: Box) -> str:
    """A region as it is written in Python."""
    return f"[{', '.join(f'{s.start}:{s.stop}' for s in region)}]"


def retrying(function: Callable[[], T]) -> T:
    """Result of ``function``, called again after transient failures, each later than the last."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return function()
        except Exception as error:
            if not transient(error):
                raise
        # at random, so that a thousand workers do not come back at once
        time.sleep(random.uniform(0, min(LONGEST, FIRST * 2**attempt)))
    return function()


def transient(error: BaseException) -> bool:
    """Whether the same call may well succeed later."""
    return any(_transient(e) for e in _chain(error))


def _transient(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in ERRNOS
    status = _status(error)
    return status == 429 or 500 <= status < 600 or isinstance(error, TimeoutError | ConnectionError)


def _status(error: BaseException) -> int:
    """HTTP status of an error of botocore, aiohttp, requests or httpx; 0 if there is none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    found = [getattr(e, k, None) for e in (error, response) for k in ("status", "status_code")]
    return next((status for status in found if isinstance(status, int)), 0)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
