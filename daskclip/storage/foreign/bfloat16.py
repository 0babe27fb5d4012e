"""The data type bfloat16 of Zarr, which zarr knows only while we open an array."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any, ClassVar, Self, TypeGuard

import numpy as np
from zarr.dtype import Float16, data_type_registry

NAME = "bfloat16"
"""Registered name of format 3, and what tensorstore writes in format 2."""
KEY = "daskclip.bfloat16"  # no key of another package's data type

_lock = RLock()


@dataclass(frozen=True, kw_only=True)
class BFloat16(Float16):
    """The data type for zarr; NumPy's is that of ml_dtypes, which is imported when it is used."""

    _zarr_v3_name: ClassVar[Any] = NAME
    _zarr_v2_names: ClassVar[Any] = (NAME,)

    @classmethod
    def _check_native_dtype(cls, dtype: Any) -> TypeGuard[Any]:
        return bool(dtype.name == NAME)

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        # of the base: the error for other names, which zarr has in different modules
        return cls() if cls._check_json_v2(data) else super()._from_json_v2(data)

    def to_native_dtype(self) -> Any:
        """Dtype of NumPy."""
        from ml_dtypes import bfloat16

        return np.dtype(bfloat16).newbyteorder("<" if self.endianness == "little" else ">")

    def to_json(self, zarr_format: Any) -> Any:
        """Its name in metadata."""
        return {"name": NAME, "object_codec_id": None} if zarr_format == 2 else NAME

    def from_json_scalar(self, data: Any, *, zarr_format: Any) -> Any:
        """Fill value of metadata."""
        if isinstance(data, str) and data.startswith("0x"):
            # the bits, which tell one NaN from another
            return np.uint16(int(data, 16)).view(self.to_native_dtype().newbyteorder("="))
        return super().from_json_scalar(data, zarr_format=zarr_format)


@contextmanager
def knowing_bfloat16(*documents: Mapping[str, Any]) -> Iterator[None]:
    """Let zarr open arrays with these documents; its registry is the same after."""
    # alone, since zarr goes through its registry for any array
    with _lock:
        known = data_type_registry.contents
        # what the user has registered, or zarr itself, comes first, since it is asked first
        if any(NAME in (about.get("data_type"), about.get("dtype")) for about in documents):
            known[KEY] = BFloat16
        try:
            yield
        finally:
            known.pop(KEY, None)
