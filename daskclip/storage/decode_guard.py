"""Encoded chunks: refused where decoding would read or write outside of its memory, or fill it."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any

import numcodecs

# decoders of the standard library take a limit; the others say first how much they will write
STREAMS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(31),
    "zlib": zlib.decompressobj,
    "bz2": bz2.BZ2Decompressor,
    "lzma": lzma.LZMADecompressor,
}
# those of numcodecs that can put what they decode where it is wanted
INTO = {"blosc": numcodecs.Blosc(), "zstd": numcodecs.Zstd()}
ZSTD_BLOCK = 1 << 17  # bytes, at most, of a block in a frame that does not say its size


def decoded(codec: str, data: Any, limit: int, decode: Callable[..., Any], out: Any) -> Any:
    """What ``decode`` gives; refused if it would be more than ``limit`` bytes or kill the process.

    It is put into ``out`` and returned as such, where it is known to fill ``out``.
    """
    if codec in STREAMS:
        return _stream(codec, data, limit)
    size = _size(codec, data, limit)
    if out is None or size != out.nbytes or codec not in INTO:
        return decode(data)
    INTO[codec].decode(data, out)
    return out


def _stream(codec: str, data: Any, limit: int) -> bytes:
    """Decode to ``limit`` bytes at most."""
    decoder = STREAMS[codec]()
    decoded: bytes = decoder.decompress(data, limit + 1)
    if len(decoded) <= limit and not decoder.eof:
        raise ValueError(f"its {codec} stream ends too early")
    _require(len(decoded), limit)
    return decoded


def _size(codec: str, data: Any, limit: int) -> int | None:
    """Bytes that ``data`` decodes to, where it says so.

    Refuses what would be larger, or would make the decoder leave its memory.
    """
    size, most = None, 0
    if codec == "blosc":
        # a length that is wrong makes it read beyond the end, which kills the process
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


def _integer(data: Any) -> int:
    return int.from_bytes(bytes(data), "little")


def _zstd_size(data: Any) -> tuple[int | None, int]:
    """Bytes that frames decode to (RFC 8878, section 3.1), if all say so, and at most."""
    total = at = 0
    said = True
    while at < len(data):
        magic, flags = _integer(data[at : at + 4]), _integer(data[at + 4 : at + 5])
        if magic & ~15 == 0x184D2A50:  # a frame to be skipped
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
