"""Figures as HTML: tables and inline SVG, which need nothing from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import accumulate, pairwise
from typing import Any

MIB = 2**20
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 240, 66, 28, 22, 44  # of a picture
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


def fragment(
    title: str, rows: dict[str, str], pictures: dict[str, Any] | None, limit: float | None = None
) -> str:
    """Figures and pictures, to be put into a page or a notebook.

    Parameters
    ----------
    title : str
        What it is about.
    rows : dict of str
        The figures for people, by their names.
    pictures : dict, optional
        Any of ``histogram``, ``worst`` and ``along``, of `sketch.figures`; ``throughput``, seconds
        and bytes done; ``plan``, names with what was foreseen and what it was.
    limit : float, optional
        Drawn where it is in the range of the norms.

    Returns
    -------
    str
    """
    shown, slices = pictures or {}, (pictures or {}).get("slices", 0)
    parts = [_figure("Figures", _table([], rows.items()))]
    if shown.get("histogram"):
        parts += _spread(shown["histogram"], shown["zeros"], limit)
    for along in shown.get("along", ()) if slices else ():
        parts.append(_along(along, slices))
    if len(shown.get("throughput", ())) > 1:
        parts.append(_throughput(shown["throughput"]))
    if shown.get("worst"):
        worst = ((f"{w['norm']:.6g}", ", ".join(map(str, w["index"]))) for w in shown["worst"])
        parts.append(_figure("Largest norms", _table(["norm", "index in the kept axes"], worst)))
    if shown.get("plan"):
        table = _table(["", "planned", "actual"], shown["plan"])
        parts.append(_figure("Plan against actual", table))
    head = f"<style>{STYLE}</style>\n<h1>{escape(title)}</h1>"
    return f'<div class="daskclip">{head}<div class="all">{"".join(parts)}</div></div>'


def page(title: str, body: str) -> str:
    """A document of its own."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        '</title><meta name="viewport" content="width=device-width">'
        '<meta name="color-scheme" content="light dark">'
        "<style>body { margin: 0; } .daskclip { min-height: 98vh; }</style>"
        f"</head><body>\n{body}\n</body></html>\n"
    )


def _spread(bars: Sequence[Any], zeros: int, limit: float | None) -> Iterable[str]:
    span = bars[0][0], bars[-1][1]
    most, total = max(n for *_, n in bars), zeros + sum(n for *_, n in bars)
    boxes = [("bar", [(low, n), (high, n)]) for low, high, n in bars if n]
    label = "norm of a slice (logarithmic)"
    yield _chart("Slices by their norm", label, "slices", span, most, boxes, True, limit)
    ends = [(span[0], zeros), *((high, n) for _, high, n in bars)]
    sums = accumulate(100 * n / total for _, n in ends)
    line = [("line", [(x, min(y, 100.0)) for (x, _), y in zip(ends, sums, strict=True)])]
    yield _chart("Slices up to a norm", label, "% of finite slices", span, 100, line, True, limit)


def _along(along: dict[str, Any], slices: int) -> str:
    length, part, axis = along["length"], along["part"], along["axis"]
    what, unit, values = "Largest norm", "norm", along["largest"]
    places = [(i, min(i + part, length)) for i in range(0, length, part)]
    if "clipped" in along:
        what, unit, each = "Clipped", "% of slices", slices / length
        pairs = zip(places, along["clipped"], strict=True)
        values = [100 * n / ((end - start) * each) for (start, end), n in pairs]
    boxes = [("bar", [(i, v), (j, v)]) for (i, j), v in zip(places, values, strict=True)]
    title, across = f"{what} along axis {axis}", f"index, axis {axis}"
    return _chart(title, across, unit, (0, length), max(values) or 1.0, boxes)


def _throughput(states: Sequence[Any]) -> str:
    points = []
    for (before, was), (now, done) in pairwise(states):
        rate = (done - was) / max(now - before, 1e-9) / 1e6
        points += [(before, rate), (now, rate)]
    span, most = (states[0][0], states[-1][0]), max(y for _, y in points) or 1.0
    return _chart("Throughput", "time of the passes, s", "MB/s", span, most, [("line", points)])


def _chart(
    title: str, across: str, up: str, span: tuple[float, float], most: float,
    shapes: list[tuple[str, list[tuple[float, float]]]], log: bool = False,
    limit: float | None = None,
) -> str:  # fmt: skip
    """A picture with axes; its shapes are bars, by their upper corners, and lines."""
    if not math.isfinite(most) or not span[0] < span[1]:
        return ""
    scale = math.log if log else float
    low, high = scale(span[0]), scale(span[1])

    def at(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (scale(x) - low) / (high - low) * (WIDTH - LEFT - RIGHT)
        return round(right, 2), round(HEIGHT - BOTTOM - y / most * (HEIGHT - TOP - BOTTOM), 2)

    (left, bottom), (right, top) = at(span[0], 0), at(span[1], most)
    drawn = []
    for y in _ticks(0, most):
        _, h = at(span[0], y)
        drawn.append(f'<path class="grid" d="M{left} {h}H{right}"/>')
        drawn.append(f'<text x="{left - 6}" y="{h + 4}" text-anchor="end">{y:g}</text>')
    for x in _ticks(*span, log):
        w, _ = at(x, 0)
        drawn.append(f'<path class="grid" d="M{w} {bottom}v5"/>')
        drawn.append(f'<text x="{w}" y="{bottom + 18}" text-anchor="middle">{x:g}</text>')
    for kind, points in shapes:
        places = [at(*p) for p in points]
        if kind == "bar":
            (x, h), (end, _) = places
            box = f'x="{x}" y="{h}" width="{max(end - x, 0.5):.2f}" height="{bottom - h:.2f}"'
            drawn.append(f'<rect class="bar" {box}/>')
        else:
            drawn.append(
                f'<polyline class="line" points="{" ".join(f"{x},{y}" for x, y in places)}"/>'
            )
    if limit is not None and span[0] <= limit <= span[1]:
        x, _ = at(limit, 0)
        anchor = "end" if x > (left + right) / 2 else "start"
        drawn.append(f'<path class="mark" d="M{x} {bottom}V{top}"/>')
        drawn.append(
            f'<text x="{x}" y="{top - 8}" text-anchor="{anchor}">clip_norm {limit:.4g}</text>'
        )
    middle, half = (left + right) / 2, (top + bottom) / 2
    drawn.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{across}</text>')
    turned = f'transform="rotate(-90 13 {half})" text-anchor="middle"'
    drawn.append(f'<text x="13" y="{half}" {turned}>{up}</text>')
    view = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}"'
    return _figure(title, f"<svg {view}>{''.join(drawn)}</svg>")


def _ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Some five round numbers from ``low`` to ``high``."""
    if log and high / low >= 10:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        step = math.ceil((last - first) / 6)
        digits = (1, 2, 5) if last - first <= 2 else (1,)
        numbers = [float(f"{d}e{k}") for k in range(first, last + 1, step) for d in digits]
        return [n for n in numbers if low <= n <= high]
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


def format_axes(axes: Sequence[int] | None, dim: Sequence[str] | None = None) -> str:
    """What norms are taken over, as the command line takes it."""
    if dim:
        return f"dim {','.join(dim)}"
    return f"axes {'all' if axes is None else ','.join(map(str, axes)) or 'none'}"


def format_size(size: int) -> str:
    """Bytes for people."""
    return f"{size / MIB:,.1f} MiB"
