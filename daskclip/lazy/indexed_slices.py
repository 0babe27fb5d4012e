"""Rows of a larger array, the form of TensorFlow's sparse gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from daskclip.errors import InvalidTypeError, InvalidValueError


# eq=False: arrays compare element by element, and the result has no truth value
@dataclass(frozen=True, slots=True, eq=False)
class IndexedSlices:
    """Rows ``values[i] = dense[indices[i]]`` of an array of shape ``dense_shape``.

    Parameters
    ----------
    values : array of shape (n, ...)
        NumPy, Dask or Zarr array.
    indices : array of shape (n,)
        Integer positions along the first axis of the dense array; duplicates are allowed.
    dense_shape : sequence of int, optional
        Shape of the dense array.

    See Also
    --------
    clip_by_norm : Clips ``values``; the other fields stay the same objects.

    Notes
    -----
    Holds references to its arguments and copies nothing.

    References
    ----------
    `tf.IndexedSlices <https://www.tensorflow.org/api_docs/python/tf/IndexedSlices>`_

    Examples
    --------
    >>> s = IndexedSlices(np.float32([[1, 2], [3, 4]]), np.array([2, 2]), (4, 2))
    >>> s.to_dense()[2]
    array([4., 6.], dtype=float32)
    >>> s.coalesce().indices
    array([2])
    """

    values: Any
    """Array of shape (n, ...)."""
    indices: Any
    """Integer array of shape (n,)."""
    dense_shape: Any = None
    """Shape of the dense array, or None."""

    def to_dense(self) -> npt.NDArray[Any]:
        """Return a dense NumPy array; rows of equal index are added, absent rows are 0.

        Returns
        -------
        ndarray of shape dense_shape
            Of the dtype of ``values``.

        Raises
        ------
        ValueError
            If ``dense_shape`` is None or an index lies outside it.

        Notes
        -----
        Computes lazy values and holds the dense array in memory.
        """
        if self.dense_shape is None:
            raise InvalidValueError("dense_shape is None; give it to make a dense array")
        values, indices = self._arrays()
        shape = tuple(int(n) for n in np.asarray(self.dense_shape))
        dense = np.zeros(shape, values.dtype)
        # numpy would count negative indices from the end and add them to a wrong row
        if indices.size and not (indices.min() >= 0 and indices.max() < shape[0]):
            raise InvalidValueError(
                f"indices {indices.min()} to {indices.max()} leave 0 to {shape[0] - 1}; "
                f"correct them or dense_shape {shape}"
            )
        # unlike dense[indices] += values, adds every row of an index that occurs twice
        np.add.at(dense, indices, values)
        return dense

    def coalesce(self) -> IndexedSlices:
        """Return slices with sorted, unique indices; rows of equal index are added.

        Returns
        -------
        IndexedSlices
            NumPy values and indices; ``dense_shape`` is the same object.

        Notes
        -----
        Computes lazy values and holds them twice.
        """
        values, indices = self._arrays()
        unique, inverse = np.unique(indices, return_inverse=True)
        # rows are added in the order they have, which decides how the sums are rounded
        summed = np.zeros((len(unique), *values.shape[1:]), values.dtype)
        np.add.at(summed, inverse, values)
        return IndexedSlices(summed, unique, self.dense_shape)

    def _arrays(self) -> tuple[Any, Any]:
        """Values and indices as NumPy arrays, checked against each other."""
        values, indices = np.asarray(self.values), np.asarray(self.indices)
        if indices.dtype.kind not in "iu":
            raise InvalidTypeError(f"indices have dtype {indices.dtype}; give integers")
        if indices.shape != values.shape[:1]:
            raise InvalidValueError(
                f"indices of shape {indices.shape} do not match values of shape {values.shape}; "
                "give one index a row"
            )
        return values, indices


def is_indexed(t: object) -> TypeGuard[IndexedSlices]:
    """Whether ``t`` has the three parts of IndexedSlices."""
    # not isinstance: TensorFlow's own class has them too, and need not be importable
    return all(hasattr(t, name) for name in ("dense_shape", "indices", "values"))


def values_of(t: object) -> object:
    """Return the array to clip: the values of IndexedSlices, else ``t`` itself."""
    return t.values if is_indexed(t) else t


def with_values(t: object, values: object) -> object:
    """Return ``values`` in the form of ``t``: IndexedSlices if ``t`` has their parts."""
    # ours even where t is TensorFlow's, which could not hold a Dask array
    return IndexedSlices(values, t.indices, t.dense_shape) if is_indexed(t) else values
