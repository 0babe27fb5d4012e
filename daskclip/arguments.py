"""The arguments of the operation, checked once and brought to one form."""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from dask.utils import parse_bytes

from daskclip.errors import AxesError, DTypeError, InvalidTypeError, InvalidValueError, short_repr
from daskclip.numerics import ORDERS

Array = npt.NDArray[Any]
NonFinite = Literal["propagate", "omit", "raise"]
Check = Callable[[Any], None]
DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")


def check_dtype(dtype: Any) -> None:
    """Refuse what is neither floating point nor complex, and long doubles."""
    name = getattr(dtype, "name", str(dtype))
    if name not in DTYPES:
        raise DTypeError(
            f"arrays of dtype {name} cannot be clipped; cast to one of {', '.join(DTYPES)}, "
            "for example with .astype('float32')"
        )


def parse_axes(axes: Any, ndim: int) -> tuple[int, ...]:
    """Axes as sorted integers that are not negative.

    Examples
    --------
    >>> parse_axes(-1, 3), parse_axes(None, 2), parse_axes([], 2)
    ((2,), (0, 1), ())
    """
    if axes is None:
        return tuple(range(ndim))
    if isinstance(axes, np.ndarray) and axes.dtype.kind in "iu":
        axes = axes.tolist() if axes.ndim < 2 else [axes.tolist()]
    sequence = [axes] if _integer(axes) else axes
    if isinstance(axes, str | bytes) or not np.iterable(sequence):
        raise InvalidTypeError(
            f"axes {short_repr(axes)} is a {type(axes).__name__}; {_AXES_REMEDY}"
        )
    result = []
    for axis in sequence:
        if not _integer(axis):
            raise InvalidTypeError(
                f"axes {short_repr(axes)} holds a {type(axis).__name__}; {_AXES_REMEDY}"
            )
        if not -ndim <= axis < ndim:
            raise AxesError(
                f"axis {axis} is out of bounds for an array of {ndim} dimensions; "
                f"use {-ndim} to {ndim - 1}"
                if ndim
                else f"axis {axis} is out of bounds for a 0-d array; use None or []"
            )
        result.append(int(axis) % ndim)
    if len(set(result)) < len(result):
        raise InvalidValueError(f"axes {short_repr(axes)} names an axis twice; give each axis once")
    return tuple(sorted(result))


def parse_dim(dim: Any, known: Sequence[Any]) -> list[Any]:
    """The names in ``dim``, one or several of those that are known; None and ``...`` are all.

    Examples
    --------
    >>> parse_dim("time", ["time", "x"]), parse_dim(None, ["time", "x"])
    (['time'], ['time', 'x'])
    """
    if dim is None or dim is ...:
        return list(known)
    names = [dim] if isinstance(dim, str) or not isinstance(dim, Iterable) else list(dim)
    for name in names:
        if name is None or name not in known:
            listed = ", ".join(str(n) for n in known if n is not None) or "none"
            raise InvalidValueError(
                f"dim {short_repr(name)} is not a dimension; there are: {listed}"
            )
        if names.count(name) > 1:
            raise InvalidValueError(
                f"dim {short_repr(dim)} names {short_repr(name)} twice; give it once"
            )
    return names


def axes_named(dim: Any, names: Sequence[Any] | None, axes: Any) -> Any:
    """Axes of the dimensions in ``dim``, which are given instead of ``axes``."""
    if dim is None:
        return axes
    if axes is not None:
        raise InvalidValueError(
            f"axes {short_repr(axes)} and dim {short_repr(dim)} are given; give one"
        )
    if not names or not any(names):
        raise InvalidValueError(f"dim {short_repr(dim)}: the array names no dimensions; give axes")
    wanted = parse_dim(dim, names)
    return [a for a, name in enumerate(names) if name in wanted]


_AXES_REMEDY = "give None, an int or a sequence of ints"


def _integer(axis: Any) -> bool:
    if isinstance(axis, np.ndarray):
        return axis.ndim == 0 and axis.dtype.kind in "iu"
    return isinstance(axis, numbers.Integral) and not isinstance(axis, bool)


def check_scalar(ndim: int, dtype: Any, shape: Any, what: str = "clip_norm") -> None:
    """Refuse a limit that is not a real number."""
    if getattr(dtype, "kind", "") not in "biuf" and getattr(dtype, "name", "") != "bfloat16":
        raise InvalidTypeError(f"{what} has dtype {dtype}; give a real number")
    if ndim:
        raise InvalidValueError(f"{what} has shape {tuple(shape)}; give one number (0-d)")


def check_limits_dtype(dtype: Any) -> None:
    """Refuse limits that are not real numbers."""
    check_scalar(0, dtype, (), "an array of limits")


def check_limits(limits: Any, clip_norm: Any, shape: Any, axes: tuple[int, ...]) -> None:
    """Refuse limits beside a clip_norm, and those that do not broadcast against the norms."""
    if clip_norm is not None:
        raise InvalidValueError(
            f"clip_norm {short_repr(clip_norm)} and limits are both given; give one"
        )
    kept = tuple(1 if k in axes else n for k, n in enumerate(shape))
    pairs = zip(limits.shape[::-1], kept[::-1], strict=False)
    if limits.ndim > len(kept) or any(n not in (1, m) for n, m in pairs):
        raise InvalidValueError(
            f"limits of shape {tuple(limits.shape)} do not broadcast against norms of shape "
            f"{kept}; give each axis that size, or 1"
        )


def parse_clip_norm(clip_norm: Any, what: str = "clip_norm") -> float:
    """A real number as an exact float64."""
    if isinstance(clip_norm, numbers.Real):
        try:
            return float(clip_norm)
        except OverflowError:
            raise InvalidValueError(
                f"{what} {short_repr(clip_norm)} exceeds float64; use float('inf') for no limit"
            ) from None
    if clip_norm is None or isinstance(clip_norm, str | bytes | numbers.Complex):
        raise InvalidTypeError(
            f"{what} {short_repr(clip_norm)} is not a real number; give a number"
        )
    try:
        value = np.asarray(clip_norm)
    except ValueError:
        raise InvalidValueError(
            f"{what} {short_repr(clip_norm)} is ragged; give one number (0-d)"
        ) from None
    check_scalar(value.ndim, value.dtype, value.shape, what)
    return float(value)


def parse_ord(ord: Any, dtype: np.dtype[Any]) -> float:
    """Key of `ORDERS` for a norm of arrays of ``dtype``."""
    if isinstance(ord, bool) or not isinstance(ord, numbers.Real) or ord not in ORDERS:
        raise InvalidValueError(f"ord {short_repr(ord)} is not a norm; use 1, 2 or inf")
    if dtype.kind == "c" and ord != 2:
        raise DTypeError(
            f"the norm of ord {ord:g} of dtype {dtype} is not exact, since it takes the roots of "
            "its elements; use ord=2, or clip .real and .imag"
        )
    return float(ord)


def parse_clip_norm_or_quantile(clip_norm: Any) -> float | Fraction:
    """A real number, or the percentage of the norms that are to be at most the limit.

    Examples
    --------
    >>> parse_limit(2), parse_limit("p99.9")
    (2.0, Fraction(999, 10))
    """
    if not isinstance(clip_norm, str):
        return parse_clip_norm(clip_norm)
    if not re.fullmatch(r"p[0-9]{1,3}(\.[0-9]{1,9})?", clip_norm) or Fraction(clip_norm[1:]) > 100:
        raise InvalidTypeError(
            f"clip_norm {short_repr(clip_norm)} is not a real number; give a number, or 'p' and a "
            "percentage of the norms such as 'p99'"
        )
    return Fraction(clip_norm[1:])


def check_nonfinite(nonfinite: Any) -> None:
    """Refuse a policy that does not exist."""
    if nonfinite not in get_args(NonFinite):
        raise InvalidValueError(
            f"nonfinite={short_repr(nonfinite)} is not a policy; use 'propagate', 'omit' or 'raise'"
        )


def parse_memory(memory: Any) -> int:
    """A size in bytes."""
    if not isinstance(memory, str | int) or isinstance(memory, bool):
        raise InvalidTypeError(
            f"memory {short_repr(memory)} is a {type(memory).__name__}; "
            "give bytes or a text like '512MiB'"
        )
    try:
        size = int(parse_bytes(memory))
    except (ValueError, OverflowError):
        raise InvalidValueError(
            f"memory {short_repr(memory)} is not a size; write it as '512MiB'"
        ) from None
    if size <= 0:
        raise InvalidValueError(f"memory {short_repr(memory)} is not above 0; write it as '512MiB'")
    return size
