"""Encode and decode chunks with the codecs of zarr.

Everything runs in the calling thread, one chunk at a time, without an event loop: zarr's own
pipeline decodes chunks concurrently, so that its memory has no bound.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Union

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.codec import ArrayArrayCodec, BytesBytesCodec
from zarr.codecs import BytesCodec, ShardingCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import default_buffer_prototype
from zarr.dtype import UInt64

from daskclip.grid import Box, box_index, boxes, grid_shape
from daskclip.storage.decode_guard import decode_guarded
from daskclip.storage.durable import Data

Array = npt.NDArray[Any]

ABSENT = 2**64 - 1  # offset and length, in a shard's index, of an inner chunk not stored


Codec = Union["_Elements", "_Called", "_Shards"]
"""One step from values to bytes, and back.

``decode(x, out)`` returns ``out`` if it has filled it, else something new.
"""


class Chain(NamedTuple):
    """The codecs of chunks of one shape."""

    shape: tuple[int, ...]
    """Shape of a chunk."""
    fill: Array
    """Fill value; 0-d."""
    codecs: tuple[Codec, ...]
    """In the order of encoding."""


def chain(array: zarr.Array[Any]) -> Chain:
    """Codecs of the objects that an array is stored in: shards, else chunks."""
    metadata: Any = array.metadata
    fill = np.zeros((), array.dtype)
    if array.fill_value is not None:
        fill[()] = array.fill_value
    if metadata.zarr_format == 2:
        limit = max_decoded_nbytes(array.chunks, array.dtype)
        used = [*(metadata.filters or ()), metadata.compressor]
        elements = _Elements(array.chunks, array.dtype, metadata.order)
        return Chain(array.chunks, fill, (elements, *(_plain(c, limit) for c in used if c)))
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
            # a transposition before it has changed the shape of the chunk
            steps.append(_Elements(spec.shape, fill.dtype.newbyteorder(order or "|"), "C"))
            continue
        # zarr's wrapper of a codec of numcodecs has asynchronous methods only
        plain = getattr(codec, "_codec", None)
        steps.append(_plain(plain, limit) if plain else _of_zarr(codec, spec, limit))
        spec = codec.resolve_metadata(spec)
    return Chain(shape, fill, tuple(steps))


def encode(chain: Chain, values: Array) -> Data | None:
    """Encode a chunk, which may be cut off at the edge of its array; None if it is all fill."""
    if _is_fill(values, chain.fill):
        return None
    x: Data = values
    if values.shape != chain.shape:
        # zarr stores whole chunks, with the fill value beyond the edge
        x = np.full(chain.shape, chain.fill)
        x[tuple(slice(n) for n in values.shape)] = values
    for codec in chain.codecs:
        x = codec.encode(x)
    return x


def decode(chain: Chain, data: Data, out: Array) -> None:
    """Decode a chunk into ``out``, which may be cut off at the edge of its array."""
    x, (first, *rest) = data, chain.codecs
    buffer = out if out.shape == chain.shape else None
    if rest:
        # the second codec decodes to the bytes of the values: straight into their memory
        memory = first.buffer(buffer) if isinstance(first, _Elements) else None
        for codec in rest[:0:-1]:
            x = codec.decode(x, None)
        x = rest[0].decode(x, memory)
    if x is not out:
        x = first.decode(x, buffer)
    if x is not out:
        values = np.reshape(x, chain.shape)  # pcodec decodes to one dimension
        out[...] = values[box_index(tuple(slice(n) for n in out.shape))]


def memory_of(chain: Chain, parts: list[Array]) -> list[npt.NDArray[np.uint8] | None]:
    """The memory of each chunk, as bytes, if a chunk is stored as just these bytes, else None."""
    first, *rest = chain.codecs
    if rest or not isinstance(first, _Elements):
        return [None] * len(parts)
    whole = (x if x.shape == chain.shape and first.buffer(x) is x else None for x in parts)
    return [None if x is None else x.reshape(-1).view(np.uint8) for x in whole]


def codec_name(name: str) -> str:
    """Name of a codec without the prefix of its library."""
    return name.removeprefix("numcodecs.")


def _memory(data: Any) -> memoryview:
    """The memory of bytes or of an array, byte by byte."""
    return memoryview(data).cast("B")


def max_decoded_nbytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Bytes that any codec of a chain may decode to."""
    # the codecs before it may have added to the bytes of the values, but never this much
    return 2 * math.prod(shape) * dtype.itemsize + 4096


def _is_fill(values: Array, fill: Array) -> bool:
    """Whether all elements equal the fill value bit for bit."""
    # bytes are compared: -0.0 == 0.0, and NaN does not equal a fill value of NaN
    if not values.size:
        return True
    # nearly all chunks of data differ in their first or last element
    ends = values[(0,) * values.ndim], values[(-1,) * values.ndim]
    if any(end.tobytes() != fill.tobytes() for end in ends):
        return False
    return values.tobytes() == fill.tobytes() * values.size


@dataclass(frozen=True)
class _Elements:
    """Values as bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: Any

    def encode(self, x: Data) -> Array:
        # a view, if the values have that order and byte order already
        return np.asarray(x, self.dtype).ravel(self.order).view(np.uint8)

    def decode(self, x: Data, out: Array | None) -> Array:
        return np.frombuffer(x, self.dtype).reshape(self.shape, order=self.order)

    def buffer(self, x: Array | None) -> Array:
        """Memory for the bytes of a chunk: ``x`` itself if it has them in the same order."""
        if x is not None and (self.order, self.dtype) == ("C", x.dtype) and x.flags.c_contiguous:
            return x
        return np.empty(self.shape, self.dtype)


@dataclass(frozen=True)
class _Called:
    """A codec of a library, by its two functions."""

    name: str
    limit: int | None
    """Bytes that it may decode to; None for a codec from values to values."""
    encoding: Callable[[Data], Data]
    decoding: Callable[[Data], Data]

    def encode(self, x: Data) -> Data:
        encoded = self.encoding(x)
        if self.name == "gzip":
            # without its timestamp, equal values are encoded to equal bytes
            encoded = np.array(np.frombuffer(encoded, np.uint8))
            encoded[4:8] = 0
        return encoded

    def decode(self, x: Data, out: Array | None) -> Data:
        if self.limit is None:
            return self.decoding(x)
        return decode_guarded(self.name, _memory(x), self.limit, self.decoding, out)


def _plain(codec: Any, limit: int) -> _Called:
    """A codec of numcodecs."""
    return _Called(codec.codec_id, limit, codec.encode, codec.decode)


def _of_zarr(codec: Any, spec: ArraySpec, limit: int) -> _Called:
    """A codec of zarr, called by its synchronous methods."""
    name = codec_name(codec.to_dict()["name"])
    to_values = isinstance(codec, ArrayArrayCodec)
    encoding = _synchronous(codec._encode_sync, spec, not isinstance(codec, BytesBytesCodec))
    decoding = _synchronous(codec._decode_sync, spec, to_values)
    return _Called(name, None if to_values else limit, encoding, decoding)


def _synchronous(method: Any, spec: ArraySpec, of_values: bool) -> Callable[[Data], Array]:
    kinds: Any = spec.prototype
    wrap = kinds.nd_buffer.from_ndarray_like if of_values else kinds.buffer.from_array_like

    def call(x: Data) -> Array:
        # asarray would make a scalar of bytes, which some codecs of numcodecs return
        array = x if isinstance(x, np.ndarray) else np.frombuffer(x, np.uint8)
        made: Array = method(wrap(array), spec).as_numpy_array()
        return made

    return call


@dataclass(frozen=True)
class _Shards:
    """Many chunks in one object, with an index of their offsets and sizes."""

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
        # not None: a shard of which no chunk is stored is all fill, and is not encoded
        index = _memory(encode(self.index, entries))
        parts.insert(0 if self.index_first else len(parts), index)
        return np.frombuffer(b"".join(parts), np.uint8)

    def decode(self, x: Data, out: Array | None) -> Array:
        x = _memory(x)
        at = slice(self.index_size) if self.index_first else slice(-self.index_size, None)
        entries = np.empty(self.index.shape, np.uint64)
        decode(self.index, x[at], entries)
        values = np.empty(self.shape, self.inner.fill.dtype) if out is None else out
        spans = entries.reshape(-1, 2).tolist()
        for (start, size), inside in zip(spans, self._boxes(), strict=True):
            part = values[box_index(inside)]
            if (start, size) == (ABSENT, ABSENT):
                part[...] = self.inner.fill
            elif start + size > len(x):
                # a slice beyond the end would be shorter, and some codecs decode that
                raise ValueError(f"its index leads beyond its {len(x)} bytes")
            else:
                decode(self.inner, x[start : start + size], part)
        return values

    def _boxes(self) -> Iterator[Box]:
        return boxes(self.shape, self.inner.shape)


def _shards(codec: ShardingCodec, spec: ArraySpec, fill: Array) -> _Shards:
    inner_shape = codec.chunk_shape
    inner = _chain(codec.codecs, replace(spec, shape=inner_shape), fill)
    inside = grid_shape(spec.shape, inner_shape)
    entries = replace(spec, shape=(*inside, 2), dtype=UInt64(), fill_value=np.uint64(ABSENT))
    size = 16 * math.prod(inside)
    # the index has no length in the shard: zarr computes it from the codecs too
    for step in codec.index_codecs:
        size = step.compute_encoded_size(size, entries)
    index_chain = _chain(codec.index_codecs, entries, np.array(ABSENT, np.uint64))
    configuration: Any = codec.to_dict()["configuration"]
    first = configuration["index_location"] == "start"
    return _Shards(inner, index_chain, size, first, spec.shape)
