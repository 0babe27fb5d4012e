"""Damaged headers of flat files: refused in one line, or read as by their own libraries."""

import os
import tracemalloc

import numpy as np
import pytest
import zarr
from flat import npy, safetensors
from reference import bits
from servers import missing
from stores import some

from daskclip import clip_by_norm, clip_zarr
from daskclip.errors import DaskClipError

MUTATIONS = 40  # of each of 10 seeds, for both formats
MEMORY = 64 << 20
PIECES = [
    b"'", b'"', b"(", b")", b"[", b"]", b"{", b"}", b",", b":", b"-", b"0", b"9" * 20, b"True",
    b"\\", b"\xff", b"\0", b"e9", b"<f8", b"|O", b">f2", b"V", b"F16", b"BF16", b"F64", b"__",
    b"\n", b"data_offsets", b"shape", b"descr", b"[]", b"()", b"L", b"*", b"#",
]  # fmt: skip


def mutated(data, rng, end):
    """Bytes of which some before ``end`` are changed, removed, doubled, moved or replaced."""
    head, rest = bytearray(data[:end]), data[end:]
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at, n = int(rng.integers(len(head))), int(rng.integers(1, 9))
        match rng.integers(6):
            case 0:
                head[at] ^= 1 << int(rng.integers(8))
            case 1:
                head[at : at + n] = b""
            case 2:
                head[at:at] = head[at : at + n]
            case 3:
                digits = [i for i, byte in enumerate(head) if chr(byte).isdigit()] or [at]
                head[int(rng.choice(digits))] = int(rng.integers(48, 58))
            case _:
                piece = PIECES[int(rng.integers(len(PIECES)))]
                head[at : at + int(rng.integers(len(piece) + 1))] = piece
    data = bytes(head) + rest
    return data[: int(rng.integers(len(data)))] if rng.random() < 0.05 else data


def by_safetensors(path):
    from safetensors.numpy import load_file

    return load_file(path)


def written(target):
    found = zarr.open(target, mode="r")
    return dict(found.arrays()) if isinstance(found, zarr.Group) else {"": found}


def assert_refused_or_right(path, target, load):
    """Returns whether it was clipped; memory is bounded in any case."""
    tracemalloc.start()
    try:
        clip_zarr(path, target, 1.0, memory="128MiB")
    except DaskClipError as error:
        refusal = error
    else:
        refusal = None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY
    if refusal is not None:
        assert refusal.exit_code == 3
        assert "; " in str(refusal)
        assert "\n" not in str(refusal)
        return False
    clipped = written(target)
    for name, x in load(path).items():
        is_clipped = x.dtype.kind in "fc"
        assert bits(clipped[name][...]) == bits(clip_by_norm(x, 1.0) if is_clipped else x)
    return True


@pytest.mark.filterwarnings("ignore:Reading")  # of headers as Python 2 wrote them
@pytest.mark.parametrize("seed", range(10))
def test_mutated_headers_of_npy_files(tmp_path, seed):
    rng, right = np.random.default_rng(seed), 0
    for i in range(MUTATIONS):
        version = (1 + i % 3, 0)
        x = np.asarray(some((5, 6), "f4"), order="CF"[i % 2])
        path = npy(tmp_path / f"{i}.npy", x, version)
        data = path.read_bytes()
        # padding is not mutated too often
        end = data.index(b"}") + 4 if rng.random() < 0.9 else len(data) - x.nbytes
        path.write_bytes(mutated(data, rng, end))
        right += assert_refused_or_right(path, tmp_path / f"{i}", lambda p: {"": np.load(p)})
    assert right < MUTATIONS


@pytest.mark.skipif(bool(missing("safetensors")), reason=missing("safetensors"))
@pytest.mark.parametrize("seed", range(10))
def test_mutated_headers_of_safetensors_files(tmp_path, seed):
    rng, right = np.random.default_rng(seed), 0
    for i in range(MUTATIONS):
        x = {"a": some((5, 6), "f4"), "b": some((7,), "f2"), "n": np.arange(5)}
        path = safetensors(tmp_path / f"{i}.safetensors", x, {"format": "np"})
        data = path.read_bytes()
        path.write_bytes(mutated(data, rng, data.index(b"}}") + 2))
        # of a header that was mended, so that its length fits it
        if rng.random() < 0.5 and b"}}" in (data := path.read_bytes()):
            end = data.index(b"}}") + 2
            path.write_bytes((end - 8).to_bytes(8, "little") + data[8:])
        right += assert_refused_or_right(path, tmp_path / f"{i}", by_safetensors)
    assert right < MUTATIONS


@pytest.mark.parametrize("descr", ["0<f4", "<0f4", "(2,)<f4", ("<f4", (2,)), [("a", "<f4")]])
def test_dtypes_with_axes_are_refused(tmp_path, descr):
    path = npy(tmp_path / "x.npy", some((5, 6), "f4"), shape=(5, 3), descr=descr)
    assert not assert_refused_or_right(path, tmp_path / "y", None)


BOMBS = {
    "npy length": ("npy", b"\x93NUMPY\2\0\xf0\xff\xff\xff{"),
    "npy shape": ("npy", b"\x93NUMPY\1\0\x46\0{'descr': '<f4', 'fortran_order': False, "),
    "safetensors length": ("safetensors", (5 << 30).to_bytes(8, "little") + b"{"),
    "safetensors of 16 MiB": ("safetensors", (1 << 24).to_bytes(8, "little") + b"{"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_refused_within_memory(tmp_path, kind):
    name, data = BOMBS[kind]
    path = tmp_path / f"x.{name}"
    path.write_bytes(data)
    os.truncate(path, 6 << 30)  # without blocks
    assert not assert_refused_or_right(path, tmp_path / "y", None)


@pytest.mark.parametrize("value", ["[]", "{}"])
def test_a_header_of_nothing_else_is_refused_within_memory(tmp_path, value):
    header = f'{{"a":[{value}{f",{value}" * 5_000_000}]}}'.encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert not assert_refused_or_right(path, tmp_path / "y", None)
