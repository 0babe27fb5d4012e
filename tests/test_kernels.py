"""Compiled loops against NumPy: every field and every bit."""

import math
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import dask
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import bits, is_rounded, squares
from strategies import LAYOUTS, elements, flags, one_of, spoil

import daskclip
from daskclip import clip_by_norm, kernels, loops, numerics
from daskclip.exact import partial_norm
from daskclip.factor import finalize
from daskclip.numerics import clip_array, clip_block
from daskclip.partials import SLICES

pytest.importorskip("numba", reason="numba is not installed")

DTYPES = [np.dtype(d) for d in ("f4", "f8", "c8", "c16")]
LENGTHS = (1, 2, 3, 16, 17, 40, 130)


@contextmanager
def compiled(least):
    """Compiled loops for blocks of at least so many bytes."""
    before, kernels.LEAST = kernels.LEAST, least
    try:
        yield
    finally:
        kernels.LEAST = before


def both(function):
    """What NumPy gives, and what compiled loops give."""
    with compiled(math.inf):
        plain = function()
    with compiled(0):
        return plain, function()


def assert_same(plain, other):
    """Two partials or scales with equal fields."""
    for a, b in zip(plain, other, strict=True):
        assert np.shape(a) == np.shape(b)
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
        assert a is b is None or np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind == "f")


def assert_sums(x, axes, omit=False, used=True):
    """Same partials; `used`: by a compiled loop."""
    plain, other = both(lambda: partial_norm(x, axes, omit_nan=omit))
    assert_same(plain, other)
    with compiled(0):
        assert (kernels.partial_norm(x, axes, omit) is not None) == used


def assert_clipped(x, axes, limit, omit=False):
    """Same results, in place too, on one thread and on three."""

    def clip(out=None):
        return clip_block(x if out is None else out, limit, axes, omit_nan=omit, out=out)

    (plain, record), (other, same) = both(clip)
    assert bits(plain) == bits(other)
    assert_same(record, same)
    with compiled(0), pytest.MonkeyPatch.context() as patch:
        inside, same = clip(x.copy(order="K"))
        assert bits(plain) == bits(inside)
        assert_same(record, same)
        patch.setattr(numerics, "LARGE", 64)
        threaded, same = clip_array(x, limit, axes, omit_nan=omit, threads=3)
    assert bits(plain) == bits(threaded)
    assert_same(record._replace(toward_zero=0, shift=0), same._replace(toward_zero=0, shift=0))


@st.composite
def arrays(draw, special=True):
    """An array of up to four axes, some long enough for compiled loops, and axes to reduce."""
    dtype = draw(one_of(*DTYPES))
    shape = tuple(draw(st.lists(one_of(*LENGTHS), min_size=1, max_size=4)))
    while math.prod(shape) > 20_000:
        shape = shape[1:]
    x = elements(draw, shape, dtype)
    if special and draw(flags):
        spoil(draw, x)
    x = x.transpose(draw(st.permutations(range(x.ndim))))
    x = LAYOUTS[draw(one_of("c", "c", *sorted(LAYOUTS)))](x)
    return x, tuple(k for k in range(x.ndim) if draw(flags))


@settings(max_examples=200, derandomize=True, deadline=None)
@given(case=arrays(), omit=flags)
def test_sums_of_any_array(case, omit):
    x, axes = case
    assert_same(*both(lambda: partial_norm(x, axes, omit_nan=omit)))


@settings(max_examples=120, derandomize=True, deadline=None)
@given(case=arrays(), omit=flags, share=one_of(0.0, 1e-3, 0.5, 1.0, 1.5), data=st.data())
def test_any_array_clipped(case, omit, share, data):
    x, axes = case
    norms = finalize(partial_norm(x, axes, omit_nan=omit), math.inf, x.dtype).norm.ravel()
    norm = norms[data.draw(st.integers(0, len(norms) - 1))]
    assert_clipped(x, axes, float(share * norm) if math.isfinite(norm) else share, omit)


# longer than a run, wider than the lanes, narrow; whole arrays, rows, columns and mixed axes
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((2 * loops.RUN + 5,), (0,)),
        ((3, loops.RUN + 1), (1,)),
        ((loops.ROWS + 3, loops.LANES + 7), (0,)),
        ((999, 2), (0,)),
        ((35, 60), (0,)),
        ((4, 50, 30), (1,)),
        ((4, 50, 30), (0, 2)),
        ((20, 3, 20), (0, 2)),
        ((4, 20, 3, 20), (1, 3)),
    ],
)
@pytest.mark.parametrize("spread", [0, 2, 30, 60, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_every_form(shape, axes, spread, dtype):
    rng = np.random.default_rng(0)
    x = random_values(rng, (*shape, 2), dtype, spread)
    x = x.view(dtype)[..., 0] if dtype.kind == "c" else x[..., 0].copy()
    # complex columns, and more groups of axes than two by two, are left to NumPy
    columns = axes != tuple(range(x.ndim)) and x.ndim - 1 not in axes
    assert_sums(x, axes, used=axes != (1, 3) and not (columns and dtype.kind == "c"))


def random_values(rng, shape, dtype, spread):
    real = np.dtype(f"f{dtype.itemsize // (2 if dtype.kind == 'c' else 1)}")
    info = np.finfo(real)
    lowest, highest = info.minexp - info.nmant, info.maxexp - 1
    exponent = np.clip(rng.integers(-spread, spread, shape, endpoint=True), lowest, highest)
    return np.ldexp(rng.uniform(-1, 1, shape), exponent).astype(real)


def special(dtype):
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
        "largest mantissas": np.ldexp(2.0 - float(info.eps), np.arange(-60, 60)),
        "nan": [math.nan, 1.0, 2.0, 3.0],
        "one nan": [math.nan] + [1.0] * 99,
        "inf": [math.inf, 1.0, -math.inf, tiny],
        "nan and inf": [math.nan, -math.inf, 3.0, 0.0, tiny],
    }


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("name", list(special("f4")))
@pytest.mark.parametrize("omit", [False, True])
def test_special_values(name, dtype, omit):
    values = np.resize(np.asarray(special(dtype)[name], dtype), 6000)
    for x, axes in (
        (values, (0,)),
        (values.reshape(60, 100), (1,)),
        (values.reshape(60, 100), (0,)),
        (values.reshape(3000, 2), (0,)),
    ):
        assert_sums(x, axes, omit)
        for limit in (0.0, 1e-45, 1.0, 1e30, math.inf, math.nan):
            assert_clipped(x, axes, limit, omit)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "c8", "c16"])
@pytest.mark.parametrize("shape", [(), (0,), (0, 50), (50, 0), (1,)])
def test_empty_and_single(shape, dtype):
    x = np.full(shape, 3, dtype)
    for axes in ((), tuple(range(len(shape)))):
        assert_sums(x, axes, used=False)
        assert_clipped(x, axes, 2.0)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("axis", [0, 1])
def test_more_slices_than_fit_at_a_time(axis, dtype):
    x = np.ones((16, SLICES + 50), dtype)
    x *= np.float32(2.0) ** (np.arange(x.shape[1]) // 1000 * 8)
    x = x if axis == 0 else np.ascontiguousarray(x.T)
    assert_sums(x, (axis,))
    assert_sums(np.zeros_like(x), (axis,))
    assert_clipped(x, (axis,), 100.0)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_read_only_and_parts_of_arrays(dtype):
    x = np.random.default_rng(0).standard_normal((70, 90)).astype(dtype)
    x.flags.writeable = False
    for part in (x, x[3:, 5:], x[::2], x[:, 1:80]):
        for axes in ((0,), (1,), (0, 1)):
            assert_sums(part, axes)
            assert_clipped(part, axes, 2.0)


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
def test_rows_whose_norm_100_bits_do_not_round(odd, beside):
    x = np.tile(row_of_sum((2**53 + odd) ** 2 + beside), (3, 1))
    with compiled(0):
        *_, left = kernels.clip_rows(x, 1.0, (1,), np.empty_like(x))
        assert left.all()
        norms = clip_block(x, 1.0, (1,))[1].norm
    assert is_rounded(norms[0, 0], squares(x, (1,))[0, 0])
    assert_clipped(x, (1,), 1.0)


def test_rows_at_the_limit_are_left():
    x = np.tile(np.float32([3, 4] + [0] * 62), (5, 1))
    out = np.zeros_like(x)
    with compiled(0):
        *_, left = kernels.clip_rows(x, 5.0, (1,), out)
        assert left.all()
        assert not out.any()
    for limit in (math.nextafter(5, 0), 5.0, math.nextafter(5, 9)):
        assert_clipped(x, (1,), limit)


def test_nearly_all_rows_are_decided():
    x = np.random.default_rng(0).standard_normal((20_000, 40)).astype(np.float32)
    with compiled(0):
        *_, left = kernels.clip_rows(x, 5.0, (1,), np.empty_like(x))
    assert np.count_nonzero(left) < 5


def test_other_layouts_are_left_to_numpy():
    x = np.ones((200, 40), np.float32)
    with compiled(0):
        for other in (x[:, ::2], x[::-1], x.astype(">f4"), np.broadcast_to(x[:1], x.shape)):
            assert kernels.partial_norm(other, (1,), False) is None
            assert (
                kernels.clip_rows(other, 1.0, (1,), np.empty_like(x[:, : other.shape[1]])) is None
            )
        factor = np.full((200, 1), 0.5)
        assert not kernels.rescale(x.reshape(-1)[:-40].reshape(199, 40), factor[1:], x[1:])
        assert not kernels.rescale(x, factor, np.empty_like(x, order="F"))
        assert kernels.rescale(x, factor, np.empty_like(x))


@pytest.mark.parametrize("axes", [None, 0, 1])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_threads_change_nothing(dtype, axes):
    x = np.random.default_rng(0).standard_normal((3000, 1001)).astype(dtype)
    assert x.nbytes > numerics.LARGE
    results = []
    for workers in (1, 2, 5):
        with dask.config.set(num_workers=workers):
            results.append(clip_by_norm(x, 3.0, axes, return_norm=True))
    with compiled(math.inf):
        results.append(clip_by_norm(x, 3.0, axes, return_norm=True))
    assert len({(bits(y), bits(n)) for y, n in results}) == 1


PROGRAM = """
import numpy as np
from daskclip import clip_by_norm, kernels, loops
x = np.random.default_rng(0).standard_normal((300, 500)).astype(np.float32)
results = [clip_by_norm(x, 2.0, axes, return_norm=True) for axes in (None, 0, 1)]
kernels.LEAST = 1 << 60
expected = [clip_by_norm(x, 2.0, axes, return_norm=True) for axes in (None, 0, 1)]
for (y, n), (a, b) in zip(results, expected, strict=True):
    assert y.tobytes() == a.tobytes() and n.tobytes() == b.tobytes()
"""


def run(program, folder=None, **environment):
    command = [sys.executable, "-W", "error", "-c", program]
    subprocess.run(command, check=True, cwd=folder, env={**os.environ, **environment})


@pytest.mark.parametrize("dtype", ["f4", "f8", "c8"])
def test_blocks_compile_nothing_after_the_warm_up(dtype):
    run(f"""
import numpy as np
from daskclip import loops, numerics
dtype = np.dtype({dtype!r})
numerics.warm_up(dtype, 1 << 20)
before = {{name: len(loop.signatures) for name, loop in loops.compiled().items()}}
x = np.random.default_rng(0).standard_normal((500, 600)).astype(dtype)
for axes in ((0,), (1,), (0, 1)):
    y, z = x.copy(), x.copy()
    numerics.clip_block(y, 1.0, axes, out=y)
    scale = numerics.finalize(numerics.partial_norm(z, axes), 1.0, dtype)
    assert numerics.rescale(z, scale, z).tobytes() == y.tobytes()
assert before == {{name: len(loop.signatures) for name, loop in loops.compiled().items()}}
""")


def test_without_numba_everything_works():
    block = "import sys\nsys.modules['numba'] = None\n"
    run(block + PROGRAM + "assert not loops.compiled()\n")


@pytest.mark.slow
def test_no_folder_for_compiled_code(tmp_path):
    package = Path(daskclip.__file__).parent
    copied = tmp_path / "daskclip"
    shutil.copytree(package, copied, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in {path.parent for path in copied.rglob("*.py")}:
        (folder / "__pycache__").touch()  # a file in the place of the folder
    where = f"import daskclip\nassert daskclip.__file__.startswith({str(tmp_path)!r})\n"
    nowhere = dict.fromkeys(("HOME", "XDG_CACHE_HOME"), os.devnull)
    ran = "assert loops.compiled()['sums'].stats.cache_path is None\n"
    run(where + PROGRAM + ran, tmp_path, PYTHONPATH=str(tmp_path), **nowhere)
