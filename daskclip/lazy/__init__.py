"""The operation on arrays in memory and on Dask arrays, which stay lazy.

    inputs ──> clip ──> numerics                           NumPy: at once
                   └──> graph ──> tree, fusion, recipes    Dask: partial norms, a second pass
    inputs ──> lists ──> list_graph ──> graph              arrays that have norms in common

Nothing here computes a Dask graph or knows a run from storage to storage.
"""

from daskclip.lazy.clip import clip_by_norm, norm
from daskclip.lazy.indexed_slices import IndexedSlices
from daskclip.lazy.lists import clip_by_global_norm, global_norm

__all__ = ["IndexedSlices", "clip_by_global_norm", "clip_by_norm", "global_norm", "norm"]
