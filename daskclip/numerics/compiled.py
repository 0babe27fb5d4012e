"""Loading of the compiled kernel, and the description of arrays that it takes."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from daskclip.errors import KernelError

Array = npt.NDArray[Any]
"""Elements of any dtype that is clipped; bfloat16 has no type in NumPy."""
DType = np.dtype[np.generic]

AXES = 72  # of kernel.c
FOLDER = Path(__file__).parent
LEVEL_3 = {"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"}  # of x86-64-v3
REMEDY = "install daskclip with pip, which compiles it"
SMALLEST = 5e-324  # subnormal; by a name, since Python multiplies literals when it compiles
KNOWN = "0x1.c08da5aa6a675p+2 0x1.47469a60f03f4p-7 0x1.10bad5fb72df6p-5 "
KNOWN += "0x1.0c1ab55a78a00p-20 0x1.65f538da06c53p-1"
"""Norm and clipped elements of the array that `load` tries; wrong roundings change them."""


class Format(NamedTuple):
    """Format of a real dtype, as in kernel.c."""

    number: int
    """The kernel's number for it."""
    digits: int
    """Significant bits."""
    lowest: int
    """Exponent of the smallest subnormal."""
    first: int
    """Position of the first limb of a sum in the kernel."""
    limbs: int
    """Number of limbs of a sum in the kernel."""

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return math.ldexp(2**self.digits - 1, 3 - self.lowest - 2 * self.digits)


FORMATS = {
    "float16": Format(0, 11, -24, -11, 24),
    "bfloat16": Format(1, 8, -133, -11, 24),
    "float32": Format(2, 24, -149, -11, 24),
    "float64": Format(3, 53, -1074, -69, 138),
}


class Block(ctypes.Structure):
    """Argument of every function of the kernel: `block` in kernel.c, which explains its fields."""

    _fields_ = (
        *((name, ctypes.c_int64 * AXES) for name in ("length", "from_", "to", "slice", "local")),
        *((name, ctypes.c_int64) for name in ("axes", "base", "slices", "type", "swapped", "omit")),
        *((name, ctypes.c_int64) for name in ("paired", "zero", "normalize", "power", "largest")),
        ("limits", ctypes.c_int64),
        ("used", ctypes.c_int64 * 2),
        *((name, ctypes.c_double) for name in ("truncate_below", "error", "ceiling")),
        *((name, ctypes.c_void_p) for name in ("x", "out", "limit", "factor", "norm", "shift")),
        *((name, ctypes.c_void_p) for name in ("toward_zero", "flags", "limbs", "scratch")),
    )

    def __init__(self, dtype: DType, **arrays: Array | None) -> None:
        super().__init__()
        self.type = format_of(dtype).number
        self._arrays: dict[str, Array | None] = {}
        self.point(**{k: a if a is None else np.ascontiguousarray(a) for k, a in arrays.items()})

    def point(self, **arrays: Array | None) -> None:
        """Point fields to the first elements of contiguous arrays, and keep these alive."""
        self._arrays |= arrays
        for name, array in arrays.items():
            setattr(self, name, None if array is None else array.__array_interface__["data"][0])

    def describe(self, x: Array, kept: Sequence[int], out: Array | None = None) -> None:
        """Describe the elements to read, and to write, as axes in the order of memory.

        Parameters
        ----------
        x : ndarray
            Elements to read, at least one; in any layout and byte order.
        kept : sequence of int
            Shape of the norms: 1 along reduced axes.
        out : ndarray of the shape and dtype of ``x``, optional
            Elements to write, in any layout.
        """
        itemsize = real_dtype(x.dtype).itemsize
        # slices are numbered in C order; a step along a reduced axis stays in its slice
        *strides, self.slices = accumulate(reversed(kept), mul, initial=1)
        slices = [s if n > 1 else 0 for n, s in zip(kept, reversed(strides), strict=True)]
        steps = x.strides if out is None else out.strides
        axes = [a for a in zip(x.shape, x.strides, steps, slices, strict=True) if a[0] > 1]
        if x.dtype.kind == "c":
            axes.append((2, itemsize, itemsize, 0))
        # broadcast axes first, then from the longest stride to the shortest
        axes.sort(key=lambda axis: (axis[1] != 0, -abs(axis[1])))
        # an axis that continues the next inner one is merged with it: longer runs are faster
        merged = [(1, itemsize, itemsize, 0)]
        for n, *inner in axes:
            outer, *wide = merged[-1]
            if outer == 1 or wide == [n * stride for stride in inner]:
                merged.pop()
                n *= outer
            merged.append((n, *inner))
        self.axes = len(merged)
        for i, axis in enumerate(merged):
            self.length[i], self.from_[i], self.to[i], self.slice[i] = axis
        self.swapped = not x.dtype.isnative
        # a chunk of Dask without axes may be a scalar: its address is that of a temporary array
        self.point(x=np.asarray(x), out=out)

    def run(self, function: str, loaded: ctypes.CDLL | None = None) -> None:
        """Call a function of the kernel, without holding the interpreter's lock."""
        require_subnormals()
        loaded = loaded or kernel()
        if not self.scratch:
            # the system provides only those pages of zeros that are touched
            self.point(scratch=np.zeros(loaded.scratch_bytes(self.type), np.uint8))
        loaded[function](ctypes.byref(self))


def require_subnormals() -> None:
    """Refuse to compute in a thread whose processor makes subnormal numbers 0."""
    # a library may set this mode, which threads that are started later have too
    if SMALLEST * 1.25 == 0:
        raise KernelError(
            "subnormal numbers are 0 in this thread, since a library has set the processor to "
            "flush them; set it back, as by torch.set_flush_denormal(False), or do not load what "
            "was linked with -ffast-math"
        )


def real_dtype(dtype: DType) -> DType:
    """Dtype of the real part."""
    return np.dtype(f"f{dtype.itemsize // 2}") if dtype.kind == "c" else dtype


def format_of(dtype: DType) -> Format:
    """Format of the real part."""
    return FORMATS[real_dtype(dtype).name]


@cache
def kernel() -> ctypes.CDLL:
    """Load the best kernel that this processor runs."""
    # names end with the level: the last one has the most instructions
    names = sorted(path.name for path in FOLDER.glob("_kernel*.so")) or ["_kernel.so"]
    return load(names[-1 if has_level_3() else 0])


def load(name: str) -> ctypes.CDLL:
    """Load a kernel that was compiled when the package was installed, and check its bits."""
    try:
        loaded = ctypes.CDLL(str(FOLDER / name))
        size = loaded.block_bytes()
    except (OSError, AttributeError) as error:
        raise KernelError(f"the compiled kernel cannot be loaded: {error}; {REMEDY}") from error
    # a kernel of another version would take what lies behind a shorter block for pointers
    if size != ctypes.sizeof(Block):
        raise KernelError(f"the compiled kernel {name} is of another version; {REMEDY}")
    loaded.scratch_bytes.argtypes = [ctypes.c_int64]
    loaded.scratch_bytes.restype = ctypes.c_int64
    x, limit = np.array([0.1, 1 / 3, 1e-5, 7.0]), np.array(0.7)
    norm, factor, flags = np.empty(1), np.empty(1), np.empty(1, np.uint8)
    block = Block(x.dtype, limit=limit, norm=norm, factor=factor, flags=flags)
    block.power = 2
    block.describe(x, (1,), x)  # clipped in place
    block.run("sum_slices", loaded)
    if " ".join(v.hex() for v in (*norm, *x)) != KNOWN:
        raise KernelError(
            f"the compiled kernel {name} rounds wrongly; install daskclip again with the flags of "
            "hatch_build.py"
        )
    return loaded


def has_level_3() -> bool:
    """Whether /proc/cpuinfo lists the instructions of x86-64-v3."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return flags is not None and {*flags[1].split()} >= LEVEL_3
