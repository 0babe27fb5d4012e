"""The tree of partial norms."""

import dask
import dask.array as da
import pytest

from daskclip import norm


@pytest.mark.parametrize("shape", [(64,), (64, 1), (1, 64, 1)])
def test_axes_of_one_block_leave_split_every_to_the_others(shape):
    """Dask shares it out among all axes that it reduces."""
    with dask.config.set(split_every=4):
        x = norm(da.ones(shape, chunks=1))
    sizes = [len(x.dask.layers[n]) for n in x.dask.layers if n.startswith("_combine_blocks")]
    assert sizes == [16, 4, 1]
