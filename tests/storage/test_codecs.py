"""Codecs, compared with zarr's own reading and writing, and chunk files of all lengths."""

import gzip
from collections import Counter

import numcodecs
import numpy as np
import pytest
import zarr
from reference import bits
from sizes import resize
from stores import read, some
from zarr.codecs import (
    BloscCodec,
    Crc32cCodec,
    GzipCodec,
    ShardingCodec,
    TransposeCodec,
    ZstdCodec,
)

from daskclip import clip_by_norm, clip_zarr
from daskclip.storage import Hierarchy, StoredArray, durable, files
from daskclip.storage import codecs as chunks

SHAPE, CHUNKS = (37, 50), (8, 10)
STORED = {
    "raw": {"compressors": None},
    "zstd": {},
    "blosc": {"compressors": BloscCodec(cname="lz4")},
    "gzip": {"compressors": GzipCodec()},
    "two codecs": {"compressors": [ZstdCodec(), Crc32cCodec()]},
    "transposed": {"filters": [TransposeCodec(order=(1, 0))]},
    "shards": {"shards": (16, 30)},
    "raw shards": {"shards": (16, 30), "compressors": None},
    "transposed shards": {"shards": (16, 30), "filters": [TransposeCodec(order=(1, 0))]},
    "compressed shards": {
        "shards": {"shape": (16, 30), "index_location": "start"},
        "compressors": BloscCodec(cname="lz4"),
    },
    "format 2": {"zarr_format": 2},
    "format 2, Fortran order": {"zarr_format": 2, "order": "F"},
    "format 2, raw": {"zarr_format": 2, "compressors": None},
}


@pytest.fixture(params=STORED)
def layout(request):
    return STORED[request.param]


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<c8", "<f2"])
def test_what_zarr_wrote_is_read_and_what_is_written_zarr_reads(tmp_path, layout, dtype):
    x = some(SHAPE, dtype)
    x[:8, :10] = 0
    array = zarr.create_array(tmp_path / "x", shape=SHAPE, chunks=CHUNKS, dtype=dtype, **layout)
    array[...] = x
    region = (slice(0, 37), slice(0, 50))
    values = StoredArray(array).read(region, "fill")
    assert bits(values) == bits(read(tmp_path / "x"))
    Hierarchy.open(tmp_path / "x").write_documents(tmp_path / "y")
    made = Hierarchy.open(tmp_path / "y").arrays[""]
    digest = made.write(region, x)
    assert bits(read(tmp_path / "y")) == bits(x)
    assert digest == made.digest(region)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("chunks", [(8, 8), (8, 4)], ids=str)
@pytest.mark.filterwarnings("ignore:Combining a")
def test_shards_behind_a_transposition_are_read_as_zarr_does(tmp_path, chunks):
    x = some((16, 8), "f4")
    array = zarr.create(
        store=str(tmp_path / "x"),
        shape=x.shape,
        chunks=chunks,
        dtype=x.dtype,
        zarr_format=3,
        codecs=[TransposeCodec(order=(1, 0)), ShardingCodec(chunk_shape=(2, 2))],
    )
    array[...] = x
    stored, region = StoredArray(array), (slice(0, 16), slice(0, 8))
    assert bits(stored.read(region)) == bits(x)
    stored.write(region, x)
    assert bits(read(tmp_path / "x")) == bits(x)


def test_chunks_are_encoded_as_by_zarr(tmp_path, layout, monkeypatch):
    monkeypatch.setattr(gzip.time, "time", lambda: 0.0)  # its header holds the time
    x = some(SHAPE, "f4")
    array = zarr.create_array(tmp_path, shape=SHAPE, chunks=CHUNKS, dtype="f4", **layout)
    array[...] = x
    tall, wide = array.shards or array.chunks
    inside = x[tall : 2 * tall, :wide]
    stored = (tmp_path / array.metadata.encode_chunk_key((1, 0))).read_bytes()
    chain = chunks.chain(array)
    encoded = bytes(chunks.encode(chain, inside))
    if not array.shards:  # their chunks may lie in any order
        assert encoded == stored
    out = np.empty_like(inside)
    for data in (encoded, stored):
        chunks.decode(chain, data, out)
        assert bits(out) == bits(inside)
    assert chunks.encode(chain, np.zeros_like(inside)) is None
    assert chunks.encode(chain, np.full_like(inside, -0.0)) is not None


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_what_is_encoded_does_not_tell_the_time(tmp_path, monkeypatch, zarr_format):
    compressor = GzipCodec() if zarr_format == 3 else numcodecs.GZip()
    array = zarr.create_array(
        tmp_path, shape=SHAPE, chunks=CHUNKS, dtype="f4", zarr_format=zarr_format,
        compressors=compressor,
    )  # fmt: skip
    x, how, made = some(CHUNKS, "f4"), chunks.chain(array), []
    for second in (0.0, 1e9):
        monkeypatch.setattr(gzip.time, "time", lambda second=second: second)
        made.append(bytes(chunks.encode(how, x)))
    assert made[0] == made[1]
    out = np.empty_like(x)
    chunks.decode(how, made[0], out)
    assert bits(out) == bits(x)


@pytest.mark.parametrize("offset", [0, 16])
@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 5 * 2**20 + 4097])
def test_files_of_any_length_are_written_and_copied_whole(tmp_path, size, offset):
    data = np.frombuffer(durable.aligned_buffer(size + offset), np.uint8).copy()[:size]
    room = np.frombuffer(durable.aligned_buffer(size + offset), np.uint8)[offset : size + offset]
    data[:] = np.random.default_rng(size).integers(0, 256, size)
    room[:] = data
    files.write(tmp_path, "c/0/0", room, "token")
    (tmp_path / "copy").mkdir()
    digest = files.copy_files(tmp_path, tmp_path / "copy", ["c/0/0", "c/0/1"])
    for folder in (tmp_path, tmp_path / "copy"):
        assert (folder / "c/0/0").read_bytes() == data.tobytes()
        for into in (None, np.empty(100, np.uint8), np.empty(size, np.uint8)):
            assert files.read(f"{folder}/c/0/0", into).tobytes() == data.tobytes()
        assert files.copy_files(folder, None, ["c/0/0"]) == digest
    assert digest == durable.digest_entries([("c/0/0", room)])
    assert files.read(f"{tmp_path}/c/0/1", room) is None


def test_a_folder_that_is_gone_is_not_made_again(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.write(tmp_path / "gone", "c/0/0", b"data", "token")
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("damage", ["cut", "beyond"])
def test_a_damaged_file_is_told(tmp_path, layout, damage):
    array = zarr.create_array(tmp_path, shape=SHAPE, chunks=CHUNKS, dtype="f4", **layout)
    array[...] = some(SHAPE, "f4")
    path = tmp_path / array.metadata.encode_chunk_key((0, 0))
    data = path.read_bytes()
    if damage == "beyond":
        if not array.shards:
            pytest.skip("only shards have an index")
        index = np.array([[2**40, 8]] * 6, "<u8").tobytes()
        crc = durable.digest(index).to_bytes(4, "little")
        first = layout["shards"] != (16, 30)
        data = index + crc + data if first else data + index + crc
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    with pytest.raises(Exception, match=r"\S") as caught:
        StoredArray(array).read((slice(0, 37), slice(0, 50)), "fill")
    assert not isinstance(caught.value, MemoryError)


@pytest.mark.parametrize("axes", [None, 0, 1])
def test_what_is_not_stored_is_neither_read_nor_written(tmp_path, monkeypatch, axes):
    array = zarr.create_array(tmp_path / "x", shape=(64, 64), chunks=(8, 8), dtype="f4")
    array[8:16, 24:32] = some((8, 8), "f4")
    resize(monkeypatch, block_nbytes=1024)
    seen, original = Counter(), StoredArray.read

    def counting(array, region, *args):
        seen[tuple((s.start, s.stop) for s in region)] += 1
        return original(array, region, *args)

    monkeypatch.setattr(StoredArray, "read", counting)
    report = clip_zarr(tmp_path / "x", tmp_path / "y", 1.0, axes)
    assert report.blocks > 1
    assert all(r[0][0] <= 8 < r[0][1] and r[1][0] <= 24 < r[1][1] for r in seen)
    assert max(seen.values()) == report.passes
    assert [p.name for p in (tmp_path / "y/c").rglob("*") if p.is_file()] == ["3"]
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(tmp_path / "x"), 1.0, axes))


def test_zeros_that_are_not_stored_become_nan_where_their_slice_does(tmp_path):
    array = zarr.create_array(tmp_path / "x", shape=(4, 4), chunks=(2, 2), dtype="f4")
    array[0, 0] = np.nan
    clip_zarr(tmp_path / "x", tmp_path / "y", 1.0)
    assert np.isnan(read(tmp_path / "y")).all()
