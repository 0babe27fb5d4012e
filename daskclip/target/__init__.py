"""Where a run writes: a lock, staging, a journal of what is done, and one commit at the end.

    locate ──> directory      a local folder: flock, staging beside it, one rename
           └─> object_store   a prefix: a lease, chunks first, metadata last

Nothing here knows what a block holds.
"""

from daskclip.target import journal
from daskclip.target.directory import (
    JOURNAL,
    DirectoryTarget,
    DirectoryTransaction,
    matches_record,
    refuse_existing,
)
from daskclip.target.journal import Arrays, Entry, Journal
from daskclip.target.locate import Target, find_target, open_target
from daskclip.target.object_store import ObjectStoreTransaction

__all__ = [
    "JOURNAL", "Arrays", "DirectoryTarget", "DirectoryTransaction", "Entry", "Journal",
    "ObjectStoreTransaction", "Target", "find_target", "journal", "matches_record", "open_target",
    "refuse_existing",
]  # fmt: skip  # fmt: skip  # fmt: skip
