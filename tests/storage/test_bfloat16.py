"""bfloat16 in Zarr: as tensorstore writes and reads it, in a zarr that does not know it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import zarr
from reference import bits
from servers import local_cluster, missing
from zarr.dtype import data_type_registry
from zarr.storage import LocalStore

from daskclip import clip_by_norm, clip_zarr, stats_zarr, verify_zarr
from daskclip.errors import SourceError
from daskclip.storage.foreign.bfloat16 import BFloat16

ml_dtypes = pytest.importorskip("ml_dtypes")
needs_tensorstore = pytest.mark.skipif(
    bool(missing("tensorstore")), reason=missing("tensorstore")
)  # fmt: skip
BF16 = ml_dtypes.bfloat16


def some(shape, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * 4).astype(BF16)


def tensorstore(path, driver, x=None, **metadata):
    """An array that tensorstore opens, or makes."""
    import tensorstore as ts

    spec = {"driver": driver, "kvstore": {"driver": "file", "path": str(path)}}
    if x is None:
        return ts.open(spec).result()
    if metadata:
        kind = "dtype" if driver == "zarr" else "data_type"
        spec["metadata"] = {kind: "bfloat16"} | metadata
    array = ts.open(spec, create=True, dtype=ts.bfloat16, shape=x.shape).result()
    array[...] = x
    return array


def sharded(order):
    inner = [{"name": "bytes", "configuration": {"endian": order}}, {"name": "zstd"}]
    return [
        {
            "name": "sharding_indexed",
            "configuration": {"chunk_shape": [2, 3], "codecs": inner},
        }
    ]


ZSTD = {"id": "zstd", "level": 1}
LAYOUTS = {
    "format 2": ("zarr", {}),
    "format 2, zstd": ("zarr", {"chunks": [3, 4], "compressor": ZSTD, "order": "F"}),
    "format 2, raw": ("zarr", {"chunks": [3, 4], "compressor": None, "fill_value": "NaN"}),
    "format 3": ("zarr3", {}),
    "format 3, big-endian": ("zarr3", {"codecs": sharded("big")[0]["configuration"]["codecs"]}),
    "format 3, sharded": ("zarr3", {"codecs": sharded("little"), "fill_value": "-Infinity"}),
    "format 3, NaN": ("zarr3", {"fill_value": "0x7fc1"}),
}


@needs_tensorstore
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_tensorstore_writes_is_clipped_and_read_by_it(tmp_path, layout):
    (driver, metadata), x = LAYOUTS[layout], some((9, 8))
    if layout.endswith("sharded"):
        metadata = metadata | {
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4, 6]}}
        }
    tensorstore(tmp_path / "x", driver, x, **metadata)
    known = dict(data_type_registry.contents)
    for axes in (None, 1, 0):
        target = tmp_path / f"y{axes}"
        assert clip_zarr(tmp_path / "x", target, 1.0, axes).status == "clipped"
        assert bits(tensorstore(target, driver).read().result()) == bits(clip_by_norm(x, 1.0, axes))
        assert clip_zarr(tmp_path / "x", target, 1.0, axes).status == "up to date"
        verify_zarr(target, tmp_path / "x")
    assert stats_zarr(tmp_path / "x", axes=1).slices == 9
    assert clip_zarr(tmp_path / "x", None, 1.0, 1, in_place=True).status == "clipped"
    assert bits(tensorstore(tmp_path / "x", driver).read().result()) == bits(
        clip_by_norm(x, 1.0, 1)
    )
    assert data_type_registry.contents == known
    name = "zarr.json" if driver == "zarr3" else ".zarray"
    old, new = (json.loads((tmp_path / at / name).read_text()) for at in ("x", "y1"))
    assert old == new


@needs_tensorstore
@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
@pytest.mark.parametrize("fill", ["NaN", "Infinity", "-Infinity", 1.5, 0.0])
def test_missing_chunks_are_the_fill_value(tmp_path, driver, fill):
    array = tensorstore(tmp_path / "x", driver, some((4, 6)), fill_value=fill)
    array = array.resize(exclusive_max=[12, 6]).result()
    x = array.read().result()
    np.testing.assert_array_equal(x[4:].astype("f8"), float(fill))
    clip_zarr(tmp_path / "x", tmp_path / "y", 1.0, 1)
    assert bits(tensorstore(tmp_path / "y", driver).read().result()) == bits(
        clip_by_norm(x, 1.0, 1)
    )


@needs_tensorstore
def test_an_array_of_a_group_on_a_cluster(tmp_path):
    x = some((40, 6))
    zarr.create_group(tmp_path / "g", zarr_format=2)
    tensorstore(tmp_path / "g/a", "zarr", x, chunks=[5, 6])
    zarr.create_array(tmp_path / "g/b", data=x.astype("f4"), zarr_format=2)
    with local_cluster(2) as cluster, cluster.get_client():
        assert clip_zarr(tmp_path / "g", tmp_path / "y", 1.0, 1).arrays == 2
        verify_zarr(tmp_path / "y", tmp_path / "g")
    for name, values in {"a": x, "b": x.astype("f4")}.items():
        found = tensorstore(tmp_path / "y" / name, "zarr").read().result()
        assert bits(found) == bits(clip_by_norm(values, 1.0, 1))


def make(path, **changes):
    """An array of format 3 that zarr does not know, without tensorstore."""
    zarr.create_array(path, data=np.asarray(some((4, 6))).view("u2"), compressors=None)
    document = json.loads((path / "zarr.json").read_text()) | {"data_type": "bfloat16"} | changes
    (path / "zarr.json").write_text(json.dumps(document))
    return path


def test_a_data_type_of_the_user_is_used_and_stays(tmp_path):
    class Own(BFloat16):
        """Another one."""

    make(tmp_path / "x")
    data_type_registry.register("bfloat16", Own)
    try:
        opened = zarr.open_array(tmp_path / "x", mode="r")
        clip_zarr(opened, tmp_path / "y", 1.0, 1)
        clip_zarr(tmp_path / "x", tmp_path / "z", 1.0, 1)
        assert data_type_registry.get("bfloat16") is Own
        for name in "yz":
            array = zarr.open_array(tmp_path / name, mode="r")
            assert type(array.metadata.data_type) is Own
            assert bits(array[...]) == bits(clip_by_norm(some((4, 6)), 1.0, 1))
        # zarr can now make one too
        array = zarr.create_array(LocalStore(tmp_path / "w"), shape=(3,), dtype=Own(), fill_value=1)
        assert array[...].tolist() == [1, 1, 1]
        assert bits(clip_by_norm(opened, 1.0, 1).compute()) == bits(
            clip_by_norm(some((4, 6)), 1.0, 1)
        )
    finally:
        data_type_registry.unregister("bfloat16")


def test_nothing_is_registered_by_an_import(tmp_path):
    make(tmp_path / "x")
    code = (
        "import sys, daskclip, zarr\n"
        "from zarr.dtype import data_type_registry as known\n"
        "before = dict(known.contents)\n"
        "assert not any('bfloat16' in key for key in before) and 'ml_dtypes' not in sys.modules\n"
        f"assert daskclip.clip_zarr({str(tmp_path / 'x')!r}, {str(tmp_path / 'y')!r}, 1.0)\n"
        "assert known.contents == before and 'ml_dtypes' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("fill", ["", "0x", "0xzz", "0x12345", "x", [], {}, None, True])
def test_a_damaged_fill_value_is_refused_in_one_line(tmp_path, fill):
    make(tmp_path / "x", fill_value=fill)
    try:
        clip_zarr(tmp_path / "x", tmp_path / "y", 1.0)
    except SourceError as error:
        text = str(error)
    else:
        text = "; "
        assert fill in (True, None)
    assert "; " in text
    assert "\n" not in text
