"""Refuse encoded chunks whose decoding would exceed a size, or crash the process."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numcodecs

if TYPE_CHECKING:
    import numpy.typing as npt

    from daskclip.storage.durable import Data

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
    size = _size(codec, data, limit)
    if out is None or size != out.nbytes or codec not in INTO:
        return decode(data)
    INTO[codec].decode(data, out)
    return out


def _stream(codec: str, data: memoryview, limit: int) -> bytes:
    """Decode at most ``limit`` bytes."""
    decoder = STREAMS[codec]()
    decoded: bytes = decoder.decompress(data, limit + 1)
    if len(decoded) <= limit and not decoder.eof:
        raise ValueError(f"its {codec} stream ends too early")
    _require(len(decoded), limit)
    return decoded


def _size(codec: str, data: memoryview, limit: int) -> int | None:
    """Declared decoded size in bytes, or None; refuses too large and inconsistent ones."""
    size, most = None, 0
    if codec == "blosc":
        # the decoder trusts the length, reads beyond the end, and crashes the process
        if len(data) < 16 or _integer(data[12:16]) != len(data):
            raise ValueError(f"its blosc header does not fit its {len(data)} bytes")
        size = most = _integer(data[4:8])
    elif codec == "lz4":
        size = most = _integer(data[:4])
    elif codec == "zstd":
        size, most = _zstd_size(data)
    _require(most, limit + ZSTD_BLOCK)
    return size


def _require(size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(f"it decodes to {size} bytes or more, above the {limit} of a chunk")


def _integer(data: memoryview) -> int:
    return int.from_bytes(bytes(data), "little")


def _zstd_size(data: memoryview) -> tuple[int | None, int]:
    """Decoded size of zstd frames (RFC 8878, section 3.1): exact if declared, and at most."""
    total = at = 0
    said = True
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
        said = said and width > 0
        at += 4 * (flags >> 2 & 1)
    return (total if said else None), total
