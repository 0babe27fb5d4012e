"""Zarr arrays and groups on local file systems and in object stores.

    source ──> hierarchy ──> array ──> codecs ──> files or object_store

Chunks are decoded in the thread that asks, one at a time, and every file appears whole. Nothing
here knows what a norm is.
"""

from daskclip.storage import array, durable, files, object_store, regions
from daskclip.storage.array import dimension_names, stored_blocks, write_unit
from daskclip.storage.attempts import format_region, retrying_block
from daskclip.storage.cf import SCALES, SENTINELS, numbers, require_decoded
from daskclip.storage.hierarchy import DOCUMENTS, MADE_BY, Hierarchy, at_folder, at_place
from daskclip.storage.object_store import ObjectPrefix
from daskclip.storage.retry import translating_storage_errors
from daskclip.storage.source import check_source, open_source, patterns, select_arrays

__all__ = [
    "DOCUMENTS", "MADE_BY", "SCALES", "SENTINELS", "Hierarchy", "ObjectPrefix", "array",
    "at_folder", "at_place", "check_source", "dimension_names", "durable", "files",
    "format_region", "numbers", "object_store", "open_source", "patterns", "regions",
    "require_decoded", "retrying_block", "select_arrays", "stored_blocks",
    "translating_storage_errors", "write_unit",
]  # fmt: skip
