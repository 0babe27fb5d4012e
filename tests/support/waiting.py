"""Waiting for what other processes do."""

import time


def until(condition, seconds=120):
    """Wait for something; the time only guards against hanging."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.001)
