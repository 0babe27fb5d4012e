"""The client's side of a run: check the arguments, plan, compute window after window, publish.

    clip_zarr ──> request ──> target ──> attempt ──> passes ──> window_graph ──> Dask ──> worker
                                            │           │
                                         report      journal

This room decides what is computed and in which order; it holds no array data. How a block is
computed is the worker's, how a target is locked and published is the target's.
"""

from daskclip.engine import run_record
from daskclip.engine.clip import clip_zarr, plan_zarr
from daskclip.engine.stats import stats_zarr
from daskclip.engine.verify import verify_zarr

__all__ = ["clip_zarr", "plan_zarr", "run_record", "stats_zarr", "verify_zarr"]
