"""One chunk by hand, from the source to the published target, without Dask.

It introduces the terms of the package in the order in which a chunk meets them. An array of two
rows and two chunks is clipped along its rows: each slice lies in both chunks, so two passes are
needed. `daskclip.engine` does the same with many blocks, `daskclip.lazy` with Dask chunks.
"""

import tempfile
from pathlib import Path

import zarr

from daskclip import clip_by_norm
from daskclip.grid import boxes
from daskclip.numerics import combine, finalize, partial_norm, rescale
from daskclip.storage import at_folder, regions
from daskclip.target import DirectoryTarget


def main(tmp):
    folder, clip_norm, axes = Path(tmp), 1.0, (1,)
    source = zarr.create_array(folder / "x.zarr", shape=(2, 8), chunks=(2, 4), dtype="float32")
    source[:] = [[3, 0, 0, 0, 0, 0, 0, 4], [0.3, 0, 0, 0, 0, 0, 0, 0.4]]

    # a block is a region of whole chunks, so that one task is the only writer of a stored object
    blocks = list(boxes(source.shape, source.chunks))
    assert blocks == [(slice(0, 2), slice(0, 4)), (slice(0, 2), slice(4, 8))]

    # first pass: the exact sum of squares of each row of each block; no block is kept
    values = (regions.read(source, block, "fill") for block in blocks)
    partials = [partial_norm(x, axes) for x in values]

    # the sums are exact, so any order of combining them gives the same bits
    total = combine(partials)
    assert (total.limbs == combine(partials[::-1]).limbs).all()

    # norm and factor of each row; a row within the limit has factor 1 and keeps its bits
    scale = finalize(total, clip_norm, source.dtype)
    assert (scale.norm[0], scale.factor[1]) == (5.0, 1.0)

    # second pass: read again, rescale, write to a staging folder beside the target
    with DirectoryTarget(folder / "y.zarr").locked() as transaction:
        hierarchy = at_folder(folder / "x.zarr")  # for a group, all of its arrays
        transaction.begin(hierarchy, "staged")
        target, staged = transaction.staging(hierarchy, "staged")
        for block in blocks:
            clipped = rescale(regions.read(source, block, "fill"), scale)
            regions.write(target.arrays[""], block, clipped)
        # one rename publishes the target: readers see all of it or nothing
        Path(staged).rename(folder / "y.zarr")

    result = zarr.open_array(folder / "y.zarr", mode="r")[:]
    assert result.tobytes() == clip_by_norm(source[:], clip_norm, axes).tobytes()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
