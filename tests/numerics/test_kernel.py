"""The compiled kernel is exact for every layout of array and every processor level."""

import ctypes
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import dask
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    BFLOAT16,
    DTYPES,
    EXPONENTS,
    bits,
    exact_sums,
    is_rounded,
    native,
    same,
    squares,
    totals,
)
from strategies import (
    LAYOUTS,
    bits_of,
    elements,
    flags,
    make_nonfinite,
    one_of,
    parts_as_integers,
)

import daskclip
from daskclip import clip_by_norm
from daskclip.errors import KernelError
from daskclip.numerics import (
    ORDERS,
    block,
    clip_array,
    clip_block,
    compiled,
    finalize,
    partial_norm,
)

LEVELS = sorted(path.name for path in compiled.FOLDER.glob("_kernel*.so"))
if not compiled.has_level_3():
    LEVELS = LEVELS[:1]
RUN, LANES, ROWS = 4096, 1024, 64  # of kernel.c
LENGTHS = (1, 2, 3, 7, 16, 17, 40, 130)


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    """Each kernel that this processor runs."""
    loaded = compiled.load(request.param)
    monkeypatch.setattr(compiled, "kernel", lambda: loaded)
    return request.param


def on_each_level(function):
    """What a function gives with each kernel; all the same."""
    results = []
    for name in LEVELS:
        with pytest.MonkeyPatch.context() as patch:
            loaded = compiled.load(name)
            patch.setattr(compiled, "kernel", lambda loaded=loaded: loaded)
            results.append(function())
    assert all(same(results[0], other) for other in results[1:])
    return results[0]


@st.composite
def arrays(draw):
    """An array of up to four axes in any layout, and axes to reduce."""
    dtype = draw(one_of(*DTYPES))
    shape = tuple(draw(st.lists(one_of(*LENGTHS), min_size=1, max_size=4)))
    while math.prod(shape) > 20_000:
        shape = shape[1:]
    x = elements(draw, shape, dtype)
    if draw(flags):
        make_nonfinite(draw, x)
    x = x.transpose(draw(st.permutations(range(x.ndim))))
    x = LAYOUTS[draw(one_of("c", "c", *sorted(LAYOUTS)))](x)
    return x, tuple(k for k in range(x.ndim) if draw(flags))


@settings(max_examples=150, derandomize=True, deadline=None)
@given(case=arrays(), omit=flags, share=one_of(0.0, 1e-3, 0.5, 1.0, 1.5, 1e3), data=st.data())
def test_levels_layouts_places_and_threads_change_nothing(case, omit, share, data):
    x, axes = case
    ord = data.draw(one_of(*ORDERS)) if x.dtype.kind != "c" else 2.0
    how = {"omit_nan": omit, "ord": ord}
    plain = np.array(x, order="C")
    summed = on_each_level(lambda: partial_norm(x, axes, **how))
    assert same(summed, partial_norm(plain, axes, **how))
    norms = finalize(summed, math.inf, x.dtype).norm.ravel()
    norm = norms[data.draw(st.integers(0, len(norms) - 1))]
    limit = share * float(norm) if math.isfinite(norm) else share
    how |= {"zero": data.draw(flags), "normalize": data.draw(flags)}
    expected = on_each_level(lambda: clip_block(x, limit, axes, **how))
    assert same(expected, clip_block(plain, limit, axes, **how))
    inside = x.copy(order="K")
    assert same(expected, clip_block(inside, limit, axes, out=inside, **how))
    other = np.empty(x.shape[::-1], x.dtype).T
    assert same(expected, clip_block(x, limit, axes, out=other, **how))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "LARGE", 64)
        threaded, norm = clip_array(x, limit, axes, threads=3, **how)
    assert bits(threaded) == bits(expected[0])
    assert bits(norm) == bits(expected[1].norm)


# longer than a run, wider than the lanes, narrow; whole arrays, rows, columns and mixed axes
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((2 * RUN + 5,), (0,)),
        ((3, RUN + 1), (1,)),
        ((ROWS + 3, LANES + 7), (0,)),
        ((999, 2), (0,)),
        ((999, 2), (1,)),
        ((35, 60), (0,)),
        ((4, 50, 30), (1,)),
        ((4, 50, 30), (0, 2)),
        ((20, 3, 20), (0, 2)),
        ((30, 40, 3), (0, 2)),
        ((4, 20, 3, 20), (1, 3)),
        ((4, 20, 3, 20), (0, 2)),
        ((4, 20, 3, 20), ()),
    ],
)
@pytest.mark.parametrize("spread", [1, 30, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("level")
def test_sums_of_every_form_are_exact(shape, axes, spread, dtype):
    x = random_values(np.random.default_rng(0), shape, dtype, spread)
    partial = partial_norm(x, axes)
    assert (exact_sums(partial) == squares(x, axes)).all()
    if dtype.kind != "c" and dtype.itemsize > 2:
        sums = exact_sums(partial_norm(x, axes, ord=1))
        assert (sums * sums == totals(x, axes, 1) << 2148).all()


def random_values(rng, shape, dtype, spread):
    """Normal values around exponents of some spread."""
    real = dtype if dtype.kind != "c" else np.dtype(f"f{dtype.itemsize // 2}")
    parts = (*shape, 2) if dtype.kind == "c" else shape
    lowest, highest = EXPONENTS[real.name]
    exponent = np.clip(rng.integers(-spread, spread, parts, endpoint=True), lowest, highest - 1)
    x = np.ldexp(rng.uniform(-1, 1, parts), exponent).astype(real)
    return x.view(dtype)[..., 0] if dtype.kind == "c" else x


@pytest.mark.parametrize("ord", [1, 2])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.usefixtures("level")
def test_sums_at_the_reach_of_the_grids_are_exact(dtype, ord):
    """Elements of all bits that lie 2**span below the largest of their slice."""
    spans = np.arange(15, 65)
    x = np.random.default_rng(0).uniform(1, 2, (len(spans), 64)).astype(dtype)
    x[:, 1:] = np.ldexp(x[:, 1:], -spans[:, None])
    lowest = np.finfo(dtype).minexp
    for exponent in (0, *range(lowest, lowest + 60, 3)):  # some of them subnormal
        y = np.ldexp(x, exponent)
        for rows, axis in ((y, 1), (np.ascontiguousarray(y.T), 0)):
            sums = exact_sums(partial_norm(rows, (axis,), ord=ord))
            expected = totals(rows, (axis,), ord)
            assert (sums == expected if ord == 2 else sums * sums == expected << 2148).all()


def special(dtype):
    """Values at the edges of a format, by name."""
    info = np.finfo(dtype)
    tiny, top = float(info.smallest_subnormal), float(info.max)
    return {
        "zeros": [0.0, -0.0],
        "one subnormal": [tiny] + [0.0] * 30,
        "subnormals": [tiny, -3 * tiny, float(info.smallest_normal) - tiny],
        "smallest normal": [float(info.smallest_normal)],
        "largest": [top, -top],
        "largest and smallest": [top, tiny, 1.0, -top, -tiny],
        "all exponents": np.ldexp(1.0, np.arange(info.minexp - info.nmant, info.maxexp)),
        "nan": [math.nan, 1.0, 2.0, 3.0],
        "one nan": [math.nan] + [1.0] * 99,
        "inf": [math.inf, 1.0, -math.inf, tiny],
        "nan and inf": [math.nan, -math.inf, 3.0, 0.0, tiny],
    }


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("name", list(special("f4")))
@pytest.mark.parametrize("omit", [False, True])
def test_special_values_are_flagged_and_left_out_of_sums(name, dtype, omit):
    values = np.resize(np.asarray(special(dtype)[name], dtype), 6000)
    finite = np.where(np.isfinite(values), values, values.dtype.type(0))
    for shape, axes in (((6000,), (0,)), ((60, 100), (1,)), ((60, 100), (0,)), ((3000, 2), (0,))):
        x = values.reshape(shape)
        partial = on_each_level(lambda x=x, axes=axes: partial_norm(x, axes, omit_nan=omit))
        assert (exact_sums(partial) == squares(finite.reshape(shape), axes)).all()
        nan = np.isnan(x).any(axis=axes, keepdims=True) * (4 if omit else 1)
        assert np.array_equal(partial.flags, nan + 2 * np.isinf(x).any(axis=axes, keepdims=True))
        for limit in (0.0, 1e-45, 1.0, 1e30, math.inf, math.nan):
            on_each_level(lambda c=limit, a=axes, x=x: clip_block(x, c, a, omit_nan=omit))


# rows, lanes, bins and strips; factors that are truncated, that leave float64's range, 0 and NaN
@pytest.mark.parametrize("limit", [0.0, 5e-324, 1e-310, 1e-40, 1e-6, 1.0, math.nan, math.inf])
@pytest.mark.parametrize("omit", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_that_is_made_is_one_and_any_other_keeps_its_bits(dtype, omit, limit):
    rng = np.random.default_rng(0)
    real, quiet = parts_as_integers(np.zeros(1, dtype)).dtype, bits_of(math.nan, dtype)
    for shape, axes in (((4, 5000), (1,)), ((300, 7), (0,)), ((40, 30, 3), (0, 2)), ((2, 40), ())):
        x = rng.standard_normal((*shape, 2))[..., : 2 if dtype.kind == "c" else 1]
        x = x.astype(np.float32 if dtype.itemsize < 16 else np.float64)
        x = (x.view(dtype) if dtype.kind == "c" else x.astype(dtype)).reshape(shape)
        before = parts_as_integers(x)
        is_nan = rng.random(before.shape) < 0.1
        signed = rng.integers(0, 2, before.shape, dtype=real) << real.type(8 * real.itemsize - 1)
        # quiet or not, with any sign and payload
        nan = bits_of(math.inf, dtype) | signed | rng.integers(1, 8, before.shape, dtype=real)
        before[is_nan] = nan[is_nan] | rng.choice(np.array([0, quiet], real), is_nan.sum())
        infinite = (rng.random(before.shape) < 0.05) & ~is_nan
        before[infinite] = bits_of(-math.inf, dtype)
        with np.errstate(invalid="ignore"):
            spoilt = np.isnan(x).any(axis=axes, keepdims=True) & (not omit)
        for layout in LAYOUTS.values():
            other = layout(x)
            clipped = on_each_level(
                lambda x=other, axes=axes: clip_block(x, limit, axes, omit_nan=omit)[0]
            )
            found = parts_as_integers(native(clipped)).reshape(before.shape)
            each = np.broadcast_to(spoilt[..., None], (*shape, before.size // x.size)).ravel()
            if limit == math.inf:
                assert np.array_equal(found, before)
            elif math.isnan(limit):
                assert (found == quiet).all()
            else:
                assert (found[each] == quiet).all()
                assert np.array_equal(found[is_nan & ~each], before[is_nan & ~each])
                assert (found[infinite & ~each] == quiet).all()


def test_no_warning_reaches_the_user_from_a_signaling_nan():
    x = np.full(3, 0x7F81, "u2").view(BFLOAT16)
    assert (clip_by_norm(x, 1.0, nonfinite="omit").view("u2") == 0x7F81).all()
    with pytest.raises(FloatingPointError, match="slice"):
        clip_by_norm(x, 1.0, nonfinite="raise")


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "c8", "c16"])
@pytest.mark.parametrize("shape", [(), (0,), (0, 50), (50, 0), (1,)])
def test_empty_arrays_and_single_elements(shape, dtype):
    x = np.full(shape, 3, dtype)
    for axes in ((), tuple(range(len(shape)))):
        assert (exact_sums(partial_norm(x, axes)) == squares(x, axes)).all()
        assert (abs(clip_block(x, 2.0, axes)[0]) <= 2.0).all()


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("axis", [0, 1])
def test_more_slices_than_are_worked_on_at_a_time(axis, dtype):
    x = np.ones((4, 40_000), dtype)
    x *= np.float32(2.0) ** (np.arange(x.shape[1]) // 1000)
    x = x if axis == 0 else np.ascontiguousarray(x.T)
    norms = finalize(partial_norm(x, (axis,)), math.inf, x.dtype).norm
    assert np.array_equal(norms, 2 * np.take(x, [0], axis).astype(float))
    assert not partial_norm(np.zeros_like(x), (axis,)).limbs.size


def row_of_sum(total):
    """64 numbers of float32 whose squares add up to an integer."""
    row = []
    while total:
        root = math.isqrt(total)
        root >>= (cut := max(0, root.bit_length() - 24))
        row.append(float(root << cut))
        total -= (root << cut) ** 2
    return np.float32([*row, *[0.0] * (64 - len(row))])


# 2**53 + odd is halfway between two floats
@pytest.mark.parametrize("odd", [3, 13])
@pytest.mark.parametrize("beside", [-1, 0, 1])
@pytest.mark.usefixtures("level")
def test_norms_that_100_bits_do_not_round(odd, beside):
    x = np.tile(row_of_sum((2**53 + odd) ** 2 + beside), (3, 1))
    norms = clip_block(x, 1.0, (1,))[1].norm
    assert is_rounded(norms[0, 0], squares(x, (1,))[0, 0])


@settings(max_examples=100, derandomize=True, deadline=None)
@given(seed=st.integers(0, 2**32), power=st.integers(-540, 500), excess=st.integers(-1, 1))
def test_norms_beside_ties_are_rounded_to_even(seed, power, excess):
    """Sums beside the square of a midpoint, of norms from subnormal to large."""
    rng = np.random.default_rng(seed)
    middle = 2 * int(rng.integers(2**52, 2**53)) + 1
    total, x = middle**2 + excess, []
    while total and len(x) < 30:
        root = math.isqrt(total)
        root >>= (cut := max(0, root.bit_length() - 53))
        x.append(math.ldexp(float(root), cut))
        total -= (root << cut) ** 2
    x = np.ldexp(np.array(x), power)
    assert is_rounded(daskclip.norm(x), squares(x, (0,)).item())


@pytest.mark.parametrize("axes", [None, 0, 1])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_the_number_of_threads_changes_nothing(dtype, axes):
    x = np.random.default_rng(0).standard_normal((3000, 2001)).astype(dtype)
    assert x.nbytes > block.LARGE
    results = []
    for workers in (1, 2, 5):
        with dask.config.set(num_workers=workers):
            results.append(clip_by_norm(x, 3.0, axes, return_norm=True))
    assert len({(bits(y), bits(n)) for y, n in results}) == 1


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "c16"])
def test_scalars_are_kept_while_they_are_read(dtype):
    """A chunk without axes may be a scalar: a temporary array of it is all that has an address."""
    compiled.kernel.cache_clear()  # loading a kernel takes memory of the same size
    assert clip_block(np.dtype(dtype).type(4), 8.0, ())[0] == 4


def test_bits_of_untouched_elements_are_kept():
    """NaN of any bits stays as it is where it does not count, -0.0 and subnormals in any case."""
    odd = np.array([0x7F800001, 0xFFC12345, 0x80000000, 0x00000001], np.uint32).view(np.float32)
    x = np.tile(np.append(odd, np.float32([0.25, -0.25])), (5, 1))
    for axes in ((0,), (1,), (0, 1)):
        assert clip_block(x, 5.0, axes, omit_nan=True)[0].tobytes() == x.tobytes()


def test_python_describes_the_block_as_the_kernel_does():
    source = (compiled.FOLDER / "kernel.c").read_text()
    (body,) = re.findall(r"typedef struct \{([^{}]*)\} block;", source)
    declared = []
    for line in re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL).strip().split(";")[:-1]:
        kind, names = re.fullmatch(r"\s*(?:const )?(\w+) (.*)", line).groups()
        for name in names.split(", "):
            bare, size = re.fullmatch(r"\*?(\w+)(?:\[(\w+)\])?", name).groups()
            one = ctypes.c_void_p if "*" in name else {"i64": ctypes.c_int64}.get(kind)
            one = ctypes.c_double if kind == "double" and "*" not in name else one
            many = compiled.AXES if size == "AXES" else int(size or 0)
            declared.append(({"from": "from_"}.get(bare, bare), one * many if size else one))
    assert declared == list(compiled.Block._fields_)


def test_python_knows_the_formats_of_the_kernel():
    source = (compiled.FOLDER / "kernel.c").read_text()
    tables = dict(re.findall(r"(\w+)\[\] = \{(.*?)\}", source))
    names = re.search(r"enum \{ (FLOAT16.*?) \}", source)[1].lower().split(", ")
    for name, form in compiled.FORMATS.items():
        assert names[form.number] == name
        for field, table in zip(
            form._fields[1:], ("DIGITS", "LOWEST", "FIRST", "LIMBS"), strict=True
        ):
            entry = tables[table].split(", ")[form.number].replace("MAX_LIMBS", "138")
            assert getattr(form, field) == int(entry)


def test_a_kernel_of_another_version_is_not_called(monkeypatch):
    monkeypatch.setattr(ctypes, "sizeof", lambda block: 3000)
    with pytest.raises(KernelError, match="is of another version; install daskclip with pip"):
        compiled.load(LEVELS[0])


def test_a_missing_kernel_is_one_line(tmp_path):
    package = Path(daskclip.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(package, tmp_path / "daskclip", ignore=ignored)
    code = "import daskclip\ntry: daskclip.norm([3.0])\nexcept ImportError as e: print(e)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("the compiled kernel cannot be loaded: ")
    assert done.stdout.endswith("; install daskclip with pip, which compiles it\n")
    assert done.stdout.count("\n") == 1
