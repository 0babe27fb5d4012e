"""Encoded chunks: refused where decoding would read or write outside of its memory, or fill it."""

from __future__ import annotations

import asyncio
import bz2
import lzma
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import zarr
from numcodecs.abc import Codec
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import ShardingCodec

# decoders of the standard library take a limit; the others say first how much they will write
STREAMS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(31),
    "zlib": zlib.decompressobj,
    "bz2": bz2.BZ2Decompressor,
    "lzma": lzma.LZMADecompressor,
}
ZSTD_BLOCK = 1 << 17  # bytes, at most, of a block in a frame that does not say its size


def guarded(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """The array, with decoders that refuse what would kill the process or fill its memory."""
    metadata: Any = array.metadata
    if metadata.zarr_format == 2:
        limit = _limit(array.chunks, array.dtype.itemsize)
        inner = metadata.compressor
        filters = [_GuardedV2(f, limit) for f in metadata.filters or ()]
        metadata = replace(
            metadata,
            compressor=_GuardedV2(inner, limit) if inner else None,
            filters=filters or None,
        )
    else:
        metadata = replace(metadata, codecs=_guarded(metadata.codecs))
    config = array._async_array.config
    return zarr.Array(zarr.AsyncArray(metadata, array.store_path, config))


def _guarded(codecs: Any) -> tuple[Any, ...]:
    return tuple(
        _Guarded(c)
        if isinstance(c, BytesBytesCodec)
        else replace(c, codecs=_guarded(c.codecs))
        if isinstance(c, ShardingCodec)
        else c
        for c in codecs
    )


def _limit(shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes that a codec may decode to; those inside of others add little to the elements."""
    return 2 * math.prod(shape) * itemsize + 4096


def codec_name(name: str) -> str:
    """A codec's name without the prefix of its library."""
    return name.removeprefix("numcodecs.")


@dataclass(frozen=True)
class _Guarded(BytesBytesCodec):
    """A codec of format 3 that decodes only what fits its chunk."""

    inner: Any
    is_fixed_size = False

    def to_dict(self) -> Any:
        return self.inner.to_dict()

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        return int(self.inner.compute_encoded_size(input_byte_length, chunk_spec))

    def evolve_from_array_spec(self, array_spec: Any) -> _Guarded:
        return _Guarded(self.inner.evolve_from_array_spec(array_spec))

    async def _decode_single(self, chunk_data: Any, chunk_spec: Any) -> Any:
        limit = _limit(chunk_spec.shape, chunk_spec.dtype.to_native_dtype().itemsize)
        name = codec_name(self.inner.to_dict()["name"])
        data = chunk_data.as_numpy_array().data
        if name in STREAMS:
            decoded = await asyncio.to_thread(_decode, name, data, limit)
            return chunk_spec.prototype.buffer.from_bytes(decoded)
        _check(name, data, limit)
        return await self.inner._decode_single(chunk_data, chunk_spec)

    async def _encode_single(self, chunk_data: Any, chunk_spec: Any) -> Any:
        return await self.inner._encode_single(chunk_data, chunk_spec)


class _GuardedV2(Codec):  # type: ignore[misc]
    """The same for format 2."""

    codec_id = "guarded"

    def __init__(self, inner: Any, limit: int) -> None:
        self.inner, self.limit = inner, limit

    def get_config(self) -> Any:
        return self.inner.get_config()

    def encode(self, buf: Any) -> Any:
        return self.inner.encode(buf)

    def decode(self, buf: Any, out: Any = None) -> Any:
        view = np.frombuffer(buf, np.uint8).data
        name = self.inner.codec_id
        if name in STREAMS:
            return _decode(name, view, self.limit)
        _check(name, view, self.limit)
        return self.inner.decode(buf, out)


def _decode(codec: str, data: Any, limit: int) -> bytes:
    """Decode to ``limit`` bytes at most."""
    decoder = STREAMS[codec]()
    decoded: bytes = decoder.decompress(data, limit + 1)
    if len(decoded) <= limit and not decoder.eof:
        raise ValueError(f"its {codec} stream ends too early")
    _require(len(decoded), limit)
    return decoded


def _check(codec: str, data: Any, limit: int) -> None:
    """Refuse what says that it would be larger, or would make the decoder leave its memory."""
    if codec == "blosc":
        # a length that is wrong makes it read beyond the end, which kills the process
        if len(data) < 16 or _integer(data[12:16]) != len(data):
            raise ValueError(f"its blosc header does not fit its {len(data)} bytes")
        _require(_integer(data[4:8]), limit)
    elif codec == "lz4":
        _require(_integer(data[:4]), limit)
    elif codec == "zstd":
        _require(_zstd_size(data), limit + ZSTD_BLOCK)


def _require(size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(f"it decodes to {size} bytes or more, above the {limit} of a chunk")


def _integer(data: Any) -> int:
    return int.from_bytes(bytes(data), "little")


def _zstd_size(data: Any) -> int:
    """Bytes that frames decode to at most (RFC 8878, section 3.1); not all say their size."""
    total = at = 0
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
        at += 4 * (flags >> 2 & 1)
    return total
