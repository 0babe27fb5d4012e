"""Arrays that records of a journal name."""

import sys
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


def test_an_interrupt_of_saving_is_not_hidden(tmp_path):
    files, arrays = ArrayFiles(tmp_path), {"a": np.arange(9), "b": np.array(2.5)}
    calls = stop = 0

    def interrupting(_, event, __):
        nonlocal calls
        calls += event == "call"  # where Python calls the handlers of signals
        if calls == stop:
            sys.setprofile(None)
            raise KeyboardInterrupt

    saved = False
    while not saved:
        calls, stop = 0, stop + 1
        sys.setprofile(interrupting)
        try:
            files.save("some", arrays)
            saved = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
    assert stop > 50
    assert {name: a.tolist() for name, a in files.load("some").items()} == {
        "a": [*range(9)],
        "b": 2.5,
    }


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_arrays_that_are_damaged_are_not_loaded(tmp_path, damage):
    files = ArrayFiles(tmp_path)
    files.save("some", {"a": np.arange(9), "b": np.array(2.5)})
    whole = (tmp_path / "some").read_bytes()
    for at in range(len(whole)):
        changed = {
            "flip": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
            "cut": whole[:at],
            "empty": b"",
        }[damage]
        (tmp_path / "some").write_bytes(changed)
        with pytest.raises(ValueError, match="some is damaged"):
            files.load("some")
