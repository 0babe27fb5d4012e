"""Damage to files of an array: each function takes its folder and the key of the file."""

import os


class Payload:
    """Makes a folder when it is unpickled, as proof that code was run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def remove(array, key):
    (array / key).unlink()


def link(array, key):
    (array / key).rename(array.parent / "elsewhere")
    (array / key).symlink_to(array.parent / "elsewhere")


def dangle(array, key):
    (array / key).unlink()
    (array / key).symlink_to(array.parent / "nowhere")


def loop(array, key):
    (array / key).unlink()
    (array / key).symlink_to(array / key)


def folder(array, key):
    (array / key).unlink()
    (array / key).mkdir()


def pipe(array, key):
    (array / key).unlink()
    os.mkfifo(array / key)


def empty(array, key):
    (array / key).write_bytes(b"")
