"""CF conventions: packed integers, and numbers that mark missing data."""

import base64
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from daskclip.errors import DTypeError, SourceError, short_repr

SCALES = ("scale_factor", "add_offset")
SENTINELS = ("_FillValue", "missing_value")
_REMEDY = (
    "open it with xarray and mask_and_scale=True, its default, and clip that, or store that after "
    "drop_encoding()"
)


def require_decoded(dtype: object, attributes: Mapping[Any, Any], what: str) -> None:
    """Refuse packed integers, and data in which numbers mark missing values."""
    scales = [f"{name} {short_repr(attributes[name])}" for name in SCALES if name in attributes]
    if scales and getattr(dtype, "kind", "") in "iu":
        raise DTypeError(f"{what} is packed as {dtype} with {', '.join(scales)}; {_REMEDY}")
    for name in SENTINELS:
        for number in numbers(attributes.get(name)):
            # a zero adds nothing to a norm and stays zero; NaN has a policy of its own
            if number and not math.isnan(number) and getattr(dtype, "kind", "") in "fc":
                raise SourceError(
                    f"{what} has {name} {number:g}, which would count as data and be clipped; "
                    f"{_REMEDY}"
                )


def numbers(value: object) -> Iterator[float]:
    """Numbers in an attribute: one or several, or float64 in base64, as xarray stores them.

    Examples
    --------
    >>> list(numbers([-999, "AAAAAAAA+H8="]))
    [-999.0, nan]
    """
    # an attribute may be anything; what is no number marks nothing
    for item in np.asarray(value, object).ravel().tolist():
        try:
            yield float(item)
        except (TypeError, ValueError, OverflowError):
            try:
                yield struct.unpack("<d", base64.b64decode(item))[0]
            except (TypeError, ValueError, struct.error):
                continue
