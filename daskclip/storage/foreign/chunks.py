"""Chunks of a flat array: read by the calling thread, without an event loop or a copy."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest

from daskclip.storage.files import Bytes
from daskclip.storage.foreign.store import FlatStore
from daskclip.storage.object_store import ChunkObjects, join


class FlatChunks(ChunkObjects):
    """The chunks of an array in a `FlatStore`, by key."""

    def read(
        self, keys: Sequence[str], buffers: Sequence[Bytes | None] = ()
    ) -> Iterator[Bytes | None]:
        """Bytes of each chunk, in its buffer if there is one."""
        store = self.store
        assert isinstance(store, FlatStore)
        for key, buffer in zip_longest(keys, buffers):
            yield store.read(join(self.path, key), buffer)
