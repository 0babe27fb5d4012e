"""Numbers and axes as text."""

from __future__ import annotations

from collections.abc import Sequence

MIB = 2**20


def format_axes(axes: Sequence[int] | None, dim: Sequence[str] | None = None) -> str:
    """Axes or dimensions of a norm, as the options of the command line take them."""
    if dim:
        return f"dim {','.join(dim)}"
    return f"axes {'all' if axes is None else ','.join(map(str, axes)) or 'none'}"


def format_size(nbytes: int) -> str:
    """Bytes in MiB."""
    return f"{nbytes / MIB:,.1f} MiB"
