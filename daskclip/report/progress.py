"""How far a run is, on stderr: a bar, a line now and then, or JSON lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from daskclip.errors import InvalidTypeError, InvalidValueError, short_repr

Mode = Literal["auto", "bar", "lines", "json", "none"]
EVERY = 10.0  # seconds between two lines
WIDTH = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressState:
    """What is known after a window."""

    done: int
    """Bytes done, over all passes."""
    skipped: int
    """Those that this call had nothing to do for."""
    total: int
    """Bytes to do, over all passes."""
    pass_: int
    """Pass of the window that was done last."""
    passes: int
    """Number of passes."""
    seconds: float
    """Since the start."""

    @property
    def rate(self) -> float:
        """Bytes a second of this call."""
        return (self.done - self.skipped) / max(self.seconds, 1e-9)

    @property
    def left(self) -> float:
        """Seconds that the rest takes at that rate."""
        return (self.total - self.done) / self.rate if self.rate else 0.0


Show = Callable[[ProgressState], None]


def progress_printer(progress: Any) -> Show:
    """Function that shows a `ProgressState`; True is ``'auto'``, False is ``'none'``."""
    if not isinstance(progress, bool | str):
        raise InvalidTypeError(
            f"progress {short_repr(progress)} is a {type(progress).__name__}; give a bool or a mode"
        )
    mode = progress if isinstance(progress, str) else "auto" if progress else "none"
    if mode not in get_args(Mode):
        raise InvalidValueError(
            f"progress {short_repr(progress)} is unknown; use one of {', '.join(get_args(Mode))}"
        )
    if mode == "auto":
        mode = "bar" if sys.stderr.isatty() else "lines"
    shows: dict[str, Show] = {"bar": _bar, "lines": _Lines(), "json": _json}
    return shows.get(mode, lambda state: None)


def _text(state: ProgressState) -> str:
    gb, total = state.done / 1e9, state.total / 1e9
    return (
        f"{gb:.2f}/{total:.2f} GB  pass {state.pass_}/{state.passes}  "
        f"{state.rate / 1e6:.0f} MB/s  {state.left:.0f} s left"
    )


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _json(state: ProgressState) -> None:
    fields = {
        "done": state.done, "total": state.total, "pass": state.pass_, "passes": state.passes,
        "seconds": round(state.seconds, 3), "rate": round(state.rate), "left": round(state.left, 3),
    }  # fmt: skip
    _write(json.dumps(fields) + "\n")


def _bar(state: ProgressState) -> None:
    full = WIDTH * state.done // max(1, state.total)
    end = "\n" if state.done >= state.total else ""
    _write(f"\r[{'#' * full}{' ' * (WIDTH - full)}] {_text(state)}\x1b[K{end}")


class _Lines:
    def __init__(self) -> None:
        self.next = time.monotonic() + EVERY

    def __call__(self, state: ProgressState) -> None:
        if time.monotonic() >= self.next or state.done >= state.total:
            self.next = time.monotonic() + EVERY
            _write(f"daskclip: {_text(state)}\n")
