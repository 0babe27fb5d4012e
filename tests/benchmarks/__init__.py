"""Measurements; each module is run by hand with `python -m`."""
