"""Flat arrays as zarr's own arrays and groups, for what is not a run."""

import os
from typing import Any

import zarr
from zarr.core.group import AsyncGroup, GroupMetadata
from zarr.storage import StorePath

from daskclip.errors import SourceError
from daskclip.storage.foreign.bfloat16 import knowing_bfloat16
from daskclip.storage.hierarchy import Hierarchy
from daskclip.storage.source import open_source


def open_flat(source: object) -> "zarr.Array[Any] | zarr.Group":
    """Open a .npy or .safetensors file, or a NumPy array, as a read-only Zarr array or group.

    Parameters
    ----------
    source : str, path or NumPy array
        A ``.npy`` or ``.safetensors`` file, a folder of shards with their index, or an array in
        memory or in a ``numpy.memmap``, of any shape.

    Returns
    -------
    zarr.Array or zarr.Group
        Of ``.safetensors`` files, a group with an array for each tensor.

    Raises
    ------
    TypeError
        If the dtype is not one that Zarr has.
    ValueError
        If ``source`` is none of these, or its header is damaged.
    FileNotFoundError
        If it does not exist.

    See Also
    --------
    clip_zarr : Takes all of these as they are.
    clip_by_norm : Clips the arrays lazily.

    Notes
    -----
    Reads headers only. Chunks are ranges of the first axis of about 4 MiB, or of the last one in
    Fortran order. The bytes of a chunk are read from the file when they are asked for.

    References
    ----------
    `The .npy format <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>`_ and
    `safetensors <https://huggingface.co/docs/safetensors>`_.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> path = f"{tempfile.mkdtemp()}/x.npy"
    >>> np.save(path, np.float32([[3, 4], [6, 8]]))
    >>> open_flat(path)[1]
    array([6., 8.], dtype=float32)
    """
    opened = open_source(source)
    if not opened.is_flat:
        name = os.fspath(source) if isinstance(source, str | os.PathLike) else source
        raise SourceError(f"source {name} is no flat file or array; open it with zarr.open")
    return _group(opened) if opened.is_group else opened.arrays[""].array


def _group(opened: Hierarchy) -> zarr.Group:
    # with the metadata of its members, since zarr need not know their dtypes later
    nodes = {name: opened.document(name) for name in (*opened.groups, *opened.arrays) if name}
    inside = {"kind": "inline", "must_understand": False, "metadata": nodes}
    about = opened.document("") | {"consolidated_metadata": inside}
    with knowing_bfloat16(*nodes.values()):
        metadata = GroupMetadata.from_dict(about)
    return zarr.Group(AsyncGroup(metadata=metadata, store_path=StorePath(opened.store)))
