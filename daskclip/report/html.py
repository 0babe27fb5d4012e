"""Figures as HTML: tables and charts in inline SVG, which need nothing from elsewhere."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise
from typing import NotRequired, Protocol, TypedDict

WIDTH, HEIGHT = 460, 240  # of a chart
LEFT, RIGHT, TOP, BOTTOM = 66, WIDTH - 28, 22, HEIGHT - 44  # edges of the area inside the axes
# every rule is below .daskclip: a notebook puts the fragment into a page with styles of its own
STYLE = """
.daskclip { --ink: #1b1f24; --paper: #fff; --bar: #2f6fb3; --mark: #b5391a; --grid: #0002;
  color: var(--ink); background: var(--paper); font: 14px/1.45 sans-serif; padding: 8px 16px; }
@media (prefers-color-scheme: dark) { .daskclip {
  --ink: #e6e8ea; --paper: #16191d; --bar: #6ea8e6; --mark: #ff9a6b; --grid: #fff3; } }
.daskclip h1 { font-size: 20px; overflow-wrap: anywhere; }
.daskclip h2 { font-size: 15px; margin: 0 0 4px; }
.daskclip .all { columns: 380px; column-gap: 32px; }
.daskclip figure { margin: 0 0 12px; max-width: 560px; break-inside: avoid; }
.daskclip svg text { font: 12px sans-serif; fill: var(--ink); }
.daskclip .bar { fill: var(--bar); } .daskclip .grid { stroke: var(--grid); }
.daskclip .line { fill: none; stroke: var(--bar); stroke-width: 2; }
.daskclip .mark { stroke: var(--mark); stroke-width: 2; }
.daskclip td, .daskclip th { padding: 1px 12px 1px 0; text-align: left; vertical-align: top;
  font-weight: normal; overflow-wrap: anywhere; color: inherit; background: none; }
.daskclip th { white-space: nowrap; opacity: 0.75; }
"""

NORM = "norm of a slice (logarithmic)"
Bar = tuple[float, float, float]
"""Lower edge, upper edge and height."""


class PerAxis(TypedDict):
    """Figures along a kept axis, in parts of so many indices."""

    axis: int
    length: int
    part: int
    largest: Sequence[float]
    clipped: NotRequired[Sequence[int]]


class LargestSlice(TypedDict):
    """Norm of a slice and its index in the kept axes."""

    norm: float
    index: Sequence[int | str]


class Pictures(TypedDict, total=False):
    """Numbers of the charts and tables of a page, named as in the JSON of a report."""

    histogram: Sequence[Bar]
    zeros: int
    slices: int
    along: Sequence[PerAxis]
    worst: Sequence[LargestSlice]
    throughput: Sequence[tuple[float, int]]
    """Seconds and bytes done after each record."""
    plan: Sequence[tuple[str, str, str]]
    """Name, planned value and actual value of a figure."""


class Drawn(Protocol):
    """Report or plan with an HTML form, as notebooks show it."""

    def _repr_html_(self) -> str: ...


def fragment(
    title: str, rows: dict[str, str], pictures: Pictures | None = None, limit: float | None = None
) -> str:
    """HTML of figures and charts, for a page or a notebook.

    Parameters
    ----------
    title : str
        Heading.
    rows : dict of str to str
        Figures as text, by their names.
    pictures : Pictures, optional
        Numbers of the charts; a chart without numbers is left out.
    limit : float, optional
        The clip_norm, marked on the axis of the norms.

    Returns
    -------
    str
    """
    body = "".join(_figures(rows, pictures or {}, limit))
    head = f"<style>{STYLE}</style>\n<h1>{escape(title)}</h1>"
    return f'<div class="daskclip">{head}<div class="all">{body}</div></div>'


def _figures(rows: dict[str, str], pictures: Pictures, limit: float | None) -> Iterator[str]:
    yield _figure("Figures", _table([], rows.items()))
    slices = pictures.get("slices", 0)
    if bars := pictures.get("histogram"):
        yield _histogram(bars, limit)
        yield _cumulative(bars, pictures["zeros"], limit)
    for axis in pictures.get("along", ()) if slices else ():
        yield _per_axis(axis, slices)
    if len(states := pictures.get("throughput", ())) > 1:
        yield _throughput(states)
    if largest := pictures.get("worst"):
        cells = ((f"{one['norm']:.6g}", ", ".join(map(str, one["index"]))) for one in largest)
        yield _figure("Largest norms", _table(["norm", "index in the kept axes"], cells))
    if plan := pictures.get("plan"):
        yield _figure("Plan against actual", _table(["", "planned", "actual"], plan))


def as_page(figures: Drawn) -> str:
    """HTML document of the figures and charts."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>daskclip'
        '</title><meta name="viewport" content="width=device-width">'
        '<meta name="color-scheme" content="light dark">'
        "<style>body { margin: 0; } .daskclip { min-height: 98vh; }</style>"
        f"</head><body>\n{figures._repr_html_()}\n</body></html>\n"
    )


def _histogram(bars: Sequence[Bar], limit: float | None) -> str:
    """Chart of how many slices have which norm."""
    title, x_range = "Slices by their norm", (bars[0][0], bars[-1][1])
    most = max(n for *_, n in bars)
    # an empty bar would be an element without a height; norms far apart leave many
    bars = [bar for bar in bars if bar[2]]
    return _Chart(title, NORM, "slices", x_range, most, bars, is_log=True, limit=limit).figure()


def _cumulative(bars: Sequence[Bar], zeros: int, limit: float | None) -> str:
    """Chart of the share of slices up to each norm."""
    total = zeros + sum(n for *_, n in bars)
    edges = [bars[0][0], *(high for _, high, _ in bars)]
    shares = accumulate(100 * n / total for n in (zeros, *(n for *_, n in bars)))
    # a sum of rounded shares may exceed 100
    line = [(x, min(share, 100.0)) for x, share in zip(edges, shares, strict=True)]
    title, unit, x_range = "Slices up to a norm", "% of finite slices", (edges[0], edges[-1])
    return _Chart(title, NORM, unit, x_range, 100, line=line, is_log=True, limit=limit).figure()


def _per_axis(figures: PerAxis, slices: int) -> str:
    """Chart of the clipped slices along an axis, or of the largest norms if there is no limit."""
    length, part, axis = figures["length"], figures["part"], figures["axis"]
    edges = [(i, min(i + part, length)) for i in range(0, length, part)]
    if "clipped" in figures:
        title, unit, each = "Clipped", "% of slices", slices / length
        counts = zip(edges, figures["clipped"], strict=True)
        heights = [100 * n / ((end - start) * each) for (start, end), n in counts]
    else:
        title, unit, heights = "Largest norm", "norm", list(figures["largest"])
    bars = [(*edge, height) for edge, height in zip(edges, heights, strict=True)]
    title, label, most = f"{title} along axis {axis}", f"index, axis {axis}", max(heights) or 1.0
    return _Chart(title, label, unit, (0, length), most, bars).figure()


def _throughput(states: Sequence[tuple[float, int]]) -> str:
    """Chart of the bytes a second between records."""
    points = []
    for (before, start), (now, end) in pairwise(states):
        # two records may lie within the resolution of the clock
        rate = (end - start) / max(now - before, 1e-9) / 1e6
        points += [(before, rate), (now, rate)]
    x_range, most = (states[0][0], states[-1][0]), max(y for _, y in points) or 1.0
    label = "time of the passes, s"
    return _Chart("Throughput", label, "MB/s", x_range, most, line=points).figure()


@dataclass(frozen=True, slots=True)
class _Chart:
    """Bars or a line, with axes."""

    title: str
    x_label: str
    y_label: str
    x_range: tuple[float, float]
    y_max: float
    bars: Sequence[Bar] = ()
    line: Sequence[tuple[float, float]] = ()
    is_log: bool = False
    """Whether the x axis is logarithmic."""
    limit: float | None = None
    """Marked by a line if it is in the range of the x axis."""

    def figure(self) -> str:
        """The chart as an HTML figure; empty where there is no range to draw."""
        if not math.isfinite(self.y_max) or not self.x_range[0] < self.x_range[1]:
            return ""
        # later ones are drawn over earlier ones
        drawn = "".join((*self._axes(), *self._values(), *self._mark(), *self._labels()))
        view = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{self.title}"'
        return _figure(self.title, f"<svg {view}>{drawn}</svg>")

    def _x(self, value: float) -> float:
        scale = math.log if self.is_log else float
        low, high = map(scale, self.x_range)
        return round(LEFT + (scale(value) - low) / (high - low) * (RIGHT - LEFT), 2)

    def _y(self, value: float) -> float:
        return round(BOTTOM - value / self.y_max * (BOTTOM - TOP), 2)

    def _axes(self) -> Iterator[str]:
        for value in _ticks(0, self.y_max):
            y = self._y(value)
            yield f'<path class="grid" d="M{LEFT} {y}H{RIGHT}"/>'
            yield f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>'
        for value in _ticks(*self.x_range, self.is_log):
            x = self._x(value)
            yield f'<path class="grid" d="M{x} {BOTTOM}v5"/>'
            yield f'<text x="{x}" y="{BOTTOM + 18}" text-anchor="middle">{value:g}</text>'

    def _values(self) -> Iterator[str]:
        for low, high, value in self.bars:
            x, y = self._x(low), self._y(value)
            width = max(self._x(high) - x, 0.5)  # a bar is seen however narrow it is
            size = f'width="{width:.2f}" height="{BOTTOM - y:.2f}"'
            yield f'<rect class="bar" x="{x}" y="{y}" {size}/>'
        if self.line:
            points = " ".join(f"{self._x(x)},{self._y(y)}" for x, y in self.line)
            yield f'<polyline class="line" points="{points}"/>'

    def _mark(self) -> Iterator[str]:
        if self.limit is None or not self.x_range[0] <= self.limit <= self.x_range[1]:
            return
        x = self._x(self.limit)
        anchor = "end" if x > (LEFT + RIGHT) / 2 else "start"  # the text stays inside
        text = f"clip_norm {self.limit:.4g}"
        yield f'<path class="mark" d="M{x} {BOTTOM}V{TOP}"/>'
        yield f'<text x="{x}" y="{TOP - 8}" text-anchor="{anchor}">{text}</text>'

    def _labels(self) -> Iterator[str]:
        x, y = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
        yield f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="middle">{self.x_label}</text>'
        turned = f'transform="rotate(-90 13 {y})" text-anchor="middle"'
        yield f'<text x="13" y="{y}" {turned}>{self.y_label}</text>'


def _ticks(low: float, high: float, log: bool = False) -> list[float]:
    """About five round numbers from ``low`` to ``high``."""
    if log and high / low >= 10:  # powers of ten, and 2 and 5 between few of them
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        step = math.ceil((last - first) / 6)
        digits = (1, 2, 5) if last - first <= 2 else (1,)
        numbers = [float(f"{d}e{k}") for k in range(first, last + 1, step) for d in digits]
        return [n for n in numbers if low <= n <= high]
    # the next round number at or above a quarter of the range; 0.999 forgives its rounding
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(d * power for d in (1, 2, 2.5, 5, 10) if d * power >= rough * 0.999)
    return [k * gap for k in range(math.ceil(low / gap), math.floor(high / gap) + 1)]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(v)}</td>' for v in values)}</tr>"
        for name, *values in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>" if heads else f"<table>{body}</table>"


def _figure(title: str, body: str) -> str:
    return f"<figure><h2>{escape(title)}</h2>{body}</figure>"
