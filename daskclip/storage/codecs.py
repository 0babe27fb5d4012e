"""Encode and decode chunks with the codecs of zarr.

Everything runs in the calling thread, one chunk at a time, without an event loop: zarr's own
pipeline decodes chunks concurrently, so that its memory has no bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from zarr.abc.codec import ArrayArrayCodec, BytesBytesCodec
from zarr.codecs import BytesCodec, ShardingCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import default_buffer_prototype
from zarr.dtype import UInt64

from daskclip.grid import Box, box_index, boxes, grid_shape
from daskclip.storage.decode_guard import decode_guarded

if TYPE_CHECKING:
    import zarr

    from daskclip.storage.durable import Data

Array = npt.NDArray[Any]

ABSENT = 2**64 - 1  # offset and length, in a shard's index, of an inner chunk not stored


class Codec(Protocol):
    """One step from values to bytes, and back."""

    def encode(self, x: Data) -> Data: ...
    def decode(self, x: Data, out: Array | None) -> Data:
        """Decode ``x``; returns ``out`` if it was filled, else something new."""


class Chain(NamedTuple):
    """The codecs of chunks of one shape."""

    shape: tuple[int, ...]
    """Shape of a chunk."""
    fill: Array
    """Fill value; 0-d."""
    codecs: tuple[Codec, ...]
    """In the order of encoding."""


def chain(array: zarr.Array[Any]) -> Chain:
    """Codecs of what is stored as one object of an array: shards, else chunks."""
    metadata: Any = array.metadata
    fill = np.zeros((), array.dtype)
    if array.fill_value is not None:
        fill[()] = array.fill_value
    if metadata.zarr_format == 2:
        limit = max_decoded_nbytes(array.chunks, array.dtype)
        used = [*(metadata.filters or ()), metadata.compressor]
        elements = _Elements(array.chunks, array.dtype, metadata.order)
        return Chain(array.chunks, fill, (elements, *(_Plain(c, limit) for c in used if c)))
    spec = ArraySpec(
        shape=array.shards or array.chunks,
        dtype=metadata.data_type,
        fill_value=metadata.fill_value,
        config=array.async_array.config,
        prototype=default_buffer_prototype(),
    )
    return _chain(metadata.codecs, spec, fill)


def _chain(codecs: Iterable[Any], spec: ArraySpec, fill: Array) -> Chain:
    shape, limit = spec.shape, max_decoded_nbytes(spec.shape, fill.dtype)
    steps: list[Codec] = []
    for codec in codecs:
        if isinstance(codec, ShardingCodec):
            steps.append(_shards(codec, spec, fill))
            continue
        codec = codec.evolve_from_array_spec(spec)
        if isinstance(codec, BytesCodec):
            order: Any = getattr(codec.endian, "value", codec.endian)
            steps.append(_Elements(spec.shape, fill.dtype.newbyteorder(order), "C"))
        elif hasattr(codec, "_codec"):  # zarr's wrapper of a codec of numcodecs is asynchronous
            steps.append(_Plain(codec._codec, limit))
            spec = codec.resolve_metadata(spec)
        else:
            steps.append(_Zarr(codec, codec_name(str(codec.to_dict()["name"])), spec, limit))
            spec = codec.resolve_metadata(spec)
    return Chain(shape, fill, tuple(steps))


def encode(chain: Chain, values: Array) -> Data | None:
    """Encode a chunk, which may be cut off at the edge of its array; None if it is all fill."""
    if _is_fill(values, chain.fill):
        return None
    x = values
    if x.shape != chain.shape:
        x = np.full(chain.shape, chain.fill)
        x[box_index(tuple(slice(n) for n in values.shape))] = values
    return _encode_through(chain.codecs, x)


def _encode_through(codecs: tuple[Codec, ...], x: Data) -> Data:
    for codec in codecs:
        x = codec.encode(x)
    return x


def decode(chain: Chain, data: Data, out: Array) -> None:
    """Decode a chunk into ``out``, which may be cut off at the edge of its array."""
    x = data
    for i, codec in reversed([*enumerate(chain.codecs)]):
        buffer = out if out.shape == chain.shape else None
        first = chain.codecs[0]
        # what the codec before decodes to are the bytes of the values: straight into their memory
        if i == 1 and isinstance(first, _Elements):
            buffer = first.buffer(buffer)
        x = codec.decode(x, buffer if i < 2 else None)
        if x is out:
            return
    values = np.reshape(x, chain.shape)  # pcodec decodes to one dimension
    out[...] = values[box_index(tuple(slice(n) for n in out.shape))]


def stored_bytes(chain: Chain, x: Array) -> npt.NDArray[np.uint8] | None:
    """The memory of ``x`` as bytes if a chunk is stored as just these bytes, else None."""
    first, *rest = chain.codecs
    if not isinstance(first, _Elements) or rest or x.shape != chain.shape or not x.size:
        return None
    return x.reshape(-1).view(np.uint8) if first.buffer(x) is x else None


def codec_name(name: str) -> str:
    """Name of a codec without the prefix of its library."""
    return name.removeprefix("numcodecs.")


def _memory(data: Any) -> memoryview:
    """The memory of bytes or of an array, byte by byte."""
    return memoryview(data).cast("B")


def max_decoded_nbytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Bytes, at most, that any codec of a chain decodes to: inner codecs add little."""
    return 2 * math.prod(shape) * dtype.itemsize + 4096


def _is_fill(values: Array, fill: Array) -> bool:
    """Whether all elements equal the fill value bit for bit: -0.0 and NaN do not equal 0."""
    if not values.size:
        return True
    # nearly all chunks of data differ in their first or last element
    ends = values[(0,) * values.ndim], values[(-1,) * values.ndim]
    if any(end.tobytes() != fill.tobytes() for end in ends):
        return False
    return values.tobytes() == fill.tobytes() * values.size


def _without_time(name: str, data: Data) -> Data:
    """Zero gzip's timestamp, so that equal values are encoded to equal bytes."""
    if name != "gzip":
        return data
    encoded = np.array(np.frombuffer(data, np.uint8))
    encoded[4:8] = 0
    return encoded


@dataclass(frozen=True)
class _Elements:
    """Values as bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: Any

    def encode(self, x: Data) -> Array:
        return np.asarray(x, self.dtype).ravel(self.order).view(np.uint8)

    def decode(self, x: Data, out: Array | None) -> Array:
        return np.frombuffer(x, self.dtype).reshape(self.shape, order=self.order)

    def buffer(self, x: Array | None) -> Array:
        """Memory to decode a chunk's bytes into; ``x`` itself if its values are these bytes."""
        if x is not None and (self.order, self.dtype) == ("C", x.dtype) and x.flags.c_contiguous:
            return x
        return np.empty(self.shape, self.dtype)


@dataclass(frozen=True)
class _Plain:
    """A codec of numcodecs."""

    codec: Any
    limit: int

    def encode(self, x: Data) -> Data:
        return _without_time(self.codec.codec_id, self.codec.encode(x))

    def decode(self, x: Data, out: Array | None) -> Data:
        data = _memory(x)
        return decode_guarded(self.codec.codec_id, data, self.limit, self.codec.decode, out)


@dataclass(frozen=True)
class _Zarr:
    """A codec of zarr, called by its synchronous methods."""

    codec: Any
    name: str
    spec: ArraySpec
    limit: int

    def encode(self, x: Data) -> Data:
        values = not isinstance(self.codec, BytesBytesCodec)
        return _without_time(self.name, self._run("_encode_sync", values, x))

    def decode(self, x: Data, out: Array | None) -> Data:
        if isinstance(self.codec, ArrayArrayCodec):
            return self._run("_decode_sync", True, x)
        run = partial(self._run, "_decode_sync", False)
        return decode_guarded(self.name, _memory(x), self.limit, run, out)

    def _run(self, method: str, values: bool, x: Data) -> Array:
        # some codecs of numcodecs give bytes
        array = x if isinstance(x, np.ndarray) else np.frombuffer(x, np.uint8)
        prototype = self.spec.prototype
        buffer: Any = prototype.nd_buffer if values else prototype.buffer
        wrapped = buffer.from_ndarray_like(array) if values else buffer.from_array_like(array)
        made = getattr(self.codec, method)(wrapped, self.spec)
        result: Array = made.as_numpy_array()
        return result


@dataclass(frozen=True)
class _Shards:
    """Many chunks in one object, with an index of where they are."""

    inner: Chain
    index: Chain
    index_size: int
    index_first: bool
    shape: tuple[int, ...]

    def encode(self, x: Data) -> Array:
        entries = np.full(self.index.shape, ABSENT, np.uint64)
        parts: list[memoryview] = []
        offset = self.index_size if self.index_first else 0
        values = np.asarray(x)
        for entry, inside in zip(entries.reshape(-1, 2), self._boxes(), strict=True):
            data = encode(self.inner, values[box_index(inside)])
            if data is not None:
                parts.append(_memory(data))
                entry[:] = offset, len(parts[-1])
                offset += len(parts[-1])
        encoded = _memory(_encode_through(self.index.codecs, entries))
        parts.insert(0 if self.index_first else len(parts), encoded)
        return np.frombuffer(b"".join(parts), np.uint8)

    def decode(self, x: Data, out: Array | None) -> Array:
        x = _memory(x)
        at = slice(self.index_size) if self.index_first else slice(-self.index_size, None)
        entries = np.empty(self.index.shape, np.uint64)
        decode(self.index, x[at], entries)
        values = np.empty(self.shape, self.inner.fill.dtype) if out is None else out
        spans = entries.reshape(-1, 2).tolist()
        for (start, size), inside in zip(spans, self._boxes(), strict=True):
            if (start, size) == (ABSENT, ABSENT):
                values[box_index(inside)] = self.inner.fill
            elif start + size > len(x):
                raise ValueError(f"its index leads beyond its {len(x)} bytes")
            else:
                decode(self.inner, x[start : start + size], values[box_index(inside)])
        return values

    def _boxes(self) -> Iterator[Box]:
        return boxes(self.shape, self.inner.shape)


def _shards(codec: ShardingCodec, spec: ArraySpec, fill: Array) -> _Shards:
    inner_shape = codec.chunk_shape
    inner = _chain(codec.codecs, replace(spec, shape=inner_shape), fill)
    inside = grid_shape(spec.shape, inner_shape)
    entries = replace(spec, shape=(*inside, 2), dtype=UInt64(), fill_value=np.uint64(ABSENT))
    size = 16 * math.prod(inside)
    for step in codec.index_codecs:
        size = step.compute_encoded_size(size, entries)
    index_chain = _chain(codec.index_codecs, entries, np.array(ABSENT, np.uint64))
    configuration: Any = codec.to_dict()["configuration"]
    first = configuration["index_location"] == "start"
    return _Shards(inner, index_chain, size, first, spec.shape)
