"""What zarr does not know by itself: bfloat16."""
