"""The client's side of a run: check the arguments, plan, keep all threads busy, publish.

    clip ──> request ──> run_record ──> attempt ──> stages ──> passes ──> front ──> worker
                              │            │                     │
                           target       report                journal

This room decides what is computed and in which order; it holds no array data. The worker decides
how a block is computed, and the target how it is locked and published.
"""

from daskclip.engine.clip import clip_zarr, plan_zarr
from daskclip.engine.run_record import discard, status
from daskclip.engine.stats import stats_zarr
from daskclip.engine.verify import verify_zarr
from daskclip.storage import open_flat

__all__ = [
    "clip_zarr", "discard", "open_flat", "plan_zarr", "stats_zarr", "status", "verify_zarr",
]  # fmt: skip
