"""Zarr arrays and groups on local file systems and in object stores.

    source ──> hierarchy ──> array ──> codecs ──> files or object_store

Chunks are decoded in the thread that asks, one at a time, and every file appears whole. Nothing
here knows what a norm is.
"""

from daskclip.storage import array, files, object_store, regions
from daskclip.storage.array import dimension_names, stored_blocks, write_unit
from daskclip.storage.attempts import format_region, retrying_block
from daskclip.storage.cf import SCALES, SENTINELS, numbers, require_decoded
from daskclip.storage.files import DIGESTS, digest, digest_file, write_durably
from daskclip.storage.hierarchy import DOCUMENTS, MADE_BY, Hierarchy, at_folder, at_place
from daskclip.storage.members import patterns, select_arrays
from daskclip.storage.retry import (
    T,
    is_refused,
    kind_and_remedy,
    retrying,
    translating_storage_errors,
)
from daskclip.storage.source import check_source, open_source

__all__ = [
    "DIGESTS", "DOCUMENTS", "MADE_BY", "SCALES", "SENTINELS", "Hierarchy", "T", "array",
    "at_folder", "at_place", "check_source", "digest", "digest_file", "dimension_names", "files",
    "format_region", "is_refused", "kind_and_remedy", "numbers", "object_store", "open_source",
    "patterns", "regions", "require_decoded", "retrying", "retrying_block", "select_arrays",
    "stored_blocks", "translating_storage_errors", "write_durably", "write_unit",
]  # fmt: skip  # fmt: skip
