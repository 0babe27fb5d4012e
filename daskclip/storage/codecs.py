"""Chunks as they are stored, to values and back, with the codecs of zarr.

Everything happens in the thread that asks: no event loop, and no more than one chunk at a time.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from zarr.abc.codec import ArrayArrayCodec, BytesBytesCodec
from zarr.codecs import BytesCodec, ShardingCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import default_buffer_prototype
from zarr.dtype import UInt64

from daskclip.grid import box_index, boxes, grid_shape
from daskclip.storage.decode_guard import decoded

Array = npt.NDArray[Any]

ABSENT = 2**64 - 1  # offset and length of an inner chunk that a shard does not hold


class Codec(Protocol):
    """One step from values to bytes, and back."""

    def encode(self, x: Any) -> Any: ...
    def decode(self, x: Any, out: Array | None) -> Any:
        """Returns ``out`` if that could be filled on the way."""


class Chain(NamedTuple):
    """How the chunks of one shape are stored."""

    shape: tuple[int, ...]
    """Shape of a chunk."""
    fill: Array
    """What a chunk that is not stored is full of; 0-d."""
    codecs: tuple[Codec, ...]
    """In the order of encoding."""


def chain(array: Any) -> Chain:
    """How the chunks of an array are stored; the shards, if there are any."""
    metadata: Any = array.metadata
    fill = np.zeros((), array.dtype)
    if array.fill_value is not None:
        fill[()] = array.fill_value
    if metadata.zarr_format == 2:
        limit = _limit(array.chunks, array.dtype)
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


def _chain(codecs: Any, spec: Any, fill: Array) -> Chain:
    shape, limit = spec.shape, _limit(spec.shape, fill.dtype)
    steps: list[Codec] = []
    for codec in codecs:
        if isinstance(codec, ShardingCodec):
            steps.append(_shards(codec, spec, fill))
            continue
        codec = codec.evolve_from_array_spec(spec)
        if isinstance(codec, BytesCodec):
            order: Any = getattr(codec.endian, "value", codec.endian)
            steps.append(_Elements(spec.shape, fill.dtype.newbyteorder(order), "C"))
        else:
            steps.append(_Zarr(codec, codec_name(str(codec.to_dict()["name"])), spec, limit))
            spec = codec.resolve_metadata(spec)
    return Chain(shape, fill, tuple(steps))


def encode(chain: Chain, values: Array) -> Any:
    """Bytes of a chunk that is cut off at the edge of its array or whole; None if all is fill."""
    if _is_fill(values, chain.fill):
        return None
    x = values
    if x.shape != chain.shape:
        x = np.full(chain.shape, chain.fill)
        x[box_index(tuple(slice(n) for n in values.shape))] = values
    return _through(chain.codecs, x)


def _through(codecs: tuple[Codec, ...], x: Any) -> Any:
    for codec in codecs:
        x = codec.encode(x)
    return x


def decode(chain: Chain, data: Any, out: Array) -> None:
    """Put the values of a chunk into ``out``, which may be cut off at the edge of its array."""
    x: Any = data
    for i, codec in reversed([*enumerate(chain.codecs)]):
        room = out if out.shape == chain.shape else None
        first = chain.codecs[0]
        if i == 1 and isinstance(first, _Elements):  # of bytes as they lie in memory
            room = first.room(room)
        x = codec.decode(x, room if i < 2 else None)
        if x is out:
            return
    out[...] = x[box_index(tuple(slice(n) for n in out.shape))]


def elements(chain: Chain, x: Array) -> Array | None:
    """The memory of ``x`` as bytes, if they are what is stored for it."""
    first, *rest = chain.codecs
    if not isinstance(first, _Elements) or rest or x.shape != chain.shape or not x.size:
        return None
    return x.reshape(-1).view(np.uint8) if first.room(x) is x else None


def codec_name(name: str) -> str:
    """A codec's name without the prefix of its library."""
    return name.removeprefix("numcodecs.")


def _limit(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Bytes that a codec may decode to; those inside of others add little to the elements."""
    return 2 * math.prod(shape) * dtype.itemsize + 4096


def _is_fill(values: Array, fill: Array) -> bool:
    """Whether all elements are the fill value to the bit: -0.0 and any NaN are values."""
    if not values.size:
        return True
    ends = values[(0,) * values.ndim], values[(-1,) * values.ndim]
    if any(end.tobytes() != fill.tobytes() for end in ends):
        return False
    return values.tobytes() == fill.tobytes() * values.size


def _timeless(name: str, data: Any) -> Any:
    """What a codec has made, but for the second of doing so: the same values are the same bytes."""
    if name != "gzip":
        return data
    made = np.array(np.frombuffer(data, np.uint8))
    made[4:8] = 0
    return made


@dataclass(frozen=True)
class _Elements:
    """Values as bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: Any

    def encode(self, x: Array) -> Array:
        return np.asarray(x, self.dtype).ravel(self.order).view(np.uint8)

    def decode(self, x: Any, out: Array | None) -> Array:
        return np.frombuffer(x, self.dtype).reshape(self.shape, order=self.order)

    def room(self, x: Array | None) -> Array:
        """Memory for the bytes of a chunk; that of ``x`` if they would lie there as values."""
        if x is not None and (self.order, self.dtype) == ("C", x.dtype) and x.flags.c_contiguous:
            return x
        return np.empty(self.shape, self.dtype)


@dataclass(frozen=True)
class _Plain:
    """A codec of format 2."""

    codec: Any
    limit: int

    def encode(self, x: Any) -> Any:
        return _timeless(self.codec.codec_id, self.codec.encode(x))

    def decode(self, x: Any, out: Array | None) -> Any:
        data = memoryview(x).cast("B")
        return decoded(self.codec.codec_id, data, self.limit, self.codec.decode, out)


@dataclass(frozen=True)
class _Zarr:
    """A codec of format 3."""

    codec: Any
    name: str
    spec: Any
    limit: int

    def encode(self, x: Array) -> Any:
        values = not isinstance(self.codec, BytesBytesCodec)
        return _timeless(self.name, self._run("_encode", values, x))

    def decode(self, x: Any, out: Array | None) -> Any:
        if isinstance(self.codec, ArrayArrayCodec):
            return self._run("_decode", True, x)
        run = partial(self._run, "_decode", False)
        data = np.frombuffer(x, np.uint8)
        if not isinstance(self.codec, BytesBytesCodec):
            return run(data)
        return decoded(self.name, data.data, self.limit, run, out)

    def _run(self, name: str, values: bool, x: Any) -> Array:
        prototype = self.spec.prototype
        buffer = prototype.nd_buffer if values else prototype.buffer
        wrapped = buffer.from_ndarray_like(x) if values else buffer.from_array_like(np.asarray(x))
        at_once = getattr(self.codec, f"{name}_sync", None)  # newer codecs have it
        made = (
            at_once(wrapped, self.spec)
            if at_once
            else _now(getattr(self.codec, f"{name}_single")(wrapped, self.spec))
        )
        array: Array = made.as_numpy_array()
        return array


@dataclass(frozen=True)
class _Shards:
    """Many chunks in one object, with an index of where they are."""

    inner: Chain
    index: Chain
    index_size: int
    index_first: bool
    shape: tuple[int, ...]

    def encode(self, x: Array) -> Any:
        where = np.full(self.index.shape, ABSENT, np.uint64)
        parts: list[Any] = []
        at = self.index_size if self.index_first else 0
        for cell, inside in zip(where.reshape(-1, 2), self._cells(), strict=True):
            data = encode(self.inner, x[box_index(inside)])
            if data is not None:
                parts.append(memoryview(data).cast("B"))
                cell[:] = at, len(parts[-1])
                at += len(parts[-1])
        parts.insert(0 if self.index_first else len(parts), _through(self.index.codecs, where))
        return np.frombuffer(b"".join(parts), np.uint8)

    def decode(self, x: Any, out: Array | None) -> Array:
        x = memoryview(x).cast("B")
        at = slice(self.index_size) if self.index_first else slice(-self.index_size, None)
        where = np.empty(self.index.shape, np.uint64)
        decode(self.index, x[at], where)
        values = np.empty(self.shape, self.inner.fill.dtype) if out is None else out
        for (start, size), inside in zip(where.reshape(-1, 2).tolist(), self._cells(), strict=True):
            if (start, size) == (ABSENT, ABSENT):
                values[box_index(inside)] = self.inner.fill
            elif start + size > len(x):
                raise ValueError(f"its index leads beyond its {len(x)} bytes")
            else:
                decode(self.inner, x[start : start + size], values[box_index(inside)])
        return values

    def _cells(self) -> Any:
        return boxes(self.shape, self.inner.shape)


def _shards(codec: Any, spec: Any, fill: Array) -> _Shards:
    inner = _chain(codec.codecs, replace(spec, shape=codec.chunk_shape), fill)
    size = 16 * math.prod(grid_shape(spec.shape, codec.chunk_shape))
    cells = replace(
        spec,
        shape=(*grid_shape(spec.shape, codec.chunk_shape), 2),
        dtype=UInt64(),
        fill_value=np.uint64(ABSENT),
    )
    where = _chain(codec.index_codecs, cells, np.array(ABSENT, np.uint64))
    for step in codec.index_codecs:
        size = step.compute_encoded_size(size, cells)
    first = codec.to_dict()["configuration"]["index_location"] == "start"
    return _Shards(inner, where, size, first, spec.shape)


class _Here:
    """Stands in for a running loop: what would go to another thread is done in this one."""

    async def run_in_executor(self, executor: Any, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


_HERE: Any = _Here()


def _now(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Result of a coroutine that waits for nothing but other threads."""
    outer = asyncio._get_running_loop()
    asyncio._set_running_loop(_HERE)
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    finally:
        asyncio._set_running_loop(outer)
        coroutine.close()
    raise RuntimeError("a codec waits for something else than a thread")
