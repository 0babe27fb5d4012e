"""Every script of examples/ runs, keeps its asserts and its size."""

import runpy
from pathlib import Path

import pytest

SCRIPTS = sorted(Path(__file__).parents[2].glob("examples/*.py"))
LONG = {"03_gradients"}  # makes 260 MiB


def test_examples_are_found():
    assert len(SCRIPTS) == 7


@pytest.mark.parametrize(
    "script",
    [pytest.param(s, marks=[pytest.mark.slow] * (s.stem in LONG)) for s in SCRIPTS],
    ids=lambda path: path.stem,
)
def test_example_runs(script, tmp_path):
    runpy.run_path(str(script))["main"](tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_example_is_short_and_ends_in_an_assert(script):
    text = script.read_text()
    assert len(text.splitlines()) <= 60
    body = text.split("\n\n\nif __name__")[0]
    assert body.splitlines()[-1].startswith("    assert ")
