"""One chunk by hand, from the source to the published target, without Dask.

You learn the names of the package in the order in which a chunk meets them. An array of two rows
and two chunks is clipped along its rows: each slice lies in both chunks, so that two passes are
needed. `daskclip.engine` does the same with many blocks, `daskclip.lazy` with Dask chunks.
"""

import tempfile
from pathlib import Path

import zarr

from daskclip import clip_by_norm
from daskclip.grid import boxes
from daskclip.numerics import combine, finalize, partial_norm, rescale
from daskclip.storage import open_source
from daskclip.target import DirectoryTarget


def main(tmp):
    folder, clip_norm, axes = Path(tmp), 1.0, (1,)
    x = zarr.create_array(folder / "x.zarr", shape=(2, 8), chunks=(2, 4), dtype="float32")
    x[:] = [[3, 0, 0, 0, 0, 0, 0, 4], [0.3, 0, 0, 0, 0, 0, 0, 0.4]]
    whole = open_source(x)  # of a group, all its arrays
    source = whole.arrays[""]

    # regions of the source: whole chunks, so that one task is the only writer of a stored object
    regions = list(boxes(source.shape, source.unit))
    assert regions == [(slice(0, 2), slice(0, 4)), (slice(0, 2), slice(4, 8))]

    # first pass: the exact sum of squares of each row of each chunk; the chunk is let go
    chunks = (source.read(region) for region in regions)
    partials = [partial_norm(chunk, axes) for chunk in chunks]

    # the tree: any order and grouping gives the same bits, since the sums are exact
    total = combine(partials)
    assert (total.limbs == combine(partials[::-1]).limbs).all()

    # norm and factor of each row; a row within the limit has the factor 1 and keeps its bits
    scale = finalize(total, clip_norm, source.dtype)
    assert (scale.norm[0], scale.factor[1]) == (5.0, 1.0)

    # second pass: read again, rescale, write beside the target, then let it appear in one step
    with DirectoryTarget(folder / "y.zarr").locked() as work:
        work.begin(whole, "staged")
        target, staged = work.stage(whole, "staged")
        for region in regions:
            target.arrays[""].write(region, rescale(source.read(region), scale))
        Path(staged).rename(folder / "y.zarr")

    clipped = zarr.open_array(folder / "y.zarr", mode="r")[:]
    assert clipped.tobytes() == clip_by_norm(x[:], clip_norm, axes).tobytes()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
