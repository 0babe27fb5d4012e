"""Waiting for other processes."""

import time


def until(condition, seconds=120):
    """Wait for a condition; the limit only guards against hanging."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.001)
