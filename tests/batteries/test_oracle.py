"""What TensorFlow 2.21 returned, or what its documentation promises where the two differ.

The recording's own `format` field explains its fields.
"""

import math
import zlib
from random import Random

import dask
import dask.array as da
import numpy as np
import pytest
from oracle import ARRAYS, BY_GLOBAL_NORM, BY_NORM, CASES, argument, array, number
from reference import is_ideal, root, slices, squares, steps

from daskclip import IndexedSlices, clip_by_global_norm, clip_by_norm, global_norm, norm

# Where the contract decides, not the recording: (rule, expected error or None, ids)
RULES = [
    ("a limit is a real number, else TypeError", TypeError, (134, 135, 136, 149)),
    (
        "a limit is 0-D, else ValueError; TensorFlow broadcasts some vectors",
        ValueError,
        (137, 138, 139, 140, 141, 142, 143, 144, 145, 146, 147, 148, 155),
    ),
    (
        "axes out of range are an AxisError",
        np.exceptions.AxisError,
        (165, 166, 167, 174, 175, 176),
    ),
    ("an axis named twice is a ValueError", ValueError, (168, 169, 170)),
    (
        "axes that are nested, bool, float or str are a TypeError; TensorFlow takes [[1]] and True",
        TypeError,
        (159, 163, 164, 171, 172, 173),
    ),
    (
        "arrays neither floating point nor complex are a TypeError",
        TypeError,
        (177, 178, 179, 180, 181, 186, 345),
    ),
    ("complex arrays work; TensorFlow's page promises it", None, (182, 183, 184, 185)),
    ("a list may mix dtypes", None, (366,)),
    ("a negative limit counts as 0; TensorFlow turns the signs around", None, (353,)),
    ("an infinite limit leaves a list unchanged; TensorFlow gives NaN", None, (354,)),
    ("norms at most the limit change nothing, 0 included; TensorFlow gives NaN", None, (362,)),
    ("a norm is finite though its square overflows; TensorFlow gives NaN", None, (365, 369)),
]
DECIDED = {f"open-{i:04}": (rule, error) for rule, error, ids in RULES for i in ids}


def in_chunks(x, seed):
    """Dask array of `x` in chunks drawn from the seed."""
    random = Random(zlib.crc32(seed.encode()))
    cuts = [sorted(random.choices(range(n + 1), k=2)) if n else [] for n in x.shape]
    edges = [[0, *c, n] for c, n in zip(cuts, x.shape, strict=True)]
    return da.from_array(x, tuple(tuple(np.diff(e).tolist()) for e in edges))


def is_met(y, x, case, axes, clip_norm):
    doc = case.get("doc")
    if doc is None:
        totals = squares(x, axes)
        return all(
            is_ideal(y[part], x[part], totals[index], clip_norm)
            for index, part in slices(x.shape, axes)
        )
    if doc["tf_agrees"]:
        return steps(y, array(case["expected"], case["dtype"])) <= 4
    return steps(y, array(doc["ideal"], case["dtype"])) <= (4 if x.dtype == np.float64 else 2)


@pytest.mark.parametrize("form", ["numpy", "dask"])
@pytest.mark.parametrize("name", BY_NORM)
def test_clip_by_norm_is_as_recorded(name, form):
    case = CASES[name]
    x = array(case["input"], case["dtype"])
    axes, clip_norm = argument(case["axes"]), argument(case["clip_norm"])
    t = in_chunks(x, name) if form == "dask" else x
    indexed = case.get("indexed_slices")
    if indexed:
        indices, dense_shape = np.array(indexed["indices"]), indexed["dense_shape"]
        t = IndexedSlices(t, indices, dense_shape)
    rule, error = DECIDED.get(name, ("", None))
    if error:
        with pytest.raises(error):
            clip_by_norm(t, clip_norm, axes)
        return
    assert rule or "error" not in case
    y, norms = clip_by_norm(t, clip_norm, axes, case.get("name"), return_norm=True)
    if indexed:
        assert y.indices is indices
        assert y.dense_shape is dense_shape
        y = y.values
    assert isinstance(y, da.Array) == (form == "dask")
    y, norms = dask.compute(y, norms, scheduler="sync")
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    every = range(x.ndim) if axes is None else np.atleast_1d(axes).astype(int) % max(x.ndim, 1)
    every = tuple(every)
    assert is_met(y, x, case, every, float(clip_norm))
    if "doc" in case:
        expected = ARRAYS[case["doc"]["norms"]]
        np.testing.assert_array_equal(norms, expected.squeeze(every), strict=True)
        np.testing.assert_array_equal(norm(x, axes), norms)


@pytest.mark.parametrize("form", ["numpy", "dask"])
@pytest.mark.parametrize("name", BY_GLOBAL_NORM)
def test_clip_by_global_norm_is_as_recorded(name, form):
    case = CASES[name]
    arrays = [
        None if key is None else array(key, dtype)
        for key, dtype in zip(case["inputs"], case["dtypes"], strict=True)
    ]
    t_list = [
        x if x is None or form == "numpy" else in_chunks(x, f"{name}-{i}")
        for i, x in enumerate(arrays)
    ]
    indices = np.arange(3)
    for i in case["indexed"]:
        t_list[i] = IndexedSlices(t_list[i], indices)
    clip_norm, use_norm = argument(case["clip_norm"]), number(case["use_norm"])
    clipped, value = clip_by_global_norm(t_list, clip_norm, use_norm)
    assert len(clipped) == len(arrays)
    for i in case["indexed"]:
        assert clipped[i].indices is indices
        clipped[i] = clipped[i].values
    for x, y in zip(arrays, clipped, strict=True):
        if x is None:
            assert y is None
        else:
            assert isinstance(y, da.Array) == (form == "dask")
            assert (y.dtype, y.shape) == (x.dtype, x.shape)
    clipped, value, again = dask.compute(clipped, value, global_norm(t_list), scheduler="sync")
    pairs = [(x, y) for x, y in zip(arrays, clipped, strict=True) if x is not None]
    if name in DECIDED:
        total = sum(squares(x, tuple(range(x.ndim))).item() for x, _ in pairs)
        assert value == root(total)
        assert all(is_ideal(y, x, total, clip_norm) for x, y in pairs)
        return
    assert "error" not in case
    expected = [array(key, "") for key in case["expected"] if key]
    assert all(steps(y, e) <= 4 for (_, y), e in zip(pairs, expected, strict=True))
    exact = number(case["doc"]["exact_norm"])
    if use_norm is not None:
        exact = use_norm
    elif math.isnan(exact):  # a list that holds NaN or infinity
        exact = ARRAYS[case["expected_norm"]]
    np.testing.assert_array_equal(value, exact)
    if use_norm is None:
        np.testing.assert_array_equal(again, exact)


def test_every_case_is_met_or_decided():
    assert len(BY_NORM) + len(BY_GLOBAL_NORM) == 369
    assert set(DECIDED) <= set(CASES)
