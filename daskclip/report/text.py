"""Figures as text and JSON, and sizes and axes as text."""

import json
import math
from collections.abc import Sequence
from dataclasses import Field, asdict
from typing import Any, ClassVar, Protocol

MIB = 2**20


class Figures(Protocol):
    """Dataclass that is shown as text and as JSON: a report or a plan."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def rows(self) -> dict[str, str]:
        """Figures as text, by their names."""


def as_text(figures: Figures) -> str:
    """Text of the figures, a line each."""
    rows = figures.rows()
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def as_document(figures: Figures) -> str:
    """One JSON document of the fields, and of the properties that ``derived`` names."""
    derived = {name: getattr(figures, name) for name in getattr(figures, "derived", ())}
    # without allow_nan=False, json would write Infinity, which other parsers refuse
    return json.dumps(_finite(asdict(figures) | derived), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    """``value`` with infinities and NaN as strings: JSON has no numbers for them."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def format_axes(axes: Sequence[int] | str | None, dim: Sequence[str] | None = None) -> str:
    """Axes or dimensions of a norm, as the options of the command line take them."""
    # names rather than numbers where both are known: a user gave the names
    if dim:
        return f"dim {','.join(dim)}"
    if axes is None or isinstance(axes, str):
        return f"axes {axes or 'all'}"
    return f"axes {','.join(map(str, axes)) or 'none'}"


def format_size(nbytes: int) -> str:
    """Bytes in MiB."""
    # one unit for all sizes, so that figures one below the other can be compared
    return f"{nbytes / MIB:,.1f} MiB"
