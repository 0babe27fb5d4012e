"""Clip norms of arrays larger than memory, exactly.

The map of the package, from the bottom up; imports go down only.

=============  ====================================================================
errors         every error, with its exit code
retries        which errors pass, what is tried again
blocks         grid arithmetic
files          local files: durable, exchanged, listed, digested
numerics       exact norms of NumPy blocks, factors and rescaling: a room with a C kernel
sketch         histograms of norms, their quantiles, the largest
tally          counts over slices
packing        values that are stored as others
parameters     the arguments of the operation
indexed        IndexedSlices
pages          figures as HTML, with pictures
plan           what a run will do, in integers
group_plan     the same for several arrays
progress       how far a run is
report         figures as text, JSON and HTML
norms          the Dask tree that combines sums
recipes        chunks that are made again instead of held
journal        what is done, a line for each window
guard          encoded chunks that must not be decoded
chunks         chunks as they are stored, to values and back
objects        objects under a Zarr store: fetched, listed, made once
storage        Zarr arrays: listed, digested; imports zarr, as do five more
regions        regions of them: read, written, copied
attempts       blocks tried again, or told by the chunk
hierarchy      an array or a group: opened, told from other states, made elsewhere
members        which arrays of a group are clipped
sources        what is opened for reading, and what is refused
preflight      what may not be at a target or around it
publish        a target in a folder: its lock and its renaming
leases         objects of a target, and a lock among them
prefixes       a target in an object store: metadata last
targets        where a target is, by what it was named
arrays         what may be given as an array or a list
limits         a limit for every slice: checked, read, told from others
lazy           the operation as Dask graphs
clip           the operation on an array: start reading here
clip_list      the operation on a list
workers        the processes that run blocks
resume         a run on disk: begun, resumed, recognised
saved          norms that are kept for other runs
jobs           what blocks have in common, and which are under way
tasks          what a worker does with one block
prepare        what is refused or planned before a chunk is read
graphs         blocks as one Dask graph
scales         what slices are multiplied by
passes         windows of blocks, and which of them are done
run            one attempt at a run
measure        passes that write nothing
engine         from storage to storage
stats          what the norms are, before anything is clipped
verify         what was written, against its record and its source
cli            the command line
xarray         the operation on labelled arrays
=============  ====================================================================
"""

from daskclip.clip import clip_by_norm, norm
from daskclip.clip_list import clip_by_global_norm, global_norm
from daskclip.engine import clip_zarr, plan_zarr
from daskclip.indexed import IndexedSlices
from daskclip.stats import stats_zarr
from daskclip.verify import verify_zarr

__version__ = "0.2.0"

__all__ = [
    "IndexedSlices",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_zarr",
    "global_norm",
    "norm",
    "plan_zarr",
    "stats_zarr",
    "verify_zarr",
]
