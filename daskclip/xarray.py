"""The operation on labelled arrays: dimensions by name, labels kept, missing values left out.

Importing this module registers an accessor, ``.daskclip``, for DataArray, Dataset and DataTree,
whose methods are the functions of this module.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr

from daskclip.arguments import (
    DTYPES,
    Axes,
    Dim,
    NonFinite,
    check_dtype,
    check_kept_shapes,
    check_nonfinite,
    parse_clip_norm,
    parse_dim,
)
from daskclip.errors import DTypeError, InvalidTypeError, InvalidValueError, short_repr
from daskclip.lazy import clip_by_global_norm as clip_unlabelled_list
from daskclip.lazy import clip_by_norm as clip_unlabelled
from daskclip.storage import metadata

__all__ = ["DaskClipAccessor", "clip_by_global_norm", "clip_by_norm", "norm"]

Labelled = TypeVar("Labelled", xr.DataArray, xr.Dataset, xr.DataTree)
Slices = dict[Hashable, tuple[xr.DataArray, list[Hashable]]]
"""Arrays by name, each with the dimensions of its slices."""


def clip_by_norm(
    obj: Labelled,
    clip_norm: npt.ArrayLike,
    dim: Dim = None,
    *,
    skipna: bool | None = None,
    nonfinite: NonFinite | None = None,
    normalize: bool = False,
) -> Labelled:
    """Clip the L2-norm of every slice of labelled arrays over ``dim`` to at most ``clip_norm``.

    In a Dataset, every floating point or complex variable is clipped by its own norm, over those
    dimensions of ``dim`` that it has. Variables that have none of them, variables of other dtypes
    and coordinates are unchanged. In a DataTree, this holds for every variable of every group.

    Parameters
    ----------
    obj : xarray.DataArray, xarray.Dataset or xarray.DataTree of any shape
        Backed by NumPy or Dask.
    clip_norm : float or 0-d array
        See `daskclip.clip_by_norm`; also a DataArray.
    dim : str, sequence of str, ... or None
        Dimensions over which the norm is taken; None and ``...`` take all.
    skipna : bool, optional
        True: NaN elements are missing values, which do not count and stay NaN. False: a NaN makes
        its slice NaN. None means True, as in xarray's own reductions of floating point numbers;
        the default of `daskclip.clip_by_norm` is the other one.
    nonfinite : {'propagate', 'omit', 'raise', 'zero'}, optional
        See `daskclip.clip_by_norm`; in place of ``skipna``.
    normalize : bool
        See `daskclip.clip_by_norm`.

    Returns
    -------
    xarray.DataArray, xarray.Dataset or xarray.DataTree of the shape of obj
        With the names, coordinates, attributes and dtypes of ``obj``; lazy where ``obj`` is.

    Raises
    ------
    TypeError
        If ``obj`` has another type, is or holds packed integers (with the attributes
        ``scale_factor`` or ``add_offset``), or holds nothing that is floating point or complex.
    ValueError
        If ``dim`` is not a dimension of anything that can be clipped, ``clip_norm`` is not 0-D,
        ``nonfinite`` is unknown or given with ``skipna``, missing values are not decoded to NaN,
        or chunks have unknown sizes.

    See Also
    --------
    daskclip.clip_by_norm : For arrays without labels; defines the result.
    daskclip.clip_zarr : From storage to storage; takes ``dim`` too.

    Notes
    -----
    Reads and memory are those of `daskclip.clip_by_norm`.

    A variable that another one names as its ``bounds`` belongs to the coordinates: it is unchanged.

    Encoding that would round the saved values is removed, since rounding can lift norms above the
    limit: ``scale_factor`` and ``add_offset``, a ``dtype`` other than that of the result, netCDF's
    quantization and Zarr's filters. So packed integers are saved as floating point numbers.
    ``_FillValue`` and ``missing_value`` are kept if no clipped value can equal them, that is if
    they are NaN or larger than ``clip_norm``. A lossy compressor is kept and breaks the bound.

    Examples
    --------
    >>> x = xr.DataArray(np.float32([[3, 4], [0.3, np.nan]]), dims=["time", "x"])
    >>> clip_by_norm(x, 1.0, dim="x").values
    array([[0.59999996, 0.79999995],
           [0.3       ,        nan]], dtype=float32)
    """
    policy = _policy(skipna, nonfinite)
    limit, largest = _limit(clip_norm)

    def clip_all(one: Any, sliced: Slices) -> Any:
        clipped = {}
        for name, (x, dims) in sliced.items():
            axes = x.get_axis_num(dims)
            data = clip_unlabelled(_plain(x), limit, axes, nonfinite=policy, normalize=normalize)
            clipped[name] = _with_data(x, data, largest)
        return _assigned(one, clipped) if isinstance(one, xr.Dataset) else clipped[one.name]

    return _each(clip_all, obj, dim)


def clip_by_global_norm(
    obj: xr.Dataset, clip_norm: npt.ArrayLike, dim: Dim = None, *, normalize: bool = False
) -> xr.Dataset:
    """Clip the variables of a Dataset by the norms over ``dim`` that they have in common.

    Each position in the dimensions that are kept has one norm over all variables.

    Parameters
    ----------
    obj : xarray.Dataset
        Backed by NumPy or Dask.
    clip_norm : float or 0-d array
        See `clip_by_norm`.
    dim : str, sequence of str, ... or None
        Dimensions over which the norm is taken; None and ``...`` take all. Variables with one of
        them are clipped, and must keep the same dimensions, in any order; so are those with just
        the dimensions that are kept. Others stay as they are.
    normalize : bool
        See `clip_by_norm`.

    Returns
    -------
    xarray.Dataset
        As by `clip_by_norm`.

    Raises
    ------
    TypeError, ValueError
        As `clip_by_norm`, and if variables keep different dimensions.

    See Also
    --------
    daskclip.clip_by_global_norm : For arrays without labels; defines the result.

    Notes
    -----
    Reads and memory are those of `daskclip.clip_by_global_norm`. NaN is not left out: it makes all
    variables NaN at its position.

    Examples
    --------
    >>> layers = {"a": ("example", [3.0, 6.0]), "b": (("example", "x"), [[4.0], [8.0]])}
    >>> clip_by_global_norm(xr.Dataset(layers), 5.0, dim="x").a.values.round(2)
    array([3., 3.])
    """
    if not isinstance(obj, xr.Dataset):
        kind = type(obj).__name__
        raise InvalidTypeError(f"obj is a {kind}; give a Dataset, or use clip_by_norm")
    limit, largest = _limit(clip_norm)
    sliced = _slices([obj], dim)(obj)
    first = next(([d for d in x.dims if d not in own] for x, own in sliced.values()), [])
    # the elements of a variable of just the dimensions that are kept are part of the slices
    sliced |= {name: (x, []) for name, x in _arrays(obj).items() if {*x.dims} == {*first}}
    kept = {name: [d for d in x.dims if d not in own] for name, (x, own) in sliced.items()}
    named = {f"variable {short_repr(k)}": tuple(sorted(map(str, dims))) for k, dims in kept.items()}
    check_kept_shapes(named, "dimensions")
    arrays = [x.transpose(*first, ...) for x, _ in sliced.values()]
    data, _ = clip_unlabelled_list(
        [*map(_plain, arrays)], limit, axes=slice(len(first), None), normalize=normalize
    )
    clipped = {}
    for (name, (x, _)), y, array in zip(sliced.items(), data, arrays, strict=True):
        same = array.variable.copy(deep=False, data=y).transpose(*x.dims)
        clipped[name] = _with_data(x, same.data, largest)
    return _assigned(obj, clipped)


def _limit(clip_norm: npt.ArrayLike) -> tuple[Any, float]:
    """Limit without labels, and the largest value that it lets occur in the result."""
    limit = clip_norm.data if isinstance(clip_norm, xr.DataArray) else clip_norm
    # of a lazy limit nothing is known yet, so that any value may occur
    return limit, math.inf if isinstance(limit, da.Array) else max(parse_clip_norm(limit), 0.0)


def _with_data(x: xr.DataArray, data: Any, largest: float) -> xr.DataArray:
    """Array with clipped values."""
    # a copy keeps the encoding too, part of which would round the values when they are saved
    clipped = x.copy(deep=False, data=data)
    clipped.encoding = metadata.exact_encoding(x.encoding, data.dtype, largest)
    return clipped


def _assigned(obj: xr.Dataset, clipped: Mapping[Hashable, xr.DataArray]) -> xr.Dataset:
    # variables, not arrays: their coordinates need not be compared
    return obj.assign({name: x.variable for name, x in clipped.items()})


def norm(obj: Labelled, dim: Dim = None, *, skipna: bool | None = None) -> Labelled:
    """L2-norm of every slice of labelled arrays over ``dim``.

    Parameters
    ----------
    obj : xarray.DataArray, xarray.Dataset or xarray.DataTree of any shape
        Backed by NumPy or Dask.
    dim : str, sequence of str, ... or None
        Dimensions over which the norm is taken; None and ``...`` take all.
    skipna : bool, optional
        See `clip_by_norm`.

    Returns
    -------
    xarray.DataArray, xarray.Dataset or xarray.DataTree of the shape of obj without dim
        float64, correctly rounded; lazy where ``obj`` is. A Dataset or DataTree holds the norms
        of the variables that `clip_by_norm` clips.

    Raises
    ------
    TypeError, ValueError
        As `clip_by_norm`.

    See Also
    --------
    daskclip.norm : On arrays without labels.

    Notes
    -----
    Computes each chunk once. Holds the partial sums that `daskclip.clip_by_norm` holds, and one
    copy of a NumPy array.

    Examples
    --------
    >>> x = xr.DataArray(np.float32([[3, 4], [6, np.nan]]), dims=["time", "x"])
    >>> norm(x, dim="x").values
    array([5., 6.])
    """
    policy = _policy(skipna)

    def measure(one: Any, sliced: Slices) -> Any:
        own = list(dict.fromkeys(d for _, dims in sliced.values() for d in dims))
        # Dataset.reduce would take the norms of integer variables too
        if isinstance(one, xr.Dataset):
            one = one[list(sliced)]
        return one.reduce(_norm, own, keep_attrs=True, nonfinite=policy)

    return _each(measure, obj, dim)


@xr.register_datatree_accessor("daskclip")
@xr.register_dataset_accessor("daskclip")
@xr.register_dataarray_accessor("daskclip")
class DaskClipAccessor(Generic[Labelled]):
    """The functions of `daskclip.xarray` as methods of a DataArray, Dataset or DataTree.

    Parameters
    ----------
    obj : xarray.DataArray, xarray.Dataset or xarray.DataTree
        What the methods are called on.

    Examples
    --------
    >>> x = xr.DataArray(np.float32([3, 4]), dims="x")
    >>> x.daskclip.norm("x").item()
    5.0
    """

    def __init__(self, obj: Labelled) -> None:
        self._obj: Labelled = obj

    def clip_by_norm(
        self,
        clip_norm: npt.ArrayLike,
        dim: Dim = None,
        *,
        skipna: bool | None = None,
        nonfinite: NonFinite | None = None,
        normalize: bool = False,
    ) -> Labelled:
        """See `daskclip.xarray.clip_by_norm`."""
        return clip_by_norm(
            self._obj, clip_norm, dim, skipna=skipna, nonfinite=nonfinite, normalize=normalize
        )

    def clip_by_global_norm(
        self, clip_norm: npt.ArrayLike, dim: Dim = None, *, normalize: bool = False
    ) -> xr.Dataset:
        """See `daskclip.xarray.clip_by_global_norm`; of a Dataset."""
        obj: Any = self._obj
        return clip_by_global_norm(obj, clip_norm, dim, normalize=normalize)

    def norm(self, dim: Dim = None, *, skipna: bool | None = None) -> Labelled:
        """See `daskclip.xarray.norm`."""
        return norm(self._obj, dim, skipna=skipna)


def _each(function: Callable[[Any, Slices], Any], obj: Labelled, dim: Dim) -> Labelled:
    """Apply a function to an array or dataset and its slices, or to each dataset of a tree."""
    result: Labelled
    if isinstance(obj, xr.DataArray):
        metadata.require_decoded(obj.dtype, obj.attrs, f"array {short_repr(obj.name)}")
        check_dtype(obj.dtype)
        result = function(obj, {obj.name: (obj, parse_dim(dim, obj.dims))})
    elif isinstance(obj, xr.Dataset):
        result = function(obj, _slices([obj], dim)(obj))
    elif isinstance(obj, xr.DataTree):
        slices_of = _slices([node.dataset for node in obj.subtree], dim)
        result = obj.map_over_datasets(lambda one: function(one, slices_of(one)))
    else:
        raise InvalidTypeError(
            f"obj is a {type(obj).__name__}; give a DataArray, Dataset or DataTree of xarray, "
            "or use daskclip.clip_by_norm"
        )
    return result


def _slices(datasets: Sequence[xr.Dataset], dim: Dim) -> Callable[[xr.Dataset], Slices]:
    """Function that gives the slices of one of some datasets, over the dimensions it has."""
    found = [x for one in datasets for x in _arrays(one).values()]
    count = sum(len(one.data_vars) for one in datasets)
    # an empty dataset has no dimensions: in a tree, those are in the groups below
    if not count:
        return lambda one: {}
    if not found:
        raise DTypeError(
            f"none of the {count} variables can be clipped; cast one to one of {', '.join(DTYPES)}"
        )
    dims = parse_dim(dim, list(dict.fromkeys(d for x in found for d in x.dims)))
    # dim=[] asks for no dimension: every element of every variable is a slice
    is_whole = dim is None or dim is ... or not dims

    def slices_of(one: xr.Dataset) -> Slices:
        own = {name: (x, [d for d in x.dims if d in dims]) for name, x in _arrays(one).items()}
        return {name: (x, mine) for name, (x, mine) in own.items() if mine or is_whole}

    return slices_of


def _arrays(dataset: xr.Dataset) -> dict[Hashable, xr.DataArray]:
    """Variables that can be clipped, by name."""
    # all of them: an integer variable may be a packed one, and is not to be passed over in silence
    for name, x in dataset.data_vars.items():
        metadata.require_decoded(x.dtype, x.attrs, f"variable {short_repr(name)}")
    # by the CF conventions a coordinate names its bounds; they need no attributes of their own
    variables = dataset.variables.values()
    bounds = {v.attrs.get("bounds") or v.encoding.get("bounds") for v in variables}
    data = {name: x for name, x in dataset.data_vars.items() if name not in bounds}
    return {name: x for name, x in data.items() if x.dtype.name in DTYPES}


def _plain(x: xr.DataArray) -> npt.NDArray[Any] | da.Array:
    """Return the data of a DataArray that can be clipped."""
    # xarray compares shapes, and NaN equals nothing
    if any(math.isnan(n) for n in x.shape):
        raise InvalidValueError.about(
            "array", x.name, "has unknown sizes; call its .data.compute_chunk_sizes() first"
        )
    return _supported(x.data)


def _supported(data: object) -> npt.NDArray[Any] | da.Array:
    """Refuse arrays of libraries other than NumPy and Dask."""
    if not isinstance(data, np.ndarray | da.Array):
        kind = type(data)
        raise DTypeError(
            f"data of type {kind.__module__}.{kind.__name__} cannot be clipped; "
            "convert it to an array of numpy or dask"
        )
    return data


def _norm(data: object, axis: Axes = None, *, nonfinite: NonFinite) -> Any:
    # daskclip.norm has no policy for NaN; an infinite limit clips nothing
    return clip_unlabelled(_supported(data), math.inf, axis, nonfinite=nonfinite, return_norm=True)[
        1
    ]


def _policy(skipna: object, nonfinite: NonFinite | None = None) -> NonFinite:
    if skipna is not None and not isinstance(skipna, bool | np.bool_):
        raise InvalidTypeError.about("skipna", skipna, "is not a bool; give True, False or None")
    if nonfinite is None:
        return "omit" if skipna is None or skipna else "propagate"
    check_nonfinite(nonfinite)
    if skipna is not None:
        both = f"and skipna {skipna} are both given; give one"
        raise InvalidValueError.about("nonfinite", nonfinite, both)
    return nonfinite
