"""Sizes that make small arrays take several blocks, slabs and windows."""

from dataclasses import replace

from daskclip.plan import sizing

SMALL = {
    "block_nbytes": 256,
    "process_nbytes": 0,
    "thread_nbytes": 0,
    "slice_nbytes": 0,
    "window_blocks": 2,
    "sum_nbytes": 1,  # less than the elements weigh, as in large chunks
}


def resize(patch, **sizes):
    """Change some sizes until ``patch``, a `pytest.MonkeyPatch`, is undone."""
    patch.setattr(sizing, "DEFAULT", replace(sizing.DEFAULT, **sizes))


def use(**sizes):
    """Change some sizes for the rest of this process."""
    sizing.DEFAULT = replace(sizing.DEFAULT, **sizes)
