"""Load the compiled kernel, and describe arrays to it."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from daskclip.errors import KernelError

Array = npt.NDArray[Any]

AXES = 72
FOLDER = Path(__file__).parent
LEVEL_3 = {"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"}
KNOWN = "0x1.c08da5aa6a675p+2 0x1.47469a60f03f4p-7 0x1.10bad5fb72df6p-5 "
KNOWN += "0x1.0c1ab55a78a00p-20 0x1.65f538da06c53p-1"
"""Norm and clipped elements that `load` must find: other roundings would give others."""
# name of a real dtype: (its number in the kernel, significant bits, smallest subnormal's exponent,
# first limb and number of limbs of a sum)
FORMATS = {
    "float16": (0, 11, -24, -11, 24),
    "bfloat16": (1, 8, -133, -11, 24),
    "float32": (2, 24, -149, -11, 24),
    "float64": (3, 53, -1074, -69, 138),
}


class Block(ctypes.Structure):
    """The argument of every function of the kernel: `block` in kernel.c."""

    _fields_ = (
        ("axes", ctypes.c_int64),
        *((name, ctypes.c_int64 * AXES) for name in ("length", "from_", "to", "slice", "local")),
        ("base", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((n, ctypes.c_int64) for n in ("type", "swapped", "omit", "paired", "power", "largest")),
        *((n, ctypes.c_int64) for n in ("alone", "keep", "lowest", "slices", "limbs_of_slice")),
        ("limit", ctypes.c_void_p),
        ("limits", ctypes.c_int64),
        ("tiny", ctypes.c_double),
        *((n, ctypes.c_void_p) for n in ("factor", "norm", "shift", "toward_zero", "flags")),
        ("limbs", ctypes.c_void_p),
        ("used", ctypes.c_int64 * 2),
        ("scratch", ctypes.c_void_p),
    )

    def __init__(self, dtype: np.dtype[Any], **arrays: Array | None) -> None:
        super().__init__()
        self.type, bits, self.lowest, *_ = FORMATS[real_dtype(dtype).name]
        self.keep = -(1 << (53 - bits))
        self._arrays: list[Array] = []  # that the kernel uses: alive as long as this
        for name, array in arrays.items():
            self.point(name, None if array is None else np.ascontiguousarray(array))

    def point(self, name: str, array: Array | None) -> None:
        """Let a pointer of the block point to the first element of an array."""
        if array is not None:
            setattr(self, name, array.__array_interface__["data"][0])
            self._arrays.append(array)

    def describe(self, x: Array, kept: Sequence[int], out: Array | None = None) -> None:
        """Set what is to be read, and written, as axes in the order of memory.

        Parameters
        ----------
        x : ndarray
            Not empty.
        kept : sequence of int
            Shape of the arrays with a value for each slice: 1 along reduced axes.
        out : ndarray, optional
            Of the shape of ``x``.
        """
        real = real_dtype(x.dtype)
        steps = x.strides if out is None else out.strides
        slices, number = [], 1
        for n in reversed(kept):
            slices.append(0 if n == 1 else number)
            number *= n
        axes = [a for a in zip(x.shape, x.strides, steps, slices[::-1], strict=True) if a[0] > 1]
        if x.dtype.kind == "c":
            axes.append((2, real.itemsize, real.itemsize, 0))
        axes.sort(key=lambda a: (a[1] != 0, -abs(a[1])))
        merged = [(1, real.itemsize, real.itemsize, 0)]
        for n, *strides in axes:
            outer, *wide = merged[-1]
            if outer == 1 or wide == [n * s for s in strides]:
                merged.pop()
                n *= outer
            merged.append((n, *strides))
        self.axes = len(merged)
        for name, values in zip(
            ("length", "from_", "to", "slice"), zip(*merged, strict=True), strict=True
        ):
            getattr(self, name)[: self.axes] = values
        self.slices = number
        self.swapped = not x.dtype.isnative
        self.point("x", x)
        self.point("out", out)

    def run(self, function: str, loaded: ctypes.CDLL | None = None) -> None:
        """Call a function of the kernel; other threads run meanwhile."""
        loaded = loaded or kernel()
        if not self.scratch:
            # zeros of which the system makes only those pages that are touched
            self.point("scratch", np.zeros(loaded.scratch_bytes(self.type), np.uint8))
        loaded[function](ctypes.byref(self))


def real_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Dtype of the real part."""
    return np.dtype(f"f{dtype.itemsize // 2}") if dtype.kind == "c" else dtype


@cache
def kernel() -> ctypes.CDLL:
    """Load the kernel for the processor at hand."""
    names = sorted(path.name for path in FOLDER.glob("_kernel*.so"))
    if len(names) > 1 and not has_level_3():
        names = names[:1]
    return load(names[-1] if names else "_kernel.so")


def load(name: str) -> ctypes.CDLL:
    """Load a kernel that was compiled when the package was installed."""
    try:
        loaded = ctypes.CDLL(str(FOLDER / name))
    except OSError as error:
        raise KernelError(
            f"the compiled kernel cannot be loaded: {error}; install daskclip with pip, which "
            "compiles it"
        ) from error
    loaded.scratch_bytes.argtypes = [ctypes.c_int64]
    loaded.scratch_bytes.restype = ctypes.c_int64
    x, norm = np.array([0.1, 1 / 3, 1e-5, 7.0]), np.empty(1)
    block = Block(
        x.dtype, limit=np.array(0.7), norm=norm, factor=np.empty(1), flags=np.empty(1, "u1")
    )
    block.power = 2
    block.describe(x, (1,), x)
    block.run("sum_slices", loaded)
    if " ".join(v.hex() for v in (*norm, *x)) != KNOWN:
        raise KernelError(
            f"the compiled kernel {name} gives other bits than it must; install daskclip again "
            "with the flags of hatch_build.py"
        )
    return loaded


def has_level_3() -> bool:
    """Whether this is a processor of the level x86-64-v3, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return flags is not None and {*flags[1].split()} >= LEVEL_3
