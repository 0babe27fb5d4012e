"""The operation on arrays in memory and on Dask arrays, which stay lazy.

    inputs ──> clip ──> numerics                   NumPy: at once
                   └──> graph ──> tree, recipes    Dask: partial norms, their tree, a second pass

Nothing here computes a Dask graph or knows a run from storage to storage.
"""

from daskclip.lazy import clip
from daskclip.lazy.clip import clip_by_norm, norm
from daskclip.lazy.clip_list import clip_by_global_norm, global_norm
from daskclip.lazy.indexed_slices import IndexedSlices
from daskclip.lazy.inputs import as_limit
from daskclip.lazy.recipes import Constant
from daskclip.lazy.tree import no_block, tree

__all__ = [
    "Constant", "IndexedSlices", "as_limit", "clip", "clip_by_global_norm", "clip_by_norm",
    "global_norm", "no_block", "norm", "tree",
]  # fmt: skip
