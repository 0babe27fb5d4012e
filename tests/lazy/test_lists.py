"""Lists of arrays with norms in common: in memory and lazily, whole and for each kept position."""

import math

import dask
import dask.array as da
import numpy as np
import pytest
from joint import DTYPES, joint_arrays, rows
from reference import bits

from daskclip import IndexedSlices, clip_by_global_norm, clip_by_norm, global_norm, norm
from daskclip.errors import InvalidTypeError, InvalidValueError


def chunked(x, rng):
    """A Dask array of random chunks, some of them empty."""
    parts = []
    for n in x.shape:
        cuts = np.sort(rng.integers(0, n + 1, rng.integers(0, 4)))
        parts.append(tuple(map(int, np.diff([0, *cuts, n]))))
    return da.from_array(x, tuple(parts))


@pytest.mark.parametrize("seed", range(80))
def test_each_kept_position_is_clipped_as_one_row(seed):
    rng = np.random.default_rng(seed)
    arrays, axes = joint_arrays(rng, [DTYPES[seed % len(DTYPES)]])
    both = np.concatenate([rows(x, axes) for x in arrays], axis=-1)
    limit, how = float(rng.choice([0.5, 2.0, 100.0])), {"normalize": bool(rng.integers(2))}
    expected, norms = clip_by_norm(both, limit, axes=-1, return_norm=True, **how)
    clipped, found = clip_by_global_norm(arrays, limit, axes=axes, **how)
    assert bits(np.concatenate([rows(y, axes) for y in clipped], axis=-1)) == bits(expected)
    assert bits(np.asarray(found)) == bits(np.asarray(norms))
    for x, y in zip(arrays, clipped, strict=True):
        assert (y.dtype, y.shape) == (x.dtype, x.shape)


@pytest.mark.parametrize("seed", range(80))
def test_every_form_gives_what_each_position_alone_gives(seed):
    rng = np.random.default_rng(seed)
    arrays, axes = joint_arrays(rng, DTYPES)
    for x in arrays:
        if rng.random() < 0.3 and x.size:
            x.flat[rng.integers(x.size)] = rng.choice([np.nan, np.inf])
    limit, how = float(rng.choice([0.5, 2.0, 100.0])), {"normalize": bool(rng.integers(2))}
    clipped, norms = clip_by_global_norm(arrays, limit, axes=axes, **how)
    for position in np.ndindex(norms.shape):
        alone, value = clip_by_global_norm([rows(x, axes)[position] for x in arrays], limit, **how)
        assert bits(norms[position]) == bits(value)
        assert [bits(rows(y, axes)[position]) for y in clipped] == [bits(y) for y in alone]
    lazy = [chunked(x, rng) for x in arrays]
    lazily, found = clip_by_global_norm(lazy, da.asarray(limit), axes=axes, **how)
    assert [y.chunks for y in lazily] == [x.chunks for x in lazy]
    lazily, found, only = dask.compute(lazily, found, global_norm(lazy, axes=axes))
    assert [bits(y) for y in lazily] == [bits(y) for y in clipped]
    assert bits(np.asarray(found)) == bits(np.asarray(only)) == bits(np.asarray(norms))
    assert bits(np.asarray(global_norm(arrays, axes=axes))) == bits(np.asarray(norms))
    known, _ = clip_by_global_norm(lazy, limit, found, axes=axes, **how)
    again, _ = clip_by_global_norm(arrays, limit, found, axes=axes, **how)
    assert [bits(y) for y in dask.compute(*known)] == [bits(y) for y in again]


def test_none_stays_and_an_empty_list_has_one_norm():
    x = np.float32([[3, 4], [0.3, 0.4]])
    clipped, norms = clip_by_global_norm([None, x, None], 1.0, axes=1)
    assert clipped[0] is clipped[2] is None
    assert bits(clipped[1]) == bits(clip_by_norm(x, 1.0, axes=1))
    assert norms.tolist() == [5.0, norm(x[1])]
    assert clip_by_global_norm([None], 1.0, axes=1) == ([None], 0.0)


def test_known_norms_of_another_shape_are_refused():
    x = np.ones((3, 2))
    with pytest.raises(InvalidValueError, match=r"^use_norm has shape \(2,\); .* shape \(3,\)$"):
        clip_by_global_norm([x], 1.0, np.ones(2), axes=1)
    assert clip_by_global_norm([x], 1.0, 2.0, axes=1)[0][0] == pytest.approx(0.5 * x)


@pytest.mark.parametrize("dtype", ["i8", "u1", "?", "f2", ">f4", "f8", "g", None])
def test_known_norms_are_numbers_of_any_dtype(dtype):
    x, ones = np.float32([[3, 4], [0, 2], [1, 0]]), [1.0, 1.0, 1.0]
    found = clip_by_global_norm([x], 0.5, np.array(ones, dtype) if dtype else ones, axes=1)
    expected = clip_by_global_norm([x], 0.5, np.array(ones), axes=1)
    assert [*map(bits, (*found[0], found[1]))] == [*map(bits, (*expected[0], expected[1]))]


X = np.ones((4, 3))
REFUSED = {
    "other kept shapes": (
        [X, None, np.ones((5, 3))],
        r"^t_list\[0\] keeps the shape \(4,\) and t_list\[2\] the shape \(5,\), so that they have "
        r"no norms in common; keep the same of each$",
        InvalidValueError,
    ),
    "no kept axis": ([X, np.ones(())], r"t_list\[1\] the shape \(\), so that", InvalidValueError),
    "unknown sizes": (
        [X, da.ones((4, 3))[da.ones(4) > 0]],
        r"^t_list\[1\] has unknown sizes; call its \.compute_chunk_sizes\(\) first$",
        InvalidValueError,
    ),
    "IndexedSlices": (
        [X, None, IndexedSlices(X, np.arange(4))],
        r"^t_list\[2\] is IndexedSlices, whose rows are not those of other arrays; give a dense",
        InvalidTypeError,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_lists_without_norms_in_common_are_refused(name):
    arrays, text, error = REFUSED[name]
    for call in (lambda a: clip_by_global_norm(a, 1.0, axes=slice(1, None)), global_norm):
        options = {} if call is not global_norm else {"axes": slice(1, None)}
        with pytest.raises(error, match=text):
            call(arrays, **options)


def test_equal_calls_give_equal_keys_and_other_axes_others():
    x = da.ones((4, 4), chunks=2)
    names = [clip_by_global_norm([x], 1.0, axes=a)[0][0].name for a in (0, 0, 1, None)]
    assert names[0] == names[1]
    assert len({*names}) == 3
    assert math.isclose(global_norm([x]).compute(), 4.0)
