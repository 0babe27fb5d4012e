"""Zarr arrays and groups on local file systems and in object stores.

    source ──> hierarchy ──> array ──> codecs ──> files or object_store

Chunks are decoded in the thread that asks, one at a time, and every file appears whole. Nothing
here knows what a norm is.
"""

from daskclip.storage import array, files, object_store, regions
from daskclip.storage.array import dimension_names, stored_blocks, write_unit
from daskclip.storage.attempts import attempting, shown_region
from daskclip.storage.cf import SCALES, SENTINELS, check_decoded, numbers
from daskclip.storage.files import DIGESTS, digest, digest_file, write_durably
from daskclip.storage.hierarchy import DOCUMENTS, MADE_BY, Hierarchy, at_folder, at_place
from daskclip.storage.members import members, patterns
from daskclip.storage.retry import T, failing, refused, remedied, retrying
from daskclip.storage.source import check_source, open_source

__all__ = [
    "DIGESTS", "DOCUMENTS", "MADE_BY", "SCALES", "SENTINELS", "Hierarchy", "T", "array",
    "at_folder", "at_place", "attempting", "check_decoded", "check_source", "digest", "digest_file",
    "dimension_names", "failing", "files", "members", "numbers", "object_store", "open_source",
    "patterns", "refused", "regions", "remedied", "retrying", "shown_region", "stored_blocks",
    "write_durably", "write_unit",
]  # fmt: skip
