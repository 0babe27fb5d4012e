"""References to HDF5 and NetCDF files, as kerchunk and VirtualiZarr make them."""

import json

import numpy as np
import pytest
import zarr
from fsspec.implementations.reference import ReferenceFileSystem
from kinds import in_references
from reference import bits
from servers import missing
from stores import read, some
from zarr.storage import FsspecStore

from daskclip import clip_by_norm, clip_zarr, stats_zarr, verify_zarr

KINDS = {
    "HDF5": ("h5py", "kerchunk"),
    "NetCDF4": ("netCDF4", "h5py", "kerchunk"),
    "NetCDF3": ("scipy", "kerchunk"),
    "VirtualiZarr": ("h5py", "virtualizarr", "kerchunk"),
}
VALUES = {"a": some((20, 6), "f4"), "b": some((20, 6), "f8", 1)}


def hdf5(path):
    import h5py

    with h5py.File(path, "w") as file:
        for name, x in VALUES.items():
            file.create_dataset(name, data=x, chunks=(7, 6), shuffle=True, compression="gzip")
    return path


def netcdf(path, kind):
    if kind == "NetCDF3":
        from scipy.io import netcdf_file as dataset
    else:
        from netCDF4 import Dataset as dataset
    with dataset(path, "w") as file:
        file.createDimension("t", 20)
        file.createDimension("x", 6)
        for name, x in VALUES.items():
            file.createVariable(name, x.dtype, ("t", "x"))[...] = x
    return path


def references(kind, path):
    """References to the arrays of a file."""
    if kind == "NetCDF3":
        from kerchunk.netCDF3 import NetCDF3ToZarr

        return NetCDF3ToZarr(str(netcdf(path, kind))).translate()
    if kind == "VirtualiZarr":
        from obstore.store import LocalStore
        from virtualizarr import open_virtual_dataset
        from virtualizarr.parsers import HDFParser
        from virtualizarr.registry import ObjectStoreRegistry

        registry = ObjectStoreRegistry({"file://": LocalStore()})
        made = open_virtual_dataset(f"file://{hdf5(path)}", registry=registry, parser=HDFParser())
        return made.virtualize.to_kerchunk(format="dict")
    from kerchunk.hdf import SingleHdf5ToZarr

    made = hdf5(path) if kind == "HDF5" else netcdf(path, kind)
    return SingleHdf5ToZarr(str(made)).translate()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of those packages
@pytest.mark.parametrize("kind", KINDS)
def test_references_to_other_formats_are_a_source(tmp_path, kind):
    if reason := missing(*KINDS[kind]):
        pytest.skip(reason)
    made = references(kind, tmp_path / "x.file")
    fs = ReferenceFileSystem(
        made, asynchronous=True, skip_instance_cache=True, remote_protocol="file",
        remote_options={"asynchronous": True},
    )  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(made))
    for i, source in enumerate((FsspecStore(fs), f"reference://::{tmp_path}/x.json")):
        clip_zarr(source, target := tmp_path / f"y{i}", 1.0, 1, include=[*VALUES])
        verify_zarr(target, source)
        assert stats_zarr(source, axes=1, include=[*VALUES]).slices == 40
        for name, x in VALUES.items():
            y = zarr.open_group(target, mode="r", use_consolidated=False)[name][...]
            assert bits(y) == bits(clip_by_norm(np.asarray(x, y.dtype), 1.0, 1))
        assert clip_zarr(source, target, 1.0, 1, include=[*VALUES]).status == "up to date"


@pytest.mark.parametrize("path", ["", "/"])
def test_a_group_of_references_is_listed_from_the_root(tmp_path, path):
    for name, x in VALUES.items():
        zarr.create_array(tmp_path / "x" / name, data=x, chunks=(7, 6))
    zarr.create_group(tmp_path / "x", overwrite=False)
    source = in_references(tmp_path / "x", True, path)
    clip_zarr(source, tmp_path / "y", 1.0, 1)
    verify_zarr(tmp_path / "y", source)
    for name, x in VALUES.items():
        assert bits(read(tmp_path / "y" / name)) == bits(clip_by_norm(x, 1.0, 1))
