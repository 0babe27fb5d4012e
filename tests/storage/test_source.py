"""Sources of every format and codec, and what their clipped copies preserve."""

import json
import math

import numcodecs
import numpy as np
import pytest
import zarr
from reference import bits
from stores import FORMATS, clipped, create, read, some, stored
from zarr.codecs import (
    BloscCodec,
    BytesCodec,
    Crc32cCodec,
    GzipCodec,
    ShardingCodec,
    TransposeCodec,
    ZstdCodec,
)
from zarr.codecs import numcodecs as bundled
from zarr.storage import MemoryStore, ZipStore

from daskclip import clip_by_norm, clip_zarr
from daskclip.errors import SourceError

BLOSC = [
    {"cname": cname, "shuffle": shuffle}
    for cname in numcodecs.blosc.list_compressors()
    for shuffle in ("noshuffle", "shuffle", "bitshuffle")
]
CHECKSUMS = ["CRC32", "CRC32C", "Adler32", "Fletcher32", "JenkinsLookup3"]
LOSSY = {
    "quantize": {"digits": 2, "dtype": "<f4"},
    "fixedscaleoffset": {"offset": 0, "scale": 10, "dtype": "<f4", "astype": "<i2"},
    "bitround": {"keepbits": 5},
    "delta": {"dtype": "<f4"},
    "astype": {"encode_dtype": "<f2", "decode_dtype": "<f4"},
}

# zarr warns of every numcodecs codec in format 3, and again when the target is opened
pytestmark = pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")


def assert_clipped(source, target, clip_norm=1.0, axes=1):
    """Clip and compare with NumPy bit for bit; the source must not change."""
    before = stored(source)
    clipped(source, target, axes, clip_norm)
    assert stored(source) == before


@pytest.mark.parametrize(
    "options",
    [
        {"compressors": None},
        *({"compressors": BloscCodec(**blosc)} for blosc in BLOSC),
        {"compressors": GzipCodec(level=1)},
        {"compressors": ZstdCodec(level=1, checksum=True)},
        {"compressors": [GzipCodec(level=1), ZstdCodec(level=0), Crc32cCodec()]},
        {"filters": TransposeCodec(order=(1, 0))},
        {"serializer": BytesCodec(endian="big")},
        {"filters": TransposeCodec(order=(1, 0)), "compressors": Crc32cCodec()},
        {
            "serializer": ShardingCodec(
                chunk_shape=(1, 2),
                codecs=[
                    TransposeCodec(order=(1, 0)),
                    BytesCodec(endian="big"),
                    BloscCodec(cname="lz4", typesize=4),
                    Crc32cCodec(),
                ],
                index_codecs=[BytesCodec(), Crc32cCodec()],
                index_location="start",
            ),
            "compressors": None,
        },
        {
            "serializer": ShardingCodec(
                chunk_shape=(2, 2),
                codecs=[
                    ShardingCodec(chunk_shape=(1, 2), codecs=[BytesCodec(), ZstdCodec()]),
                ],
            ),
            "compressors": None,
        },
    ],
    ids=str,
)
def test_codecs_of_format_3_are_read_and_written(tmp_path, options):
    create(tmp_path / "x", some((5, 6), "f4"), (2, 4), **options)
    assert_clipped(tmp_path / "x", tmp_path / "y")


@pytest.mark.parametrize("name", ["Blosc", "BZ2", "GZip", "LZ4", "LZMA", "Zlib", "Zstd"])
def test_bundled_compressors_of_format_3(tmp_path, name):
    create(tmp_path / "x", some((5, 6), "f4"), (2, 4), compressors=getattr(bundled, name)())
    assert_clipped(tmp_path / "x", tmp_path / "y")


def test_pcodec_of_format_3(tmp_path):
    pytest.importorskip("pcodec", reason="numcodecs.pcodec needs the package pcodec")
    create(tmp_path / "x", some((5, 6), "f4"), (2, 4), serializer=bundled.PCodec())
    assert_clipped(tmp_path / "x", tmp_path / "y")


@pytest.mark.parametrize("name", [*CHECKSUMS, "Shuffle"])
def test_bundled_checksums_and_shuffle_of_format_3(tmp_path, name):
    options = {"elementsize": 4} if name == "Shuffle" else {}
    codec = getattr(bundled, name)(**options)
    create(tmp_path / "x", some((5, 6), "f4"), (2, 4), compressors=[codec, ZstdCodec()])
    assert_clipped(tmp_path / "x", tmp_path / "y")


@pytest.mark.parametrize(
    "compressor",
    [
        None,
        *(
            numcodecs.Blosc(cname, shuffle=shuffle)
            for cname in numcodecs.blosc.list_compressors()
            for shuffle in (0, 1, 2)
        ),
        *(getattr(numcodecs, name)() for name in ("BZ2", "GZip", "LZ4", "LZMA", "Zlib", "Zstd")),
    ],
    ids=str,
)
def test_codecs_of_format_2_are_read_and_written(tmp_path, compressor):
    create(tmp_path / "x", some((5, 6), "f4"), (2, 4), zarr_format=2, compressors=compressor)
    assert_clipped(tmp_path / "x", tmp_path / "y")


@pytest.mark.parametrize("compressor", [None, numcodecs.Zstd()], ids=str)
def test_the_shuffle_filter_of_format_2(tmp_path, compressor):
    options = {"zarr_format": 2, "compressors": compressor, "filters": [numcodecs.Shuffle(4)]}
    create(tmp_path / "x", some((5, 6), "f4"), (2, 4), **options)
    assert_clipped(tmp_path / "x", tmp_path / "y")


@pytest.mark.parametrize("name", CHECKSUMS)
def test_checksums_of_format_2(tmp_path, name):
    codec = getattr(numcodecs, name)()
    create(tmp_path / "x", some((5, 6), "f4"), (2, 4), zarr_format=2, compressors=codec)
    assert_clipped(tmp_path / "x", tmp_path / "y")


def assert_codec_refused(source, codec):
    """Check that the source is refused by the name of its codec, and no file is left."""
    before = stored(source.parent)
    with pytest.raises(SourceError, match=rf"stored with {codec}, .*lossless.*another codec") as e:
        clip_zarr(source, source.parent / "y", 1.0)
    assert "\n" not in str(e.value)
    assert stored(source.parent) == before


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_lossy_filters_are_refused(tmp_path, codec, zarr_format):
    if zarr_format == 2:
        used = numcodecs.get_codec({"id": codec, **LOSSY[codec]})
    else:
        kinds = {name.lower(): getattr(bundled, name) for name in bundled.__all__}
        used = kinds[codec](**LOSSY[codec])
    values = np.arange(6, dtype="f4").reshape(2, 3)
    create(tmp_path / "x", values, (2, 4), zarr_format=zarr_format, filters=[used])
    assert_codec_refused(tmp_path / "x", codec)


def test_lossy_codecs_inside_shards_are_refused(tmp_path):
    values = np.arange(32, dtype="f4").reshape(4, 8)
    filters = [bundled.Quantize(**LOSSY["quantize"])]
    create(tmp_path / "x", values, (2, 4), shards=(4, 8), filters=filters)
    assert_codec_refused(tmp_path / "x", "quantize")


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zfpy_is_refused(tmp_path, zarr_format):
    pytest.importorskip("zfpy", reason="the codec zfpy needs the package zfpy")
    lossy = {"mode": 4, "tolerance": 0.01}
    if zarr_format == 2:
        options = {"compressors": numcodecs.get_codec({"id": "zfpy", **lossy})}
    else:
        options = {"serializer": bundled.ZFPY(**lossy)}
    create(tmp_path / "x", some((5, 6), "f4"), (2, 4), zarr_format=zarr_format, **options)
    assert_codec_refused(tmp_path / "x", "zfpy")


@pytest.mark.parametrize("name", ["ScaleOffset", "CastValue"])
def test_rounding_codecs_of_newer_zarr_are_refused(tmp_path, name):
    from zarr import codecs

    if not hasattr(codecs, name):
        pytest.skip(f"this zarr has no codec {name}")
    options = {"ScaleOffset": {"offset": 1, "scale": 3}, "CastValue": {"data_type": "int16"}}[name]
    try:
        codec = getattr(codecs, name)(**options)
        create(tmp_path / "x", np.ones((2, 4), "f4"), (2, 4), filters=[codec])
    except ImportError as error:
        pytest.skip(f"this zarr cannot use its codec {name} here: {error}")
    assert_codec_refused(tmp_path / "x", "scale_offset" if name == "ScaleOffset" else "cast_value")


ZEROS = np.array(
    [
        [0.0, 0.0, -0.0, -0.0, 0.0, -0.0, math.nan, math.nan],
        [0.0, 0.0, -0.0, -0.0, -0.0, 0.0, math.nan, math.nan],
        [1.5, 1.5, -1.5, -1.5, 1.5, 0.0, -math.inf, -math.inf],
        [1.5, 1.5, -1.5, -1.5, -0.0, 1.5, -math.inf, -math.inf],
    ]
)


@pytest.mark.parametrize("fill", [0.0, -0.0, 1.5, math.nan, math.inf, None], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", ["f4", "c8"])
def test_chunks_like_the_fill_value_survive_to_the_bit(tmp_path, layout, fill, dtype):
    if fill is None and layout != "format 2":
        pytest.skip("only format 2 can have no fill value")
    shards = {"shards": (4, 4)} if layout == "shards" else {}
    options = {**FORMATS[layout], **shards, "fill_value": fill}
    create(tmp_path / "x", ZEROS.astype(dtype), (2, 2), **options)
    assert bits(read(tmp_path / "x")) == bits(ZEROS.astype(dtype))
    assert_clipped(tmp_path / "x", tmp_path / "y", math.inf)
    assert bits(read(tmp_path / "y")) == bits(ZEROS.astype(dtype))


@pytest.mark.parametrize("fill", [complex(0, 1), complex(-0.0, 0.0), complex(1, -0.0)], ids=str)
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_complex_chunks_like_the_fill_value_survive_to_the_bit(tmp_path, fill, zarr_format):
    parts = [[fill.real, fill.imag], [-fill.real, fill.imag], [fill.real, -fill.imag]]
    values = np.repeat(np.array(parts, "f8").view("c16"), 2, axis=1)
    create(tmp_path / "x", values, (1, 2), fill_value=fill, zarr_format=zarr_format)
    assert_clipped(tmp_path / "x", tmp_path / "y", 10.0)
    assert bits(read(tmp_path / "y")) == bits(values)


def test_nan_with_other_bits_than_the_fill_value_survives(tmp_path):
    values = np.array([0x7FC00000, 0xFFC00000, 0x7FC00001, 0xFFC00001], "u4").view("f4")
    create(tmp_path / "x", values, (1,), fill_value=math.nan)
    clip_zarr(tmp_path / "x", tmp_path / "y", math.inf)
    assert bits(read(tmp_path / "y")) == bits(values)


def test_a_limit_of_0_keeps_the_sign_of_zeros(tmp_path):
    create(tmp_path / "x", some((5, 6), "f4"), (2, 4), fill_value=0.0)
    assert_clipped(tmp_path / "x", tmp_path / "y", 0.0)
    assert bits(read(tmp_path / "y")) == bits(np.copysign(np.float32(0), read(tmp_path / "x")))


def inner_chunks(shard):
    """Whether each inner chunk of a shard of four is stored, from the index at its end."""
    index = np.frombuffer(shard[-(4 * 16 + 4) : -4], "<u8").reshape(4, 2)
    return (index[:, 0] != 2**64 - 1).tolist()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("fill", [0.0, -0.0, math.nan])
@pytest.mark.parametrize("value", [3.0, "zero of the other sign"])
def test_absent_chunks_stay_absent(tmp_path, layout, fill, value):
    options = {**FORMATS[layout], "fill_value": fill, "config": {"write_empty_chunks": True}}
    x = zarr.create_array(tmp_path / "x", shape=(8, 16), chunks=(2, 4), dtype="f4", **options)
    x[2:4, 4:8] = 3.0 if value == 3.0 else -math.copysign(0.0, fill)
    clip_zarr(tmp_path / "x", tmp_path / "y", 1.0, 0, nonfinite="omit")
    wanted = clip_by_norm(read(tmp_path / "x"), 1.0, 0, nonfinite="omit")
    assert stored(tmp_path / "y").keys() == stored(tmp_path / "x").keys()
    assert bits(read(tmp_path / "y")) == bits(wanted)


@pytest.mark.parametrize("value", [3.0, -0.0])
def test_absent_inner_chunks_stay_absent(tmp_path, value):
    options = {**FORMATS["shards"], "fill_value": 0.0}
    x = zarr.create_array(tmp_path / "x", shape=(4, 8), chunks=(2, 4), dtype="f4", **options)
    x[2:4, 4:8] = 3.0
    x.with_config({"write_empty_chunks": True})[0:2, 4:8] = value
    clip_zarr(tmp_path / "x", tmp_path / "y", 1.0, 0)
    source, target = (inner_chunks((tmp_path / n / "c/0/0").read_bytes()) for n in "xy")
    assert source == target == [False, True, False, True]


@pytest.mark.parametrize("layout", FORMATS)
def test_absent_chunks_are_clipped_like_their_fill_value(tmp_path, layout):
    options = {**FORMATS[layout], "fill_value": 5.0}
    x = zarr.create_array(tmp_path / "x", shape=(5, 9), chunks=(2, 4), dtype="f8", **options)
    x[:, :4] = some((5, 4), "f8")
    assert_clipped(tmp_path / "x", tmp_path / "y", 1.0, 0)
    assert not (read(tmp_path / "y") == 5.0).any()


@pytest.mark.parametrize("layout", FORMATS)
def test_metadata_is_carried_over_to_the_byte(tmp_path, layout):
    create(
        tmp_path / "x",
        some((5, 6), "f4"),
        (2, 4),
        **FORMATS[layout],
        fill_value=math.nan,
        attributes={"unit": "K", "größe": [1, {"a": None}], "scale_factor": 0.1},
        **({"dimension_names": ["time", None]} if layout != "format 2" else {}),
    )
    documents = [
        p for p in (tmp_path / "x").iterdir() if p.name in ("zarr.json", ".zarray", ".zattrs")
    ]
    for document in documents:
        parsed = json.loads(document.read_bytes())
        document.write_text(
            json.dumps(parsed, indent=7, sort_keys=True, ensure_ascii=False) + "\n\n"
        )
    assert_clipped(tmp_path / "x", tmp_path / "y")
    for document in documents:
        assert (tmp_path / "y" / document.name).read_bytes() == document.read_bytes()
    x, y = (zarr.open_array(tmp_path / name) for name in "xy")
    assert y.attrs.asdict() == x.attrs.asdict()
    assert stored(tmp_path / "y").keys() == stored(tmp_path / "x").keys()


@pytest.mark.parametrize("separator", ["/", "."])
@pytest.mark.parametrize("name", ["default", "v2", "format 2"])
@pytest.mark.parametrize("missing", ["fill", "error"])
def test_chunks_are_found_under_any_keys(tmp_path, name, separator, missing):
    encoding = {"name": "v2" if name == "format 2" else name, "separator": separator}
    create(
        tmp_path / "x",
        some((5, 6), "f4"),
        (2, 4),
        zarr_format=2 if name == "format 2" else 3,
        chunk_key_encoding=encoding,
    )
    clip_zarr(tmp_path / "x", tmp_path / "y", 1.0, missing=missing)
    assert stored(tmp_path / "y").keys() == stored(tmp_path / "x").keys()
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(tmp_path / "x"), 1.0))


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("value", [3.0, -0.5, -0.0])
def test_an_array_without_dimensions(tmp_path, zarr_format, value):
    create(tmp_path / "x", np.array(value, "f4"), (), zarr_format=zarr_format)
    assert_clipped(tmp_path / "x", tmp_path / "y", 1.0, None)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("axes", [None, 0, 1, ()])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_an_array_without_elements(tmp_path, zarr_format, shape, axes):
    create(tmp_path / "x", np.empty(shape, "f4"), (2, 4), zarr_format=zarr_format)
    assert_clipped(tmp_path / "x", tmp_path / "y", 1.0, axes)


@pytest.mark.parametrize("layout", FORMATS)
def test_one_chunk_larger_than_the_array(tmp_path, layout):
    create(tmp_path / "x", some((1, 3), "f4"), (2, 4), **FORMATS[layout])
    assert_clipped(tmp_path / "x", tmp_path / "y")


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8", ">c8", ">c16"])
def test_byte_order_is_kept_in_storage(tmp_path, layout, dtype):
    create(tmp_path / "x", some((5, 6), dtype), (2, 4), **FORMATS[layout])
    assert_clipped(tmp_path / "x", tmp_path / "y")
    x, y = (zarr.open_array(tmp_path / name) for name in "xy")
    assert y.dtype == x.dtype
    assert y.metadata == x.metadata


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("compressor", [None, numcodecs.Zstd()])
def test_memory_order_of_format_2(tmp_path, order, compressor):
    options = {"zarr_format": 2, "order": order, "compressors": compressor}
    create(tmp_path / "x", some((5, 6), "f4"), (2, 4), **options)
    assert_clipped(tmp_path / "x", tmp_path / "y")


def test_a_source_may_be_a_text_a_path_or_an_array(tmp_path):
    path = create(tmp_path / "x", some((5, 6), "f4"), (2, 4))
    wanted = bits(clip_by_norm(read(path), 1.0))
    for n, source in enumerate((path, str(path), f"file://{path}", zarr.open_array(path))):
        clip_zarr(source, tmp_path / f"y{n}", 1.0)
        assert bits(read(tmp_path / f"y{n}")) == wanted


def test_a_source_may_be_an_array_of_a_group(tmp_path):
    group = zarr.create_group(tmp_path / "group")
    group.create_array("x", data=some((5, 6), "f4"), chunks=(2, 4))
    clip_zarr(group["x"], tmp_path / "y", 1.0, 1)
    assert_clipped(tmp_path / "group" / "x", tmp_path / "z")
    assert stored(tmp_path / "y") == stored(tmp_path / "z")


def test_a_source_may_be_in_memory(tmp_path):
    x = some((5, 6), "f4")
    array = zarr.create_array(MemoryStore(), data=x, chunks=(2, 4), attributes={"a": 1})
    clip_zarr(array, tmp_path / "y", 1.0)
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(x, 1.0))
    assert zarr.open_array(tmp_path / "y").metadata == array.metadata


def test_a_source_may_be_zipped(tmp_path):
    x = some((5, 6), "f4")
    with ZipStore(tmp_path / "x.zip", mode="w") as store:
        zarr.create_array(store, data=x, chunks=(2, 4))
    with ZipStore(tmp_path / "x.zip", mode="r") as store:
        clip_zarr(zarr.open_array(store, mode="r"), tmp_path / "y", 1.0)
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(x, 1.0))


def test_a_chunk_grid_of_uneven_chunks_is_refused(tmp_path):
    if "rectilinear_chunks" not in zarr.config.get("array"):
        pytest.skip("this zarr has regular chunk grids only")
    with zarr.config.set({"array.rectilinear_chunks": True}):
        zarr.create_array(tmp_path / "x", shape=(6,), chunks=[[1, 2, 3]], dtype="f4")
        before = stored(tmp_path)
        with pytest.raises(SourceError, match="chunks of uneven sizes"):
            clip_zarr(tmp_path / "x", tmp_path / "y", 1.0)
    assert stored(tmp_path) == before
