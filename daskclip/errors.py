"""Every error daskclip raises: ours and a builtin, one line, with the exit code of the shell."""

from __future__ import annotations

from typing import Any

from numpy.exceptions import AxisError


class DaskClipError(Exception):
    """Base of all errors that daskclip raises on purpose."""

    exit_code = 3
    """Exit code of the command line; 3 says that a parameter or the source was rejected."""
    resumable = False
    """Whether the journal of a run that this error stopped is kept, so that it can be resumed."""


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


class KernelError(DaskClipError, ImportError):
    """The compiled kernel is not there or cannot be loaded."""

    exit_code = 1
    resumable = True


class MemoryBudgetError(DaskClipError, ValueError):
    """The memory budget holds less than the ``need`` of the run, in bytes, where that is given."""

    def __init__(self, text: str, need: int = 0) -> None:
        super().__init__(text)
        self.need = need


class SourceNotFoundError(DaskClipError, FileNotFoundError):
    """There is nothing at the source's path."""


class SourceError(DaskClipError, ValueError):
    """The source is not an array that can be clipped."""


class SourceChangedError(SourceError):
    """The source is not what it was when the run began."""


class TargetError(DaskClipError, ValueError):
    """The target's place cannot be used."""


class TargetPermissionError(DaskClipError, PermissionError):
    """The target's folder cannot be written."""


class ClusterError(DaskClipError, RuntimeError):
    """A worker has other versions than the client, or does not see the same files."""


class TargetExistsError(DaskClipError, FileExistsError):
    """There is something at the target's path already, or a run is under way or unfinished."""

    exit_code = 5
    resumable = True


class StorageError(DaskClipError, OSError):
    """Reading or writing failed while the run was under way; what is done is kept."""

    exit_code = 1
    resumable = True


class TemporaryError(StorageError):
    """The same, of a kind that passes: run again."""

    exit_code = 75


class VerificationError(DaskClipError, ValueError):
    """The target is not what its run wrote."""

    exit_code = 4


def short_repr(value: Any) -> str:
    """A value for an error message: its repr on one line, cut off."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def error_text(error: BaseException) -> str:
    """Text of an error of another library, on one line and without what it has for programs."""
    text = str(error).partition("Debug source")[0].partition("<?xml")[0]
    return " ".join(text.split()) or type(error).__name__
