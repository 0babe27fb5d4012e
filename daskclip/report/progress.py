"""Progress of a run on stderr: a bar, a line every ten seconds, or a JSON line a record."""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, get_args

from daskclip.errors import InvalidTypeError, InvalidValueError
from daskclip.report.output import show_progress

Mode = Literal["auto", "bar", "lines", "json", "none"]
LINE_INTERVAL_S = 10.0
BAR_WIDTH, SHORT_BAR = 30, 10
COLUMNS = 80  # of a terminal that does not say

STATES = 200  # points of the curve of progress that are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressState:
    """Bytes and seconds of a run after one of its records."""

    done: int
    """Bytes done, over all passes."""
    skipped: int
    """Bytes done before this call, or not stored at all."""
    total: int
    """Bytes to do, over all passes."""
    pass_: int
    """Number of the pass of its blocks, from 1."""
    passes: int
    """Number of passes."""
    seconds: float
    """Seconds since the passes began."""

    @property
    def rate(self) -> float:
        """Bytes a second in this call."""
        # seconds may be 0 where all blocks were done before
        return (self.done - self.skipped) / max(self.seconds, 1e-9)

    @property
    def left(self) -> float | None:
        """Seconds left at this rate; None where there is none yet."""
        if self.done >= self.total:
            return 0.0
        return (self.total - self.done) / self.rate if self.rate else None


Show = Callable[[ProgressState], None]


def progress_printer(progress: object) -> Show:
    """Function that shows a `ProgressState`.

    Parameters
    ----------
    progress : bool or Mode
        True is ``'auto'``: a bar on a terminal, else lines. False is ``'none'``.

    Returns
    -------
    callable

    Raises
    ------
    InvalidTypeError, InvalidValueError
        If ``progress`` is anything else.
    """
    if not isinstance(progress, bool | str):
        kind = f"is a {type(progress).__name__}; give a bool or a mode"
        raise InvalidTypeError.about("progress", progress, kind)
    mode = progress if isinstance(progress, str) else "auto" if progress else "none"
    if mode not in get_args(Mode):
        known = f"is unknown; use one of {', '.join(get_args(Mode))}"
        raise InvalidValueError.about("progress", progress, known)
    if mode == "auto":
        # None where the process began without a stderr; ValueError of one that was closed since
        with suppress(AttributeError, ValueError):
            mode = "bar" if sys.stderr.isatty() else "lines"
    shows: dict[str, Show] = {"bar": _bar, "lines": _lines(), "json": _json}
    return shows.get(mode, lambda state: None)


@dataclass(slots=True)
class Progress:
    """Progress of the passes over the arrays, shown after each record."""

    show: Show = field(default_factory=lambda: progress_printer(False))
    total: int = 0
    """Bytes to do, over all passes."""
    passes: int = 2
    """Number of times an array is read, at most."""
    began: float = field(default_factory=time.monotonic)
    states: list[ProgressState] = field(default_factory=list)
    """States that were shown, thinned out, from the first to the last."""

    def report(self, done: int, skipped: int, pass_: int) -> None:
        """Show the bytes done and skipped, and the pass of the last blocks."""
        state = ProgressState(
            done=min(done, self.total), skipped=skipped, total=self.total, pass_=pass_,
            passes=self.passes, seconds=time.monotonic() - self.began,
        )  # fmt: skip
        self.states.append(state)
        self.show(state)
        # every other one goes, so that they are spread over the whole run
        if len(self.states) > STATES:
            del self.states[1:-1:2]


def _parts(state: ProgressState) -> list[str]:
    """Figures as text, the most important one first."""
    parts = [f"{state.done / 1e9:.2f}/{state.total / 1e9:.2f} GB"]
    # of what an earlier call has done there is no rate
    if state.left is not None:
        parts.append(f"{state.left:.0f} s left")
    parts.append(f"pass {state.pass_}/{state.passes}")
    return [*parts, f"{state.rate / 1e6:.0f} MB/s"] if state.rate else parts


def _json(state: ProgressState) -> None:
    fields = {
        "done": state.done, "total": state.total, "pass": state.pass_, "passes": state.passes,
        "seconds": round(state.seconds, 3), "rate": round(state.rate),
        "left": None if state.left is None else round(state.left, 3),
    }  # fmt: skip
    show_progress(json.dumps(fields) + "\n")


def _columns() -> int:
    """Columns of the terminal of stderr."""
    # not shutil.get_terminal_size, which looks at stdout; a terminal may not know its size
    with suppress(OSError, ValueError, AttributeError):
        return os.get_terminal_size(sys.stderr.fileno()).columns or COLUMNS
    return COLUMNS


def _bar(state: ProgressState) -> None:
    parts, columns = _parts(state), _columns() - 1  # a full line would wrap
    # figures that leave no place for a short bar are left out
    while len(parts) > 1 and len("  ".join(parts)) + SHORT_BAR + 3 > columns:
        parts.pop()
    text = "  ".join(parts)
    width = min(BAR_WIDTH, columns - len(text) - 3)
    full = width * state.done // max(1, state.total)
    bar = f"[{'#' * full}{' ' * (width - full)}] " if width > 0 else ""
    end = "\n" if state.done >= state.total else ""
    # \x1b[K clears what is left of a longer line
    show_progress(f"\r{(bar + text)[:columns]}\x1b[K{end}")


def _lines() -> Show:
    printed = time.monotonic()

    def show(state: ProgressState) -> None:
        nonlocal printed
        # the log of a batch job is kept: a line a record could be thousands; the last one always
        if time.monotonic() >= printed + LINE_INTERVAL_S or state.done >= state.total:
            printed = time.monotonic()
            show_progress(f"daskclip: {'  '.join(_parts(state))}\n")

    return show
