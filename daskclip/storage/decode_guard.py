"""Refuse encoded chunks whose decoding would exceed a size, or crash the process."""

import bz2
import lzma
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numcodecs
import numpy as np
import numpy.typing as npt

from daskclip.storage.durable import Data

Sizes = tuple[int | None, int]
"""Decoded size in bytes, or None if it is not declared; and an upper bound for it."""

# these decoders can stop at a limit; the other formats declare their decoded size in the header
STREAMS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(31),
    "zlib": zlib.decompressobj,
    "bz2": bz2.BZ2Decompressor,
    "lzma": lzma.LZMADecompressor,
}
# codecs that can decode into a given buffer
INTO = {"blosc": numcodecs.Blosc(), "zstd": numcodecs.Zstd()}
ZSTD_BLOCK = 1 << 17  # largest decoded block (RFC 8878, section 3.1.1.2.4)

_integer = partial(int.from_bytes, byteorder="little")


def decode_guarded(
    codec: str,
    data: memoryview,
    limit: int,
    decode: Callable[[memoryview], Data],
    out: npt.NDArray[Any] | None,
) -> Data:
    """Decode a chunk safely.

    Parameters
    ----------
    codec : str
        Name of the codec, without the prefix of its library.
    data : memoryview
        Encoded bytes.
    limit : int
        Decoded bytes, at most; more raise ValueError.
    decode : callable
        Decodes ``data``, for codecs that have no better way here.
    out : ndarray or None
        Filled and returned if the codec can decode into it and the decoded size is known to fit.

    Returns
    -------
    bytes or ndarray
    """
    if codec in STREAMS:
        return _stream(codec, data, limit)
    size, most = SIZES[codec](data) if codec in SIZES else (None, 0)
    # without a declared size, the bound is that of whole blocks
    if most > limit + ZSTD_BLOCK:
        raise ValueError(TOO_LARGE.format(most, limit + ZSTD_BLOCK))
    if out is None or size != out.nbytes or codec not in INTO:
        return decode(data)
    # as bytes: buffers of Python have no bfloat16
    INTO[codec].decode(data, out.reshape(-1).view(np.uint8))
    return out


def _stream(codec: str, data: memoryview, limit: int) -> bytes:
    """Decode at most ``limit`` bytes."""
    decoder = STREAMS[codec]()
    decoded: bytes = decoder.decompress(data, limit + 1)
    if len(decoded) <= limit and not decoder.eof:
        raise ValueError(f"its {codec} stream ends too early")
    if len(decoded) > limit:
        raise ValueError(TOO_LARGE.format(len(decoded), limit))
    return decoded


def _blosc_size(data: memoryview) -> Sizes:
    # the decoder trusts the length, reads beyond the end, and crashes the process
    if len(data) < 16 or _integer(data[12:16]) != len(data):
        raise ValueError(f"its blosc header does not fit its {len(data)} bytes")
    size = _integer(data[4:8])
    return size, size


def _lz4_size(data: memoryview) -> Sizes:
    size = _integer(data[:4])
    return size, size


def _zstd_size(data: memoryview) -> Sizes:
    # the headers of all frames and blocks (RFC 8878, section 3.1)
    total = at = 0
    is_declared = True
    while at < len(data):
        magic, flags = _integer(data[at : at + 4]), _integer(data[at + 4 : at + 5])
        if magic & ~15 == 0x184D2A50:  # a skippable frame
            at += 8 + _integer(data[at + 4 : at + 8])
            continue
        if magic != 0xFD2FB528:
            raise ValueError("it is not a zstd frame")
        single = flags >> 5 & 1
        width = (single, 2, 4, 8)[flags >> 6]
        at += 6 - single + (0, 1, 2, 4)[flags & 3]
        declared = _integer(data[at : at + width]) + (256 if width == 2 else 0)
        at += width
        last = blocks = 0
        while not last and at < len(data):
            header = _integer(data[at : at + 3])
            last, kind, size = header & 1, header >> 1 & 3, header >> 3
            at += 3 + (1 if kind == 1 else size)
            blocks += 1
        total += declared if width else blocks * ZSTD_BLOCK
        is_declared = is_declared and width > 0
        at += 4 * (flags >> 2 & 1)
    return (total if is_declared else None), total


SIZES = {"blosc": _blosc_size, "lz4": _lz4_size, "zstd": _zstd_size}
TOO_LARGE = "it decodes to {} bytes or more, above the {} of a chunk"
