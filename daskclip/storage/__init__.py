"""Zarr arrays and groups on local file systems and in object stores, and flat files read as such.

    source ──> hierarchy ──> array ──> codecs ──> files or object_store ──> stores
                   └─> metadata      foreign: flat files, arrays in memory, bfloat16

Chunks are decoded in the calling thread, one at a time, and every file appears whole. Nothing
here knows what a norm is.
"""

from daskclip.storage import durable, metadata
from daskclip.storage.array import (
    StoredArray,
    is_part,
    is_zarr_array,
    retrying_block,
)
from daskclip.storage.foreign.opening import open_flat
from daskclip.storage.hierarchy import Hierarchy
from daskclip.storage.object_store import ObjectPrefix
from daskclip.storage.retry import translating_storage_errors
from daskclip.storage.source import check_source, open_source, parse_patterns, select_arrays
from daskclip.storage.stores import is_private, parse_location, read_only_protocol

__all__ = [
    "Hierarchy", "ObjectPrefix", "StoredArray", "check_source", "durable", "is_part",
    "is_private", "is_zarr_array", "metadata", "open_flat", "open_source", "parse_location",
    "parse_patterns", "read_only_protocol", "retrying_block", "select_arrays",
    "translating_storage_errors",
]  # fmt: skip
