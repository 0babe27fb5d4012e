"""The client's side of a run: check the arguments, plan, compute window after window, publish.

    clip ──> request ──> run_record ──> attempt ──> rounds ──> passes ──> window_graph ──> worker
                              │            │                     │
                           target       report                journal

This room decides what is computed and in which order; it holds no array data. How a block is
computed is the worker's, how a target is locked and published is the target's.
"""

from daskclip.engine.clip import clip_zarr, plan_zarr
from daskclip.engine.run_record import discard, status
from daskclip.engine.stats import stats_zarr
from daskclip.engine.verify import verify_zarr

__all__ = ["clip_zarr", "discard", "plan_zarr", "stats_zarr", "status", "verify_zarr"]
