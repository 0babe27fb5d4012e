"""Trace of the functions that `clip_zarr` calls for one block of six chunks.

``python tests/house/traced_run.py`` clips a small array between two local folders and prints what
was called. Dask's synchronous scheduler runs the worker's side in the client's thread.

Only named functions of the package count; module bodies, lambdas and comprehensions do not. A
resumed generator counts as another call. A change of module is a call or return between functions
of two modules, whether directly or through other packages.
"""

import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import dask
import numpy as np
import zarr

import daskclip
from daskclip import clip_zarr

PACKAGE = Path(daskclip.__file__).parent


def module_of(code: CodeType) -> str | None:
    """Return the module of a named function of the package, or None for any other code."""
    path = Path(code.co_filename)
    if code.co_name.startswith("<") or not path.is_relative_to(PACKAGE):
        return None
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def calling_module(frame: FrameType) -> str | None:
    """Return the module of the nearest function of the package that waits for a frame."""
    waiting = frame.f_back
    while waiting:
        module = module_of(waiting.f_code)
        if module:
            return module
        waiting = waiting.f_back
    return None


class Trace:
    """Calls of each function, in order of the first one, and changes of module."""

    def __init__(self) -> None:
        self.calls: Counter[CodeType] = Counter()
        self.changes: Counter[str] = Counter()

    def record(self, frame: FrameType, event: str, _: Any) -> None:
        """Count an event of the profiler."""
        module = module_of(frame.f_code)
        if event not in ("call", "return") or not module:
            return
        if event == "call":
            self.calls[frame.f_code] += 1
        if calling_module(frame) not in (None, module):
            self.changes[event] += 1

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what runs in the context, in threads that it starts too."""
        threading.setprofile(self.record)
        sys.setprofile(self.record)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    @property
    def calls_by_module(self) -> Counter[str]:
        """Call events of each module."""
        counts: Counter[str] = Counter()
        for code, count in self.calls.items():
            counts[str(module_of(code))] += count
        return counts

    @property
    def summary(self) -> dict[str, int]:
        """Figures by name."""
        return {
            "modules touched": len(self.calls_by_module),
            "functions touched": len(self.calls),
            "call events": self.calls.total(),
            "changes of module": self.changes.total(),
            "changes by a call": self.changes["call"],
            "changes by a return": self.changes["return"],
        }


def clip_six_chunks(folder: Path) -> Trace:
    """Clip a new array of six chunks in a folder, and trace that."""
    source = zarr.create_array(folder / "a.zarr", shape=(48, 32), chunks=(8, 32), dtype="float32")
    source[:] = np.arange(source.size, dtype="float32").reshape(source.shape)
    trace = Trace()
    with dask.config.set(scheduler="synchronous"), trace.running():
        clip_zarr(str(folder / "a.zarr"), str(folder / "b.zarr"), 1.0, axes=1)
    return trace


def main() -> None:
    """Print the figures, calls of each module, and functions in order of their first call."""
    with tempfile.TemporaryDirectory() as folder:
        trace = clip_six_chunks(Path(folder))
    for name, value in trace.summary.items():
        print(f"{value:5} {name}")
    print("\ncall events of each module")
    for module, count in trace.calls_by_module.most_common():
        print(f"{count:5} {module}")
    print("\nfunctions by their first call, with call events")
    for code, count in trace.calls.items():
        print(f"{count:5} {module_of(code)}.{code.co_qualname}")


if __name__ == "__main__":
    main()
