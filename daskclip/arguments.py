"""The arguments of the operation: checked once, and brought to one form."""

import numbers
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, TypeGuard, get_args

import numpy as np
import numpy.typing as npt
from dask import config
from dask.utils import parse_bytes

from daskclip.errors import (
    AxesError,
    DTypeError,
    InvalidTypeError,
    InvalidValueError,
    error_text,
    short_repr,
)
from daskclip.numerics import ORDERS, kept_shape

Array = npt.NDArray[Any]
Axes = int | Sequence[int] | npt.NDArray[np.integer[Any]] | slice | None
"""Axes by number, one or several, or a slice of them; None for all."""
Dim = Hashable | Iterable[Hashable]
"""Dimensions by name, one or several; None or ``...`` for all."""
NonFinite = Literal["propagate", "omit", "raise", "zero"]
Check = Callable[[object], None]
"""Raises if arrays of a dtype cannot be used."""
LEAST_NBYTES = 2**20
DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")


_CAST = f"cast to one of {', '.join(DTYPES)}, for example with .astype('float32')"


def check_dtype(dtype: object, remedy: str = _CAST) -> None:
    """Refuse arrays that are neither floating point nor complex, and long doubles."""
    # bfloat16 is known by its name only: ml_dtypes need not be installed
    name = getattr(dtype, "name", str(dtype))
    if name not in DTYPES:
        raise DTypeError(f"arrays of dtype {name} cannot be clipped; {remedy}")


def check_stored_dtype(dtype: object) -> None:
    """Refuse what `check_dtype` refuses of arrays in storage, which are not cast on the way."""
    check_dtype(dtype, f"store a copy as one of {', '.join(DTYPES)}, and clip that")


def parse_axes(axes: Axes, ndim: int, *, may_be_none: bool = False) -> tuple[int, ...]:
    """Axes as sorted integers that are not negative.

    With ``may_be_none``, a slice need not take any axis.

    Examples
    --------
    >>> parse_axes(-1, 3), parse_axes(None, 2), parse_axes([], 2), parse_axes(slice(1, None), 3)
    ((2,), (0, 1), (), (1, 2))
    """
    if axes is None:
        return tuple(range(ndim))
    if isinstance(axes, slice):
        return _parse_slice(axes, ndim, may_be_none)
    if isinstance(axes, np.ndarray) and axes.dtype.kind in "iu":
        # an axis of a 2-d array is a list, and refused as one
        axes = axes.tolist() if axes.ndim < 2 else [axes.tolist()]
    sequence = [axes] if _is_integer(axes) else axes
    # not isinstance(axes, Iterable): a 0-d array is one and cannot be iterated over
    if isinstance(axes, str | bytes) or not np.iterable(sequence):
        raise InvalidTypeError.about("axes", axes, f"is a {type(axes).__name__}; {_AXES_REMEDY}")
    result = [_parse_axis(axis, axes, ndim) for axis in sequence]
    if len(set(result)) < len(result):
        raise InvalidValueError.about("axes", axes, "names an axis twice; give each axis once")
    return tuple(sorted(result))


def _parse_axis(axis: object, axes: object, ndim: int) -> int:
    """One of the axes, not negative."""
    if not _is_integer(axis):
        raise InvalidTypeError.about("axes", axes, f"holds a {type(axis).__name__}; {_AXES_REMEDY}")
    if not ndim:
        raise AxesError(
            f"axis {axis} is out of bounds for a 0-d array; leave axes out, or use None or []"
        )
    if not -ndim <= axis < ndim:
        bounds = f"an array of {ndim} dimensions; use {-ndim} to {ndim - 1}"
        raise AxesError(f"axis {axis} is out of bounds for {bounds}")
    return int(axis) % ndim


def _parse_slice(axes: slice, ndim: int, may_be_none: bool) -> tuple[int, ...]:
    """Axes that a slice takes of those of an array, at least one unless there ``may_be_none``."""
    for part in (axes.start, axes.stop, axes.step):
        if not (part is None or _is_integer(part)):
            text = f"holds a {type(part).__name__}; give a slice of ints, such as slice(1, None)"
            raise InvalidTypeError.about("axes", axes, text)
    if axes.step == 0:
        raise InvalidValueError.about("axes", axes, "has a step of 0; give another one, or none")
    taken = range(ndim)[axes]
    if not (taken or may_be_none):
        empty = f"takes no axis of a {ndim}-d array; use [] to take none"
        raise InvalidValueError.about("axes", axes, empty)
    return tuple(sorted(taken))


_AXES_REMEDY = "give None, an int, a sequence of ints or a slice"


def _is_integer(axis: object) -> TypeGuard[int]:
    if isinstance(axis, np.ndarray):
        return axis.ndim == 0 and axis.dtype.kind in "iu"
    # True is an Integral
    return isinstance(axis, numbers.Integral) and not isinstance(axis, bool)


def check_kept_shapes(kept: Mapping[str, tuple[Any, ...]], what: str = "shape") -> None:
    """Refuse arrays, given by name, that have norms in common and keep different shapes."""
    for name, shape in kept.items():
        first, same = next(iter(kept.items()))
        if any(n != n for n in shape):
            unknown = "has unknown sizes; call its .compute_chunk_sizes() first"
            raise InvalidValueError(f"{name} {unknown}")
        if shape != same:
            raise InvalidValueError(
                f"{first} keeps the {what} {same} and {name} the {what} {shape}, so that they have "
                "no norms in common; keep the same of each"
            )


def axes_from_text(axes: str | None) -> list[int] | slice | None:
    """Axes as the command line has them.

    Examples
    --------
    >>> axes_from_text("0,2"), axes_from_text("1:")
    ([0, 2], slice(1, None, None))
    """
    try:
        if axes is None or ":" not in axes:
            return None if axes is None else [int(a) for a in axes.split(",") if a.strip()]
        first, last, *step = (int(a) if a.strip() else None for a in axes.split(":", 2))
        return slice(first, last, *step)
    except ValueError:
        wrong = "is neither a list nor a slice of integers; write 0,2 or 1:"
        raise InvalidValueError(f"axes {axes!r} {wrong}") from None


def axes_as_json(axes: Axes) -> list[int] | str | None:
    """Axes as JSON has them; a slice is the text of the command line.

    Examples
    --------
    >>> axes_as_json(np.array([0, 2])), axes_as_json(slice(1, None))
    ([0, 2], '1:')
    """
    if isinstance(axes, slice):
        parts = (axes.start, axes.stop, *(() if axes.step is None else (axes.step,)))
        return ":".join("" if part is None else str(part) for part in parts)
    return None if axes is None else [int(a) for a in np.atleast_1d(axes)]


def parse_dim(dim: Dim, known: Sequence[Hashable]) -> list[Any]:
    """Names in ``dim``, which must be in ``known``; None and ``...`` mean all names.

    Examples
    --------
    >>> parse_dim("time", ["time", "x"]), parse_dim(None, ["time", "x"])
    (['time'], ['time', 'x'])
    """
    if dim is None or dim is ...:
        return list(known)
    # a name may be any hashable, also a tuple; but a tuple is taken as several names, as in xarray
    names = [dim] if isinstance(dim, str) or not isinstance(dim, Iterable) else list(dim)
    for name in names:
        # known holds None for a dimension without a name
        if name is None or name not in known:
            listed = ", ".join(str(n) for n in known if n is not None) or "none"
            raise InvalidValueError.about("dim", name, f"is not a dimension; there are: {listed}")
        if names.count(name) > 1:
            twice = f"names {short_repr(name)} twice; give it once"
            raise InvalidValueError.about("dim", dim, twice)
    return names


def dim_from_text(dim: str | None) -> list[str] | None:
    """Names of dimensions as the command line has them."""
    return None if dim is None else [name.strip() for name in dim.split(",") if name.strip()]


def axes_named(dim: Dim, names: Sequence[Hashable] | None, axes: Axes) -> Axes:
    """Axes of the dimensions in ``dim``; without it, ``axes``."""
    if dim is None:
        return axes
    if axes is not None:
        both = f"and dim {short_repr(dim)} are both given; give one"
        raise InvalidValueError.about("axes", axes, both)
    if not names or not any(names):
        raise InvalidValueError.about(
            "dim", dim, "cannot be used: the array names no dimensions; give axes"
        )
    wanted = parse_dim(dim, names)
    return [a for a, name in enumerate(names) if name in wanted]


def check_scalar(dtype: object, shape: tuple[int, ...], what: str = "clip_norm") -> None:
    """Refuse a limit that is not one real number."""
    # bfloat16 is a dtype of the kind V, as structures are
    if getattr(dtype, "kind", "") not in "biuf" and getattr(dtype, "name", "") != "bfloat16":
        raise InvalidTypeError(f"{what} has dtype {dtype}; give a real number")
    if shape:
        raise InvalidValueError(f"{what} has shape {tuple(shape)}; give one number (0-d)")


def check_limits_dtype(dtype: object) -> None:
    """Refuse limits that are not real numbers."""
    check_scalar(dtype, (), "an array of limits")


def check_limits(
    limits: tuple[int, ...], clip_norm: object, shape: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    """Refuse limits given beside a clip_norm, or of a shape that no norms have.

    ``limits`` and ``shape`` are the shapes of the limits and of the array.
    """
    if clip_norm is not None:
        raise InvalidValueError.about("clip_norm", clip_norm, "and limits are both given; give one")
    kept = kept_shape(shape, axes)
    # limits broadcast against norms, never the reverse: that would clip one slice in several ways
    pairs = zip(limits[::-1], kept[::-1], strict=False)
    if len(limits) > len(kept) or any(n not in (1, m) for n, m in pairs):
        raise InvalidValueError(
            f"limits of shape {tuple(limits)} do not broadcast against norms of shape {kept}; "
            "give each axis that size, or 1"
        )


def masked_in(value: object) -> object:
    """First masked array in what may be nested lists: numpy.asarray would drop its mask."""
    found = (getattr(leaf, "_meta", leaf) for leaf in _leaves(value))
    return next((leaf for leaf in found if isinstance(leaf, np.ma.MaskedArray)), None)


def _leaves(value: object, depth: int = 64) -> Iterator[object]:
    """Yield what nested lists and tuples hold, down to the most dimensions of an array."""
    if depth and isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item, depth - 1)
    else:
        yield value


def check_unit(limit: object, what: str) -> None:
    """Refuse a limit that carries a unit: NumPy would read its number alone."""
    # what has attrs, such as a DataArray, gives out metadata as attributes
    if hasattr(limit, "attrs") or hasattr(limit, "ncattrs"):
        limit = getattr(limit, "data", None)
    for value in _leaves(limit):
        unit = getattr(value, "units", getattr(value, "unit", None))
        if isinstance(value, np.timedelta64):
            unit = np.datetime_data(value.dtype)[0]
        # a Delayed has every attribute, each a Delayed
        if unit is not None and not hasattr(unit, "__dask_graph__"):
            remedy = "give a bare number in the unit of t"
            raise InvalidTypeError(f"{what} has the unit {str(unit) or 'dimensionless'}; {remedy}")


def parse_clip_norm(clip_norm: object, what: str = "clip_norm") -> float:
    """A real number as an exact float64."""
    check_unit(clip_norm, what)
    if isinstance(clip_norm, numbers.Real):
        try:
            return float(clip_norm)
        except OverflowError:
            huge = "exceeds float64; use float('inf') for no limit"
            raise InvalidValueError.about(what, clip_norm, huge) from None
    if clip_norm is None or isinstance(clip_norm, str | bytes | numbers.Complex):
        raise InvalidTypeError.about(what, clip_norm, "is not a real number; give a number")
    graph = getattr(clip_norm, "__dask_graph__", None)
    # xarray's objects have the method, which gives None for what is in memory
    if graph and not isinstance(clip_norm, type) and graph() is not None:
        lazy = "is not computed; give a number, for example with .compute()"
        raise InvalidTypeError.about(what, clip_norm, lazy)
    if masked_in(clip_norm) is not None:
        masked = "is masked, or may be; give a number, for example with .filled(numpy.nan)"
        raise InvalidTypeError.about(what, clip_norm, masked)
    try:
        value = np.asarray(clip_norm)
    except ValueError:
        raise InvalidValueError.about(what, clip_norm, "is ragged; give one number (0-d)") from None
    except Exception as error:
        wrong = f"is not a real number ({error_text(error)}); give a number"
        raise InvalidTypeError.about(what, clip_norm, wrong) from None
    check_scalar(value.dtype, value.shape, what)
    return float(value)


def parse_ord(ord: object, dtype: np.dtype[Any]) -> float:
    """Key of `ORDERS` for a norm of arrays of ``dtype``."""
    if isinstance(ord, bool) or not isinstance(ord, numbers.Real) or ord not in ORDERS:
        raise InvalidValueError.about("ord", ord, "is not supported; use 1, 2 or inf")
    if dtype.kind == "c" and ord != 2:
        remedy = "since complex magnitudes are rounded; use ord=2, or clip their parts separately"
        raise DTypeError(f"the norm of ord {ord:g} of dtype {dtype} is not exact, {remedy}")
    return float(ord)


def parse_clip_norm_or_quantile(clip_norm: object) -> float | Fraction:
    """A limit, or the percentage of the norms that are to be at most the limit.

    Examples
    --------
    >>> parse_clip_norm_or_quantile(2), parse_clip_norm_or_quantile("p99.9")
    (2.0, Fraction(999, 10))
    """
    if not isinstance(clip_norm, str):
        return parse_clip_norm(clip_norm)
    # a fraction, not a float: the rank that a percentage means must not be off by one
    if not re.fullmatch(r"p[0-9]{1,3}(\.[0-9]{1,9})?", clip_norm) or Fraction(clip_norm[1:]) > 100:
        wrong = "is no number or percentile; give a number, or 'p' and a percentage such as 'p99'"
        raise InvalidTypeError.about("clip_norm", clip_norm, wrong)
    return Fraction(clip_norm[1:])


def check_nonfinite(nonfinite: object) -> None:
    """Refuse an unknown policy."""
    if nonfinite not in get_args(NonFinite):
        text = "is not a policy; use 'propagate', 'omit', 'raise' or 'zero'"
        raise InvalidValueError.about("nonfinite", nonfinite, text)


def check_flag(flag: object, what: str) -> None:
    """Refuse what is no bool where one is asked for."""
    if not isinstance(flag, bool):
        raise InvalidTypeError.about(what, flag, "is not True or False; give one of them")


def parse_memory(memory: object) -> int:
    """Number of bytes, from a number or a text with a unit."""
    if not isinstance(memory, str | int) or isinstance(memory, bool):
        kind = f"is a {type(memory).__name__}; give bytes or a text like '512MiB'"
        raise InvalidTypeError.about("memory", memory, kind)
    try:
        size = int(parse_bytes(memory))
    except (ValueError, OverflowError):
        wrong = "is not a size; write it as '512MiB'"
        raise InvalidValueError.about("memory", memory, wrong) from None
    if size <= 0:
        raise InvalidValueError.about("memory", memory, "is not above 0; write it as '512MiB'")
    return size


def require_unit(memory: object) -> None:
    """Refuse a text without a unit that means fewer bytes than any run needs."""
    try:
        # Dask also takes spaces within a number
        number = float("".join(memory.split()) if isinstance(memory, str) else "")
    except ValueError:  # a unit, or no text
        return
    if number < LEAST_NBYTES:
        wrong = f"has no unit and is taken as bytes; write it as '{number:.7g}MiB'"
        raise InvalidValueError.about("memory", memory, wrong)


def check_configuration() -> None:
    """Refuse settings of Dask with which no run could compute."""
    for name, (is_usable, remedy) in _SETTINGS.items():
        value = config.get(name, None)
        if value is not None and not is_usable(value):
            raise InvalidValueError(f"dask's setting {name} is {short_repr(value)}; give {remedy}")


_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_workers": (lambda n: _is_integer(n) and n > 0, "an integer above 0"),
    # of concurrent.futures or of multiprocessing
    "pool": (lambda p: hasattr(p, "submit") or hasattr(p, "apply_async"), "a pool, or none"),
    "cache": (lambda c: hasattr(c, "__setitem__"), "a mapping, or none"),
}
"""Settings of Dask that a run uses: whether a value can be used, and what to give instead."""
