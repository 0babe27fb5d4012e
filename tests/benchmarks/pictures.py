"""Pictures of README: SVG files with colours of their own for light and dark mode."""

import re
from dataclasses import asdict
from pathlib import Path

from daskclip.report.html import STYLE, fragment

FOLDER = Path(__file__).parent
WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 66, 24, 34, 44  # margins of the axes
TITLES = {"memory": "Memory over time", "histogram": "Slices by their norm"}
COLOURS = ("mark", "bar")  # of STYLE, by series
EXTRA = ".daskclip { padding: 0; } polyline { fill: none; stroke-width: 2; }"


def save(name, drawing, width=WIDTH, height=HEIGHT):
    """Write a picture of its own with the drawing, an svg element or its inside."""
    (FOLDER / f"{name}.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" class="daskclip" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{TITLES[name]}">\n'
        f"<style>{STYLE}{EXTRA}</style>\n"
        f'<rect width="100%" height="100%" rx="6" fill="var(--paper)"/>\n<svg>{drawing}</svg>\n'
        "</svg>\n"
    )


def histogram(stats, limit):
    """The histogram of norms of `stats_zarr`, as its page draws it, with a limit."""
    page = fragment("", {}, asdict(stats), limit)
    drawing, size = re.search(r'<svg viewBox="0 0 (\d+ \d+)".*?>(.*?)</svg>', page).group(2, 1)
    save("histogram", drawing, *map(int, size.split()))


def curves(name, across, up, series):
    """Write curves from 0 on, a list of (x, y) for each of two names."""
    most = [max(p[i] for points in series.values() for p in points) for i in (0, 1)]

    def at(x, y):
        right = LEFT + x / most[0] * (WIDTH - LEFT - RIGHT)
        return round(right, 1), round(HEIGHT - BOTTOM - y / most[1] * (HEIGHT - TOP - BOTTOM), 1)

    drawn = []
    for y in ticks(most[1]):
        left, height = at(0, y)
        drawn.append(f'<path class="grid" d="M{left} {height}H{WIDTH - RIGHT}"/>')
        drawn.append(text(left - 6, height + 4, f"{y:,g}", "end"))
    drawn += [text(at(x, 0)[0], HEIGHT - BOTTOM + 18, f"{x:g}") for x in ticks(most[0])]
    for i, ((label, points), colour) in enumerate(zip(series.items(), COLOURS, strict=True)):
        line = " ".join(f"{x},{y}" for x, y in (at(*p) for p in points))
        drawn.append(f'<polyline style="stroke: var(--{colour})" points="{line}"/>')
        drawn.append(text(LEFT + 300 * i, 20, label, "start", f'style="fill: var(--{colour})"'))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    drawn.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, across))
    drawn.append(text(13, middle, up, "middle", f'transform="rotate(-90 13 {middle})"'))
    save(name, "\n".join(drawn))


def ticks(most):
    """Up to six round numbers from 0 to ``most``."""
    step = next(d * 10.0**k for k in range(-3, 12) for d in (1, 2, 5) if d * 10.0**k * 5 >= most)
    return [i * step for i in range(int(most / step) + 1)]


def text(x, y, words, anchor="middle", more=""):
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" {more}>{words}</text>'
