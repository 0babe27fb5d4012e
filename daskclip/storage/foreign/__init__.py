"""Arrays that zarr does not know by itself: in flat files, in memory, and of bfloat16.

    headers ──> store ──> chunks
       └─> arrays ─┘

A flat array becomes a read-only Zarr array, of which a range of the elements is a chunk. Nothing
is copied: the bytes of a chunk are read from the file when they are asked for.
"""
