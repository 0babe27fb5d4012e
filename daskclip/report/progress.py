"""Progress of a run on stderr: a bar, a line every ten seconds, or a JSON line a window."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from daskclip.errors import InvalidTypeError, InvalidValueError

Mode = Literal["auto", "bar", "lines", "json", "none"]
LINE_INTERVAL_S = 10.0
BAR_WIDTH = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressState:
    """Bytes and seconds of a run after one of its windows."""

    done: int
    """Bytes done, over all passes."""
    skipped: int
    """Bytes done before this call, or not stored at all."""
    total: int
    """Bytes to do, over all passes."""
    pass_: int
    """Number of the pass of that window, from 1."""
    passes: int
    """Number of passes."""
    seconds: float
    """Seconds since the passes began."""

    @property
    def rate(self) -> float:
        """Bytes a second in this call."""
        # seconds may be 0 where all windows were done before
        return (self.done - self.skipped) / max(self.seconds, 1e-9)

    @property
    def left(self) -> float:
        """Seconds left at this rate."""
        return (self.total - self.done) / self.rate if self.rate else 0.0


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
        mode = "bar" if sys.stderr.isatty() else "lines"
    shows: dict[str, Show] = {"bar": _bar, "lines": _lines(), "json": _json}
    return shows.get(mode, lambda state: None)


def _text(state: ProgressState) -> str:
    done = f"{state.done / 1e9:.2f}/{state.total / 1e9:.2f} GB  pass {state.pass_}/{state.passes}"
    return f"{done}  {state.rate / 1e6:.0f} MB/s  {state.left:.0f} s left"


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()  # a bar has no end of line, which would flush it


def _json(state: ProgressState) -> None:
    fields = {
        "done": state.done, "total": state.total, "pass": state.pass_, "passes": state.passes,
        "seconds": round(state.seconds, 3), "rate": round(state.rate), "left": round(state.left, 3),
    }  # fmt: skip
    _write(json.dumps(fields) + "\n")


def _bar(state: ProgressState) -> None:
    # \x1b[K clears what is left of a longer line
    full = BAR_WIDTH * state.done // max(1, state.total)
    end = "\n" if state.done >= state.total else ""
    _write(f"\r[{'#' * full}{' ' * (BAR_WIDTH - full)}] {_text(state)}\x1b[K{end}")


def _lines() -> Show:
    printed = time.monotonic()

    def show(state: ProgressState) -> None:
        nonlocal printed
        # the log of a batch job is kept: a line a window could be thousands; the last one always
        if time.monotonic() >= printed + LINE_INTERVAL_S or state.done >= state.total:
            printed = time.monotonic()
            _write(f"daskclip: {_text(state)}\n")

    return show
