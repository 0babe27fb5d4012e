"""Standard output and files, of which any may be closed or full."""

import io
import os
import sys
from contextlib import suppress
from pathlib import Path

from daskclip.errors import StorageError, error_text


def show_progress(text: str) -> None:
    """Write to stderr; a stderr that is closed or full is no reason to stop a run."""
    # ValueError is also that of text that the encoding lacks
    with suppress(OSError, ValueError):
        if sys.stderr is not None:
            sys.stderr.write(text)
            sys.stderr.flush()  # a bar has no end of line, which would flush it


def print_text(text: str) -> None:
    """Write to stdout, or raise `StorageError`."""
    try:
        if sys.stdout is None:
            raise OSError("it is closed")
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except OSError as error:
        raise _unwritten("stdout", error) from error


def write_text(path: Path, text: str) -> None:
    """Write a file, or raise `StorageError`."""
    try:
        # names of files need not be text: what is none becomes a character reference
        path.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")
    except OSError as error:
        raise _unwritten(f"file {path}", error) from error


def _unwritten(what: str, error: OSError) -> StorageError:
    why = error.strerror or error_text(error)
    return StorageError(
        f"{what} cannot be written ({why}); a target that was made stays: mend the cause and run "
        "the same command again"
    )


def open_standard_files() -> None:
    """Open those that the caller closed, and let both streams write any name of a file."""
    # a file of the run that got the number of stderr would be written to by C libraries
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def drop_unwritten() -> None:
    """Drop what a full stream still holds, for which Python would exit with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
