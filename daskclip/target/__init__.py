"""Targets of runs: a lock, staging, a journal of what is done, and one commit at the end.

    locate ──> directory      a local folder: flock, staging beside it, one rename
           └─> object_store   a prefix: a lease, chunks first, metadata last

Nothing here knows what a block holds. A new kind of target is a pair of classes with the methods of
those in `directory`, and a branch of `find_target`. The engine calls them in this order:

    target.check           refuse a place that cannot be written; changes nothing
    target.locked          hold the lock, and give the transaction
    target.require_free    refuse a place that is taken, with what else the caller could do
    transaction.record     journal of the run that made the target; there may be none
    transaction.files      files that every worker must see
    .is_complete           whether staging is what the journal of an unfinished run says
    .begin                 prepare staging for a new run
    .stage                 the arrays to write, and the local folder that workers sync, or None
    .open_journal          the journal: replayed, then appended to
    .finish                remove stray files, and give the fingerprint of what was staged
    .publish or .clear     let the target appear, or remove all that the run kept

Of norms that are saved, which are not resumed, `open_new` and `publish_new` of a transaction take
the place of the calls from `begin` on.

The engine also uses ``journal``, ``folder`` and ``target`` of a transaction, and, to verify, for
`status` and for `discard`, ``exists``, ``open``, ``journals``, ``busy`` and ``unfinished`` of a
target. Outside this room, `parse_location` in storage/stores.py takes what a caller names apart,
`Hierarchy.open` has to read what was published, and `_open_written` in engine/verify.py and
engine/saved_norms.py ask for a `DirectoryTarget`.
"""

from daskclip.target import journal
from daskclip.target.directory import DirectoryTarget, matches_record
from daskclip.target.journal import (
    ArrayFiles,
    BlocksRecord,
    FinalRecord,
    Journal,
    Json,
    RunRecord,
)
from daskclip.target.locate import Target, Transaction, find_target, open_target
from daskclip.target.preflight import refuse_existing

__all__ = [
    "ArrayFiles", "BlocksRecord", "DirectoryTarget", "FinalRecord", "Journal", "Json",
    "RunRecord", "Target", "Transaction", "find_target", "journal", "matches_record",
    "open_target", "refuse_existing",
]  # fmt: skip
