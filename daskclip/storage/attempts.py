"""Operations on a block whose storage may fail: tried again, or told by the chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from daskclip.errors import DaskClipError, error_text
from daskclip.grid import Box, box_shape, boxes, offset_box
from daskclip.storage import array as storage
from daskclip.storage import regions
from daskclip.storage.retry import kind_and_remedy, retrying


@contextmanager
def retrying_block(
    doing: str, array: Any, region: Box, operation: Callable[[Box], Any]
) -> Iterator[Callable[[Box], Any]]:
    """Try an operation on a block again where that helps, else say which chunk it fails for."""
    try:
        yield lambda part: retrying(lambda: operation(part))
    except DaskClipError:
        raise
    except Exception as error:
        chunk, cause = _culprit(array, region, operation, error)
        kind, remedy = kind_and_remedy(cause)
        raise kind(
            f"{doing} block {format_region(region)} of {storage.location(array)} failed{chunk}: "
            f"{type(cause).__name__}: {error_text(cause)}; {remedy}"
        ) from error


def _culprit(
    array: Any, region: Box, operation: Callable[[Box], Any], error: Exception
) -> tuple[str, Exception]:
    """The first chunk of a block that the operation fails for alone."""
    for inside in boxes(box_shape(region), storage.write_unit(array)):
        part = offset_box(inside, region)
        key = next(regions.keys(array, part))
        try:
            operation(part)
        except Exception as own:
            return f" at chunk {key}", own
    return "", error


def format_region(region: Box) -> str:
    """A region as it is written in Python."""
    return f"[{', '.join(f'{s.start}:{s.stop}' for s in region)}]"
