"""Arrays that records of a journal name."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from daskclip.target import ArrayFiles


def test_arrays_that_two_workers_save_at_once_are_whole(tmp_path):
    """A task that is late runs on another worker too, and both save the same arrays."""
    files, arrays = ArrayFiles(tmp_path), {"a": np.arange(20_000)}

    def save_and_load(number):
        files.save("sums", arrays)
        return files.load("sums")["a"]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(save_and_load, range(40)):
            assert (found == arrays["a"]).all()
    assert [path.name for path in tmp_path.iterdir()] == ["sums"]
    files.forget("sums")
    with pytest.raises(FileNotFoundError):
        files.load("sums")
