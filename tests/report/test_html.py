"""The HTML page: its contents, and that a browser shows it without an error."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import dask
import numpy as np
import pytest
from command_line import run
from stores import create

from daskclip import clip_zarr, plan_zarr, stats_zarr
from daskclip.report.html import _ticks

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VOID = {"meta", "link"}


class Document(HTMLParser):
    """Elements of a page; refuses unclosed elements and external resources."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        assert not any(k in ("src", "onload") or "http" in (v or "") for k, v in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def pictures(self):
        return [attrs["aria-label"] for tag, attrs in self.found if tag == "svg"]

    def count(self, name):
        return sum(attrs.get("class") == name for _, attrs in self.found)


def succeed(*args):
    result = run(*args)
    assert result.exit_code == 0, result.stderr


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((250, 4, 30)) * np.exp(rng.standard_normal((250, 4, 1)))
    return create(tmp_path / "x<&>", x.astype("f4"), (50, 4, 30))


def test_the_page_of_stats(source, tmp_path):
    succeed("stats", source, "--axes", 2, "--html", tmp_path / "page.html")
    page = Document((tmp_path / "page.html").read_text())
    assert page.pictures() == [
        "Slices by their norm",
        "Slices up to a norm",
        "Largest norm along axis 0",
        "Largest norm along axis 1",
    ]
    assert page.count("mark") == 0
    assert f"Norms of {source}" in page.texts
    assert "norm of a slice (logarithmic)" in page.texts


def test_the_page_of_a_run(source, tmp_path):
    succeed(
        "run", source, tmp_path / "y", "--axes", 2, "--clip-norm", 5, "--html", tmp_path / "a.html"
    )
    page = Document((tmp_path / "a.html").read_text())
    assert page.pictures() == [
        "Slices by their norm",
        "Slices up to a norm",
        "Clipped along axis 0",
        "Clipped along axis 1",
        "Throughput",
    ]
    assert page.count("mark") == 2  # the limit
    for text in (
        "clip_norm 5",
        "% of slices",
        "time of the passes, s",
        "MB/s",
        "planned",
    ):
        assert text in page.texts
    # already done: the same pictures, from the record
    succeed(
        "run", source, tmp_path / "y", "--axes", 2, "--clip-norm", 5, "--html", tmp_path / "b.html"
    )
    assert Document((tmp_path / "b.html").read_text()).pictures() == page.pictures()


def test_what_the_pictures_show(source, tmp_path):
    with dask.config.set(scheduler="sync"):
        report = clip_zarr(source, tmp_path / "y", 5.0, 2, pictures=True, memory="40MiB")
    shown = report.pictures
    assert [sum(along["clipped"]) for along in shown["along"]] == [report.clipped] * 2
    assert [a["part"] for a in shown["along"]] == [2, 1]
    assert sum(n for *_, n in shown["histogram"]) == report.slices
    assert shown["throughput"][-1][1] == report.bytes_read
    plain = clip_zarr(source, tmp_path / "z", 5.0, 2)
    assert (plain.pictures, plain.digest) == (None, report.digest)


def test_notebooks_show_the_same(source, tmp_path):
    plan = plan_zarr(source, tmp_path / "y", 5.0, 2)
    report = clip_zarr(source, tmp_path / "y", 5.0, 2)
    for figures in (plan, report, stats_zarr(source, 2)):
        shown = Document(figures._repr_html_())
        rows = {k: v for k, v in figures.rows().items() if not k.startswith("largest ")}
        assert all(value in shown.texts for value in rows.values())


def test_pages_with_little_or_nothing_to_draw(tmp_path):
    zeros = create(tmp_path / "x", np.zeros((3, 2), "f4"), (3, 2))
    assert Document(stats_zarr(zeros, 1)._repr_html_()).count("line") == 0
    empty = create(tmp_path / "e", np.zeros((0, 2), "f4"), (3, 2))
    assert Document(stats_zarr(empty, 1)._repr_html_()).pictures() == []
    one = create(tmp_path / "o", np.ones((1, 1), "f4"), (1, 1))
    report = clip_zarr(one, tmp_path / "y", float("inf"), pictures=True)
    assert "Slices by their norm" in Document(report._repr_html_()).pictures()
    huge = create(tmp_path / "h", np.full((1, 2), 1.7e308), (1, 2))
    Document(stats_zarr(huge, 1)._repr_html_())


def test_no_folder_for_the_page(source, tmp_path):
    at = tmp_path / "none" / "page.html"
    done = run("stats", source, "--html", at)
    assert done.exit_code == 3
    assert "does not exist; create it" in done.stderr


@pytest.mark.parametrize("low", [1e-300, 1e-7, 0.1, 1.0, 37.0, 1e12])
@pytest.mark.parametrize("ratio", [1.001, 1.5, 9.9, 10.0, 42.0, 1e3, 1e9, 1e200])
def test_a_few_round_numbers_on_an_axis(low, ratio):
    high = low * ratio
    for log in (True, False):
        found = _ticks(low, high, log)
        assert 1 <= len(found) <= 8
        assert all(low * 0.999 <= n <= high * 1.001 for n in found)
        assert len({f"{n:.5g}" for n in found}) == len(found)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to look at the page with")
@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1300])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("rows", [250, 200_000])
def test_a_browser_shows_the_page(tmp_path, width, scheme, rows):
    page, rng = tmp_path / "page.html", np.random.default_rng(0)
    x = rng.standard_normal((rows, 4, 3)) * np.exp(rng.standard_normal((rows, 4, 1)))
    source = create(tmp_path / "x", x.astype("f4"), (rows // 5, 4, 3))
    succeed("run", source, tmp_path / "y", "--axes", 2, "--clip-norm", "p90", "--html", page)
    # measured by the browser: labels that overlap another label, or lie outside their picture
    look = """<script>
    const boxes = [...document.querySelectorAll('svg')].map(s => [s, ...s.querySelectorAll('text')]
      .map(e => e.getBoundingClientRect()));
    let bad = document.documentElement.scrollWidth > innerWidth ? 1 : 0;
    for (const [all, ...texts] of boxes) texts.forEach((a, i) => {
      if (a.left < all.left || a.right > all.right) bad++;
      if (a.top < all.top || a.bottom > all.bottom) bad++;
      texts.slice(i + 1).forEach(b => {
        if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) bad++; });
    });
    const paper = getComputedStyle(document.querySelector('.daskclip')).backgroundColor;
    document.title += ` bad=${bad} paper=${paper} width=${innerWidth} pictures=${boxes.length}`;
    </script></body>"""
    page.write_text(page.read_text().replace("</body>", look))
    shot = tmp_path / "shot.png"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2400",
        "--enable-logging=stderr",
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
    ]  # fmt: skip
    options = {"capture_output": True, "text": True, "check": True, "timeout": 120}
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], **options)
    assert "CONSOLE" not in done.stderr
    title = re.search("<title>(.*?)</title>", done.stdout)[1]
    paper = "rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 25, 29)"
    seen = re.search(r"width=(\d+)", title)[1]
    assert title == f"daskclip bad=0 paper={paper} width={seen} pictures=5"
    assert abs(int(seen) - width) <= 100  # a window of Chromium has a least width
    subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], **options)
    assert shot.stat().st_size > 10_000
