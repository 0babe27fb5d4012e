"""Every error daskclip raises: ours and a builtin, one line, with the exit code of the shell."""

from __future__ import annotations

from typing import Any

from numpy.exceptions import AxisError

__all__ = [
    "AxesError",
    "DTypeError",
    "DaskClipError",
    "InvalidTypeError",
    "InvalidValueError",
    "MemoryBudgetError",
    "NonFiniteError",
    "SourceError",
    "SourceNotFoundError",
    "StorageError",
    "TargetError",
    "TargetExistsError",
    "TargetPermissionError",
    "shown",
]


class DaskClipError(Exception):
    """Base of all errors that daskclip raises on purpose."""

    exit_code = 3
    """Exit code of the command line; 3 says that a parameter or the source was rejected."""


class InvalidValueError(DaskClipError, ValueError):
    """A parameter of the right type with a value that cannot be used."""


class InvalidTypeError(DaskClipError, TypeError):
    """A parameter of a type that cannot be used."""


class AxesError(DaskClipError, AxisError):
    """An axis outside the array."""


class DTypeError(DaskClipError, TypeError):
    """An array whose elements or blocks the operation is not defined for."""


class NonFiniteError(DaskClipError, FloatingPointError):
    """NaN or infinity was met under ``nonfinite="raise"``."""


class MemoryBudgetError(DaskClipError, ValueError):
    """The memory budget holds less than the least that the run needs."""


class SourceNotFoundError(DaskClipError, FileNotFoundError):
    """There is nothing at the source's path."""


class SourceError(DaskClipError, ValueError):
    """The source is not an array that can be clipped."""


class TargetError(DaskClipError, ValueError):
    """The target's place cannot be used."""


class TargetPermissionError(DaskClipError, PermissionError):
    """The target's folder cannot be written."""


class TargetExistsError(DaskClipError, FileExistsError):
    """There is something at the target's path already."""

    exit_code = 5


class StorageError(DaskClipError, OSError):
    """Reading or writing a chunk failed while the run was under way."""

    exit_code = 1


def shown(value: Any) -> str:
    """A value for an error message: its repr on one line, cut off."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def reason(error: BaseException) -> str:
    """Text of an error of another library, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
