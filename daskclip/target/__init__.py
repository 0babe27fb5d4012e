"""Where a run writes: a lock, staging, a journal of what is done, and one commit at the end.

    locate ──> directory      a local folder: flock, staging beside it, one rename
           └─> object_store   a prefix: a lease, chunks first, metadata last

Nothing here knows what a block holds.
"""

from daskclip.target import journal
from daskclip.target.directory import DirectoryTarget, matches_record
from daskclip.target.journal import Arrays, FinalRecord, Journal, Json, RunRecord, WindowRecord
from daskclip.target.locate import Target, Transaction, find_target, open_target
from daskclip.target.preflight import refuse_existing

__all__ = [
    "Arrays", "DirectoryTarget", "FinalRecord", "Journal", "Json", "RunRecord", "Target",
    "Transaction", "WindowRecord", "find_target", "journal", "matches_record", "open_target",
    "refuse_existing",
]  # fmt: skip
