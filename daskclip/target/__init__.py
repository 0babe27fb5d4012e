"""Where a run writes: a lock, staging, a journal of what is done, and one commit at the end.

    locate ──> directory      a local folder: flock, staging beside it, one rename
           └─> object_store   a prefix: a lease, chunks first, metadata last

Nothing here knows what a block holds.
"""

from daskclip.target import journal
from daskclip.target.directory import JOURNAL, Folder, FolderWork, is_made, refuse_existing
from daskclip.target.journal import Arrays, Entry, Journal
from daskclip.target.locate import Target, find_target, open_target
from daskclip.target.object_store import PrefixWork

__all__ = [
    "JOURNAL", "Arrays", "Entry", "Folder", "FolderWork", "Journal", "PrefixWork", "Target",
    "find_target", "is_made", "journal", "open_target", "refuse_existing",
]  # fmt: skip
