"""The READMEs: what is shown is run, in order; figures, tables, pictures and links are real."""

import re
import shlex
from xml.etree import ElementTree

import dask
import numpy as np
import pytest
import zarr
from benchmarks import exact_sum, first_screen, pictures
from benchmarks.tables import PAGES, ROOT
from click.testing import CliRunner

import daskclip
from daskclip.cli import EXIT_CODES, main

README, BENCHMARKS, PIPELINES = PAGES
TEXT = README.read_text()
# figures that depend on the machine or on versions of codecs; all others are compared
MASKED = {
    r"^(digest +)[0-9a-f]{16}$": r"\1#",
    r"^(time +)[\d.,]+ s$": r"\1#",
    r"^(peak memory +)[\d.,]+ MiB": r"\1#",
    r"^(read .* in )[\d.,]+ s$": r"\1#",
}
LINES, COLUMNS = 280, 120


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(language, text=TEXT):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def steps():
    """(language, what is shown) of the blocks that are run, in order."""
    return re.findall(r"^```(python|console)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def commands(block):
    """(command, output shown) of every line after a prompt."""
    return [p.split("\n", 1) for p in re.split(r"^\$ ", block, flags=re.MULTILINE) if p]


def masked(text):
    for pattern, mask in MASKED.items():
        text = re.sub(pattern, mask, text, flags=re.MULTILINE)
    return text.strip()


def is_shown(shown, output):
    """Whether ``output`` is what is shown, where a line of ``...`` stands for any lines."""
    lines = masked(shown).split("\n")
    pattern = "\n".join(".*" if line == "..." else re.escape(line) for line in lines)
    return re.fullmatch(pattern, masked(output), re.DOTALL) is not None


def test_what_is_shown_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # what the first screen calls x and grads.zarr
    names = {"x": np.float32([[3, 4], [0.3, 0.4]])}
    zarr.create_array("grads.zarr", data=names["x"])
    last = 0
    with dask.config.set(num_workers=2):
        for language, block in steps():
            if language == "python":
                exec(compile(block, README, "exec"), names)
                continue
            for command, shown in commands(block):
                if command == "echo $?":
                    assert shown.strip() == str(last)
                    continue
                program, *arguments = shlex.split(command)
                assert program == "daskclip"
                result = CliRunner().invoke(main, arguments, prog_name=program)
                last = result.exit_code
                output = (result.stdout or result.stderr).replace(str(tmp_path), "/data")
                if shown:
                    assert is_shown(shown, output), output
                else:
                    assert last == 0, output
    assert last == 0


@pytest.mark.parametrize(
    ("shown", "output", "same"),
    [
        ("clipped  7\ntime  1.25 s", "clipped  7\ntime  0.03 s", True),
        ("clipped  7\ntime  1.25 s", "clipped  8\ntime  1.25 s", False),
        ("peak memory  1.0 MiB of 9.0 MiB", "peak memory  2.0 MiB of 9.0 MiB", True),
        ("peak memory  1.0 MiB of 9.0 MiB", "peak memory  1.0 MiB of 9.1 MiB", False),
        ("memory   9.0 MiB of 64.0 MiB", "memory   9.1 MiB of 64.0 MiB", False),
        ("digest  0123456789abcdef", "digest  0a2b4c6d8e0f1a2b", True),
        ("digest  0123456789abcdef", "digest  none", False),
        ("...\np99  1\n...", "p50  0\np99  1\nread  5 MiB in 1 s", True),
        ("...\np99  1\n...", "p50  0\np99  2\nread  5 MiB in 1 s", False),
    ],
)
def test_figures_are_compared(shown, output, same):
    assert is_shown(shown, output) == same


def test_blocks_are_found():
    assert len(blocks("python")) >= 5
    assert sum(len(commands(block)) for block in blocks("console")) >= 8
    assert TEXT.count("```") == 2 * len(re.findall(r"^```(python|console|bash|text)$", TEXT, re.M))


def test_set_up_is_one_line_each():
    first, second = blocks("bash")[0].splitlines()
    assert first.endswith("examples/03_gradients.py")
    assert second.endswith("-m pytest -n 2")


@pytest.mark.parametrize("name", daskclip.__all__)
def test_public_name_is_shown(name):
    assert re.search(rf"\b{name}\b", TEXT)


@pytest.mark.parametrize("command", ["run", "plan"])
def test_options_are_those_of_the_command_line(command):
    options = {o for p in main.commands[command].params for o in p.opts if o.startswith("--")}
    (usage,) = (b for b in blocks("text") if b.startswith("daskclip run "))
    assert options == set(re.findall(r"--[a-z-]+", usage))
    rows = re.findall(r"^\| `--[^|]*\|", PIPELINES.read_text(), re.MULTILINE)
    assert options == {o for row in rows for o in re.findall(r"`(--[a-z-]+)", row)}


def test_exit_codes_are_those_of_the_command_line():
    listed = " ".join(EXIT_CODES.removeprefix("\b").split())
    assert listed.startswith("Exit codes: 0 ")
    assert listed in " ".join(TEXT.split())


def test_readme_is_short():
    assert len(TEXT.splitlines()) <= LINES


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_are_short(page):
    beside = r"^\|.*|\(https?://\S+\)"  # rows of tables and addresses may be long
    lines = page.read_text().splitlines()
    assert [s for s in lines if len(re.sub(beside, "", s)) > COLUMNS] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)]*)\)", page.read_text())
    assert links
    for link in links:
        name, _, section = link.partition("#")
        target = page.parent / name
        assert target.is_file(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
        assert section in ("", *slugs), link


def test_pictures_are_those_of_the_benchmark():
    shown = {ROOT / path for path in re.findall(r"!\[[^]]*\]\((.*?)\)", TEXT)}
    assert shown == {pictures.FOLDER / f"{name}.svg" for name in pictures.TITLES}


@pytest.mark.parametrize("name", pictures.TITLES)
def test_picture_is_small_and_complete(name):
    text = (pictures.FOLDER / f"{name}.svg").read_text()
    assert len(text) < 30_000
    assert ElementTree.fromstring(text).get("aria-label") == pictures.TITLES[name]
    assert "prefers-color-scheme: dark" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_are_of_benchmarks(page):
    text = page.read_text()
    names = re.findall(r"^<!-- begin: (.*) -->$", text, re.MULTILINE)
    assert names
    assert text.count("<!-- end -->") == len(names)
    for name in names:
        module = (BENCHMARKS.parent / f"{name}.py").read_text()
        assert f'write("{name}", ' in module
        assert f"tests.benchmarks.{name} --write" in BENCHMARKS.read_text()


def table(page, name):
    return page.read_text().split(f"<!-- begin: {name} -->\n")[1].split("\n\n")[0]


def test_table_is_the_one_the_benchmark_writes():
    nbytes = 2**16
    made = exact_sum.table(exact_sum.measure(nbytes, repeat=1), nbytes)
    # everything but the rates
    heads = [
        [line.split("|")[1:3] for line in t.splitlines()]
        for t in (made, table(BENCHMARKS, "exact_sum"))
    ]
    assert heads[0] == heads[1]


def test_first_screen_is_the_one_the_benchmark_writes():
    figures = dict.fromkeys((first_screen.USUAL, first_screen.OURS), 1.0)
    made = first_screen.table(
        nbytes=2**31,
        memory=figures,
        seconds=figures,
        above=0.5,
        changed=0.5,
        missing=0.5,
        resumed=1.0,
    )
    heads = [
        [line.split("|")[1] for line in t.splitlines()]
        for t in (made, table(README, "first_screen"))
    ]
    assert heads[0] == heads[1]
    assert made.splitlines()[0] == table(README, "first_screen").splitlines()[0]


def test_deployments_are_of_tests():
    rows = re.findall(r"\| `(\w+)` \|$", table(PIPELINES, "deployments"), re.MULTILINE)
    tests = "".join(
        (ROOT / f"tests/batteries/test_{f}.py").read_text() for f in ("deployments", "pipelines")
    )
    assert len(rows) >= 16
    for name in rows:
        assert f"def {name}(" in tests
