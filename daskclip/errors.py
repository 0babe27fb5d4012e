"""Every error that daskclip raises on purpose.

Each is a `DaskClipError` and also a builtin error, so that either can be caught, and has the exit
code that the command line returns for it. A message is one line: the fact, the values, the remedy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from numpy.exceptions import AxisError


# pickle makes an error again from its args: an __init__ must work with the message alone
class DaskClipError(Exception):
    """Base of all errors that daskclip raises on purpose."""

    exit_code = 3
    """Exit code of the command line; 3 means that an argument or the source was rejected."""
    resumable = False
    """Whether a run that this error stopped keeps its journal and can be resumed."""

    def __str__(self) -> str:
        # names of files hold anything: line ends, commands to a terminal, bytes that are no UTF-8
        text = super().__str__()
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)

    @classmethod
    def about(cls, what: str, value: object, text: str) -> Self:
        """Error whose message begins with the name and the value of an argument."""
        return cls(f"{what} {short_repr(value)} {text}")


class InvalidValueError(DaskClipError, ValueError):
    """An argument has a value that cannot be used (exit code 3)."""


class InvalidTypeError(DaskClipError, TypeError):
    """An argument has a type that cannot be used (exit code 3)."""


# numpy's AxisError, not IndexError alone: it is what numpy.linalg.norm raises
class AxesError(DaskClipError, AxisError):
    """An axis is out of bounds for the array (exit code 3)."""


class DTypeError(DaskClipError, TypeError):
    """The dtype of an array, or the type of its blocks, is not supported (exit code 3)."""


class NonFiniteError(DaskClipError, FloatingPointError):
    """NaN or infinity was met under ``nonfinite="raise"`` (exit code 3)."""


class KernelError(DaskClipError, ImportError):
    """The compiled kernel cannot be loaded, or its results would be wrong (exit code 1)."""

    exit_code = 1
    # nothing is wrong with the run: the installation is to be repaired
    resumable = True


class MemoryBudgetError(DaskClipError, ValueError):
    """The memory budget is too small for the run (exit code 3).

    ``need`` is the number of bytes that would do, or 0 if it is unknown.
    """

    def __init__(self, text: str, need: int = 0) -> None:
        super().__init__(text)
        self.need = need


class SourceNotFoundError(DaskClipError, FileNotFoundError):
    """The source does not exist (exit code 3)."""


class SourceError(DaskClipError, ValueError):
    """The source is not an array or group that can be clipped (exit code 3)."""


class SourceChangedError(SourceError):
    """The source changed after the run began (exit code 3)."""


class TargetError(DaskClipError, ValueError):
    """The target cannot be at the given location (exit code 3)."""


class TargetPermissionError(DaskClipError, PermissionError):
    """The target's folder is not writable (exit code 3)."""


class ClusterError(DaskClipError, RuntimeError):
    """Workers, or the place from which they are called, do not suit the run (exit code 3)."""


class TargetExistsError(DaskClipError, FileExistsError):
    """The target exists already, or a run to it is active or unfinished (exit code 5)."""

    exit_code = 5
    resumable = True


class StorageError(DaskClipError, OSError):
    """Reading or writing failed during a run; completed work is kept (exit code 1)."""

    exit_code = 1
    resumable = True


class TemporaryError(StorageError):
    """Reading or writing failed for a reason that may pass: run again (exit code 75)."""

    # EX_TEMPFAIL of sysexits.h
    exit_code = 75


class VerificationError(DaskClipError, ValueError):
    """The target differs from what its run wrote (exit code 4)."""

    exit_code = 4


def short_repr(value: object) -> str:
    """Return the repr of a value on one line, cut off after 60 characters."""
    # the repr of an array has many lines, and a log may be read by lines
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def interrupts_first() -> Iterator[None]:
    """Raise the interrupt in place of an error of code that it stopped half-way."""
    try:
        yield
    except Exception as error:
        before = error.__context__
        while before is not None:
            if isinstance(before, KeyboardInterrupt):
                raise before from None
            before = before.__context__
        raise


def error_text(error: BaseException) -> str:
    """Return the message of a foreign error on one line, without debug output and XML."""
    # clients of object stores append what they sent and received
    text = str(error).partition("Debug source")[0].partition("<?xml")[0]
    return " ".join(text.split()) or type(error).__name__
